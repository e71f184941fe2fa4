"""What warps wait at: barriers of a CTA or a cluster, and mbarriers."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import EmulatorError


@dataclass
class Mbarrier:
    """phase: how many phases are complete. pending: arrivals, transactions: bytes that the current one lacks."""

    count: int
    pending: int
    transactions: int = 0
    phase: int = 0

    def arrive(self, count: int = 1) -> None:
        self.pending -= count
        if self.pending < 0:
            raise EmulatorError(f"mbarrier: more arrivals than its count of {self.count}")
        self._complete()

    def expect(self, size: int) -> None:
        self.transactions += size

    def deliver(self, size: int) -> None:
        self.transactions -= size
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class Barrier:
    """A barrier that counts warps; `done` is how often it was passed."""

    arrived: int = 0
    expected: int = 0
    done: int = 0

    def arrive(self, warps: int) -> int:
        """Arrive with one warp at a barrier of so many; the value that `done` gets when all have."""
        if self.arrived and self.expected != warps:
            raise EmulatorError(f"barrier used with {warps} warps while others wait for {self.expected}")
        self.arrived, self.expected = self.arrived + 1, warps
        target = self.done + 1
        if self.arrived == warps:
            self.arrived, self.done = 0, target
        return target
