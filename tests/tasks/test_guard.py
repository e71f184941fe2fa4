"""The guard, step by step."""

import pytest
import torch

from sparse_pretrain.config import GuardConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.tasks.guard import WARMUP_STEPS, StepGuard


def check(guard, step, loss=1.0, norm=1.0, **options) -> bool:
    return bool(guard.check(step, torch.tensor(loss), torch.tensor(norm), **options))


def warmed_up(**options) -> StepGuard:
    guard = StepGuard(GuardConfig(**options))
    assert not any(check(guard, step) for step in range(WARMUP_STEPS))
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(torch.nan, 1.0), (torch.inf, 1.0), (1.0, torch.nan), (1.0, torch.inf)])
def test_not_finite_is_dropped_and_leaves_the_averages(loss, norm):
    guard = warmed_up()
    assert check(guard, 60, loss, norm)
    assert not check(guard, 61)
    assert guard.dropped.tolist() == [1, 0, 0]
    assert guard.loss_average == pytest.approx(1.0)
    guard.raise_if_stopped()


def test_spikes_are_told_from_the_average():
    guard = warmed_up(loss_spike="skip", loss_spike_factor=2.0, gradient_spike="skip", gradient_spike_factor=10.0)
    assert not check(guard, 60, loss=1.9)
    assert check(guard, 61, loss=2.5)
    assert not check(guard, 62, norm=9.0)
    assert check(guard, 63, norm=15.0)
    assert guard.dropped.tolist() == [0, 1, 1]


def test_spikes_are_let_be_by_default_and_while_warming_up():
    assert not check(warmed_up(), 60, loss=100.0, norm=100.0)
    guard = StepGuard(GuardConfig(loss_spike="skip"))
    assert not check(guard, 0)
    assert not check(guard, 1, loss=100.0)


def test_after_a_stop_every_step_is_dropped():
    guard = warmed_up(loss_spike="stop")
    assert check(guard, 60, loss=5.0)
    assert check(guard, 61)
    with pytest.raises(
        UserError, match=r"trainer.guard.loss_spike: found a loss above 2 times its moving average, at step 60"
    ):
        guard.raise_if_stopped()


def test_overflow_under_loss_scaling_does_not_stop():
    guard = warmed_up(nonfinite="stop")
    assert check(guard, 60, norm=torch.inf, loss_scaled=True)
    guard.raise_if_stopped()
    assert check(guard, 61, loss=torch.nan, norm=torch.nan, loss_scaled=True)
    with pytest.raises(UserError, match="at step 61"):
        guard.raise_if_stopped()


def test_state_is_in_the_state_dict():
    guard = warmed_up(loss_spike="skip")
    check(guard, 60, loss=torch.nan)
    other = StepGuard(GuardConfig(loss_spike="skip"))
    other.load_state_dict(guard.state_dict())
    assert check(other, 61, loss=2.5)
    assert other.dropped.tolist() == [1, 1, 0]
