"""AdamW with masked decay against a few-line computation of each published update."""

import pytest
import torch
from torch import nn

from sparse_pretrain.optim import adamw
from sparse_pretrain.optim.adamw import AdamW, MaskedDecay, parameter_groups

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
    decayed, rest = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (5, 2)]
    assert all(p.dim() == 1 for p in rest["params"])
    assert len(rest["params"]) == 3
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
