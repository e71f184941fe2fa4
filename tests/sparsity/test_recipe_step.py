"""STEP (Lu et al., ICML 2023): each update against its published equation, in fp64, through every phase."""

import copy
import math

import pytest
import torch

from sparse_pretrain.sparsity import load_recipe
from sparse_pretrain.sparsity.schedule import DENSE_WARMUP, SPARSE, SwitchMonitor
from tests.sparsity.by_hand import BETA2, STEPS, Adam, build, data, keep, near, train_step


def step_by_hand(weight, eps, mean, earliest, latest, scales):
    """Weights after each step, and the first sparse step, of the published algorithm."""
    window = math.floor(1 / (1 - BETA2))
    adam, changes, switch, weights = Adam(eps=eps), [], None, []
    for t in range(STEPS):
        settled = t >= earliest and len(changes) >= window and sum(changes[-window:]) / window < eps
        if switch is None and (settled or t == latest):
            switch, adam.frozen = t, adam.v / (1 - BETA2**t)
        x, y, _ = data(t)
        used = weight if switch is None else weight * keep(weight)
        gradient = scales[t] * (x.double() @ used.T - y.double()).T @ x.double()
        before = adam.v
        weight = adam.step(weight, gradient)
        change = (adam.v - before).abs()
        changes.append(float(change.mean() if mean == "arithmetic" else change.log().mean().exp()))
        weights.append(weight)
    return weights, switch


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize(("eps", "when"), [(3e-7, "between"), (1e-9, "at the latest"), (1e-2, "at the earliest")])
def test_step_is_the_published_one(mean, eps, when):
    """Dense Adam; the switch when the mean of Z over floor(1/(1−β₂)) = 4 steps is below ε; then straight-through masks,
    the v̂ of the switch kept and m going on."""
    recipe = load_recipe("step")
    recipe.schedule.switch_mean = mean
    earliest, latest = 6, 20
    recipe.schedule.dense_warmup, recipe.schedule.dense_warmup_max = earliest / STEPS, latest / STEPS
    scales = [1e-3 * 0.5 ** min(t, 20) for t in range(STEPS)]  # gradients fall, and so does the change of v
    model, training, optimizer = build(recipe, eps=eps)
    layer = model["ffn"]
    weights, switch = step_by_hand(layer.weight.detach().double(), eps, mean, earliest, latest, scales)
    assert {"between": earliest < switch < latest, "at the latest": switch == latest}.get(when, switch == earliest)
    for t in range(STEPS):
        assert training.phase(t) == (DENSE_WARMUP if t < switch else SPARSE), t
        assert layer.is_sparse == (t >= switch)
        held = copy.deepcopy(optimizer.state[layer.weight].get("exp_avg_sq"))
        out, _ = train_step(model, training, optimizer, t, *data(t, scales[t]))
        near(layer.weight, weights[t])
        if t > switch:
            assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], held)
            before = weights[t - 1]
            near(out, data(t)[0].double() @ (before * keep(before)).T)


def test_the_window_is_the_published_one():
    assert [SwitchMonitor(0, beta, 1e-8).window for beta in (0.0, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999)] == [
        1, 4, 10, 20, 50, 100, 1000,
    ]  # fmt: skip


def test_a_dropped_step_changes_as_much_as_the_one_before_it_resumed_or_not():
    recipe = load_recipe("step")
    recipe.schedule.dense_warmup_max = 1.0

    def run(stop):
        model, training, optimizer = build(recipe, eps=1e-30)
        for t in range(6):
            if t == stop:
                states = [copy.deepcopy(part.state_dict()) for part in (model, training, optimizer)]
                model, training, optimizer = build(recipe, eps=1e-30)
                for part, state in zip((model, training, optimizer), states, strict=True):
                    part.load_state_dict(state)
                training.prepare(t, refresh=False)
            optimizer.found_inf = torch.tensor(float(t == 4))
            train_step(model, training, optimizer, t, *data(t))
        return training.switch.changes

    whole = run(stop=None)
    assert whole[0] == whole[3]  # steps 4 and 3
    assert whole[1] != whole[0]
    for stop in (3, 4, 5):
        assert torch.equal(run(stop), whole)
