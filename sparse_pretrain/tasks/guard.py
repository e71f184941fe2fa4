"""Guards against steps that would ruin a run: loss or gradient not finite, loss spikes, gradient spikes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_pretrain.config import GuardConfig
from sparse_pretrain.errors import UserError

AVERAGING = 0.98  # of the moving averages that spikes are measured against
WARMUP_STEPS = 50  # steps before a spike can be told from the start of training

CAUSES = ("nonfinite", "loss_spike", "gradient_spike")


class StepGuard(nn.Module):
    """Decides for each optimizer step whether it is dropped, without waiting for the device.

    All of its state is in buffers (so in every checkpoint): moving averages, how many steps each cause has dropped,
    how many were dropped in a row, and the first step that asked for the run to stop. From that step on every step is
    dropped, so that the weights are still those from before it when `raise_if_stopped` is next called.
    """

    watched: Tensor  # (causes,) boolean: not `off`
    stopping: Tensor  # (causes,) boolean: `stop`
    loss_average: Tensor
    norm_average: Tensor
    good_steps: Tensor
    dropped: Tensor
    dropped_in_row: Tensor
    stopped_at: Tensor
    stopped_by: Tensor

    def __init__(self, cfg: GuardConfig) -> None:
        super().__init__()
        self.cfg = cfg
        actions = (cfg.nonfinite, cfg.loss_spike, cfg.gradient_spike)
        self.register_buffer("watched", torch.tensor([action != "off" for action in actions]), persistent=False)
        self.register_buffer("stopping", torch.tensor([action == "stop" for action in actions]), persistent=False)
        for name in ("loss_average", "norm_average"):
            self.register_buffer(name, torch.zeros(()))
        for name in ("good_steps", "dropped_in_row"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("dropped", torch.zeros(len(CAUSES), dtype=torch.int64))
        self.register_buffer("stopped_at", torch.full((), -1, dtype=torch.int64))
        self.register_buffer("stopped_by", torch.full((), -1, dtype=torch.int64))

    @torch.no_grad()
    def check(self, step: int, loss: Tensor, grad_norm: Tensor, loss_scaled: bool = False) -> Tensor:
        """1.0 (0-dim fp32) if this step must be dropped, else 0.0.

        Args:
            loss, grad_norm: 0-dim fp32, of the global batch, the norm before clipping.
            loss_scaled: under fp16 loss scaling an overflowing gradient is part of the scaler's search: it is dropped
                and counted, but does not stop the run.
        """
        overflow = ~torch.isfinite(grad_norm)
        warm = self.good_steps >= WARMUP_STEPS
        bad = torch.stack(
            (
                ~torch.isfinite(loss) | overflow,
                warm & (loss > self.cfg.loss_spike_factor * self.loss_average),
                warm & (grad_norm > self.cfg.gradient_spike_factor * self.norm_average),
            )
        )
        bad &= self.watched
        stops = bad & self.stopping
        if loss_scaled:
            stops[0] &= ~torch.isfinite(loss)
        drop = bad.any()
        self.dropped += bad
        self.dropped_in_row.copy_(torch.where(drop, self.dropped_in_row + 1, 0))
        stop = stops.any() | (self.dropped_in_row > self.cfg.max_skipped)
        first_stop = stop & (self.stopped_at < 0)
        self.stopped_by.copy_(torch.where(first_stop, bad.int().argmax(), self.stopped_by))
        self.stopped_at.copy_(torch.where(first_stop, step, self.stopped_at))

        first = self.good_steps == 0
        for average, value in ((self.loss_average, loss), (self.norm_average, grad_norm)):
            moved = torch.where(first, value, torch.lerp(value.float(), average, AVERAGING))
            average.copy_(torch.where(drop, average, moved))
        self.good_steps += ~drop
        return (drop | (self.stopped_at >= 0)).float()

    def raise_if_stopped(self) -> None:
        """Waits for the device.

        Raises:
            UserError: a guard set to `stop` was hit, or more than `max_skipped` steps in a row were dropped.
        """
        step = int(self.stopped_at)
        if step < 0:
            return
        cause = CAUSES[int(self.stopped_by)]
        what = {
            "nonfinite": "a loss or gradient that is not finite",
            "loss_spike": f"a loss above {self.cfg.loss_spike_factor:g} times its moving average",
            "gradient_spike": f"a gradient norm above {self.cfg.gradient_spike_factor:g} times its moving average",
        }[cause]
        in_row = int(self.dropped_in_row)
        if in_row > self.cfg.max_skipped:
            what += f", for more than {self.cfg.max_skipped} steps in a row"
        raise UserError(
            f"trainer.guard.{cause}",
            f"{what}, at step {step}: training stopped",
            "steps without it",
            hint="Usually a lower optimizer.lr or more scheduler.warmup_steps helps; checkpoints up to then are kept",
        )
