"""The search for a decay factor: short runs of one dense and several sparse settings, compared by their flip rates."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_pretrain import crosscheck, preflight, runs
from sparse_pretrain.config import LoggerConfig, SearchConfig, TrainConfig
from sparse_pretrain.config_recipe import TeacherConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import before_the_first_step
from sparse_pretrain.sparsity.decay_search import WINDOW, Trial, choose, in_window, next_factor

if TYPE_CHECKING:
    from sparse_pretrain.data.build import Store

RESULT_FILE, FIGURE_FILE = "decay-search.json", "decay-search.png"


def search(
    cfg: TrainConfig, settings: SearchConfig, folder: Path, train: Callable[[TrainConfig], Any]
) -> dict[str, Any]:
    """Find the decay factor of `cfg`'s recipe, and say how.

    Each setting is a run of its own in `folder`, which also gets the result and its figure. A search that was
    interrupted goes on where it was; runs that have got to the sample step are not run again.

    Args:
        cfg: the run to find a factor for, whatever factor it has.
        train: trains a run up to its `trainer.stop_after`.

    Returns:
        The result, as in `folder`'s decay-search.json: `factor` is what has been found.

    Raises:
        UserError: the search cannot be done, or no run of it gave a flip rate.
        Interrupted: a signal; the same search continues.
    """
    from sparse_pretrain.data.build import prepare

    step = crosscheck.sample_step(cfg, settings)
    todo = sorted(set(settings.factors))
    most = len(todo) + (settings.refine if len(todo) > 1 else 0)
    _announce(cfg, step, len(todo), most)
    with runs.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder), before_the_first_step():  # the short runs have handlers of their own
        data = prepare(cfg.data)
        print("dense:", flush=True)
        dense, note = _flip_rate(short_run(cfg, folder, None, step), data, train)
        if not dense:
            raise UserError(
                "search.sample_step",
                f"{step}, where a dense run has no flip rate to compare with: {note or 'its masks do not change'}",
                "a step at which a dense run is stable, and its learning rate above 0",
            )
        print(f"  flip rate {dense:.4g}", flush=True)
        trials: list[Trial] = []
        while todo:
            factor = todo.pop(0)
            print(f"decay factor {factor:g}:", flush=True)
            rate, note = _flip_rate(short_run(cfg, folder, factor, step), data, train)
            trials.append(Trial(factor, rate, None if rate is None else rate / dense, note))
            print(f"  {describe(trials[-1])}", flush=True)
            if not todo and len(trials) < most:
                between = next_factor(trials)
                todo += [] if between is None else [between]
        chosen = choose(trials)
        if chosen is None:
            raise UserError(
                "search.factors",
                f"{', '.join(f'{trial.factor:g}' for trial in trials)}, none of which trained up to step {step}",
                "smaller ones, or a lower optimizer.lr",
            )
        trials.sort(key=lambda trial: trial.factor)
        result = {
            "factor": chosen.factor,
            "in_window": in_window(chosen, trials),
            "window": list(WINDOW),
            "place": cfg.recipe.decay.place,
            "sample_step": step,
            "refresh_every": cfg.recipe.schedule.refresh_every,
            "dense_flip_rate": dense,
            "trials": [dataclasses.asdict(trial) for trial in trials],
        }
        runs.write_json(folder / RESULT_FILE, result)
        with runs.writing(folder):
            _draw(trials, chosen, result, folder / FIGURE_FILE)
    print(table(trials, chosen, dense))
    if not result["in_window"]:
        print(warning(trials))
    print(f"Figure: {folder / FIGURE_FILE}", flush=True)
    return result


def short_run(cfg: TrainConfig, folder: Path, factor: float | None, step: int) -> TrainConfig:
    """`cfg` up to `step`, sparse from the start with this decay factor at once, or dense (None) with would-be masks."""
    dense = factor is None
    every = cfg.recipe.schedule.refresh_every
    recipe = dataclasses.replace(
        cfg.recipe,
        frozen_preconditioner=False,  # there is no dense phase to take it from
        decay=dataclasses.replace(cfg.recipe.decay, factor=factor or 0.0, ramp=0.0),
        schedule=dataclasses.replace(
            cfg.recipe.schedule,
            dense_warmup=1.0 if dense else 0.0,
            dense_warmup_max=None,
            dense_finetune=0.0 if dense else cfg.recipe.schedule.dense_finetune,
            track_dense=dense,
        ),
        teacher=TeacherConfig(),
    )
    trainer = dataclasses.replace(
        cfg.trainer,
        log_every=every,  # a row at each refresh
        eval_every=cfg.trainer.steps,
        checkpoint_every=-(-cfg.trainer.checkpoint_every // every) * every,
        checkpoints_kept=1,
        stop_after=step,
    )
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(TrainConfig)}
    run_dir = folder / ("dense" if dense else f"factor-{factor:g}")
    short = {"recipe": recipe, "trainer": trainer, "logger": LoggerConfig(), "run_dir": str(run_dir), "resume": "auto"}
    return TrainConfig(**{**values, **short})


def _flip_rate(cfg: TrainConfig, data: Store, train: Callable[[TrainConfig], Any]) -> tuple[float | None, str]:
    """The flip rate of a short run at its last step, from its metrics if it has been there; else None, and why."""
    run_dir, step = runs.resolve_run_dir(cfg), cfg.trainer.stop_after
    if (run_dir / runs.CONFIG_FILE).is_file():
        runs.open_run(cfg, run_dir)
        preflight.check_same_corpus(run_dir, data)
    note = runs.read_json(run_dir / runs.RUN_FILE).get("diverged", "")
    rows = runs.read_rows(run_dir / runs.METRICS_FILE)
    if not note and not any(int(row["step"]) == step for row in rows):
        try:
            with redirect_stdout(io.StringIO()):  # what a run says of itself would be said many times
                train(cfg)
        except Exception as error:
            logged = len(runs.read_rows(run_dir / runs.METRICS_FILE))
            if getattr(error, "exit_code", None) != 2 or logged <= len(rows):
                raise  # it is not that training went wrong
            note = "diverged"
            if isinstance(error, UserError):
                print(f"  {error}")
            runs.write_json(run_dir / runs.RUN_FILE, {**runs.read_json(run_dir / runs.RUN_FILE), "diverged": note})
        rows = runs.read_rows(run_dir / runs.METRICS_FILE)
    row = next((row for row in rows if int(row["step"]) == step), None)
    shutil.rmtree(run_dir / runs.CHECKPOINTS, ignore_errors=True)  # one run's worth of disk for each would be a lot
    if row is None:
        return None, note
    if not math.isfinite(float(row["train/loss"])):
        return None, "diverged"
    if not row["sparsity/flip_rate"]:
        return None, "no flip rate"
    return float(row["sparsity/flip_rate"]), ""


def _announce(cfg: TrainConfig, step: int, factors: int, most: int) -> None:
    """What it costs, before it starts, and how the short runs differ from the run itself."""
    schedule, steps, warmup = cfg.recipe.schedule, cfg.trainer.steps, cfg.scheduler.warmup_steps
    more = f", and up to {most - factors} more between two factors" if most > factors else ""
    counts = dict.fromkeys((1 + factors, 1 + most))
    print(
        f"\nSearching the decay factor of {runs.run_name(cfg)}: flip rate at step {step}, over that of a dense run\n"
        f"  {1 + factors} short runs of {step:,} steps (1 dense, {factors} with decay factors){more}: "
        f"{' to '.join(f'{count * step:,}' for count in counts)} steps, "
        f"{' to '.join(f'{count * step / steps:.0%}' for count in counts)} of the run's {steps:,}"
    )
    if step > warmup:
        print(f"  step {step} is after the learning rate's warm-up of {warmup} steps, within which it should be")
    if schedule.dense_warmup or schedule.dense_warmup_max:
        print("  the short runs are sparse from step 0, where the run itself starts dense")
    if cfg.recipe.decay.ramp:
        print("  their decay has its whole factor from step 0, where the run's rises to it")
    if cfg.recipe.teacher.models:
        print("  they have no teacher")


def describe(trial: Trial) -> str:
    if trial.ratio is None:
        return trial.note
    return f"flip rate {trial.flip_rate:.4g}, {trial.ratio:.2f} of dense"


def table(trials: list[Trial], chosen: Trial, dense: float) -> str:
    """One line a trial, plain ASCII."""
    low, high = WINDOW
    lines = [f"\ndecay factor  flip rate  x dense  in {low:.2f} to {high:.2f}", f"{'dense':12}  {dense:9.4g}"]
    for trial in trials:
        figures = f"{'-':>9}  {trial.note}"
        if trial.ratio is not None:
            figures = f"{trial.flip_rate:9.4g}  {trial.ratio:7.2f}  {'yes' if in_window(trial, trials) else 'no'}"
            if not in_window(trial, trials) and WINDOW[0] <= trial.ratio <= WINDOW[1]:
                figures += ": below it for a smaller factor"
        lines.append(f"{trial.factor:<12g}  {figures}{'  <- chosen' if trial is chosen else ''}")
    return "\n".join(lines)


def warning(trials: list[Trial]) -> str:
    """What to try when no factor is in the window."""
    ratios = [trial.ratio for trial in trials if trial.ratio is not None]
    advice = "more search.refine"
    if all(ratio > WINDOW[1] for ratio in ratios):
        advice = "larger search.factors"
    elif all(ratio < WINDOW[0] for ratio in ratios):
        advice = "smaller search.factors"
    return (
        f"Warning: no factor tried has a flip rate of {WINDOW[0]:.2f} to {WINDOW[1]:.2f} of the dense one; the chosen "
        f"one is the nearest. Try {advice}, or another search.sample_step."
    )


def _draw(trials: list[Trial], chosen: Trial, result: dict[str, Any], path: Path) -> None:
    from sparse_pretrain.reporting.decay_curve import decay_curve  # matplotlib takes a second to import

    points = [(trial.factor, trial.ratio) for trial in trials if trial.ratio is not None]
    failed = [trial.factor for trial in trials if trial.ratio is None]
    path.write_bytes(decay_curve(points, failed, chosen.factor, WINDOW, result["sample_step"], result["refresh_every"]))
