"""Recipes compared over several seeds: what their run folders say, as means, spreads and gaps to dense."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain import runs
from sparse_pretrain.errors import UserError
from sparse_pretrain.reporting.run_data import DENSE_FINETUNE, RunData, dense_counterpart, read_run
from sparse_pretrain.reporting.table import machine

DENSE_WARMUP = "dense warm-up"  # as in the phase column


@dataclass(frozen=True)
class PlannedRun:
    """A run that is part of a comparison, whatever became of it."""

    recipe: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end; step: the last one logged, 0 if none was."""

    seed: int
    folder: Path
    step: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """One complete run beside the dense run of its seed. nan: there is no such figure.

    Attributes:
        gap: change of the validation loss against dense, in %.
        tokens_per_second: over the whole run, its phases as long as they are.
        speed: that over dense's.
        loss_at_time: validation loss at the time at which the fastest recipe ended.
    """

    run: RunData
    gap: float
    tokens_per_second: float
    speed: float
    loss_at_time: float

    @property
    def seed(self) -> int:
        return self.run.config.seed


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds, of those that have the figure.

    mean is nan without any, deviation with fewer than two."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        there = [value for value in values if not math.isnan(value)]
        return cls(
            statistics.fmean(there) if there else math.nan,
            statistics.stdev(there) if len(there) > 1 else math.nan,
        )


@dataclass(frozen=True, eq=False)
class RecipeResult:
    """One recipe over its seeds.

    Attributes:
        failures: of the other seeds.
    """

    recipe: str
    outcomes: list[Outcome]
    failures: list[Failure]

    @property
    def is_dense(self) -> bool:
        return bool(self.outcomes) and self.outcomes[0].run.is_dense

    @property
    def loss(self) -> Spread:
        return Spread.of([outcome.run.val_loss for outcome in self.outcomes])

    @property
    def gap(self) -> Spread:
        return Spread.of([outcome.gap for outcome in self.outcomes])

    @property
    def flip_rate(self) -> Spread:
        return Spread.of([outcome.run.flip_rate for outcome in self.outcomes])

    @property
    def tokens_per_second(self) -> float:
        """Median over seeds; nan without a complete run."""
        rates = [outcome.tokens_per_second for outcome in self.outcomes]
        return statistics.median(rates) if rates else math.nan

    @property
    def speed(self) -> Spread:
        return Spread.of([outcome.speed for outcome in self.outcomes])

    @property
    def loss_at_time(self) -> Spread:
        return Spread.of([outcome.loss_at_time for outcome in self.outcomes])

    @property
    def dense_start(self) -> float:
        """Share of the run's tokens before the sparse phase; `dense_end`: after it."""
        return self._share_of(DENSE_WARMUP)

    @property
    def dense_end(self) -> float:
        return self._share_of(DENSE_FINETUNE)

    @property
    def has_teacher(self) -> bool:
        return any(outcome.run.config.recipe.teacher.models for outcome in self.outcomes)

    @property
    def has_adapter(self) -> bool:
        return any(outcome.run.config.recipe.adapter.kind != "none" for outcome in self.outcomes)

    def _share_of(self, phase: str) -> float:
        """Mean over seeds; between two logged steps the later one's phase counts."""
        shares = []
        for outcome in self.outcomes:
            tokens = outcome.run.rows["tokens"]
            inside = np.array([name == phase for name in outcome.run.phases])
            shares.append(float(np.diff(tokens, prepend=0.0)[inside].sum() / tokens[-1]))
        return statistics.fmean(shares) if shares else 0.0


@dataclass(frozen=True, eq=False)
class RecipeComparison:
    """All recipes: dense first, then from the lowest loss to the highest, then those without a complete run.

    Attributes:
        one_machine: whether speeds can be compared.
        fastest, seconds: which recipe ended first, and when (median over seeds); "" and nan where that is not known.
    """

    recipes: list[RecipeResult]
    one_machine: bool
    fastest: str
    seconds: float

    @property
    def runs(self) -> list[RunData]:
        return [outcome.run for result in self.recipes for outcome in result.outcomes]

    @property
    def failures(self) -> list[tuple[str, Failure]]:
        return [(result.recipe, failure) for result in self.recipes for failure in result.failures]


def read_comparison(planned: Sequence[PlannedRun]) -> RecipeComparison:
    """What came out of `planned`; a run without summary.json has failed.

    Raises:
        UserError: no run is complete, or two of them cannot be compared.
    """
    found: dict[str, list[RunData]] = {run.recipe: [] for run in planned}
    failures: dict[str, list[Failure]] = {run.recipe: [] for run in planned}
    for run in planned:
        if runs.is_complete(run.folder):
            found[run.recipe].append(read_run(run.folder))
        else:
            rows = runs.read_rows(run.folder / runs.METRICS_FILE)
            failures[run.recipe].append(Failure(run.seed, run.folder, int(rows[-1]["step"]) if rows else 0))
    complete = [run for of_recipe in found.values() for run in of_recipe]
    if not complete:
        raise UserError("recipe", "not one run that came to its end", "recipes of which at least one run is complete")
    check_comparable(complete)
    one_machine = len({machine(run) for run in complete}) == 1
    ends = {recipe: statistics.median(_end(run) for run in group) for recipe, group in found.items() if group}
    fastest = min(ends, key=lambda recipe: ends[recipe]) if one_machine else ""
    seconds = ends[fastest] if one_machine else math.nan
    results = [
        RecipeResult(recipe, [_outcome(run, complete, seconds) for run in sorted(group, key=_seed)], failures[recipe])
        for recipe, group in found.items()
    ]
    results.sort(key=lambda result: (not result.is_dense, not result.outcomes, result.loss.mean))
    return RecipeComparison(results, one_machine, fastest, seconds)


def check_comparable(complete: Sequence[RunData]) -> None:
    """Raises UserError, naming what differs, unless recipe and seed are all that does."""
    first = complete[0]
    for run in complete[1:]:
        here, there = _deciding(first), _deciding(run)
        for fact in here | there:
            if here.get(fact) != there.get(fact):
                raise UserError(
                    fact,
                    f"{here.get(fact)} in {first.name} and {there.get(fact)} in {run.name}",
                    "the same in all runs of a comparison",
                )


def loss_at(run: RunData, seconds: float) -> float:
    """Validation loss after so many seconds of training, on the line between two validations; the final one after the
    end of the run; nan before the first."""
    times, losses = run.logged("seconds", "val/loss")
    if math.isnan(seconds) or not len(times) or seconds < times[0]:
        return math.nan
    return float(np.interp(seconds, times, losses))


def mean_rate(run: RunData) -> float:
    """Tokens per second of training, from the first logged step to the last: what comes before pays for warming up."""
    tokens, seconds = run.rows["tokens"], run.rows["seconds"]
    if len(tokens) == 1:
        return float(tokens[0] / seconds[0])
    return float((tokens[-1] - tokens[0]) / (seconds[-1] - seconds[0]))


def _deciding(run: RunData) -> dict[str, Any]:
    """What runs must share for their losses to be comparable: every option but recipe and seed, and what was found
    when they started."""
    options = runs.identity(run.config).items()
    return {
        "data": run.facts.get("corpus", {}).get("digest"),
        "trainer.precision": run.facts.get("precision"),
        **{
            option: value
            for option, value in options
            if not option.startswith("recipe.") and option not in ("seed", "trainer.precision")
        },
        "tokens": float(run.rows["tokens"][-1]),
    }


def _outcome(run: RunData, complete: Sequence[RunData], seconds: float) -> Outcome:
    dense = dense_counterpart(run, complete)
    gap = speed = math.nan
    if dense is not None:
        gap = 100 * (run.val_loss / dense.val_loss - 1)
        if machine(run) == machine(dense):
            speed = mean_rate(run) / mean_rate(dense)
    return Outcome(run, gap, mean_rate(run), speed, loss_at(run, seconds))


def _end(run: RunData) -> float:
    return float(run.rows["seconds"][-1])


def _seed(run: RunData) -> int:
    return run.config.seed
