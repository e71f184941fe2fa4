"""What a warp has issued and not yet waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError

if TYPE_CHECKING:
    from .warp import Warp


class Groups:
    """Asynchronous operations of one kind: a commit closes a group of them, a wait executes the oldest groups."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.committed: list[list[Callable[[], None]]] = []

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def finish(self, keep: int) -> None:
        while len(self.committed) > keep:
            for operation in self.committed.pop(0):
                operation()

    def __bool__(self) -> bool:
        return bool(self.open or self.committed)


@dataclass
class Wgmma:
    """One wgmma in flight: how to compute it, and the registers it holds."""

    compute: Callable[[list[np.ndarray] | None], list[np.ndarray]]
    destination: list[int]
    accumulator: Wgmma | list[np.ndarray] | None
    operands: dict[int, np.ndarray]
    result: list[np.ndarray] | None = None

    def execute(self) -> None:
        start = self.accumulator.result if isinstance(self.accumulator, Wgmma) else self.accumulator
        self.result = self.compute(start)

    def finish(self, warp: Warp) -> None:
        """The registers get the result; nobody may have touched them before."""
        names = warp.cta.launch.program.register_names
        for register, value in self.operands.items():
            if warp.regs[register] is not value:
                raise EmulatorError(f"{names[register]} changed while a wgmma had to read it")
        if self.result is None:
            self.execute()
        for register, value in zip(self.destination, self.result, strict=True):
            held = warp.regs[register]
            if not isinstance(held, InFlight):
                raise EmulatorError(f"{names[register]} written while a wgmma was to write it")
            if held.wgmma is self:  # else a later wgmma accumulates on it
                warp.regs[register] = warp.fenced[register] = value


class InFlight:
    """What a register holds that a wgmma still has to write: no operation takes it."""

    def __init__(self, wgmma: Wgmma) -> None:
        self.wgmma = wgmma
