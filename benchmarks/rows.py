"""One measured line, as it is kept in JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

OK = "ok"  # checked, then timed
WRONG = "wrong"  # the result does not agree: not timed
FAILED = "failed"  # an exception, a crash or no end
UNAVAILABLE = "unavailable"  # this device, version or shape cannot do it: the note says why
SKIPPED = "skipped"  # did not fit into the time
STATUSES = (OK, WRONG, FAILED, UNAVAILABLE, SKIPPED)

EAGER, GRAPH = "eager", "graph"


@dataclass
class Row:
    """What one arm does in one case.

    part, case: where it belongs; the rows of a case were measured in turns, in one process.
    arm: what was measured.
    ours: whether it is our code; false for dense products and other libraries.
    status: one of `STATUSES`.
    note: why it was not timed, or what else there is to know.
    mode: `eager` or `graph` (a CUDA graph, replayed).
    ms, low, high: median, 20th and 80th percentile of a call.
    error: ‖result - reference‖ / ‖reference‖ of the check before.
    ratio: the time of the case's baseline in the same mode / this time, so above 1 is faster than the baseline.
    floor_ms, floor: the shortest time that the measured ceilings of this device allow, and which of them sets it.
    extra: further numbers by name, with their unit in the name; `check`: it is there to be right, not to be fast.
    """

    part: str
    case: str
    arm: str
    ours: bool = True
    status: str = OK
    note: str = ""
    mode: str = ""
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    ratio: float | None = None
    floor_ms: float | None = None
    floor: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def floor_share(self) -> float | None:
        """Which share of the time the floor is; 1 would be as fast as this device allows."""
        return self.floor_ms / self.ms if self.floor_ms and self.ms else None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
