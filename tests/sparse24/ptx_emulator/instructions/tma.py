"""TMA: cp.async.bulk.tensor, boxes of a tensor between global and shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arguments import TensorMap
from ..errors import EmulatorError
from ..global_memory import GLOBAL_BASE
from ..parse import split
from ..shared_memory import OFFSET, RANK_BITS, SHARED_BASE, swizzle
from .operands import Operands, Run, lanes, unsupported, vector

if TYPE_CHECKING:
    from ..launch import Launch
    from ..warp import Warp


def cp_async_bulk(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    if "commit_group" in parts:
        return lambda warp, mask: warp.stores.commit()
    if "wait_group" in parts:
        keep = int(operands[0], 0)
        return lambda warp, mask: warp.stores.finish(keep)
    if "tensor" not in parts or "im2col" in parts or "reduce" in parts:
        raise unsupported(parts)
    # the operand where it goes to comes first
    to_shared = next(p for p in parts[5:] if p.split("::")[0] in ("shared", "global")).startswith("shared")
    if to_shared:
        return _loads(resolve, parts, operands)
    return _stores(resolve, operands)


class _Box:
    """The operands [descriptor, {coordinates}], innermost coordinate first."""

    def __init__(self, resolve: Operands, text: str) -> None:
        descriptor, coordinates = split(text[1:-1])
        self.descriptor = resolve.source(descriptor, np.uint64)
        self.coordinates = [resolve.source(text, np.int32) for text in reversed(vector(coordinates))]

    def of(self, warp: Warp, lane: int) -> tuple[TensorMap, list[int]]:
        """The tensor map, and the coordinates of the box, outermost first."""
        address = int(self.descriptor(warp)[lane])
        tensor = warp.cta.launch.tensor_maps.get(address)
        if tensor is None:
            raise EmulatorError(f"no tensor map at {address:#x}")
        at = [int(get(warp)[lane]) for get in self.coordinates]
        if len(at) != len(tensor.shape):
            raise EmulatorError(f"TMA: {len(at)} coordinates for a tensor map of {len(tensor.shape)}")
        return tensor, at


def _loads(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    box, shared, barrier = _Box(resolve, operands[1]), resolve.address(operands[0]), resolve.address(operands[2])
    multicast = any(p.startswith("multicast") for p in parts)
    ctas = resolve.source(operands[3], np.uint16) if multicast else None

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        launch = warp.cta.launch
        for lane in lanes(mask):
            tensor, at = box.of(warp, lane)
            address, signal = int(shared(warp)[lane]), int(barrier(warp)[lane])
            if ctas is None:
                _load(launch, tensor, at, address, signal)  # the barrier may be another CTA's
                continue
            ranks = [r for r in range(16) if int(ctas(warp)[lane]) >> r & 1]
            if ranks and ranks[-1] >= len(launch.cluster):
                raise EmulatorError(f"TMA: multicast to CTA {ranks[-1]} of {len(launch.cluster)}")
            for rank in ranks:  # each has its own barrier
                _load(launch, tensor, at, *(x & OFFSET | rank << RANK_BITS for x in (address, signal)))

    return run


def _load(launch: Launch, tensor: TensorMap, at: list[int], address: int, signal: int) -> None:
    """To a shared::cluster address, with an mbarrier that is told."""
    cta = launch.cluster[address >> RANK_BITS]
    memory = cta.memory
    inner, outer, inside = _places(launch, tensor, at, address & OFFSET)
    if inner.max() >= memory.end or inner.min() < SHARED_BASE:
        raise EmulatorError("TMA: writes outside of the shared memory")
    memory.begin_copy(inner)
    target = cta.mbarrier(signal)

    def copy() -> None:
        cta.check_running()
        data = np.zeros(inner.shape, np.uint8)
        data[inside] = launch.memory.data[outer[inside]]
        memory.end_copy(inner, data, None)
        target.deliver(inner.size)

    launch.later(copy)


def _stores(resolve: Operands, operands: list[str]) -> Run:
    box, shared = _Box(resolve, operands[0]), resolve.address(operands[1])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        for lane in lanes(mask):
            _store(warp, *box.of(warp, lane), int(shared(warp)[lane]))

    return run


def _store(warp: Warp, tensor: TensorMap, at: list[int], address: int) -> None:
    cta, launch = warp.cta, warp.cta.launch
    if address >> RANK_BITS != cta.rank:
        raise EmulatorError("TMA: stores from the shared memory of another CTA")
    inner, outer, inside = _places(launch, tensor, at, address & OFFSET)
    fences = cta.memory.fences.copy()

    def copy() -> None:
        launch.memory.data[outer[inside]] = cta.memory.gather_async(inner, warp.number, fences)[inside]

    if launch.lazy:
        warp.stores.open.append(copy)
    else:
        copy()
        warp.stores.open.append(lambda: None)  # there is something to wait for all the same


def _places(launch: Launch, tensor: TensorMap, at: list[int], offset: int) -> tuple[np.ndarray, ...]:
    """Byte offsets (elements, size) in shared memory, those in global memory, which elements are inside."""
    size = tensor.array.itemsize
    if offset % 128:
        raise EmulatorError(f"TMA: shared address {offset} is not a multiple of 128")
    index = np.indices(tuple(tensor.box)).reshape(len(at), -1)
    position = index + np.array(at)[:, None]
    inside = ((position >= 0) & (position < np.array(tensor.shape)[:, None])).all(axis=0)
    strides = np.array([*(tensor.strides or ()), size])
    start = launch.memory.address(tensor.array) - GLOBAL_BASE + tensor.offset
    outer = start + (position * strides[:, None]).sum(axis=0)
    inner = swizzle(offset + np.arange(index.shape[1]) * size, tensor.swizzle)
    if inside.any():
        launch.memory.index(outer[inside] + GLOBAL_BASE, size, size)
    return inner[:, None] + np.arange(size), outer[:, None] + np.arange(size), inside
