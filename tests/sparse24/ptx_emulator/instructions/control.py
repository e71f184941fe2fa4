"""Jumps, setmaxnreg, and instructions in which the lanes of a warp look at each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EmulatorError
from ..lanes import LANE, LANES
from .operands import EXIT, Operands, Run, all_lanes, lanes, require

if TYPE_CHECKING:
    from ..warp import Warp


def _bra(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    target = resolve.program.labels[operands[0]]
    return lambda warp, mask: target if mask is None else (target, mask)


def _brx(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    get = resolve.source(operands[0], np.uint32)
    targets = [resolve.program.labels[name] for name in resolve.program.tables[operands[1]]]

    def run(warp: Warp, mask: np.ndarray | None) -> Any:
        index = get(warp)[lanes(mask)]
        if (index != index[0]).any():
            raise EmulatorError("brx.idx diverges")
        target = targets[int(index[0])]
        return target if mask is None else (target, mask)

    return run


def _exit(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    return lambda warp, mask: EXIT if mask is None else (EXIT, mask)


def _setmaxnreg(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    return lambda warp, mask: None  # registers are not counted


def _elect(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    leader, elected = (resolve.destination(name) for name in operands[0].split("|"))

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        first = int(lanes(mask)[0])
        leader(warp, mask, np.full(LANES, first, np.uint32))
        elected(warp, mask, first == LANE)

    return run


def _shfl(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    require(parts, "sync", "idx", "b32")
    put = resolve.destination(operands[0])
    a, b, c = (resolve.source(text, np.uint32) for text in operands[1:4])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        all_lanes(mask, "shfl.sync")
        wanted, clamp = b(warp).astype(np.int64) & 31, c(warp).astype(np.int64)
        segment, bound = clamp >> 8 & 31, clamp & 31
        first = LANE & segment
        source = first | (wanted & ~segment)
        last = first | (bound & ~segment)
        put(warp, None, a(warp)[np.where(source <= last, source, LANE)])

    return run


TABLE = {
    "bra": _bra, "brx": _brx, "ret": _exit, "exit": _exit, "elect": _elect, "shfl": _shfl,
    "setmaxnreg": _setmaxnreg,
}  # fmt: skip
