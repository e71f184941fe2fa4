"""Barriers, mbarriers and fences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..barriers import Barrier, Mbarrier
from ..errors import EmulatorError
from ..lanes import LANES
from ..shared_memory import OFFSET, RANK_BITS, SHARED_BASE
from .operands import BLOCK, Operands, Run, all_lanes, lanes, require, unsupported

if TYPE_CHECKING:
    from ..warp import Warp


def _barrier(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    if "warp" in parts:
        return lambda warp, mask: None
    if "cluster" in parts:
        return _cluster_arrive if "arrive" in parts else _cluster_wait
    if not {"sync", "arrive"} & set(parts):
        raise unsupported(parts)
    number = resolve.source(operands[0], np.uint32)
    threads = resolve.source(operands[1], np.uint32) if len(operands) > 1 else None
    waits = "sync" in parts

    def run(warp: Warp, mask: np.ndarray | None) -> Any:
        all_lanes(mask, "a barrier")
        barrier = warp.cta.barriers.setdefault(int(number(warp)[0]), Barrier())
        if warp.awaits is None:
            count = int(threads(warp)[0]) if threads else warp.cta.launch.program.threads
            if count % LANES:
                raise EmulatorError(f"a barrier of {count} threads is not one of whole warps")
            target = barrier.arrive(count // LANES)
            if not waits:
                return None
            warp.awaits = target
        if barrier.done < warp.awaits:
            warp.waiting = f"barrier {int(number(warp)[0])}: {barrier.arrived} of {barrier.expected} warps are there"
            return BLOCK
        warp.awaits = None
        return None

    return run


def _cluster_arrive(warp: Warp, mask: np.ndarray | None) -> None:
    all_lanes(mask, "barrier.cluster")
    launch = warp.cta.launch
    if warp.cluster_phase is not None:
        raise EmulatorError("barrier.cluster.arrive twice without a wait")
    warp.cluster_phase = launch.cluster_barrier.arrive(sum(len(cta.warps) for cta in launch.cluster))


def _cluster_wait(warp: Warp, mask: np.ndarray | None) -> Any:
    all_lanes(mask, "barrier.cluster")
    barrier = warp.cta.launch.cluster_barrier
    if warp.cluster_phase is None:
        raise EmulatorError("barrier.cluster.wait without an arrive")
    if barrier.done < warp.cluster_phase:
        warp.waiting = f"the cluster's barrier: {barrier.arrived} of {barrier.expected} warps are there"
        return BLOCK
    warp.cluster_phase = None
    return None


def _mbarrier(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    kind = parts[1]
    if kind in ("try_wait", "test_wait"):
        return _mbarrier_wait(resolve, parts, operands)
    if kind == "arrive":
        kind = "arrive.expect_tx" if parts[2] == "expect_tx" else kind
        operands = operands[1:]  # the state that it returns
    address = resolve.address(operands[0])
    count = resolve.source(operands[1], np.uint32) if len(operands) > 1 else None

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        cta, addresses = warp.cta, address(warp)
        for lane in lanes(mask):
            at = int(addresses[lane])
            value = int(count(warp)[lane]) if count else 1
            if kind in ("init", "inval"):
                offset = int(cta.memory.offsets(addresses[lane : lane + 1], 8)[0])
                if kind == "inval":
                    del cta.mbarriers[offset]
                elif not 0 < value < 1 << 20:
                    raise EmulatorError(f"mbarrier.init with a count of {value}")
                else:
                    cta.mbarriers[offset] = Mbarrier(value, value)
            elif kind == "arrive.expect_tx":
                cta.mbarrier(at).expect(value)
                cta.mbarrier(at).arrive()
            elif kind == "arrive":
                cta.mbarrier(at).arrive(value)
            else:
                raise unsupported(parts)

    return run


def _mbarrier_wait(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    require(parts, "parity")
    put, address = resolve.destination(operands[0]), resolve.address(operands[1])
    parity = resolve.source(operands[2], np.uint32)
    blocks = parts[1] == "try_wait"

    def run(warp: Warp, mask: np.ndarray | None) -> Any:
        active = lanes(mask)
        addresses, wanted = address(warp)[active], parity(warp)[active]
        if (addresses != addresses[0]).any() or (wanted != wanted[0]).any():
            raise EmulatorError("lanes wait for different mbarriers")
        at = int(addresses[0])
        if at >> RANK_BITS != warp.cta.rank:
            raise EmulatorError("mbarrier wait on another CTA's")
        barrier = warp.cta.mbarrier(at)
        # the phase before the current one is the one that counts as complete
        ready = barrier.phase % 2 != int(wanted[0]) % 2
        if not ready and blocks:
            warp.waiting = (
                f"mbarrier {(at & OFFSET) - SHARED_BASE} parity {int(wanted[0])}: phase {barrier.phase} "
                f"lacks {barrier.pending} of {barrier.count} arrivals and {barrier.transactions} bytes"
            )
            return BLOCK
        put(warp, mask, np.full(LANES, ready))
        return None

    return run


def _fence(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    if parts[1:3] != ["proxy", "async"] and not parts[-1].startswith("async"):
        return lambda warp, mask: None  # memory accesses are executed in order
    return lambda warp, mask: warp.cta.memory.fence(warp.number)


TABLE = {"bar": _barrier, "barrier": _barrier, "mbarrier": _mbarrier, "fence": _fence}
