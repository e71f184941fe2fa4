"""The comparison table, as text and as cells for the page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_pretrain.reporting.run_data import (
    RunData,
    dense_counterpart,
    dense_first,
    labels,
)

WIDTH = 100  # columns of the terminal that the text table fits into


@dataclass(frozen=True)
class Comparison:
    """header: of the columns; cells: a row of texts per run; notes: what a reader must know to read them."""

    header: list[str]
    cells: list[list[str]]
    notes: list[str]


def compare(runs: Sequence[RunData]) -> Comparison:
    runs = dense_first(runs)
    names = labels(runs)
    cells = [[name, *_figures(run, runs)] for name, run in zip(names, runs, strict=True)]
    second = "perplexity" if _predict_words(runs) else "accuracy"
    speed = f"{runs[0].unit}/s"
    header = ["run", "val loss", second, "vs dense", speed, "x dense", "flip rate", "sparse", "time"]
    return Comparison(header, cells, _notes(runs, names))


def _predict_words(runs: Sequence[RunData]) -> bool:
    """Whether perplexity says something of all of them."""
    return all(run.config.data.task in ("language_modeling", "text_to_text") for run in runs)


def comparison_table(runs: Sequence[RunData]) -> str:
    """A plain ASCII table of at most 100 columns, and its notes."""
    comparison = compare(runs)
    return text_table([comparison.header, *comparison.cells], comparison.notes)


def text_table(table: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A header and rows, the first column to the left, then the notes; of at most 100 columns if the cells allow it."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    widths[0] = max(min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)), len(table[0][0]))
    lines = []
    for name, *figures in table:
        if len(name) > widths[0]:  # a line of its own: cut short, it might be mistaken for another run's
            lines.append(name)
            name = ""
        cells = [
            name.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    for note in notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _figures(run: RunData, runs: Sequence[RunData]) -> list[str]:
    dense = dense_counterpart(run, runs)
    versus = speed = "-"
    if dense is not None and run.summary and dense.summary:
        versus = f"{100 * (run.val_loss / dense.val_loss - 1):+.2f}%"
    if dense is not None and machine(run) == machine(dense):
        speed = f"{run.tokens_per_second / dense.tokens_per_second:.2f}x"
    loss, second = run.val_loss, run.accuracy
    if not math.isnan(loss) and _predict_words(runs):
        shown = _perplexity(loss)
    else:
        shown = "-" if math.isnan(second) else f"{second:.2%}"
    return [
        "-" if math.isnan(loss) else f"{loss:.4f}",
        shown,
        versus,
        f"{run.tokens_per_second:,.0f}",
        speed,
        _flip_rate(run),
        "-" if run.is_dense else f"{sparse_share(run):.0%}",
        duration(float(run.rows["seconds"][-1])),
    ]


def _notes(runs: Sequence[RunData], names: Sequence[str]) -> list[str]:
    unfinished = [
        f"{name}: not complete, at step {run.step:,} of {run.config.trainer.steps:,}."
        for name, run in zip(names, runs, strict=True)
        if not run.summary
    ]
    sparse = [run for run in runs if not run.is_dense]
    notes = unfinished
    if any(dense_counterpart(run, runs) is None for run in sparse):
        notes.append("vs dense: - where no dense run with the same other options is among these runs.")
    elif sparse:
        notes.append("vs dense: change of the validation loss; lower is better.")
    if sparse:
        notes.append("flip rate: share of mask entries changed by the last refresh / steps between refreshes.")
        notes.append("sparse: share of all parameters in 2:4 (or other N:M) layers.")
    ends_dense = [
        name
        for name, run in zip(names, runs, strict=True)
        if not run.is_dense and run.config.recipe.schedule.dense_finetune
    ]
    if ends_dense:
        notes.append(f"Ends with a dense fine-tune, so with dense weights: {', '.join(ends_dense)}.")
    return notes


def machine(run: RunData) -> tuple[object, ...]:
    """What two runs must share for their speeds to be comparable."""
    return run.facts.get("device"), run.facts.get("precision"), run.config.trainer.devices


def sparse_share(run: RunData) -> float:
    """Weights in 2:4 layers, as a share of all parameters."""
    weights = sum(row["out_features"] * row["in_features"] for row in run.facts["layers"] if row["sparse"])
    return weights / run.facts["model"]["parameters"]


def rate(value: float) -> str:
    """A flip rate with two digits that count."""
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def count(value: int) -> str:
    """Parameters or tokens: 12.34M, or all digits of fewer than 100,000."""
    return f"{value / 1e6:,.2f}M" if value >= 100_000 else f"{value:,}"


def duration(seconds: float) -> str:
    """48 s, 1m 52s, 3h 05m, 2d 04h."""
    for size, unit, smaller, smaller_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        # Rounded first, so that 3599.7 s is 1h 00m and not 60m 00s.
        count = round(seconds / smaller)
        if count * smaller >= size:
            return f"{count * smaller // size}{unit} {count % (size // smaller):02d}{smaller_unit}"
    return f"{seconds:.0f}s" if seconds >= 10 else f"{seconds:.1f}s"


def _flip_rate(run: RunData) -> str:
    if math.isnan(run.flip_rate):
        return "-"
    every = run.config.recipe.schedule.refresh_every
    return f"{rate(run.flip_rate)} / {every} step{'s' if every > 1 else ''}"


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700))
    return f"{value:,.2f}" if value < 1e5 else f"{value:.2e}"
