from pathlib import Path

import pytest
import torch

from benchmarks.bench import Bench, Ceilings


@pytest.fixture
def rows():
    """What `bench` emits."""
    return []


@pytest.fixture
def bench(rows, tmp_path) -> Bench:
    """A rehearsal on the CPU, with ceilings of 1 GB/s and 1 TFLOP/s."""
    made = Bench(torch.device("cpu"), True, rows.append, lambda what, blame: None, Path(tmp_path) / "products.json")
    made.ceilings = Ceilings(1.0, {"float32": 1.0})
    return made
