"""A warp: its registers, where its lanes are, and what it waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .in_flight import Groups
from .lanes import LANE, LANES

if TYPE_CHECKING:
    from .cta import Cta

Path = tuple[int, np.ndarray | None]  # pc and lanes; None: all of them


class Warp:
    """number: within its CTA."""

    def __init__(self, cta: Cta, number: int) -> None:
        self.cta, self.number = cta, number
        self.regs: list[Any] = [None] * len(cta.launch.program.register_names)
        self.fenced: list[Any] = []  # the registers as they were at the last wgmma.fence
        self.special = _special_registers(cta, number)
        # where the lanes are; more than one path while they diverge. The path with the lowest pc goes first.
        self.paths: list[Path] = [(0, None)]
        self.waiting = ""
        self.awaits: int | None = None  # the value of `done` of the barrier at which the warp waits
        self.cluster_phase: int | None = None  # and of the cluster's, from its arrival to its wait
        self.copies, self.stores, self.wgmmas = Groups(), Groups(), Groups()  # of cp.async, TMA stores
        self.dense_of: tuple[int, list[Any]] = (-1, [])  # the operands of the last mma.sp, and their dense matrix
        self.dense: np.ndarray | None = None

    @property
    def exited(self) -> bool:
        return not self.paths


def _special_registers(cta: Cta, number: int) -> dict[str, np.ndarray]:
    x = np.arange(number * LANES, (number + 1) * LANES, dtype=np.uint32)
    launch = cta.launch
    special = {
        "laneid": LANE, "warpid": number, "tid.x": x, "tid.y": 0, "tid.z": 0,
        "ntid.x": launch.program.threads, "ntid.y": 1, "ntid.z": 1,
        "ctaid.x": cta.index[0], "ctaid.y": cta.index[1], "ctaid.z": cta.index[2],
        "nctaid.x": launch.grid[0], "nctaid.y": launch.grid[1], "nctaid.z": launch.grid[2],
        "clusterid.x": cta.index[0] // launch.size, "clusterid.y": cta.index[1], "clusterid.z": cta.index[2],
        "nclusterid.x": launch.grid[0] // launch.size, "nclusterid.y": launch.grid[1],
        "nclusterid.z": launch.grid[2], "cluster_ctarank": cta.rank, "cluster_nctarank": launch.size,
        "cluster_ctaid.x": cta.rank, "cluster_ctaid.y": 0, "cluster_ctaid.z": 0,
        "cluster_nctaid.x": launch.size, "cluster_nctaid.y": 1, "cluster_nctaid.z": 1,
    }  # fmt: skip
    return {f"%{name}": np.broadcast_to(np.uint32(value), LANES) for name, value in special.items()}
