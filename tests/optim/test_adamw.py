"""AdamW with masked decay against a few-line computation of each published update."""

import pytest
import torch
from torch import nn

from sparse_pretrain.optim import adamw
from sparse_pretrain.optim.adamw import AdamW, MaskedDecay, SecondMoment, parameter_groups

LR, BETAS, EPS, WEIGHT_DECAY, FACTOR = 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.3


@pytest.fixture(autouse=True, params=["torch", "kernel"])
def who_steps(request, monkeypatch):
    """torch's own AdamW with the decay beside it, or the kernel that a GPU gets, here in Triton's interpreter."""
    if request.param == "kernel":
        pytest.importorskip("triton")
        monkeypatch.setattr(adamw, "use_kernels", lambda tensor: True)


def published_update(w, m, v, t, grad, mask, place):
    """One step in fp64, as the papers write it (AdamW: Loshchilov & Hutter 2019)."""
    decay = FACTOR * (~mask).double() * w
    g = grad + decay if place == "gradient" else grad
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    u = m + decay if place == "momentum" else m
    squared = u if place == "momentum" else g
    v = BETAS[1] * v + (1 - BETAS[1]) * squared**2
    new = w - LR * WEIGHT_DECAY * w - LR * (u / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return new - LR * decay * (1 - LR * WEIGHT_DECAY) if place == "weight" else new, m, v


@pytest.mark.parametrize("place", ["none", "gradient", "momentum", "weight"])
def test_update_is_the_published_one(place):
    weight = nn.Parameter(torch.randn(8, 16))
    mask = torch.rand(8, 16) < 0.5
    other = nn.Parameter(torch.randn(5, 3))
    decay = MaskedDecay(place=place, factor=FACTOR, masks={weight: mask})
    optimizer = AdamW(
        [{"params": [weight, other], "weight_decay": WEIGHT_DECAY}], lr=LR, betas=BETAS, eps=EPS, decay=decay
    )
    expected = {
        p: (p.detach().double(), torch.zeros(p.shape).double(), torch.zeros(p.shape).double()) for p in (weight, other)
    }
    masks = {weight: (mask, place), other: (torch.ones(5, 3, dtype=torch.bool), "none")}  # other: plain AdamW
    for t in range(1, 6):
        for p in (weight, other):
            p.grad = torch.randn(p.shape)
            expected[p] = published_update(*expected[p], t, p.grad.double(), *masks[p])
        optimizer.step()
        for p in (weight, other):
            torch.testing.assert_close(p.detach().double(), expected[p][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), expected[p][1], rtol=1e-5, atol=1e-6)


def test_decay_pulls_pruned_weights_only():
    weight = nn.Parameter(torch.ones(4, 4))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, :2] = True
    decay = MaskedDecay(place="gradient", factor=0.1, masks={weight: mask})
    optimizer = AdamW([{"params": [weight], "weight_decay": 0.0}], lr=LR, betas=BETAS, eps=EPS, decay=decay)
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(weight[:, :2], torch.ones(4, 2))
    assert (weight[:, 2:] < 1).all()


@pytest.mark.parametrize("place", ["none", "gradient", "momentum", "weight"])
def test_a_dropped_step_changes_nothing(place):
    weight = nn.Parameter(torch.randn(4, 8))
    mask = torch.rand(4, 8) < 0.5
    decay = MaskedDecay(place=place, factor=FACTOR, masks={weight: mask})
    optimizer = AdamW([{"params": [weight], "weight_decay": WEIGHT_DECAY}], lr=LR, betas=BETAS, eps=EPS, decay=decay)
    weight.grad = torch.randn(4, 8)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = weight.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    weight.grad = torch.full((4, 8), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before)
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in state.items())
    weight.grad = torch.randn(4, 8)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(weight, before)


def test_groups_decay_matrices_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 2))
    decayed, rest = parameter_groups(model, 0.1, lr=LR)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (5, 2)]
    assert all(p.dim() == 1 for p in rest["params"])
    assert len(rest["params"]) == 3
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decayed["peak_lr"] == rest["peak_lr"] == LR


def test_parameters_of_their_own_rate_are_a_group_without_decay():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False))
    first, second = model[0].weight, model[1].weight
    groups = parameter_groups(model, 0.1, lr=LR, own_lr={second: 5e-4})
    assert [group["params"] for group in groups] == [[first], [second]]
    assert [group["peak_lr"] for group in groups] == [LR, 5e-4]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def frozen_by_hand(w, m, v_hat, t, grad, mask, place):
    """One step of STEP's second phase in fp64 (Lu et al. 2023, Algorithm 1), with weight decay."""
    decay = FACTOR * (~mask).double() * w
    g = grad + decay if place == "gradient" else grad
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    u = m + decay if place == "momentum" else m
    new = w - LR * WEIGHT_DECAY * w - LR * (u / (1 - BETAS[0] ** t)) / (v_hat.sqrt() + EPS)
    return new - LR * decay * (1 - LR * WEIGHT_DECAY) if place == "weight" else new, m


def make(params, second=None, decay=None):
    groups = [{"params": params, "weight_decay": WEIGHT_DECAY}]
    return AdamW(groups, lr=LR, betas=BETAS, eps=EPS, decay=decay, second_moment=second)


@pytest.mark.parametrize("place", ["none", "gradient", "momentum", "weight"])
def test_the_preconditioner_is_frozen_as_it_was(place):
    """Three steps of AdamW, then v̂ of the third for good, whatever the later gradients; nothing jumps."""
    weight, second = nn.Parameter(torch.randn(8, 16)), SecondMoment()
    mask = torch.rand(8, 16) < 0.5
    optimizer = make([weight], second, MaskedDecay(place=place, factor=FACTOR, masks={weight: mask}))
    for _ in range(3):
        weight.grad = torch.randn(8, 16)
        optimizer.step()
    state = optimizer.state[weight]
    v_hat = state["exp_avg_sq"].double() / (1 - BETAS[1] ** 3)
    w, m = weight.detach().double(), state["exp_avg"].double()
    second.frozen = True
    for t in (4, 5, 6):
        grad = 100 * torch.randn(8, 16)
        w, m = frozen_by_hand(w, m, v_hat, t, grad.double(), mask, place)
        weight.grad = grad
        optimizer.step()
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["exp_avg"].double(), m, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["exp_avg_sq"].double(), v_hat, rtol=1e-6, atol=0)


def test_freezing_survives_a_checkpoint():
    """Loaded into an optimizer that is told of the freeze only afterwards, and continued bit for bit."""

    def train(optimizer, weight, steps):
        for t in steps:
            optimizer.second_moment.frozen = t >= 3
            weight.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    start = torch.randn(4, 8)
    whole = nn.Parameter(start.clone())
    train(make([whole], SecondMoment()), whole, range(8))
    first = nn.Parameter(start.clone())
    optimizer = make([first], SecondMoment())
    train(optimizer, first, range(5))
    second = nn.Parameter(first.detach().clone())
    resumed = make([second], SecondMoment())
    resumed.load_state_dict(optimizer.state_dict())
    train(resumed, second, range(5, 8))
    assert torch.equal(second, whole)


def test_a_parameter_that_comes_after_the_switch_has_its_own_second_moment():
    old, new = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
    second, alone = SecondMoment(), nn.Parameter(new.detach().clone())
    optimizer, other = make([old, new], second), make([alone])
    for t in range(6):
        second.frozen = t >= 2
        old.grad = torch.randn(4, 8)
        if t >= 3:
            new.grad = torch.randn(4, 8)
            alone.grad = new.grad.clone()
            other.step()
        optimizer.step()
        new.grad = None
    assert torch.equal(new, alone)


@pytest.mark.parametrize("place", ["none", "gradient", "momentum"])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_the_change_of_the_second_moment_is_that_of_the_step(mean, place):
    """Z_t (Lu et al. 2023, eq. for the switch) from copies of v, over all watched entries, whatever their tensors."""
    weights = [nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(3, 4))]
    other = nn.Parameter(torch.randn(5))
    masks = {weights[0]: torch.rand(4, 8) < 0.5}
    second = SecondMoment(watched=weights, mean=mean)
    optimizer = make([*weights, other], second, MaskedDecay(place=place, factor=FACTOR, masks=masks))
    before = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    for _ in range(4):
        for p in (*weights, other):
            p.grad = torch.randn(p.shape)
        optimizer.step()
        after = [optimizer.state[w]["exp_avg_sq"].double() for w in weights]
        changes = torch.cat([(a - b).abs().flatten() for a, b in zip(after, before, strict=True)])
        expected = changes.mean() if mean == "arithmetic" else changes.log().mean().exp()
        assert second.change.dtype == torch.float32
        torch.testing.assert_close(second.change.double(), expected, rtol=1e-3 if mean == "geometric" else 1e-5, atol=0)
        before = [a.clone() for a in after]


def test_a_dropped_step_leaves_the_change_and_the_frozen_moment():
    weight = nn.Parameter(torch.randn(4, 8))
    second = SecondMoment(watched=[weight])
    optimizer = make([weight], second)
    optimizer.found_inf = torch.ones(())
    weight.grad = torch.full((4, 8), torch.nan)
    optimizer.step()
    assert second.change == torch.inf  # no step before it
    for dropped in (0.0, 1.0):
        optimizer.found_inf = torch.tensor(dropped)
        weight.grad = torch.full((4, 8), torch.nan if dropped else 0.5)
        optimizer.step()
        assert 0 < second.change < torch.inf
    second.frozen = True
    for dropped in (1.0, 0.0, 1.0):
        before = [weight.detach().clone(), *(x.clone() for x in optimizer.state[weight].values() if torch.is_tensor(x))]
        optimizer.found_inf = torch.tensor(dropped)
        weight.grad = torch.full((4, 8), torch.nan if dropped else 0.5)
        optimizer.step()
        assert torch.isfinite(weight).all()
        assert torch.equal(before[0], weight) == bool(dropped)
    assert optimizer.state[weight]["step"] == 2
