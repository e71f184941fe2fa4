"""Which decay factors to try, and which of those tried to take: the flip rate's criterion of FST (Hu et al., 2024).

A factor λ is judged by μ(λ) = r_λ / r_dense, the flip rate early in a sparse run over that of a dense run at the same
step. Above the window masks change more than the weights make them change anyway, and go on doing so; below it they
are frozen too early. μ falls as λ grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WINDOW = (0.60, 0.95)  # of μ


@dataclass(frozen=True)
class Trial:
    """One short run.

    Attributes:
        factor: λ.
        flip_rate: at the sample step; None if the run did not get there.
        ratio: μ; None without a flip rate.
        note: why there is no flip rate.
    """

    factor: float
    flip_rate: float | None
    ratio: float | None
    note: str = ""


def in_window(trial: Trial, trials: Sequence[Trial]) -> bool:
    """Whether this one of the trials will do: its μ is in the window, and has not been below it for a smaller factor.

    Under a decay that is far too strong, pruned weights swing about zero and masks change again.
    """
    return trial in _falling(trials) and trial.ratio is not None and WINDOW[0] <= trial.ratio <= WINDOW[1]


def next_factor(trials: Sequence[Trial]) -> float | None:
    """The factor to try after these, halfway in log λ between the first two neighbours with the window between them;
    None if one of them is in the window, or none are such neighbours.

    A run that diverged counts as below the window: a smaller factor may not.
    """
    if any(in_window(trial, trials) for trial in trials):
        return None
    for low, high in pairwise(sorted(trials, key=lambda trial: trial.factor)):
        if _above(low) and not _above(high):
            factor = round_factor(math.sqrt(low.factor * high.factor))
            return factor if low.factor < factor < high.factor else None
    return None


def choose(trials: Sequence[Trial]) -> Trial | None:
    """The trial whose μ is nearest to the middle of the window; outside it that is the one nearest to the window.

    Near is meant in log μ, a ratio: the middle is √(0.60 · 0.95) ≈ 0.755. Of two as near, the smaller factor. None if
    no trial has a flip rate.
    """
    judged = [trial for trial in _falling(trials) if trial.ratio is not None]
    return min(judged, key=lambda trial: (_distance(trial), trial.factor), default=None)


def round_factor(factor: float) -> float:
    """To two digits that count, so that it can be read and typed."""
    return float(f"{factor:.1e}")


def _falling(trials: Sequence[Trial]) -> list[Trial]:
    """By factor, up to the first whose μ is below the window."""
    ordered = sorted(trials, key=lambda trial: trial.factor)
    below = (i for i, trial in enumerate(ordered) if trial.ratio is not None and trial.ratio < WINDOW[0])
    return ordered[: next(below, len(ordered)) + 1]


def _above(trial: Trial) -> bool:
    return trial.ratio is not None and trial.ratio > WINDOW[1]


def _distance(trial: Trial) -> float:
    if not trial.ratio:
        return math.inf
    return abs(math.log(trial.ratio / math.sqrt(WINDOW[0] * WINDOW[1])))
