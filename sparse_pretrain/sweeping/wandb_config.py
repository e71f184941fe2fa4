"""A sweep for Weights & Biases to run: the same space and trials, suggested by its server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import IntDistribution

from sparse_pretrain import runs
from sparse_pretrain.config import SweepConfig
from sparse_pretrain.sweeping.metrics_tail import LOSS
from sparse_pretrain.sweeping.space import Parameter, hydra_text
from sparse_pretrain.sweeping.study import REDUCTION

METHODS = {"tpe": "bayes", "random": "random", "grid": "grid"}


def write_wandb(path: Path, space: Sequence[Parameter], cfg: SweepConfig, train: Sequence[str]) -> Path:
    """Write the file that `wandb sweep` takes.

    Raises:
        UserError: it cannot be written.
    """
    with runs.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, yaml.safe_dump(wandb_config(space, cfg, train), sort_keys=False, allow_unicode=True))
    return path


def wandb_config(space: Sequence[Parameter], cfg: SweepConfig, train: Sequence[str]) -> dict[str, Any]:
    """Its content; see docs.wandb.ai, "Sweep configuration options".

    Args:
        train: the command that a trial's own options come after.
    """
    logger = [option for option in ("logger.wandb=true", "logger.wandb_mode=online") if option not in train]
    values = {
        "program": train[0],
        "project": cfg.logger.wandb_project,
        "command": [*train, *logger, "${args_no_hyphens}"],
        "method": METHODS[cfg.sampler],
        "metric": {"name": LOSS, "goal": "minimize"},
        "run_cap": cfg.trials,
        "parameters": {parameter.option: _parameter(parameter, cfg.sampler == "grid") for parameter in space},
    }
    if cfg.logger.wandb_entity:
        values["entity"] = cfg.logger.wandb_entity
    if cfg.pruner != "none":  # W&B counts logged rows, and knows one way to stop early
        first = max(cfg.trainer.eval_every, cfg.prune_after_steps)
        values["early_terminate"] = {
            "type": "hyperband",
            "min_iter": max(first // cfg.trainer.log_every, 1),
            "eta": REDUCTION,
        }
    return values


def _parameter(parameter: Parameter, listed: bool) -> dict[str, Any]:
    """As a distribution of W&B; its quantized ones are multiples of a step, not steps from the lowest value."""
    distribution = parameter.distribution
    if parameter.choices:
        return {"values": [_choice(value) for value in parameter.choices]}
    if isinstance(distribution, IntDistribution) and distribution.step == 1 and not listed:
        log = {"distribution": "q_log_uniform_values", "q": 1}
        kind: dict[str, Any] = log if distribution.log else {"distribution": "int_uniform"}
    elif parameter.values() is not None:
        return {"values": parameter.values()}
    else:
        kind = {"distribution": "log_uniform_values" if getattr(distribution, "log", False) else "uniform"}
    low, high = parameter.ends()
    return {**kind, "min": low, "max": high}


def _choice(value: Any) -> Any:
    """Numbers as they are; others as on the command line, where W&B writes them unchanged."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else hydra_text(value)
