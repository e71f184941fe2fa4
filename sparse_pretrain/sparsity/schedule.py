"""What happens when: dense warm-up → sparse → dense fine-tune, and the mask refreshes in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_pretrain.config_recipe import ScheduleConfig

DENSE_WARMUP, SPARSE, DENSE_FINETUNE = "dense warm-up", "sparse", "dense fine-tune"


@dataclass(frozen=True)
class PhaseSchedule:
    """Pure functions of the optimizer step: steps [0, warmup_end) are dense, [warmup_end, finetune_start) sparse,
    [finetune_start, total_steps) dense again. Where the switch is automatic (STEP), warmup_end is the latest it may be
    until it has happened."""

    warmup_end: int
    finetune_start: int
    total_steps: int
    refresh_every: int
    track_dense: bool = False

    @classmethod
    def from_config(cls, cfg: ScheduleConfig, total_steps: int) -> PhaseSchedule:
        warmup = cfg.dense_warmup if cfg.dense_warmup_max is None else cfg.dense_warmup_max
        return cls(
            warmup_end=round(warmup * total_steps),
            finetune_start=total_steps - round(cfg.dense_finetune * total_steps),
            total_steps=total_steps,
            refresh_every=cfg.refresh_every,
            track_dense=cfg.track_dense,
        )

    def phase(self, step: int) -> str:
        """The phase of optimizer step `step`; after the last step, the last step's phase still holds."""
        step = min(step, self.total_steps - 1)
        if step < self.warmup_end:
            return DENSE_WARMUP
        return SPARSE if step < self.finetune_start else DENSE_FINETUNE

    def progress(self, step: int) -> float:
        """How far through the sparse steps `step` is: 0 at the first of them, 1 at the last."""
        sparse_steps = self.finetune_start - self.warmup_end
        return min(max((step - self.warmup_end) / max(sparse_steps - 1, 1), 0.0), 1.0)

    def refresh_due(self, step: int) -> bool:
        """Whether masks are recomputed before step `step`: at the first sparse step, then every `refresh_every`. With
        `track_dense` every `refresh_every` steps in dense phases too."""
        if self.phase(step) == SPARSE:
            return (step - self.warmup_end) % self.refresh_every == 0
        return self.track_dense and step % self.refresh_every == 0


class SwitchMonitor:
    """When a dense start is over: once Adam's second moment has settled (STEP, Lu et al. 2023, AutoSwitch).

    It has when Z_t, the mean change of the second moment in a step, averaged over the last 1/(1 − β₂) steps, is below
    Adam's ε; not before `earliest`.

    Args:
        earliest: the first step at which sparsity may begin.
        beta2, eps: of Adam.
    """

    def __init__(self, earliest: int, beta2: float, eps: float) -> None:
        self.earliest, self.eps = earliest, eps
        self.window = max(int(1 / (1 - beta2) + 1e-6), 1)
        self.changes = torch.full((self.window,), torch.inf)  # of the last steps; infinite where there is none yet

    def watches(self, step: int) -> bool:
        """Whether the change made by step `step` may matter."""
        return step >= self.earliest - self.window

    def record(self, step: int, change: Tensor) -> None:
        """The change made by the step before `step`, 0-dim."""
        self.changes = self.changes.to(change.device)
        self.changes[(step - 1) % self.window] = change

    def change_before(self, step: int) -> Tensor:
        """What was recorded for the step before `step`; infinite if nothing was."""
        return self.changes[(step - 1) % self.window]

    def settled(self, step: int) -> bool:
        """Waits for the device, where it may be true."""
        return step >= self.earliest and float(self.changes.mean()) < self.eps
