"""cp.async: copies of a few bytes a lane from global to shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import EmulatorError
from ..lanes import ALL
from .operands import Operands, Run, unsupported
from .tma import cp_async_bulk

if TYPE_CHECKING:
    from ..warp import Warp


def _cp(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    if "bulk" in parts:
        return cp_async_bulk(resolve, parts, operands)
    if "commit_group" in parts:
        return lambda warp, mask: warp.copies.commit()
    if "wait_group" in parts:
        keep = int(operands[0], 0)
        return lambda warp, mask: warp.copies.finish(keep)
    if parts[3:5] not in (["shared", "global"], ["shared::cta", "global"]):
        raise unsupported(parts)
    return _copy(resolve, operands)


def _copy(resolve: Operands, operands: list[str]) -> Run:
    width = int(operands[2], 0)
    target, source = resolve.address(operands[0]), resolve.address(operands[1])
    size = resolve.source(operands[3], np.uint32) if len(operands) > 3 else None

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        shared, memory = warp.cta.memory, warp.cta.launch.memory
        active = ALL if mask is None else mask
        to = shared.offsets(target(warp)[active], width)[:, None] + np.arange(width)
        count = np.full(active.sum(), width) if size is None else size(warp)[active].astype(np.int64)
        if ((count != width) & (count != 0)).any():
            raise EmulatorError("cp.async of a part of its bytes is not supported")
        read = count > 0
        start = memory.index(source(warp)[active][read], 1, width)
        shared.begin_copy(to)

        def copy() -> None:
            data = np.zeros(to.shape, np.uint8)
            data[read] = memory.data[start[:, None] + np.arange(width)]
            shared.end_copy(to, data, warp.number)

        if warp.cta.launch.lazy:
            warp.copies.open.append(copy)
        else:
            copy()

    return run


TABLE = {"cp": _cp}
