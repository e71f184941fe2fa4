"""Real data that lies beside the checkout where this project is developed; tests skip what is absent."""

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
