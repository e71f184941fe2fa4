"""MNIST's idx files: https://yann.lecun.org/exdb/mnist/ describes the format."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from sparse_pretrain.data.sources import UNREADABLE
from sparse_pretrain.errors import UserError

BYTES = 8  # the type code of unsigned bytes


def idx_array(path: Path, option: str) -> np.ndarray:
    """The array of unsigned bytes in an idx file, plain or .gz.

    Raises:
        UserError: naming `option` and the file, if it is not that.
    """
    allowed = "an idx file of unsigned bytes, as MNIST's, plain or .gz"
    try:
        content = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
    except UNREADABLE as error:
        raise UserError(option, f"{path}, which cannot be read ({error})", allowed) from error
    dimensions = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4", min(dimensions, len(content[4:start]) // 4)).astype(int)
    if content[:3] != bytes([0, 0, BYTES]) or len(shape) != dimensions or len(content) - start != shape.prod():
        raise UserError(option, f"{path}, which is not an idx file or not all of one", allowed)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
