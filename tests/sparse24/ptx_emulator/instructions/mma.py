"""mma.sp: sparse products of a warp on its registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import EmulatorError
from ..lanes import LANES
from ..number_formats import DECODE, ELEMENT
from .fragments import accumulator_map, decompress
from .operands import Operands, Run, all_lanes, unsupported, vector

if TYPE_CHECKING:
    from ..warp import Warp


def _mma_sp(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    if "sp::ordered_metadata" not in parts:
        raise unsupported(parts)
    shape, kind = next(p for p in parts if p.startswith("m16n8k")), parts[-3]
    k = int(shape[6:])
    if (kind, k) not in (("bf16", 32), ("f16", 32), ("e4m3", 64)) or parts[-4] != "f32" or parts[-2] != kind:
        raise unsupported(parts)
    put = [resolve.destination(name) for name in vector(operands[0])]
    a, b, c = ([resolve.source(name, np.uint32) for name in vector(text)] for text in operands[1:4])
    metadata, selector = resolve.source(operands[4], np.uint32), int(operands[5], 0)
    numbers = [resolve.numbers[name] for name in (*vector(operands[1]), operands[4])]
    if selector not in ((0, 1) if k == 32 else (0,)):
        raise EmulatorError(f"sparsity selector {selector} with {shape} {kind}")
    dtype = ELEMENT[kind]
    per = 4 // dtype().itemsize
    register, lane, element = np.ogrid[:4, :LANES, :per]
    b_row = per * (lane % 4) + element + 4 * per * register
    b_column = lane // 4 + 0 * b_row
    row, column = accumulator_map(4)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        all_lanes(mask, "mma.sp")
        # the same A often meets several B, one after the other
        held = [warp.regs[number] for number in numbers]
        if selector != warp.dense_of[0] or any(x is not y for x, y in zip(held, warp.dense_of[1], strict=True)):
            warp.dense = decompress([g(warp) for g in a], metadata(warp), selector, kind)
            warp.dense_of = (selector, held)
        right = np.zeros((k, 8), np.float32)
        fragment = np.stack([g(warp) for g in b]).view(dtype).reshape(4, LANES, per)
        right[b_row, b_column] = DECODE[kind](fragment)
        result = np.stack([g(warp) for g in c]).view(np.float32) + (warp.dense @ right)[row, column]
        for store, value in zip(put, result, strict=True):
            store(warp, None, value)

    return run


TABLE = {"mma": _mma_sp}
