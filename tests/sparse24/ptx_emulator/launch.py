"""The clusters of a launch, one after the other: whose turn it is, and where the lanes of a warp go."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arguments import TensorMap
from .barriers import Barrier
from .cta import Cta
from .errors import Deadlock, EmulatorError
from .global_memory import GlobalMemory
from .in_flight import InFlight
from .instructions.operands import BLOCK, EXIT, Run
from .lanes import ALL
from .parse import Program
from .warp import Path, Warp


@dataclass
class Launch:
    program: Program
    code: list[tuple[str, Run]]
    memory: GlobalMemory
    grid: tuple[int, int, int]
    size: int
    lazy: bool
    shared: int
    parameters: dict[str, int]
    tensor_maps: dict[int, TensorMap]
    random: np.random.Generator | None
    counts: Counter[str]
    cluster: list[Cta] = field(default_factory=list)
    cluster_barrier: Barrier = field(default_factory=Barrier)
    pending: list[Callable[[], None]] = field(default_factory=list)
    shuffled: bool = False

    def later(self, action: Callable[[], None]) -> None:
        """Something asynchronous that a barrier tells of."""
        if self.lazy:
            self.pending.append(action)
        else:
            action()

    def run_cluster(self, ctas: list[tuple[int, int, int]]) -> None:
        self.cluster = [Cta(self, index, rank) for rank, index in enumerate(ctas)]
        self.cluster_barrier, self.pending, self.shuffled = Barrier(), [], False
        warps = [warp for cta in self.cluster for warp in cta.warps]
        while warps:
            moved = self.turns_in_order(warps) if self.random is None else self.random_turn(warps)
            warps = [warp for warp in warps if not warp.exited]
            if warps and not moved:
                if not self.pending:
                    lines = "\n".join(self.describe(w) for w in warps)
                    raise Deadlock(f"deadlock; {len(warps)} warps wait:\n{lines}")
                which = 0 if self.random is None else int(self.random.integers(len(self.pending)))
                self.pending.pop(which)()
        if self.pending:
            raise EmulatorError(f"the kernel ends while {len(self.pending)} TMA loads are under way")

    def turns_in_order(self, warps: list[Warp]) -> bool:
        """Let every warp run until it has to wait; whether any did anything."""
        return sum(self.turn(warp, None) for warp in warps) > 0

    def random_turn(self, warps: list[Warp]) -> bool:
        """Let the first warp that can move do so; now and then reorder them, often by CTA.

        Most of the time the same warps are ahead, so that others are left far behind: races show in extremes.
        """
        if self.random.random() < 0.02 or not self.shuffled:
            self.random.shuffle(warps)
            if self.random.random() < 0.5:
                place = self.random.permutation(len(self.cluster))
                warps.sort(key=lambda warp: place[warp.cta.rank])
            self.shuffled = True
        limit = int(self.random.integers(1, 200))
        return any(self.turn(warp, limit) for warp in warps)

    def describe(self, warp: Warp) -> str:
        pc = warp.paths[0][0]
        text = self.program.statements[pc]
        return f"  CTA {warp.cta.index} warp {warp.number} at {pc} `{text[:100]}`: {warp.waiting or 'ready'}"

    def turn(self, warp: Warp, limit: int | None) -> bool:
        """Run a warp until it waits, ends or has had its turn; whether it did anything."""
        steps = 0
        code, counts = self.code, self.counts
        while warp.paths and (limit is None or steps < limit):
            if len(warp.paths) > 1:
                warp.paths = _merge(warp.paths)
            pc, mask = warp.paths[0]
            op, run = code[pc]
            try:
                result = run(warp, mask)
            except EmulatorError as error:
                raise type(error)(f"{error}\n{self.describe(warp)}") from None
            except (TypeError, AttributeError) as error:
                raise self.unusable_register(warp, pc, error) from error
            if result is BLOCK:
                return steps > 0
            warp.waiting = ""
            steps += 1
            counts[op] += 1
            if result is None:
                warp.paths[0] = (pc + 1, mask)
            elif result is EXIT:
                warp.paths.pop(0)
                self.check_exit(warp)
            elif isinstance(result, int):
                warp.paths[0] = (result, mask)
            else:
                _diverge(warp, pc, mask, *result)
                self.check_exit(warp)
        return steps > 0

    def unusable_register(self, warp: Warp, pc: int, error: Exception) -> Exception:
        """A TypeError of numpy means that a register holds nothing, or a result that is still to come."""
        statement = self.program.statements[pc]
        names = [name for name in re.findall(r"%?[\w#]+", statement) if name in self.program.register_types]
        values = {name: warp.regs[self.program.register_names.index(name)] for name in names}
        reason = {name: "a wgmma has to write it" for name in names if isinstance(values[name], InFlight)}
        reason = reason or {name: "it is not written" for name in names if values[name] is None}
        for name, why in reason.items():
            return EmulatorError(f"{name} read while {why}\n{self.describe(warp)}")
        return error

    def check_exit(self, warp: Warp) -> None:
        """What a warp must not leave behind when its last lanes end."""
        if not warp.exited:
            return
        where = f"CTA {warp.cta.index} warp {warp.number} ends"
        if warp.wgmmas:
            raise EmulatorError(f"{where} while a wgmma is in flight")
        if warp.stores:
            raise EmulatorError(f"{where} without having waited for its TMA stores")
        if warp.cluster_phase is not None:
            raise EmulatorError(f"{where} between barrier.cluster.arrive and wait")


def _merge(paths: list[Path]) -> list[Path]:
    """The paths by pc, those at the same one joined."""
    joined: dict[int, np.ndarray] = {}
    for pc, mask in paths:
        lanes = ALL if mask is None else mask
        joined[pc] = joined[pc] | lanes if pc in joined else lanes
    return [(pc, None if joined[pc].all() else joined[pc]) for pc in sorted(joined)]


def _diverge(warp: Warp, pc: int, mask: np.ndarray | None, target: Any, taken: np.ndarray) -> None:
    """Lanes `taken` of the path at pc go to `target` (or end), the others on."""
    others = (ALL if mask is None else mask) & ~taken
    warp.paths.pop(0)
    if target is not EXIT:
        warp.paths.append((target, taken))
    if others.any():
        warp.paths.append((pc + 1, others))
    warp.paths = _merge(warp.paths)
