"""Arguments of a launch that are more than a number or an array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Pointer:
    """The address of `array`, moved by `offset` bytes (any sign)."""

    array: np.ndarray
    offset: int


@dataclass
class TensorMap:
    """A tiled TMA descriptor.

    array: contiguous base. shape, box: elements, outermost first. strides: bytes of all dimensions but the last,
    by default those of a contiguous tensor. swizzle: 0, 32, 64 or 128 bytes. offset: bytes added to the base.
    """

    array: np.ndarray
    shape: Sequence[int]
    box: Sequence[int]
    swizzle: int = 128
    strides: Sequence[int] | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        size = self.array.itemsize
        if self.strides is None:
            self.strides = [int(np.prod(self.shape[i + 1 :])) * size for i in range(len(self.shape) - 1)]
        if self.swizzle not in (0, 32, 64, 128):
            raise ValueError(f"swizzle must be 0, 32, 64 or 128; found {self.swizzle}")
        if any(stride % 16 for stride in self.strides) or self.offset % 16:
            raise ValueError(f"strides and offset must be multiples of 16 bytes; found {self.strides}, {self.offset}")
        if max(self.box) > 256 or self.box[-1] * size % 16 or (self.swizzle and self.box[-1] * size > self.swizzle):
            raise ValueError(f"box must be ≤ 256, its rows multiples of 16 bytes within the swizzle; found {self.box}")

    def arguments(self) -> list[Any]:
        """What Triton passes for a descriptor argument: itself, the shape, the strides in elements."""
        strides = [stride // self.array.itemsize for stride in self.strides or ()]
        return [self, *self.shape, *strides, 1]
