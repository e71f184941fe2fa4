"""Muon with masked decay, against a computation of its update by singular values, and in a resumed run."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from sparse_pretrain import runs, sharding, train
from sparse_pretrain.checkpoint import store
from sparse_pretrain.optim.adamw import MaskedDecay
from sparse_pretrain.optim.muon import Muon
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.task import Sizes
from tests.ranks import run_ranks

LR, MOMENTUM, WEIGHT_DECAY, FACTOR = 1e-2, 0.9, 0.1, 0.3


def make(weight, decay=None):
    return Muon([weight], lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, decay=decay)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_the_update_is_nearly_orthogonal_and_as_large_as_adamws(shape):
    """Five Newton-Schulz steps bring every singular value to about 1 (0.7 to 1.2), times lr·0.2·√max(out, in)."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = make(weight)
    momentum = torch.zeros(shape)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(shape)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
        nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
        optimizer.step()
        update = (before * (1 - LR * WEIGHT_DECAY) - weight.detach()) / (LR * 0.2 * max(shape) ** 0.5)
        u, _, vh = torch.linalg.svd(nesterov, full_matrices=False)
        inner = u.T @ update @ vh.T  # diagonal, if the singular vectors are those of the momentum
        assert inner.diagonal().min() > 0.6
        assert inner.diagonal().max() < 1.3
        assert (inner - inner.diagonal().diag()).abs().max() < 0.05
        assert 0.1 < (update * 0.2 * max(shape) ** 0.5).square().mean().sqrt() < 0.3


@pytest.mark.parametrize("place", ["gradient", "weight"])
def test_masked_decay(place):
    torch.manual_seed(0)
    mask = torch.rand(8, 16) < 0.5
    weight = nn.Parameter(torch.randn(8, 16))
    plain = nn.Parameter(weight.detach().clone())
    optimizer, other = make(weight, MaskedDecay(place, FACTOR, {weight: mask})), make(plain)
    for _ in range(3):
        grad = torch.randn(8, 16)
        weight.grad, plain.grad = grad.clone(), grad.clone()
        decay = FACTOR * torch.where(mask, 0.0, plain.detach())
        if place == "gradient":
            plain.grad += decay
        else:
            plain.data -= LR * decay
        optimizer.step()
        other.step()
        torch.testing.assert_close(weight, plain)


def test_a_dropped_step_changes_nothing():
    mask = torch.rand(8, 16) < 0.5
    weight = nn.Parameter(torch.randn(8, 16))
    optimizer = make(weight, MaskedDecay("weight", FACTOR, {weight: mask}))
    for dropped in (0.0, 1.0, 0.0):
        before = weight.detach().clone()
        momentum = optimizer.state[weight].get("momentum_buffer", torch.zeros(8, 16)).clone()
        weight.grad = torch.full((8, 16), torch.nan) if dropped else torch.randn(8, 16)
        optimizer.found_inf = torch.tensor(dropped)
        optimizer.step()
        assert torch.equal(weight, before) == bool(dropped)
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum) == bool(dropped)


def final(run_dir):
    newest, _ = store.newest_valid(run_dir / runs.CHECKPOINTS)
    return store.load(newest)


@pytest.mark.parametrize("place", ["gradient", "weight"])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_resumed_run_is_bit_identical(tiny, tmp_path, stop, place):
    changes = {"optimizer__name": "muon", "recipe__decay__place": place}
    train.run(tiny("fst", "whole", **changes))
    train.run(tiny("fst", "stopped", trainer__stop_after=stop, **changes))
    assert final(tmp_path / "stopped")["steps_done"] == stop
    train.run(tiny("fst", "stopped", **changes))
    whole, stopped = final(tmp_path / "whole"), final(tmp_path / "stopped")
    assert whole["steps_done"] == stopped["steps_done"] == 12
    assert whole["state_dict"].keys() == stopped["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, stopped["state_dict"][name]), name
    for one, other in zip(whole["optimizer_states"], stopped["optimizer_states"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        assert one["state"].keys() == other["state"].keys()
        assert one["state"]
        for index, state in one["state"].items():
            assert all(torch.equal(value, other["state"][index][key]) for key, value in state.items())


def test_a_dropped_step_leaves_a_model_with_both_optimizers_as_it_was(tiny):
    task = CausalLM(tiny("fst", optimizer__name="muon"), Sizes(vocab_size=320))
    optimizers = task.configure_optimizers()
    before = [p.detach().clone() for p in task.model.parameters()]
    for optimizer in optimizers:
        optimizer.found_inf = torch.ones(())
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, torch.nan)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))


def _compare_sharded():
    """Steps of sharded weights, of which one is dropped, against those of whole ones."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8), (9, 16), (2, 8)):
        one = nn.Parameter(torch.randn(shape))
        many = nn.Parameter(distribute_tensor(one.detach().clone(), mesh, [Shard(0)]))
        mask = torch.rand(shape) < 0.5
        optimizers = [
            make(one, MaskedDecay("weight", FACTOR, {one: mask})),
            make(many, MaskedDecay("weight", FACTOR, {many: sharding.part(mask, many)})),
        ]
        for dropped in (0.0, 1.0, 0.0):
            one.grad = torch.full(shape, torch.nan) if dropped else torch.randn(shape)
            many.grad = distribute_tensor(one.grad.clone(), mesh, [Shard(0)])
            with CommDebugMode() as sent:
                for optimizer in optimizers:
                    optimizer.found_inf = torch.tensor(dropped)
                    optimizer.step()
            assert sent.get_total_counts() == (0 if dropped else 1)
        torch.testing.assert_close(many.detach().full_tensor(), one.detach(), rtol=0, atol=5e-7)
        momentum = optimizers[1].state[many]["momentum_buffer"].full_tensor()
        assert torch.equal(momentum, optimizers[0].state[one]["momentum_buffer"])


@pytest.mark.slow
def test_sharded_weights_are_orthogonalised_whole():
    """One gather a matrix, also of rows that ranks cannot share evenly; the same but for the last rounding."""
    run_ranks(3, _compare_sharded)
