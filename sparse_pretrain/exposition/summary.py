"""What came out: the search's frontier, every method's best networks, as tables and as numbers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_pretrain.exposition.search import Structure, name
from sparse_pretrain.exposition.trials import Found
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.reporting.table import text_table

NONE = "-"


@dataclass(frozen=True)
class Point:
    """All trainings of one thing: a number of weights in the search; a method, width and target in pruning.

    Attributes:
        best: the most accurate of them.
        networks: how many different ones, as masks in the search.
    """

    found: Sequence[Found]

    @property
    def best(self) -> Found:
        return max(self.found, key=lambda pair: (pair[1].accuracy, -pair[1].weights))

    @property
    def networks(self) -> int:
        return len({trial.network for trial, _ in self.found})

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(outcome, field) for _, outcome in self.found)


@dataclass(frozen=True)
class Summary:
    """Everything found.

    Attributes:
        target: the accuracy wanted.
        structure: which the masks are of.
        structures, masks, pruned: the trials of the three parts.
    """

    target: float
    structure: Structure
    structures: Sequence[Found]
    masks: Sequence[Found]
    pruned: Sequence[Found]

    @property
    def frontier(self) -> dict[int, Point]:
        """The search by number of weights, ascending: dense structures and masks."""
        groups: dict[int, list[Found]] = {}
        for pair in (*self.structures, *self.masks):
            groups.setdefault(pair[1].weights, []).append(pair)
        return {weights: Point(groups[weights]) for weights in sorted(groups) if weights}

    @property
    def sparsest(self) -> Found | None:
        """The network of the search with the fewest weights that reaches the target."""
        return _sparsest([point.best for point in self.frontier.values()], self.target)

    @property
    def methods(self) -> dict[str, dict[tuple[str, str], Point]]:
        """Pruning by method, then by width and target."""
        groups: dict[str, dict[tuple[str, str], list[Found]]] = {}
        for pair in self.pruned:
            trial = pair[0]
            groups.setdefault(trial.method, {}).setdefault((trial.network, trial.target), []).append(pair)
        return {method: {key: Point(group) for key, group in by_key.items()} for method, by_key in groups.items()}

    def counterpart(self) -> Found | None:
        """The most accurate pruned network with no more weights than the sparsest one of the search."""
        limit = self.sparsest[1].weights if self.sparsest else max(self.frontier)
        small = [pair for pair in self.pruned if 0 < pair[1].weights <= limit]
        return max(small, key=lambda pair: pair[1].accuracy, default=None)


def _sparsest(found: Iterable[Found], target: float) -> Found | None:
    good = [pair for pair in found if pair[1].accuracy >= target]
    return min(good, key=lambda pair: (pair[1].weights, -pair[1].accuracy), default=None)


def search_text(summary: Summary, tried: int) -> str:
    """The search's table, for a terminal.

    Args:
        tried: structures looked at.
    """
    header = ["weights", "networks", "trainings", "best accuracy"]
    rows = [
        [str(weights), str(point.networks), str(len(point.found)), percent(point.best[1].accuracy)]
        for weights, point in summary.frontier.items()
    ]
    notes = []
    if tried:
        notes.append(
            f"{tried} dense structures were tried, smallest first, and the masks of {name(summary.structure)}."
        )
    if summary.sparsest:
        trial, outcome = summary.sparsest
        notes.append(
            f"Sparsest at {percent(summary.target)}: {outcome.weights} weights, {outcome.parameters} parameters with "
            f"biases, {percent(outcome.accuracy)}: {trial.network}"
        )
    else:
        notes.append(f"No network reached {percent(summary.target)}.")
    return text_table([header, *rows], notes)


def pruning_text(summary: Summary) -> str:
    """The table of methods that keep a number of weights, and of those that keep N of M."""
    limit = summary.sparsest[1].weights if summary.sparsest else max(summary.frontier)
    header = ["method", f"weights at {percent(summary.target)}", "width", f"best with {limit}", "no path", "neurons"]
    rows = []
    patterns = [["N:M masks", "width", "weights", "best accuracy", "mean", "no path", "neurons"]]
    for method, points in summary.methods.items():
        counted = [point for (_, target), point in points.items() if parse_pattern(target) is None]
        if counted:
            fewest = _sparsest([pair for point in counted for pair in point.found], summary.target)
            small = [
                outcome.accuracy for point in counted for _, outcome in point.found if 0 < outcome.weights <= limit
            ]
            rows.append(
                [
                    method,
                    str(fewest[1].weights) if fewest else NONE,
                    fewest[0].network.split("-")[0] if fewest else NONE,
                    percent(max(small)) if small else NONE,
                    *_waste(counted),
                ]
            )
        patterns += [
            [
                f"{method} {target}",
                network.split("-")[0],
                str(point.best[1].weights),
                percent(point.best[1].accuracy),
                percent(point.mean("accuracy")),
                *_waste([point]),
            ]
            for (network, target), point in points.items()
            if parse_pattern(target) is not None
        ]
    notes = [
        f"weights at {percent(summary.target)}: the fewest with which a pruned network reached it, of weights on a "
        "path from an input to the output; width: its neurons a layer before.",
        f"best with {limit}: the best accuracy with no more such weights, as the sparsest network of the search has.",
        "no path: kept weights that are on none, mean over trainings. neurons: hidden neurons with kept weights, but "
        "on no path; mean.",
    ]
    tables = [[header, *rows]] if rows else []
    tables += [patterns] if patterns[1:] else []
    return "\n\n".join([*(text_table(table, []) for table in tables[:-1]), text_table(tables[-1], notes)])


def _waste(points: Sequence[Point]) -> tuple[str, str]:
    outcomes = [outcome for point in points for _, outcome in point.found]
    kept, used = sum(outcome.kept for outcome in outcomes), sum(outcome.weights for outcome in outcomes)
    return f"{1 - used / kept:.0%}", f"{statistics.fmean(outcome.disconnected for outcome in outcomes):.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def numbers(summary: Summary) -> dict[str, Any]:
    """Every figure of the tables, for other programs."""
    return {
        "target": summary.target,
        "structure": list(summary.structure),
        "sparsest": _record(summary.sparsest),
        "counterpart": _record(summary.counterpart()),
        "frontier": [
            {"weights": weights, "networks": point.networks, "trainings": len(point.found), "best": _record(point.best)}
            for weights, point in summary.frontier.items()
        ],
        "pruning": [
            {
                "method": method,
                "network": network,
                "target": target,
                "trainings": len(point.found),
                "best": _record(point.best),
                **{f"mean_{field}": point.mean(field) for field in ("accuracy", "kept", "weights", "disconnected")},
            }
            for method, points in summary.methods.items()
            for (network, target), point in points.items()
        ],
    }


def _record(found: Found | None) -> dict[str, Any] | None:
    return found and {**dataclasses.asdict(found[0]), **dataclasses.asdict(found[1])}
