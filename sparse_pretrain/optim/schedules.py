"""Learning-rate schedules as pure functions of the step, so that resuming has no state to restore."""

from __future__ import annotations

import math

from sparse_pretrain.config import SchedulerConfig


def lr_share(step: int, total_steps: int, cfg: SchedulerConfig) -> float:
    """The share of the peak learning rate used in optimizer step `step` (0 … total_steps - 1).

    A linear warm-up, then `constant`; `cosine` down to `final_lr_share` (Loshchilov & Hutter 2017); or `wsd`,
    constant with a linear fall over the last `decay_share` of the run (Hu et al. 2024, MiniCPM).
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.name == "constant":
        return 1.0
    if cfg.name == "cosine":
        progress = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
        return cfg.final_lr_share + (1 - cfg.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = max(1, round(cfg.decay_share * total_steps))
    progress = max(0, step - (total_steps - decay_steps)) / decay_steps
    return 1 - (1 - cfg.final_lr_share) * progress
