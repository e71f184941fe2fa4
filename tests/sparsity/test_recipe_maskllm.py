"""MaskLLM (Fang et al., NeurIPS 2024): each update against its published equation, in fp64, through every phase."""

import math

import pytest
import torch

from sparse_pretrain.sparsity import load_recipe
from tests.sparsity.by_hand import IN, LR, OUT, STEPS, Adam, build, data, keep, near, train_step

PATTERNS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.float64
)


def maskllm(**changes):
    recipe = load_recipe("maskllm")
    learned = recipe.learned
    assert (learned.temperature, learned.scale, learned.prior_strength) == ([4.0, 0.05], [100.0, 500.0], 3.0)
    assert (learned.logit_std, learned.norm_weight, recipe.train_weights) == (0.01, 1e-5, False)
    recipe.schedule.dense_warmup = 0.25
    learned.norm_weight, learned.logit_lr = 0.05, 2e-3  # large enough to be seen in 40 steps
    learned.temperature = [4.0, 0.5]  # at 0.05 fp32 and fp64 part ways
    for name, value in changes.items():
        setattr(recipe, name, value)
    return recipe


def test_mask_logits_start_from_the_prior():
    """N(0, 0.01), then logit += (overlap − 1)·std(logit)·3 with the overlap of a pattern and the magnitude mask."""
    recipe = maskllm()
    model, _, _ = build(recipe, inputs=512, out=256)
    layer = model["ffn"]
    logits = layer.learned.logits.detach().double()
    overlap = keep(layer.weight).view(256, 128, 4).double() @ PATTERNS.T
    assert set(overlap.unique().tolist()) == {0.0, 1.0, 2.0}
    # what is left without the prior is N(0, 0.01), whatever the overlap: 196608 numbers
    drawn = logits - (overlap - 1) * 0.01 * 3
    for selected in (overlap == 0, overlap == 1, overlap == 2):
        assert float(drawn[selected].mean()) == pytest.approx(0, abs=5e-4)
        assert float(drawn[selected].std()) == pytest.approx(0.01, rel=0.02)
    std = float(drawn.std())
    exact = logits - (overlap - 1) * std * 3
    assert float(exact.std()) == pytest.approx(std, rel=1e-3)


@pytest.mark.parametrize("train_weights", [False, True])
def test_maskllm_is_the_published_one(train_weights):
    """Ŵ = W⊙M̃, M̃ = Σ softmax((κ·logit + Gumbel)/τ)·pattern, κ and τ annealed linearly; loss − λ(1−t/T)·Σ‖M̃⊙W‖²; the
    logits by Adam, the weights frozen from the first sparse step on, or with the gradient dŴ⊙M̃."""
    recipe = maskllm(train_weights=train_weights)
    model, training, optimizer = build(recipe, weight_decay=0.0 if train_weights else 0.1)
    layer = model["ffn"]
    first, last = 10, STEPS - 1
    adam, logit_adam = Adam(), Adam(lr=2e-3)
    weight = layer.weight.detach().double()
    noises = []
    for t in range(STEPS):
        x, y, _ = data(t, 0.01)
        x64, y64 = x.double(), y.double()
        if t < first:
            dy = 0.01 * (x64 @ weight.T - y64)
            train_step(model, training, optimizer, t, x, y, 0.01)
            if not train_weights:
                weight = weight * (1 - LR * 0.1)
            weight = adam.step(weight, dy.T @ x64)
            near(layer.weight, weight)
            continue
        if t == first:
            logits, frozen = layer.learned.logits.detach().double(), layer.weight.detach().clone()
        progress = (t - first) / (last - first)
        kappa, tau = 100 + 400 * progress, 4 - 3.5 * progress
        noises.append(layer.learned.noise.clone())
        share = ((kappa * logits + noises[-1].double()) / tau).softmax(-1)
        soft = (share @ PATTERNS).view(OUT, IN)
        strength = 0.05 * (1 - progress)
        expected = x64 @ (weight * soft).T
        dy = 0.01 * (expected - y64)
        out, dx = train_step(model, training, optimizer, t, x, y, 0.01)
        near(out, expected, atol=1e-3)
        near(dx, dy @ (weight * soft), atol=1e-4)
        of_mask = (dy.T @ x64) * weight - strength * 2 * soft * weight**2
        of_share = of_mask.view(OUT, IN // 4, 4) @ PATTERNS.T
        of_logits = kappa / tau * share * (of_share - (share * of_share).sum(-1, keepdim=True))
        logits = logit_adam.step(logits, of_logits)
        near(layer.learned.logits, logits, rtol=1e-3, atol=2e-4)
        logits = layer.learned.logits.detach().double()  # κ makes much of little: compare step by step
        if train_weights:
            weight = adam.step(weight, (dy.T @ x64) * soft)
            near(layer.weight, weight, rtol=1e-3, atol=1e-3)
            weight = layer.weight.detach().double()
        else:
            assert torch.equal(layer.weight.detach(), frozen)
        # what is evaluated, and deployed at the end, is the likeliest pattern
        hard = PATTERNS[layer.learned.logits.argmax(-1)].view(OUT, IN).bool()
        assert torch.equal(layer.mask, hard)
        model.eval()
        near(layer(x), x64 @ (layer.weight.detach().double() * hard).T, atol=1e-4)
        model.train()
    assert len({float(noise.sum()) for noise in noises}) == len(noises)


def test_mask_noise_is_gumbel_and_follows_seed_and_step():
    model, training, _ = build(maskllm(), inputs=512, out=256)
    training.prepare(12)
    noise = model["ffn"].learned.noise.double()
    again, other, _ = build(maskllm(), inputs=512, out=256)
    other.prepare(12)
    assert torch.equal(again["ffn"].learned.noise.double(), noise)
    other.prepare(13)
    assert not torch.equal(again["ffn"].learned.noise.double(), noise)
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.015)  # 196608 numbers: the standard error is 0.003
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert noise.isfinite().all()


def test_mask_logits_have_their_own_learning_rate_and_no_weight_decay():
    model, _, optimizer = build(maskllm(), weight_decay=0.1)
    logits = model["ffn"].learned.logits
    (group,) = [group for group in optimizer.param_groups if any(p is logits for p in group["params"])]
    assert len(group["params"]) == 1
    assert (group["peak_lr"], group["lr"], group["weight_decay"]) == (2e-3, 2e-3, 0.0)


def test_logits_rest_in_a_dense_warmup():
    model, training, optimizer = build(maskllm())
    before = model["ffn"].learned.logits.detach().clone()
    for t in range(9):
        train_step(model, training, optimizer, t, *data(t))
        assert torch.equal(model["ffn"].learned.logits.detach(), before)
    train_step(model, training, optimizer, 9, *data(9))
    # the prior is that of the weights as they are now
    likeliest = keep(model["ffn"].weight)
    agree = (model["ffn"].mask == likeliest).view(-1, 4).all(-1).double().mean()
    assert agree > 0.95
