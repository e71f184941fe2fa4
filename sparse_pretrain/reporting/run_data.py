"""A run as the report sees it: what its folder holds, parsed."""

from __future__ import annotations

import os.path
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_pretrain import runs
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.errors import UserError

DENSE_FINETUNE = "dense fine-tune"  # as in the phase column


@dataclass(frozen=True, eq=False)
class RunData:
    """One run folder.

    Attributes:
        facts: run.json.
        rows: metrics column -> one float64 per logged step; nan where nothing was logged.
        phases: the phase of each row.
        summary: summary.json; empty for a run that is not complete.
        snapshots: step -> layer name -> corner of the mask, bool (rows, columns); first, middle and last.
    """

    folder: Path
    config: TrainConfig
    facts: dict[str, Any]
    rows: dict[str, np.ndarray]
    phases: list[str]
    summary: dict[str, Any]
    snapshots: dict[int, dict[str, np.ndarray]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def recipe(self) -> str:
        return self.config.recipe.name

    @property
    def is_dense(self) -> bool:
        return self.config.recipe.projection == "none"

    @property
    def has_dense_products(self) -> bool:
        """Whether a sparse run computed everything with dense products."""
        products = self.facts.get("sparse_products")
        return products is not None and all(choice == "dense" for plan in products["plans"].values() for choice in plan)

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(self.rows["step"][-1])

    @property
    def val_loss(self) -> float:
        """The last validation loss; nan before the first."""
        _, losses = self.logged("step", "val/loss")
        return float(losses[-1]) if len(losses) else float("nan")

    @property
    def accuracy(self) -> float:
        """The last share of right predictions in validation; nan where none is reported."""
        _, shares = self.logged("step", "val/accuracy")
        return float(shares[-1]) if len(shares) else float("nan")

    @property
    def unit(self) -> str:
        """What the column `tokens` counts."""
        return "images" if self.config.data.task == "image_classification" else "tokens"

    @property
    def corpus(self) -> str:
        """Name and size of what it was trained on."""
        corpus = self.facts["corpus"]
        size = "tokens" if "train_tokens" in corpus else "examples"
        return f"{corpus['name']}, {corpus[f'train_{size}']:,} {size}"

    @property
    def flip_rate(self) -> float:
        """The last one; nan for a dense run, and before the second refresh."""
        _, rates = self.logged("step", "sparsity/flip_rate")
        return float("nan") if self.is_dense or not len(rates) else float(rates[-1])

    @property
    def tokens_per_second(self) -> float:
        """The median over the logged intervals, without the first (it pays for warming up)."""
        if self.summary:
            return float(self.summary["tokens_per_second"])
        rates = self.rows["train/tokens_per_second"]
        return float(np.nanmedian(rates[1:] if len(rates) > 1 else rates))

    def logged(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Columns `x` and `y`, where `y` was logged."""
        there = ~np.isnan(self.rows[y])
        return self.rows[x][there], self.rows[y][there]


def read_run(folder: Path) -> RunData:
    """The run in `folder`, complete or not.

    Raises:
        UserError: not a run folder, one of a version with other options, or one without metrics so far.
    """
    try:
        config = runs.read_config(folder)
    except UserError as error:
        if not (folder / runs.CONFIG_FILE).is_file():
            raise
        # Among several folders, the option alone would not tell which one it is about.
        raise UserError("runs", f"{folder}, whose config has {error}", "runs of this version") from error
    facts = runs.read_json(folder / runs.RUN_FILE)
    lines = runs.read_rows(folder / runs.METRICS_FILE)
    if not (lines and facts):
        raise UserError("runs", f"{folder}, which has no metrics yet", "runs that have logged a step")
    numbers = [column for column in runs.METRICS_COLUMNS if column != "phase"]
    return RunData(
        folder=folder,
        config=config,
        facts=facts,
        rows={column: np.array([float(line.get(column) or "nan") for line in lines]) for column in numbers},
        phases=[line["phase"] for line in lines],
        summary=runs.read_json(folder / runs.SUMMARY_FILE),
        snapshots=_read_snapshots(folder / "masks"),
    )


def _read_snapshots(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    paths = sorted(folder.glob("step-*.npz"))
    snapshots = {}
    for path in {paths[0], paths[len(paths) // 2], paths[-1]} if paths else ():
        try:
            with open(path, "rb") as file, np.load(file) as masks:
                snapshots[int(path.stem.removeprefix("step-"))] = {name: masks[name].astype(bool) for name in masks}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            continue  # cut short by a kill; the run writes it again when it goes on
    return dict(sorted(snapshots.items()))


def dense_first(runs: Sequence[RunData]) -> list[RunData]:
    """Dense runs, then the others, each in the order given."""
    return sorted(runs, key=lambda run: not run.is_dense)


def labels(runs: Sequence[RunData]) -> list[str]:
    """What to call each run: its recipe if no other has it, else its folder without what all begin with."""
    recipes = [run.recipe for run in runs]
    names = [run.name for run in runs if recipes.count(run.recipe) > 1]
    shared = os.path.commonprefix(names).rfind("-") + 1  # noqa: RUF071 (these are no paths)
    return [run.recipe if recipes.count(run.recipe) == 1 else run.name[shared:] for run in runs]


def same_but_recipe(run: RunData, other: RunData) -> bool:
    """Whether the two runs differ in the recipe alone: the same model, corpus, seed, steps and so on."""
    options, others = (
        {option: value for option, value in runs.identity(r.config).items() if not option.startswith("recipe.")}
        for r in (run, other)
    )
    digest, other_digest = (r.facts.get("corpus", {}).get("digest") for r in (run, other))
    return options == others and digest == other_digest


def dense_counterpart(run: RunData, runs: Sequence[RunData]) -> RunData | None:
    """The dense run among `runs` that `run` can be compared with; None for a dense run."""
    if run.is_dense:
        return None
    return next((other for other in runs if other.is_dense and same_but_recipe(run, other)), None)
