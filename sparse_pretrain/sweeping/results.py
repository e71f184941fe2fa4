"""What a sweep has found so far: its trials, as table, page and pictures show them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sparse_pretrain.errors import UserError
from sparse_pretrain.reporting.table import duration
from sparse_pretrain.sweeping import record, storage
from sparse_pretrain.sweeping.space import Parameter, parse
from sparse_pretrain.sweeping.study import REASON, RUN, SECONDS, STEPS, short

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


@dataclass(frozen=True)
class TrialResult:
    """One trial.

    Attributes:
        state: complete, pruned, failed or running.
        params: option -> value, of a categorical one as on the command line.
        loss: the last validation loss, in nats; None before the first.
        steps, seconds: of training, up to the last logged row; None where nothing was logged.
        losses: step -> validation loss.
        reason: why it failed, else empty.
        run_dir: of its run; None where its settings do not go together.
    """

    number: int
    state: str
    params: dict[str, Any]
    loss: float | None
    steps: int | None
    seconds: float | None
    losses: dict[int, float] = field(default_factory=dict)
    reason: str = ""
    run_dir: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """A whole sweep.

    Attributes:
        record: sweep.yaml.
        trials: by number.
        importances: option -> share of what the options decide, the largest first; empty for too few trials.
    """

    name: str
    record: dict[str, Any]
    space: list[Parameter]
    trials: list[TrialResult]
    importances: dict[str, float]

    @property
    def best(self) -> TrialResult | None:
        complete = [trial for trial in self.trials if trial.state == "complete"]
        return min(complete, key=lambda trial: trial.loss or 0.0, default=None)


def read_sweep(folder: Path, url: str | None) -> SweepResult:
    """The sweep in `folder`, at its end or not.

    Args:
        url: of its storage; None = as it is recorded.

    Raises:
        UserError: not the folder of a sweep, or a storage that cannot be read.
    """
    known = record.read(folder)
    url = url if url is not None else known["storage"]
    if url is not None:
        if ":***@" in url:
            raise UserError("storage", f"{url}, without its password", "the URL with it")
        url = storage.absolute_url(url)
    elif not (folder / storage.JOURNAL_FILE).is_file():
        raise UserError("sweep", f"{folder} without {storage.JOURNAL_FILE}", "the folder of a sweep, left as it was")
    with storage.storing(folder):
        try:
            study = optuna.load_study(study_name=known["study"], storage=storage.open_storage(url, folder))
        except KeyError as error:
            raise UserError("storage", f"none with the study {known['study']}", "the one of the sweep") from error
        space = parse(known["space"], "tpe", ())
        return SweepResult(
            name=folder.name,
            record=known,
            space=space,
            trials=[_result(trial) for trial in study.get_trials(deepcopy=False)],
            importances=_importances(study),
        )


def _result(trial: FrozenTrial) -> TrialResult:
    steps = sorted(trial.intermediate_values)
    last = trial.intermediate_values[steps[-1]] if steps else None
    return TrialResult(
        number=trial.number,
        state=STATES[trial.state],
        params=trial.params,
        loss=trial.value if trial.state == TrialState.COMPLETE else last,
        steps=trial.user_attrs.get(STEPS, steps[-1] if steps else None),
        seconds=trial.user_attrs.get(SECONDS),
        losses={step: trial.intermediate_values[step] for step in steps},
        reason=trial.user_attrs.get(REASON, ""),
        run_dir=trial.user_attrs.get(RUN),
    )


def _importances(study: optuna.Study) -> dict[str, float]:
    """By PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023): how differently an option is spread among the best tenth
    of the complete trials. It needs no further package, so a sweep looks the same everywhere."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # seconds, with scikit-learn there

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def labels(options: Sequence[str]) -> dict[str, str]:
    """What to call each option: its last word, or as many as tell it from the others."""
    names = {}
    for option in options:
        parts = option.split(".")
        tails = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        names[option] = next(
            tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in options) == 1 or tail == option
        )
    return names


def table(sweep: SweepResult) -> tuple[list[list[str]], list[str]]:
    """Header and rows, the best first, then pruned, failed and running ones; and notes."""
    options = [parameter.option for parameter in sweep.space]
    names = labels(options)
    order = list(STATES.values())
    ranked = sorted(
        sweep.trials,
        key=lambda trial: (order.index(trial.state), trial.loss if trial.state == "complete" else 0, trial.number),
    )
    rows = [["trial", "state", *names.values(), "val loss", "steps", "time"]]
    for trial in ranked:
        rows.append(
            [
                str(trial.number),
                trial.state,
                *(short(trial.params[option]) for option in options),
                "-" if trial.loss is None else f"{trial.loss:.4f}",
                "-" if trial.steps is None else f"{trial.steps:,}",
                "-" if trial.seconds is None else duration(trial.seconds),
            ]
        )
    notes = [f"trial {trial.number} failed: {trial.reason}" for trial in sweep.trials if trial.state == "failed"]
    return rows, notes
