"""A CTA: its shared memory, its barriers and its warps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .barriers import Barrier, Mbarrier
from .errors import EmulatorError
from .lanes import LANES
from .shared_memory import OFFSET, RANK_BITS, SharedMemory
from .warp import Warp

if TYPE_CHECKING:
    from .launch import Launch


class Cta:
    """rank: in its cluster."""

    def __init__(self, launch: Launch, index: tuple[int, int, int], rank: int) -> None:
        self.launch, self.index, self.rank = launch, index, rank
        warps = launch.program.threads // LANES
        self.memory = SharedMemory(rank, launch.shared, warps)
        self.mbarriers: dict[int, Mbarrier] = {}  # by offset
        self.barriers: dict[int, Barrier] = {}
        self.warps = [Warp(self, i) for i in range(warps)]

    def check_running(self) -> None:
        """The shared memory of a CTA is gone when it ends; others of its cluster must not touch it then."""
        if all(warp.exited for warp in self.warps):
            raise EmulatorError(f"shared memory of CTA {self.index}, which has ended, is accessed by its cluster")

    def mbarrier(self, address: int) -> Mbarrier:
        """By its shared::cluster address."""
        rank, offset = address >> RANK_BITS, address & OFFSET
        peer = self.launch.cluster[rank] if rank < len(self.launch.cluster) else None
        if peer is None or offset not in peer.mbarriers:
            raise EmulatorError(f"no mbarrier was initialised at {address:#x} (shared base {self.memory.base:#x})")
        peer.check_running()
        return peer.mbarriers[offset]
