"""Every recipe on a GPU: the same training as on a CPU, by the kernels. Needs a GPU."""

import pytest
import torch
from torch import nn

from sparse_pretrain.config import OptimizerConfig
from sparse_pretrain.optim.build import build_optimizers
from sparse_pretrain.paths import config_dir
from sparse_pretrain.sparsity import SparseTraining, load_recipe, sparsify

STEPS, TOKENS, IN, OUT = 24, 64, 64, 128
RECIPES = sorted(path.stem for path in (config_dir() / "recipe").glob("*.yaml"))


def trained(name, device):
    """Losses of every step, and the last masks."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": nn.ModuleDict({"up": nn.Linear(IN, OUT), "down": nn.Linear(OUT, IN)})})
    recipe = load_recipe(name)
    recipe.schedule.refresh_every = min(recipe.schedule.refresh_every, 4)
    recipe.decay.factor = 0.01 if recipe.decay.factor else 0.0
    recipe.learned.logit_lr = 0.05
    sparsify(model, recipe)
    model.to(device)
    training = SparseTraining(model, recipe, STEPS, seed=1)
    cfg = OptimizerConfig(lr=3e-3)
    optimizers = build_optimizers(model, cfg, training.decay, training.second_moment, training.own_lr)
    x, y = torch.randn(TOKENS, IN), torch.randn(TOKENS, IN)
    losses = []
    training.prepare(0)
    for step in range(STEPS):
        out = model["ffn"]["down"](torch.relu(model["ffn"]["up"](x.to(device))))
        loss = (out - y.to(device)).square().mean()
        loss.backward()
        training.adjust_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        training.prepare(step + 1)
        losses.append(float(loss))
    return losses, {layer: module.mask.cpu() for layer, module in training.layers.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RECIPES)
def test_training_on_a_gpu_is_that_of_a_cpu(name):
    expected, masks = trained(name, "cpu")
    losses, found = trained(name, "cuda")
    assert losses[-1] < losses[0]
    if name == "maskllm":  # whose noise is drawn by the device
        return
    assert losses == pytest.approx(expected, rel=1e-2)
    for layer, mask in masks.items():
        assert (found[layer] == mask).float().mean() > 0.98  # a tie within rounding may fall either way


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_learn_here_too(name):
    losses, _ = trained(name, "cpu")
    assert losses[-1] < losses[0]
