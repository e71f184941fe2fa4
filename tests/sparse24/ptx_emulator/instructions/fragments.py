"""Matrices as the registers of a warp hold them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import EmulatorError
from ..lanes import GROUP, LANES, THREAD
from ..number_formats import DECODE, ELEMENT


@lru_cache
def sparse_maps(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and stored column of each element (register, lane, element) of a fragment of the compressed A."""
    per = 32 // bits
    register, lane, element = np.ogrid[:4, :LANES, :per]
    row = lane // 4 + 8 * (register % 2) + 0 * element
    column = per * (lane % 4) + element + (4 * per) * (register // 2)
    return row, column


def decompress(a: list[np.ndarray], metadata: np.ndarray, selector: int, kind: str) -> np.ndarray:
    """The dense (16, 32 or 64) float32 tile of a warp's fragment of A and its metadata registers."""
    dtype = ELEMENT[kind]
    per = 4 // dtype().itemsize
    fragment = np.stack(a).view(dtype).reshape(4, LANES, per)
    row, column = sparse_maps(8 * dtype().itemsize)
    stored = np.zeros((16, 8 * per), np.float32)
    stored[row, column] = DECODE[kind](fragment)
    words = metadata.reshape(8, 4, 1).astype(np.int64) >> 2 * np.arange(16) & 3  # (g, thread, 16 positions)
    if per == 2:  # two of four threads: the low half of a word is row g's, the high half row g + 8's
        words = words[:, 2 * selector : 2 * selector + 2]
        position = np.concatenate([words[:, :, :8].reshape(8, 16), words[:, :, 8:].reshape(8, 16)])
    else:  # threads 0, 2 row g's and 1, 3 row g + 8's; threads 2, 3 the second half of the columns
        position = np.concatenate([words[:, 0::2].reshape(8, 32), words[:, 1::2].reshape(8, 32)])
    if (position[:, 0::2] >= position[:, 1::2]).any():
        raise EmulatorError("metadata: the two positions of a group are not in increasing order")
    dense = np.zeros((16, 16 * per), np.float32)
    np.put_along_axis(dense, 4 * (np.arange(8 * per) // 2) + position, stored, axis=1)
    return dense


def dense_a(a: list[np.ndarray], kind: str) -> np.ndarray:
    """The (16, 16 or 32) float32 tile of a warp's fragment of a dense A: the map is that of the compressed one."""
    dtype = ELEMENT[kind]
    row, column = sparse_maps(8 * dtype().itemsize)
    tile = np.zeros((16, 32 // dtype().itemsize), np.float32)
    tile[row, column] = DECODE[kind](np.stack(a).view(dtype).reshape(row.shape))
    return tile


def accumulator_map(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of (register, lane) of a float32 accumulator."""
    register = np.arange(registers)[:, None]
    return GROUP + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * THREAD + register % 2
