"""A comparison of recipes as a text table, as a Markdown page, and as numbers for other programs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparse_pretrain.reporting.comparison import Outcome, RecipeComparison, RecipeResult, Spread
from sparse_pretrain.reporting.table import count, duration, rate, text_table

NONE = "-"
DENSE_END, DENSE_START, TEACHER, ADAPTER = "F", "W", "T", "A"  # marks in the table


@dataclass(frozen=True)
class Provenance:
    """How a comparison came about. command: the one that repeats it; date: ISO 8601, of the results."""

    command: str
    date: str


def comparison_text(comparison: RecipeComparison) -> str:
    """The table and its notes, for a terminal, in ASCII."""
    header, rows = _cells(comparison)
    table = [[cell.replace("± ", "+-") for cell in row] for row in (header, *rows)]
    notes = [note.replace("±", "+-") for note in [_setting(comparison), *reading_notes(comparison)]]
    return text_table(table, notes)


def comparison_markdown(comparison: RecipeComparison, provenance: Provenance) -> str:
    """The page of the results: table, how to read it, what it does not show, and what it was run with."""
    header, rows = _cells(comparison)
    alignment = ["---", "---", *["--:"] * (len(header) - 2)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, alignment, *rows))
    parts = [
        f"# {comparison.runs[0].config.model.name}: 2:4 recipes on equal budgets",
        _setting(comparison),
        table,
        "![Validation loss over tokens, and the final gap to dense for each seed](comparison.png)",
        _list("How to read it", reading_notes(comparison)),
        _list("What it does not show", limits(comparison)),
        f"## Run again\n\n```\n{provenance.command}\n```",
        "## Run with\n\n| | |\n|---|---|\n"
        + "\n".join(f"| {name} | {value} |" for name, value in _facts(comparison, provenance)),
    ]
    return "\n\n".join(parts) + "\n"


def comparison_json(comparison: RecipeComparison, provenance: Provenance) -> dict[str, Any]:
    """Every number of the table and of each run; a figure that there is not is null."""
    first = comparison.runs[0]
    values = {
        "command": provenance.command,
        "date": provenance.date,
        "model": {"name": first.config.model.name, **first.facts["model"]},
        "corpus": first.facts["corpus"],
        "steps": first.config.trainer.steps,
        "tokens": int(first.rows["tokens"][-1]),
        "machines": sorted({str(run.facts["device"]) for run in comparison.runs}),
        "precision": first.facts["precision"],
        "packages": dict(_packages(comparison)),
        "equal_time": {"fastest": comparison.fastest or None, "seconds": comparison.seconds},
        "recipes": [_recipe_json(result) for result in comparison.recipes],
        "runs": [_run_json(result, outcome) for result in comparison.recipes for outcome in result.outcomes],
        "failed": [
            {"recipe": recipe, "seed": failure.seed, "run": failure.folder.name, "last_step": failure.step}
            for recipe, failure in comparison.failures
        ],
    }
    return _with_null(values)


def reading_notes(comparison: RecipeComparison) -> list[str]:
    """What a reader must know to read the table."""
    some_spread = any(len(result.outcomes) > 1 for result in comparison.recipes)
    notes = [
        f"{recipe}, seed {failure.seed}: FAILED after step {failure.step:,}; its figures are without this seed."
        for recipe, failure in comparison.failures
    ]
    notes.append(
        "val loss, vs dense: mean"
        + (" ± sample standard deviation over seeds" if some_spread else "; one seed says nothing about the spread")
        + "; vs dense: change of the validation loss against the dense run of the same seed, lower is better."
    )
    notes.append(
        "flip rate: share of mask entries changed by the last refresh / steps between refreshes; mean over seeds."
    )
    if comparison.one_machine:
        notes.append(
            "tokens/s: over the whole run, dense phases included; median over seeds. x dense: against the dense run of "
            "the same seed."
        )
        notes.append(
            f"loss @ {duration(comparison.seconds)}: validation loss (mean) after the training time in which "
            f"{comparison.fastest}, the fastest recipe, ended. The slower ones were in the middle of their schedules "
            "(learning rate, phases) then, so it is more than a run fitted to that time would be expected to reach."
        )
    else:
        notes.append("tokens/s: - because these runs are of different machines.")
    for mark, what, share in (
        (DENSE_START, "begins with a dense warm-up", lambda result: result.dense_start),
        (DENSE_END, "ends with a dense fine-tune, so with dense weights", lambda result: result.dense_end),
    ):
        marked = [f"{result.recipe} {share(result):.0%}" for result in comparison.recipes if mark in _marks(result)]
        if marked:
            notes.append(f"{mark}: {what}, for this share of the run: {', '.join(marked)}.")
    for mark, what in ((TEACHER, "also learns from a teacher"), (ADAPTER, "has adapters beside its sparse weights")):
        marked = [result.recipe for result in comparison.recipes if mark in _marks(result)]
        if marked:
            notes.append(f"{mark}: {what}: {', '.join(marked)}.")
    return notes


def limits(comparison: RecipeComparison) -> list[str]:
    """What this comparison does not say."""
    runs = comparison.runs
    seeds = max(len(result.outcomes) for result in comparison.recipes)
    notes = [
        "Every recipe ran with the same learning rate, schedule and batch size, not searched for each of them; its own "
        "options are published for other models and lengths. Searching either may change the order.",
        f"{seeds} seed{'s' if seeds > 1 else ''} at one size and length: gaps of the order of the spread do not tell "
        "recipes apart, and nothing here says how a gap changes with size.",
        "Equal tokens are not equal arithmetic: teachers, adapters and the computation of masks come on top. Recipes "
        "that are dense for a part of the run (W, F) are sparse for fewer tokens.",
    ]
    if any(run.has_dense_products for run in runs):
        notes.append(
            "The 2:4 products ran as dense products on masked weights: speeds show what the recipes cost beside the "
            "products, not what 2:4 hardware gains."
        )
    return notes


def _cells(comparison: RecipeComparison) -> tuple[list[str], list[list[str]]]:
    header = ["recipe", "", "seeds", "val loss", "vs dense", "flip rate", "tokens/s", "x dense"]
    if comparison.one_machine:
        header.append(f"loss @ {duration(comparison.seconds)}")
    return header, [_row(result, comparison.one_machine) for result in comparison.recipes]


def _row(result: RecipeResult, one_machine: bool) -> list[str]:
    complete = len(result.outcomes)
    seeds = f"{complete}/{complete + len(result.failures)}" if result.failures else str(complete)
    if not complete:
        return [result.recipe, "", seeds, "FAILED", *[NONE] * (5 if one_machine else 4)]
    every = result.outcomes[0].run.config.recipe.schedule.refresh_every
    cells = [
        result.recipe,
        _marks(result),
        seeds,
        _with_spread(result.loss, "{:.4f}".format),
        NONE if result.is_dense else _with_spread(result.gap, "{:+.2f}".format, "{:.2f}".format, unit="%"),
        _text(result.flip_rate.mean, lambda value: f"{rate(value)} / {every}"),
        _text(result.tokens_per_second if one_machine else math.nan, "{:,.0f}".format),
        NONE if result.is_dense else _text(result.speed.mean, "{:.2f}x".format),
    ]
    return [*cells, _text(result.loss_at_time.mean, "{:.4f}".format)] if one_machine else cells


def _marks(result: RecipeResult) -> str:
    marks = {
        DENSE_START: result.dense_start > 0,
        DENSE_END: result.dense_end > 0,
        TEACHER: result.has_teacher,
        ADAPTER: result.has_adapter,
    }
    return "".join(mark for mark, there in marks.items() if there)


def _setting(comparison: RecipeComparison) -> str:
    run = comparison.runs[0]
    cfg, corpus = run.config, run.facts["corpus"]
    tokens, evaluated = int(run.rows["tokens"][-1]), cfg.trainer.eval_batches * cfg.trainer.batch_size
    return (
        f"{cfg.model.name}, {count(run.facts['model']['parameters'])} parameters, on {corpus['name']}: each run "
        f"{cfg.trainer.steps:,} steps of {cfg.trainer.batch_size} examples of {cfg.data.tokens_per_example} {run.unit} "
        f"({count(tokens)}; the corpus: {run.corpus}), for a seed the same in the same order whatever the recipe; "
        f"validated on the same {evaluated:,} held-out examples, or as many as there are."
    )


def _facts(comparison: RecipeComparison, provenance: Provenance) -> list[tuple[str, str]]:
    runs = comparison.runs
    trainer, optimizer, scheduler = runs[0].config.trainer, runs[0].config.optimizer, runs[0].config.scheduler
    return [
        ("date", provenance.date),
        ("machine", _each(str(run.facts["device"]) for run in runs)),
        ("devices", str(trainer.devices)),
        ("precision", str(runs[0].facts["precision"])),
        ("python", _each(str(run.facts.get("python", NONE)) for run in runs)),
        *((name, " / ".join(versions)) for name, versions in _packages(comparison)),
        ("corpus digest", str(runs[0].facts["corpus"]["digest"])),
        ("vocabulary", f"{runs[0].facts['corpus']['vocab_size']:,}"),
        ("optimizer", f"{optimizer.name}, peak learning rate {optimizer.lr:g}, {scheduler.name} schedule"),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.config.seed for run in runs}))),
        ("training time of all runs", duration(sum(float(run.rows["seconds"][-1]) for run in runs))),
    ]


def _packages(comparison: RecipeComparison) -> list[tuple[str, list[str]]]:
    """Each package with the versions that runs had of it."""
    installed = [run.facts.get("packages", {}) for run in comparison.runs]
    names = dict.fromkeys(name for packages in installed for name in packages)
    return [(name, sorted({packages.get(name, NONE) for packages in installed})) for name in names]


def _recipe_json(result: RecipeResult) -> dict[str, Any]:
    outcomes = result.outcomes
    return {
        "recipe": result.recipe,
        "seeds": [outcome.seed for outcome in outcomes],
        "failed_seeds": [failure.seed for failure in result.failures],
        "val_loss": _spread_json(result.loss),
        "gap_percent": _spread_json(result.gap),
        "flip_rate": _spread_json(result.flip_rate),
        "tokens_per_second": result.tokens_per_second,
        "speed": _spread_json(result.speed),
        "loss_at_equal_time": _spread_json(result.loss_at_time),
        "seconds": statistics.median(float(o.run.rows["seconds"][-1]) for o in outcomes) if outcomes else math.nan,
        "dense_start": result.dense_start,
        "dense_end": result.dense_end,
        "options": dataclasses.asdict(outcomes[0].run.config.recipe) if outcomes else None,
    }


def _run_json(result: RecipeResult, outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    _, losses = run.logged("step", "val/loss")
    return {
        "recipe": result.recipe,
        "seed": outcome.seed,
        "run": run.name,
        "val_loss": run.val_loss,
        "gap_percent": outcome.gap,
        "flip_rate": run.flip_rate,
        "tokens_per_second": outcome.tokens_per_second,
        "speed": outcome.speed,
        "loss_at_equal_time": outcome.loss_at_time,
        "seconds": float(run.rows["seconds"][-1]),
        "dropped_steps": int(run.rows["train/dropped_steps"][-1]),
        "validations": {
            "step": run.logged("step", "val/loss")[0].astype(int).tolist(),
            "seconds": run.logged("seconds", "val/loss")[0].tolist(),
            "loss": losses.tolist(),
        },
    }


def _spread_json(spread: Spread) -> dict[str, float]:
    return {"mean": spread.mean, "sample_standard_deviation": spread.deviation}


def _with_null(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_spread(
    spread: Spread, mean: Callable[[float], str], deviation: Callable[[float], str] | None = None, unit: str = ""
) -> str:
    if math.isnan(spread.mean):
        return NONE
    if math.isnan(spread.deviation):
        return mean(spread.mean) + unit
    return f"{mean(spread.mean)} ± {(deviation or mean)(spread.deviation)}{unit}"


def _text(value: float, form: Callable[[float], str]) -> str:
    return NONE if math.isnan(value) else form(value)


def _list(title: str, notes: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {note}" for note in notes)


def _each(texts: Any) -> str:
    return " / ".join(dict.fromkeys(texts))
