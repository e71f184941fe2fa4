"""Global memory: the arrays of a launch, and which accesses to them are allowed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import EmulatorError
from .number_formats import UINT

GLOBAL_BASE = 1 << 36  # beyond 32 bits, so that truncated addresses are found


class GlobalMemory:
    """The arrays of one launch, laid out with gaps in one array of bytes."""

    GAP = 4096

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays, self.addresses, end = [], [], self.GAP
        for array in arrays:
            if not array.flags.c_contiguous:
                raise ValueError(
                    f"arrays must be contiguous; found one of shape {array.shape} with strides {array.strides}"
                )
            if not any(array is other for other in self.arrays):
                self.arrays.append(array)
                self.addresses.append(end)
                end = -(-(end + array.nbytes) // 512) * 512 + self.GAP
        self.data = np.zeros(end, np.uint8)
        self.valid = np.zeros(end, bool)
        for array, start in zip(self.arrays, self.addresses, strict=True):
            self.data[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
            self.valid[start : start + array.nbytes] = True
        self.views = {size: self.data[: end // size * size].view(UINT[size]) for size in UINT}

    def address(self, array: np.ndarray) -> int:
        return GLOBAL_BASE + next(a for other, a in zip(self.arrays, self.addresses, strict=True) if other is array)

    def index(self, addresses: np.ndarray, size: int, width: int) -> np.ndarray:
        """Checked offsets, in elements of `size` bytes, of accesses of `width` bytes."""
        offset = addresses - GLOBAL_BASE
        if offset.size and (offset.min() < 0 or offset.max() + width > self.data.size):
            raise EmulatorError(f"global access outside of every array: address {int(offset.min()):#x}…")
        if not (self.valid[offset].all() and self.valid[offset + (width - 1)].all()):
            bad = offset[~(self.valid[offset] & self.valid[offset + (width - 1)])][0]
            near = [f"{a:#x}+{x.nbytes:#x}" for a, x in zip(self.addresses, self.arrays, strict=True)]
            raise EmulatorError(f"global access outside of the arrays: {bad:#x} of {', '.join(near)}")
        if (offset % width).any():
            raise EmulatorError(f"misaligned global access of {width} bytes: {int(offset[offset % width != 0][0]):#x}")
        return offset // size

    def load(self, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        """(lanes, count) elements of `size` bytes each."""
        return self.views[size][self.index(addresses, size, size * count)[:, None] + np.arange(count)]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """values (lanes, count)."""
        size, count = values.itemsize, values.shape[1]
        self.views[size][self.index(addresses, size, size * count)[:, None] + np.arange(count)] = values

    def write_back(self) -> None:
        for array, start in zip(self.arrays, self.addresses, strict=True):
            array.reshape(-1).view(np.uint8)[...] = self.data[start : start + array.nbytes]
