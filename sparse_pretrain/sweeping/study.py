"""The trials of a sweep: which are to run, with which settings, and what came of them.

Every process of a sweep has this view of one study. A trial is created whole, with all its settings, in one write,
under a lock of the sweep's folder. While it runs, a lock of its own is held by the process that runs it and by its run:
when both are gone, however they went, the trial is free, and the next process that asks goes on with it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
import yaml
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from sparse_pretrain import runs
from sparse_pretrain.config import SweepConfig, TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.schema import load, to_dict
from sparse_pretrain.sweeping import space as spaces
from sparse_pretrain.sweeping.locks import exclusive, try_lock
from sparse_pretrain.sweeping.storage import storing

TRIALS = "trials"  # a folder in that of the sweep
RUN, REASON, STEPS, SECONDS = "run_dir", "reason", "steps", "seconds"  # attributes of a trial
SWEEP = "sweep"  # attribute of a study: which sweep it is
ATTEMPTS = 50  # to draw settings that are new, before those left are counted out
REDUCTION = 3  # hyperband: one trial of so many goes on at each rung

Compose = Callable[[list[str]], TrainConfig]


@dataclass
class Claim:
    """A trial that this process is to run.

    Attributes:
        config: of its run, with absolute paths.
        lock: closing it gives the trial up.
        resumed: whether another process had begun it.
    """

    trial: Trial
    params: dict[str, Any]
    config: TrainConfig
    lock: IO[str]
    resumed: bool

    @property
    def number(self) -> int:
        return self.trial.number


def trial_file(folder: Path, number: int, suffix: str) -> Path:
    return folder / TRIALS / f"{number:04}{suffix}"


def trial_config(folder: Path, number: int) -> TrainConfig:
    """The config of a trial's run.

    Raises:
        UserError: it is gone or damaged, or of a version with other options.
    """
    path = trial_file(folder, number, ".yaml")
    values = runs.read_yaml(path) if path.is_file() else None
    if values is None:
        raise UserError("out", f"{path}, which is missing or damaged", "the folder of a sweep, left as it was")
    return load(TrainConfig, values)


def pruner(cfg: SweepConfig) -> optuna.pruners.BasePruner:
    if cfg.pruner == "none":
        return optuna.pruners.NopPruner()
    if cfg.pruner == "median":
        return optuna.pruners.MedianPruner(cfg.prune_after_trials, cfg.prune_after_steps)
    first = max(cfg.trainer.eval_every, cfg.prune_after_steps)
    return optuna.pruners.HyperbandPruner(
        min_resource=first, max_resource=max(cfg.trainer.steps, first), reduction_factor=REDUCTION
    )


def open_study(storage: BaseStorage, folder: Path, cfg: SweepConfig, identity: dict[str, Any]) -> optuna.Study:
    """The study of a sweep, which is called as its folder, made if there is none.

    Raises:
        UserError: the storage has one of that name that belongs to another sweep.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    with storing(folder):
        study = optuna.create_study(
            storage=storage, study_name=folder.name, load_if_exists=True, sampler=RandomSampler(), pruner=pruner(cfg)
        )
        if SWEEP not in study.user_attrs:
            study.set_user_attr(SWEEP, digest)
        if study.user_attrs[SWEEP] != digest:
            raise UserError(
                "storage", f"another sweep under the name {folder.name}", "a storage of its own, or another out=FOLDER"
            )
    return study


class Trials:
    """One process's view of the sweep's trials.

    Args:
        study: with the sweep's pruner.
        folder: of the sweep, there.
        compose: the checked config of a run with some more overrides; raises UserError.
    """

    def __init__(
        self, study: optuna.Study, folder: Path, space: list[spaces.Parameter], cfg: SweepConfig, compose: Compose
    ) -> None:
        self.study = study
        self.folder = folder
        self.space = space
        self.cfg = cfg
        self.compose = compose
        self.exhausted = False
        with storing(folder):
            (folder / TRIALS).mkdir(parents=True, exist_ok=True)

    def all(self) -> list[FrozenTrial]:
        with storing(self.folder):
            return self.study.get_trials(deepcopy=False)

    def running(self) -> int:
        """The trials that have begun and not ended, in whichever process."""
        return sum(trial.state == TrialState.RUNNING for trial in self.all())

    def claim(self) -> Claim | None:
        """A trial whose process is gone, or else a new one; None when all have been begun, or no settings are left.

        Raises:
            UserError: the storage or the folder fails, or a file of a trial is damaged.
        """
        with storing(self.folder), exclusive(self.folder / ".lock"):
            return self._orphan() or self._new()

    def _orphan(self) -> Claim | None:
        for trial in self.all():
            if trial.state != TrialState.RUNNING:
                continue
            lock = try_lock(trial_file(self.folder, trial.number, ".lock"))
            if lock is None:
                continue
            if self.all()[trial.number].state == TrialState.RUNNING:  # not ended just before its lock came free
                try:
                    config = trial_config(self.folder, trial.number)
                except UserError:
                    lock.close()
                    raise
                return Claim(Trial(self.study, trial._trial_id), trial.params, config, lock, resumed=True)
            lock.close()
        return None

    def _new(self) -> Claim | None:
        while True:
            trials = self.all()
            if len(trials) >= self.cfg.trials or self.exhausted:
                return None
            proposal = self._propose(trials)
            if proposal is None:
                self.exhausted = True
                return None
            params, config = proposal
            distributions = {parameter.option: parameter.distribution for parameter in self.space}
            if isinstance(config, UserError):  # settings that do not go together: nothing to run
                self._add(TrialState.FAIL, params, distributions, {REASON: str(config)})
                print(
                    f"trial {len(trials)}: {self.describe(params)}\ntrial {len(trials)}: failed: {config}", flush=True
                )
                continue
            number = len(trials)
            runs.write_text(trial_file(self.folder, number, ".yaml"), yaml.safe_dump(to_dict(config), sort_keys=False))
            lock = try_lock(trial_file(self.folder, number, ".lock"))
            assert lock is not None  # of a trial that is not there yet
            self._add(TrialState.RUNNING, params, distributions, {RUN: str(runs.resolve_run_dir(config))})
            trial = self.all()[number]
            return Claim(Trial(self.study, trial._trial_id), params, config, lock, resumed=False)

    def _add(
        self, state: TrialState, params: dict[str, Any], distributions: dict[str, Any], attrs: dict[str, Any]
    ) -> None:
        """In one write, so that no trial is ever seen without its settings."""
        self.study.add_trial(
            optuna.create_trial(state=state, params=params, distributions=distributions, user_attrs=attrs)
        )

    def _propose(self, trials: list[FrozenTrial]) -> tuple[dict[str, Any], TrainConfig | UserError] | None:
        """Settings that no trial has had, and the run they mean; None when there are no others.

        The same trials give the same proposal, however often the sweep was interrupted in between.
        """
        tried = {_key(trial.params) for trial in trials}
        folders = {trial.user_attrs.get(RUN) for trial in trials}
        draws = (self._draw(trials, attempt) for attempt in range(ATTEMPTS))
        rest = spaces.settings(self.space) if spaces.size(self.space) is not None else iter(())
        for candidates in (rest,) if self.cfg.sampler == "grid" else (draws, rest):
            for params in candidates:
                if _key(params) in tried:
                    continue
                tried.add(_key(params))
                try:
                    config = self.compose(spaces.overrides(self.space, params))
                except UserError as error:
                    return params, error
                if str(runs.resolve_run_dir(config)) not in folders:  # not the same run in other words
                    return params, config
        return None

    def _draw(self, trials: list[FrozenTrial], attempt: int) -> dict[str, Any]:
        """What the sampler suggests after these trials, in a study of its own: the sweep's sees only what is run."""
        seed = zlib.crc32(f"{self.cfg.seed}/{len(trials)}/{attempt}".encode())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental options
            scratch = optuna.create_study(
                study_name=self.study.study_name, sampler=_sampler(self.cfg.sampler, seed), pruner=self.study.pruner
            )
            scratch.add_trials(trials)
            params = scratch.ask({parameter.option: parameter.distribution for parameter in self.space}).params
        return {parameter.option: parameter.snapped(params[parameter.option]) for parameter in self.space}

    def report(self, claim: Claim, losses: list[tuple[int, float]]) -> bool:
        """Tell validation losses at steps; returns whether the trial is to be pruned."""
        with storing(self.folder):
            known = self.study.get_trials(deepcopy=False)[claim.number].intermediate_values
            for step, loss in losses:
                if step not in known:  # a resumed run logs again what came after its checkpoint
                    claim.trial.report(loss, step)
            return claim.trial.should_prune()

    def tell(self, claim: Claim, state: TrialState, loss: float | None = None, **attrs: str | float | None) -> None:
        """The end of a trial, whose lock is given back."""
        with storing(self.folder):
            for name, value in attrs.items():
                if value is not None:
                    claim.trial.set_user_attr(name, value)
            self.study.tell(claim.number, loss, state)
        claim.lock.close()

    def best(self) -> FrozenTrial | None:
        return best_of(self.all())

    def describe(self, params: dict[str, Any]) -> str:
        return " ".join(f"{option}={short(value)}" for option, value in params.items())


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(complete, key=lambda trial: trial.value or 0.0, default=None)


def short(value: Any) -> str:
    """A setting with the digits that a reader wants."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sampler(name: str, seed: int) -> BaseSampler:
    if name == "tpe":  # trials that are running count as bad ones, so that parallel ones differ
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return RandomSampler(seed=seed)


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
