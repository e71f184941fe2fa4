"""`sparse-pretrain compare`: every recipe with every seed, each an ordinary training run; then what came out."""

from __future__ import annotations

import datetime
import hashlib
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_pretrain import runs, train
from sparse_pretrain.config import CompareConfig, TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import config_dir
from sparse_pretrain.reporting.comparison import PlannedRun, read_comparison
from sparse_pretrain.reporting.comparison_table import (
    Provenance,
    comparison_json,
    comparison_markdown,
    comparison_text,
)
from sparse_pretrain.reporting.table import duration

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

DENSE = "dense"


@dataclass(frozen=True)
class Request:
    """What the command line of a comparison asks for.

    Attributes:
        recipes: empty = every one there is.
        own: overrides of what CompareConfig has beside the options of a run.
        shared: overrides of every run.
    """

    recipes: list[str]
    own: list[str]
    shared: list[str]

    def grids(self, cfg: CompareConfig) -> list[list[str]]:
        """The options of each `train -m` that together run it all: every recipe with the first seed, then with the
        second. Options of recipes are not for dense, which then has a grid of its own.

        Raises:
            UserError: there is no seed.
        """
        if not cfg.seeds:
            raise UserError("seeds", "none", "one or more, as seeds=1,2,3")
        recipes = self.recipes or sorted(path.stem for path in (config_dir() / "recipe").glob("*.yaml"))
        if DENSE not in recipes:
            print(f"recipe={DENSE} is added: it is what the others are compared with", flush=True)
        recipes = [DENSE, *(recipe for recipe in dict.fromkeys(recipes) if recipe != DENSE)]
        seeds = [str(seed) for seed in dict.fromkeys(cfg.seeds)]
        grid = [f"seed={','.join(seeds)}"]
        if not any(override.startswith("recipe.") for override in self.shared):
            return [[*grid, f"recipe={','.join(recipes)}", *self.shared]]
        others = [override for override in self.shared if not override.startswith("recipe.")]
        dense, sparse = [*grid, f"recipe={DENSE}", *others], [*grid, f"recipe={','.join(recipes[1:])}", *self.shared]
        return [dense, sparse] if recipes[1:] else [dense]

    def one_run(self) -> list[str]:
        """The overrides of CompareConfig, with the first of the recipes."""
        return [*(f"recipe={recipe}" for recipe in self.recipes[:1]), *self.own, *self.shared]


def parse(overrides: Sequence[Override]) -> Request:
    """Tell a comparison's own options from those of its runs.

    Raises:
        UserError: one that a comparison sets itself, or several values for one that must be equal in all runs.
    """
    recipes: list[str] = []
    own: list[str] = []
    shared: list[str] = []
    for override in overrides:
        option, text = override.key_or_group, str(override.input_line)
        if option == "recipe":
            recipes = _values(override)
        elif option == "seeds":
            own.append(f"seeds=[{','.join(_values(override))}]")
        elif option in ("seed", "run_dir"):
            allowed = "seeds=1,2,3" if option == "seed" else "runs_dir=FOLDER: each run has its own folder in it"
            raise UserError(option, text.partition("=")[2], allowed)
        elif override.is_sweep_override():
            raise UserError(text, "several values", "one value: recipe and seeds alone may have several")
        else:
            (own if option == "out" else shared).append(text)
    return Request(recipes, own, shared)


def _values(override: Override) -> list[str]:
    """The values of `a=1,2`, `a=[1,2]` or `a=1`."""
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    return [str(item) for item in (value if isinstance(value, list) else [value])]


class Comparison:
    """The runs of a comparison: what is done with each, and with all of them at the end.

    Args:
        cfg: `seeds` and `out` of the comparison.
        jobs: the config of every run, checked.
        options: the command line that this is, for whoever wants to repeat it.

    Raises:
        UserError: the runs are not to reach their end, or the folder of the results cannot be written.
    """

    def __init__(self, cfg: CompareConfig, jobs: Sequence[TrainConfig], options: Sequence[str]) -> None:
        if jobs[0].trainer.stop_after is not None:
            raise UserError(
                "trainer.stop_after", jobs[0].trainer.stop_after, "null: only runs at their end are compared"
            )
        jobs = [train.with_absolute_paths(job) for job in jobs]
        self.planned = [PlannedRun(job.recipe.name, job.seed, runs.resolve_run_dir(job)) for job in jobs]
        self.command = f"sparse-pretrain compare {shlex.join(options)}".strip()
        names = "".join(sorted(run.folder.name for run in self.planned))
        digest = hashlib.sha256(names.encode()).hexdigest()[:8]
        default = Path(jobs[0].runs_dir) / f"compare-{jobs[0].model.name}-{digest}"
        self.out = Path(cfg.out or default).expanduser().resolve()
        with runs.writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)

    def run(self, cfg: TrainConfig, command: str = "") -> Path:
        """Train one run, or go on with it, or do nothing where it is complete; returns its folder.

        Raises:
            UserError, Interrupted: as `train.run`.
        """
        folder = runs.resolve_run_dir(train.with_absolute_paths(cfg))
        if not runs.is_complete(folder):
            number = [run.folder for run in self.planned].index(folder) + 1
            left = seconds_left(self.planned)
            time = f"; about {duration(left)} of training to go" if left is not None else ""
            print(f"\nrun {number} of {len(self.planned)}: {cfg.recipe.name}, seed {cfg.seed}{time}", flush=True)
        return train.run(cfg, command)

    def finish(self, _: Sequence[Path]) -> None:
        """Show and write what came out.

        Raises:
            UserError: no run is complete, two of them cannot be compared, or the results cannot be written.
        """
        from sparse_pretrain.reporting.comparison_figure import write_comparison_figure  # matplotlib takes a second

        comparison = read_comparison(self.planned)
        provenance = Provenance(self.command, datetime.datetime.now(datetime.UTC).date().isoformat())
        print()
        print(comparison_text(comparison))
        with runs.writing(self.out):
            write_comparison_figure(comparison, self.out / "comparison.png")
        runs.write_json(self.out / "comparison.json", comparison_json(comparison, provenance))
        runs.write_text(self.out / "comparison.md", comparison_markdown(comparison, provenance))
        print(f"\nResults: {self.out}/comparison.md, .json, .png")


def seconds_left(planned: Sequence[PlannedRun]) -> float | None:
    """Training time of the runs that are not complete, as the complete ones of the same recipe took, or of all; None
    before the first is."""
    known: dict[str, list[float]] = {}
    for run in planned:
        summary = runs.read_json(run.folder / runs.SUMMARY_FILE)
        if summary:
            known.setdefault(run.recipe, []).append(summary["seconds"])
    if not known:
        return None
    every = [seconds for of_recipe in known.values() for seconds in of_recipe]
    return sum(statistics.fmean(known.get(run.recipe, every)) for run in planned if not runs.is_complete(run.folder))
