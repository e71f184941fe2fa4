"""torchvision, for tests, from a folder of its own.

torchmetrics, and so Lightning, imports torchvision wherever it is installed; the registry's build next to PyTorch's CPU
build raises in that import ("operator torchvision::nms does not exist"), so it must not be in the environment itself:
`scripts/setup dev` puts it into a folder that SPARSE_PRETRAIN_TORCHVISION names.
"""

import os
import sys
import types

import lightning  # noqa: F401  # first, so that it does not see torchvision
import pytest
import torch


@pytest.fixture(scope="session")
def torchvision() -> types.ModuleType:
    """The package; skips where there is none."""
    folder = os.environ.get("SPARSE_PRETRAIN_TORCHVISION")
    if folder:
        sys.path.append(folder)
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return pytest.importorskip("torchvision")
    finally:
        if folder:
            sys.path.remove(folder)  # processes that tests start get this path, and not the operators
