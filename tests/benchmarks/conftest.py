from pathlib import Path

import pytest
import torch
from sparse24.backends import BACKENDS

from benchmarks.bench import Bench, Ceilings


@pytest.fixture(autouse=True)
def _whole_backends(monkeypatch):
    """A worker that is told to leave something out changes the backends of its process, which here is that of all tests."""
    for backend in BACKENDS.values():
        for name in ("supports", "variants"):
            monkeypatch.setattr(backend, name, getattr(backend, name))


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
