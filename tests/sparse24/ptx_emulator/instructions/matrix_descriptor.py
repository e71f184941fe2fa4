"""Shared-memory matrix descriptors of wgmma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EmulatorError
from ..number_formats import DECODE, ELEMENT
from ..shared_memory import SharedMemory, swizzle


@dataclass
class MatrixDescriptor:
    """A shared-memory matrix descriptor of wgmma."""

    start: int
    leading: int
    stride: int
    width: int  # of the swizzle, in bytes

    @classmethod
    def decode(cls, bits: int) -> MatrixDescriptor:
        if bits >> 49 & 7:
            raise EmulatorError("matrix descriptor: base offsets are not supported")
        width = {0: 0, 1: 128, 2: 64, 3: 32}[bits >> 62]
        return cls((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, width)

    def offsets(self, rows: int, k: int, size: int, transposed: bool) -> np.ndarray:
        """(rows, k) offsets in shared memory of a matrix with `rows` along M or N; transposed: those contiguous."""
        r, c = np.ogrid[:rows, :k]
        if transposed:
            if not self.width:
                raise EmulatorError("matrix descriptor: a transposed matrix without swizzle is not supported")
            # ((16 bytes, width / 16, m), (8, k)) : ((1, 16 bytes, leading), (width, stride))
            byte = r * size
            offset = byte // self.width * self.leading + byte % self.width + c % 8 * self.width + c // 8 * self.stride
        elif self.width:  # rows of `width` bytes in groups of eight; all of k lies in one row
            if k * size > self.width:
                raise EmulatorError(f"matrix descriptor: k of {k * size} bytes in a swizzle of {self.width}")
            offset = r // 8 * self.stride + r % 8 * self.width + c * size
        else:
            byte = c * size
            offset = r // 8 * self.stride + r % 8 * 16 + byte // 16 * self.leading + byte % 16
        return swizzle(self.start + offset, self.width)

    def read(self, memory: SharedMemory, rows: int, k: int, kind: str, transposed: bool, *issued: Any) -> np.ndarray:
        """(rows, k) float32; issued: reader and fences, as in `gather_async`."""
        size = ELEMENT[kind]().itemsize
        offset = self.offsets(rows, k, size, transposed)
        raw = memory.gather_async(offset[..., None] + np.arange(size), *issued)
        return DECODE[kind](np.ascontiguousarray(raw).view(ELEMENT[kind])[..., 0])
