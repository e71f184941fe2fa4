"""Which optimizer gets which parameter, and what a loaded state brings."""

import pytest
import torch
from torch import nn

from sparse_pretrain.config import OptimizerConfig
from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.optim.adamw import AdamW, MaskedDecay, SecondMoment
from sparse_pretrain.optim.build import build_optimizers
from sparse_pretrain.optim.muon import Muon
from sparse_pretrain.sparsity import load_recipe, sparsify


def gpt(**changes) -> GPT:
    return GPT(GPTConfig(name="tiny", n_layer=1, n_head=2, d_model=16, max_seq_len=8, bias=True, **changes), 64)


def names(model, optimizer):
    known = {p: name for name, p in model.named_parameters()}
    return {known[p] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_muon_gets_the_weights_of_hidden_layers(tied, swapped):
    model = gpt(tied_embeddings=tied, activation="swiglu")
    if swapped:
        sparsify(model, load_recipe("fst"))
    muon, adamw = build_optimizers(model, OptimizerConfig(name="muon", weight_decay=0.2, momentum=0.8))
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    layers = ("attn.qkv", "attn.out", "ffn.up", "ffn.gate", "ffn.down")
    assert names(model, muon) == {f"blocks.0.{layer}.weight" for layer in layers}
    assert names(model, adamw) == {name for name, _ in model.named_parameters()} - names(model, muon)
    (group,) = muon.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.2, 0.8)
    assert (group["nesterov"], group["adjust_lr_fn"]) == (True, "match_rms_adamw")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_options_and_parts_reach_the_optimizers(name):
    model, decay, second = gpt(), MaskedDecay(), SecondMoment()
    norm = model.norm.weight
    cfg = OptimizerConfig(name=name, lr=2e-3, betas=[0.8, 0.9], eps=1e-6)
    optimizers = build_optimizers(model, cfg, decay, second, own_lr={norm: 5e-4})
    assert all(optimizer.decay is decay for optimizer in optimizers)
    adamw = optimizers[-1]
    assert adamw.second_moment is second
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6) for group in adamw.param_groups)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            own = any(p is norm for p in group["params"])
            assert group["peak_lr"] == (5e-4 if own else 2e-3)
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loaded_state_brings_moments_but_no_options(name):
    """A run that goes on from another's checkpoint has its own learning rate and weight decay."""

    def built(**changes):
        model = gpt()
        return model, build_optimizers(model, OptimizerConfig(name=name, **changes))

    model, saved = built(lr=1e-3, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in saved:
        optimizer.step()
    _, loaded = built(lr=3e-3, weight_decay=0.3)
    for optimizer, other in zip(saved, loaded, strict=True):
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["peak_lr"] == 3e-3
        assert other.param_groups[0]["weight_decay"] == 0.3
        first, again = optimizer.param_groups[0]["params"][0], other.param_groups[0]["params"][0]
        for key, value in optimizer.state[first].items():
            assert torch.equal(value, other.state[again][key])


def test_a_model_without_a_head():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6))
    muon, adamw = build_optimizers(model, OptimizerConfig(name="muon"))
    assert names(model, muon) == {"1.weight"}
    assert names(model, adamw) == {"0.weight", "1.bias", "2.weight", "2.bias"}
