"""`sparse-pretrain decay-search`: find the decay factor of a run by the flip rates of short ones."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml

from sparse_pretrain import crosscheck, preflight, runs
from sparse_pretrain.config import DecaySearchConfig, TrainConfig
from sparse_pretrain.factor_search import search
from sparse_pretrain.schema import to_dict
from sparse_pretrain.train import run as train
from sparse_pretrain.train import with_absolute_paths

EXPERIMENT = "decay"


def run(cfg: DecaySearchConfig) -> Path:
    """Search in RUN_DIR/decay-search, where `train` with `recipe.decay.factor=auto` looks too; returns that folder.

    Raises:
        UserError, Interrupted: as `factor_search.search`.
    """
    crosscheck.check(cfg)
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(TrainConfig)}
    values["trainer"] = dataclasses.replace(cfg.trainer, stop_after=None)
    run_cfg = with_factor(with_absolute_paths(TrainConfig(**values)), "auto")
    preflight.check_device(run_cfg)
    preflight.check_layers(run_cfg)
    folder = runs.resolve_run_dir(run_cfg) / runs.DECAY_SEARCH
    result = search(run_cfg, cfg.search, folder, train)
    config_dir = write_experiment(with_factor(run_cfg, result["factor"]), folder)
    print(f"\nTo train with it: recipe.decay.factor={result['factor']:g} beside the other options, or")
    print(f"  sparse-pretrain train --config-dir {shlex.quote(str(config_dir))} experiment={EXPERIMENT}")
    return folder


def with_factor(cfg: TrainConfig, factor: Any) -> TrainConfig:
    decay = dataclasses.replace(cfg.recipe.decay, factor=factor)
    return dataclasses.replace(cfg, recipe=dataclasses.replace(cfg.recipe, decay=decay))


def write_experiment(cfg: TrainConfig, folder: Path) -> Path:
    """The whole of `cfg` but its folder as `experiment=decay` of a `--config-dir`, which is returned."""
    values = {name: value for name, value in to_dict(cfg).items() if name not in ("run_dir", "resume")}
    path = folder / "conf" / "experiment" / f"{EXPERIMENT}.yaml"
    with runs.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, "# @package _global_\n" + yaml.safe_dump(values, sort_keys=False))
    return folder / "conf"
