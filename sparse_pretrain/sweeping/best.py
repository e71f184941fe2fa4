"""The best trial's options as configs that `train` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparse_pretrain import runs
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.schema import to_dict

NAME = "best"
FAMILIES = ("model", "data")  # whose options depend on one of them: replaced as a whole


def write_best(cfg: TrainConfig, folder: Path) -> Path:
    """Write all options of a run but its folder's, as `experiment=best` of a `--config-dir`, which is returned.

    Raises:
        UserError: the folder cannot be written.
    """
    values = {name: value for name, value in to_dict(cfg).items() if name not in ("run_dir", "resume")}
    config_dir = folder / "conf"
    for group in FAMILIES:
        _write(config_dir / group / f"{NAME}.yaml", "", values.pop(group))
    defaults: list[dict[str, Any]] = [{f"override /{group}": NAME} for group in FAMILIES]
    _write(config_dir / "experiment" / f"{NAME}.yaml", "# @package _global_\n", {"defaults": defaults, **values})
    return config_dir


def _write(path: Path, head: str, values: dict[str, Any]) -> None:
    with runs.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, head + yaml.safe_dump(values, sort_keys=False))
