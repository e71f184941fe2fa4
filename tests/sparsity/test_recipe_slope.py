"""SLoPe (Mozaffari et al., ICLR 2025), and static masks: each update against its published equation, in fp64, through every phase."""

import torch
from torch import nn

from sparse_pretrain.config_recipe import RecipeConfig, ScheduleConfig
from sparse_pretrain.sparsity import SparseTraining, load_recipe, sparsify
from tests.sparsity.by_hand import OUT, STEPS, Adam, build, data, double_pruned, keep, near, train_step


def test_slope_is_the_published_one():
    """A static mask; dX = dY·(Ŵᵀ pruned again, every 100 steps); dW only for kept weights; X L R / rank in the last
    hundredth."""
    recipe = load_recipe("slope")
    assert recipe.schedule.refresh_every == 100
    assert (recipe.adapter.kind, recipe.adapter.start, recipe.adapter.alpha) == ("lora", 0.99, 1.0)
    steps, recipe.schedule.refresh_every, recipe.adapter.rank = 210, 20, 3
    start = 207  # of 210
    model, training, optimizer = build(recipe, steps=steps)
    layer = model["ffn"]
    weight = layer.weight.detach().double()
    mask = keep(weight)
    drawn, initial = layer.adapter.a.detach().double(), layer.weight.detach()[~mask].clone()
    left, right = drawn, torch.zeros(OUT, 3, dtype=torch.float64)  # L is a transposed, R is b transposed
    adam = {name: Adam() for name in ("weight", "left", "right")}
    again, reselected = double_pruned(weight, mask), 0
    for t in range(steps):
        if t % 20 == 0:
            new = double_pruned(weight, mask)
            reselected += not torch.equal(new, again)
            again = new
        assert layer.adapter.active == (t >= start)
        assert torch.equal(layer.mask, mask)
        assert torch.equal(layer.input_mask & layer.mask, again)
        assert (layer.input_mask.T.reshape(-1, 4).sum(-1) == 2).all()
        x, y, _ = data(t)
        low_rank = t >= start
        expected = x.double() @ (weight * mask).T + (x.double() @ left.T @ right.T / 3 if low_rank else 0)
        dy = expected - y.double()
        out, dx = train_step(model, training, optimizer, t, x, y)
        near(out, expected, atol=1e-3)
        near(dx, dy @ (weight * again) + (dy @ right @ left / 3 if low_rank else 0), atol=1e-2)
        weight = adam["weight"].step(weight, (dy.T @ x.double()) * mask)
        if low_rank:
            left, right = (
                adam["left"].step(left, right.T @ dy.T @ x.double() / 3),
                adam["right"].step(right, dy.T @ (x.double() @ left.T) / 3),
            )
        weight[~mask] = layer.weight.detach().double()[~mask]
        near(layer.weight, weight, rtol=1e-3, atol=1e-4)
        near(layer.adapter.a, left)
        near(layer.adapter.b, right)
    assert reselected > 0
    assert (again.sum() < mask.sum()).item()  # something was lost
    assert right.any()
    assert torch.equal(layer.weight.detach()[~mask], initial)
    moments = optimizer.state[layer.weight]
    assert not moments["exp_avg"][~mask].any()
    assert not moments["exp_avg_sq"][~mask].any()


def test_random_static_masks_follow_the_seed_and_nothing_else():
    def mask(seed=1, scale=1.0):
        recipe = RecipeConfig("test", "static_random", schedule=ScheduleConfig(dense_warmup=0.1))
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b")})
        sparsify(model, recipe, include=["*"])
        training = SparseTraining(model, recipe, STEPS, seed)
        for t in range(8):
            with torch.no_grad():
                model["a"].weight.mul_(scale)
            training.prepare(t)
        assert (model["a"].mask.view(-1, 4).sum(-1) == 2).all()
        assert not torch.equal(model["a"].mask, model["b"].mask)
        return model["a"].mask

    assert torch.equal(mask(), mask(scale=0.5))
    assert not torch.equal(mask(), mask(seed=2))
    shares = mask().view(-1, 4).float().mean(0)
    assert (shares - 0.5).abs().max() < 0.06  # of 1024 groups: the standard error is 0.016
