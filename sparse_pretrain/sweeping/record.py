"""What makes a sweep this one, and the file in its folder that says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sparse_pretrain import runs
from sparse_pretrain.config import SweepConfig, TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.sweeping.space import Parameter

SWEEP_FILE = "sweep.yaml"
METHOD = ("sampler", "pruner", "prune_after_trials", "prune_after_steps", "seed")
PARTS = ("space", "method", "options")


def identify(cfg: SweepConfig, space: Sequence[Parameter], example: TrainConfig) -> dict[str, Any]:
    """What makes a sweep this one: its space and method, and every other option that decides a trial's numbers."""
    searched = [parameter.option for parameter in space]
    options = {
        option: value
        for option, value in runs.identity(example).items()
        if not any(option == name or option.startswith(f"{name}.") for name in searched)
    }
    return {"space": cfg.hparams_search, "method": {name: getattr(cfg, name) for name in METHOD}, "options": options}


def folder_of(cfg: SweepConfig, example: TrainConfig, identity: dict[str, Any]) -> Path:
    """Stable: the same options, but for how many trials, find the same sweep."""
    if cfg.out is not None:
        return Path(cfg.out).expanduser().resolve()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.runs_dir).expanduser().resolve() / f"sweep-{example.model.name}-{digest}"


def check_same(folder: Path, identity: dict[str, Any]) -> None:
    """Raises UserError if the folder holds another sweep."""
    if not (folder / SWEEP_FILE).is_file():
        return
    there = read(folder)
    for part in PARTS:
        known = there[part] if isinstance(there[part], dict) else {}
        for name in {**known, **identity[part]}:
            if known.get(name) != identity[part].get(name):
                raise UserError(
                    "out",
                    f"{folder}, holding a sweep with {part}.{name}={known.get(name)} where this one has "
                    f"{identity[part].get(name)}",
                    "the folder of the same sweep, or a new one",
                )


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        UserError: there is nothing, or it is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.is_file():
        raise UserError("sweep", folder, "the folder of a sweep, one that holds sweep.yaml")
    values = runs.read_yaml(path)
    if values is None or not {"command", "study", "storage", *PARTS} <= set(values):
        raise UserError("sweep", f"{path}, which is damaged", "the folder of a sweep, left as it was")
    return values


def write(folder: Path, command: str, storage: str | None, identity: dict[str, Any]) -> None:
    """Say in the sweep's folder what it is, and with which command it goes on."""
    values = {"command": command, "study": folder.name, "storage": storage, **identity}
    runs.write_text(folder / SWEEP_FILE, yaml.safe_dump(values, sort_keys=False))
