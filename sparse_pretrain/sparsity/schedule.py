"""What happens when: dense warm-up → sparse → dense fine-tune, and the mask refreshes in between."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pretrain.config import ScheduleConfig

DENSE_WARMUP, SPARSE, DENSE_FINETUNE = "dense warm-up", "sparse", "dense fine-tune"


@dataclass(frozen=True)
class PhaseSchedule:
    """Pure functions of the optimizer step: steps [0, warmup_end) are dense, [warmup_end, finetune_start) sparse,
    [finetune_start, total_steps) dense again."""

    warmup_end: int
    finetune_start: int
    total_steps: int
    refresh_every: int

    @classmethod
    def from_config(cls, cfg: ScheduleConfig, total_steps: int) -> PhaseSchedule:
        return cls(
            warmup_end=round(cfg.dense_warmup * total_steps),
            finetune_start=total_steps - round(cfg.dense_finetune * total_steps),
            total_steps=total_steps,
            refresh_every=cfg.refresh_every,
        )

    def phase(self, step: int) -> str:
        """The phase of optimizer step `step`; after the last step, the last step's phase still holds."""
        step = min(step, self.total_steps - 1)
        if step < self.warmup_end:
            return DENSE_WARMUP
        return SPARSE if step < self.finetune_start else DENSE_FINETUNE

    def refresh_due(self, step: int) -> bool:
        """Whether masks are recomputed before step `step`: at the first sparse step, then every `refresh_every`."""
        return self.phase(step) == SPARSE and (step - self.warmup_end) % self.refresh_every == 0
