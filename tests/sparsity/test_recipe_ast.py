"""AST (Huang et al., AAAI 2025), Wanda's metric and SLoRB: each update against its published equation, in fp64, through every phase."""

import pytest
import torch

from sparse_pretrain.config_recipe import AdapterConfig
from sparse_pretrain.sparsity import load_recipe
from tests.sparsity.by_hand import IN, LR, OUT, STEPS, Adam, build, data, keep, near, train_step


def ast(**schedule):
    recipe = load_recipe("ast")
    assert (recipe.decay.place, recipe.decay.factor, recipe.schedule.refresh_every) == ("momentum", 1e-4, 10)
    assert (recipe.projection, recipe.teacher.models, recipe.teacher.weight) == ("magnitude", ["self"], 0.67)
    recipe.decay.factor, recipe.decay.ramp = 0.8, 0.5  # large enough to be seen in 40 steps
    recipe.schedule.dense_warmup = 0.25
    for name, value in schedule.items():
        setattr(recipe.schedule, name, value)
    return recipe


def test_ast_is_the_published_one():
    """m ← β₁m + (1−β₁)g;  u = m + λ_t(1−M)⊙W;  v ← β₂v + (1−β₂)u²;  W ← W − lr·û/(√v̂ + ε): masks every 10 steps from
    the first sparse one, step 10, and λ_t = λ·min(t/15, 1) with t counted from there. Before it, plain Adam."""
    model, training, optimizer = build(ast())
    layer, adam = model["ffn"], Adam()
    weight = layer.weight.detach().double()
    mask, flipped = keep(weight), 0
    for t in range(STEPS):
        if t in (10, 20, 30):
            flipped += 0 if t == 10 else int((keep(weight) != mask).sum())
            mask = keep(weight)
        factor = 0.0 if t < 10 else 0.8 * min((t - 10) / 15, 1)
        assert training.decay.factor == pytest.approx(factor)
        x, y, _ = data(t)
        used = weight if t < 10 else weight * mask
        outside = None if t < 10 else factor * ~mask * weight
        expected = x.double() @ used.T
        out, dx = train_step(model, training, optimizer, t, x, y)
        near(out, expected, atol=1e-4)
        near(dx, (expected - y.double()) @ used, atol=1e-3)
        weight = adam.step(weight, (expected - y.double()).T @ x.double(), outside)
        near(layer.weight, weight)
    assert flipped > 0


def test_asts_decay_shrinks_pruned_weights_and_leaves_kept_ones():
    """Without a gradient nothing else moves; the public code's ~mask of integers has the opposite sign."""
    recipe = ast(dense_warmup=0.0)
    recipe.decay.ramp = 0.0
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    before, mask = layer.weight.detach().clone(), layer.mask.clone()
    for t in range(3):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        training.prepare(t + 1)
    after = layer.weight.detach()
    assert torch.equal(after[mask], before[mask])
    big = ~mask & (before.abs() > 4 * LR)  # Adam's steps are as large as the learning rate, whatever λ is
    smaller = after[big].abs() < before[big].abs()
    assert big.any()
    assert smaller.all()
    moments = optimizer.state[layer.weight]
    assert not moments["exp_avg"].any()  # outside the first moment
    assert (moments["exp_avg_sq"][~mask] > 0).all()  # and seen by the second


def test_wandas_metric_is_the_published_one():
    """|w|·‖x_j‖₂ over the training inputs since the last refresh: of all micro-batches, none of evaluation."""
    recipe = ast(dense_warmup=3 / STEPS, refresh_every=3)
    recipe.projection = "metric"
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    assert torch.equal(layer.mask, keep(layer.weight))  # no input yet
    squares, differs = torch.zeros(IN, dtype=torch.float64), 0
    for t in range(12):
        if t and t % 3 == 0:
            scores = layer.weight.detach().double() * squares.sqrt()
            assert torch.equal(layer.mask, keep(scores)), t
            differs += int((layer.mask != keep(layer.weight)).sum())
            squares = torch.zeros(IN, dtype=torch.float64)
        x, y, _ = data(t)
        x = x * torch.rand(IN, generator=torch.Generator().manual_seed(t)) ** 3
        for part in (slice(0, 8), slice(8, 12)):
            (layer(x[part].view(2, -1, IN)) - y[part].view(2, -1, OUT)).square().sum().backward()
        squares += x.double().square().sum(0)
        model.eval()
        layer(1e3 * torch.randn(4, IN))  # with gradients, but not in training
        model.train()
        with torch.no_grad():
            layer(1e3 * torch.randn(4, IN))
        before = layer.mask.clone()
        optimizer.step()
        optimizer.zero_grad()
        training.prepare(t + 1)
        if (t + 1) % 3:
            assert torch.equal(layer.mask, before)
    assert differs > 0


def test_wandas_first_masks_are_of_the_last_dense_steps():
    """Of inputs since the last multiple of refresh_every, not of the whole dense warm-up: of step 3 alone."""
    recipe = ast(dense_warmup=4 / STEPS, refresh_every=3)
    recipe.projection = "metric"
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    for t in range(4):
        x, y, _ = data(t)
        x = x.flip(1) if t < 3 else x  # whose largest inputs are then other ones
        train_step(model, training, optimizer, t, x, y)
    assert torch.equal(layer.mask, keep(layer.weight.detach().double() * x.double().square().sum(0).sqrt()))


@pytest.mark.parametrize("init", ["mean", "sum"])
def test_slorb_is_the_published_one(init):
    """From the first sparse step on Y = X Ŵᵀ + (X Pᵀ)Sᵀ, P one-hot sums of k inputs and S the mean (or sum) of the
    pruned weights at that step; both trained by Adam."""
    k, first = 4, 4
    recipe = ast(dense_warmup=first / STEPS)
    recipe.adapter = AdapterConfig(kind="slorb", group=k, init=init)
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    weight = layer.weight.detach().double()
    adam = {name: Adam() for name in ("weight", "s", "p")}
    p = torch.eye(IN // k, dtype=torch.float64).repeat_interleave(k, dim=1)
    s = torch.zeros(OUT, IN // k, dtype=torch.float64)
    for t in range(20):
        sparse = t >= first
        if t in (first, first + 10):
            mask = keep(weight)
        if t == first:
            s = (weight * ~mask) @ p.T / (k if init == "mean" else 1)
            near(layer.adapter.s, s)
        x, y, _ = data(t)
        used = weight * mask if sparse else weight
        expected = x.double() @ used.T + (x.double() @ p.T @ s.T if sparse else 0)
        out, dx = train_step(model, training, optimizer, t, x, y)
        near(out, expected, atol=1e-4)
        dy = expected - y.double()
        near(dx, dy @ (used + s @ p if sparse else used), atol=1e-3)
        decay = 0.8 * min((t - first) / 18, 1) * ~mask * weight if t >= first else None
        weight = adam["weight"].step(weight, dy.T @ x.double(), decay)
        if sparse:
            s, p = (
                adam["s"].step(s, dy.T @ (x.double() @ p.T)),
                adam["p"].step(p, s.T @ dy.T @ x.double()),
            )
            near(layer.adapter.s, s)
            near(layer.adapter.p, p)
        near(layer.weight, weight)
