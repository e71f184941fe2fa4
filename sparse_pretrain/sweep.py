"""`sparse-pretrain sweep`: training runs that search options for the lowest validation loss."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_pretrain import crosscheck, preflight, runs, train
from sparse_pretrain.config import SweepConfig, SweepReportConfig, TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import before_the_first_step

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from sparse_pretrain.sweeping.space import Parameter

OWN = {field.name for field in dataclasses.fields(SweepConfig)} - {
    field.name for field in dataclasses.fields(TrainConfig)
}
DRAWS = 32  # of whole settings, to find one that can be run

Compose = Callable[[list[str]], TrainConfig]


@dataclass(frozen=True)
class Request:
    """What the command line of a sweep asks for.

    Attributes:
        flags: of Hydra, for the trials too: --config-dir FOLDER.
        shared: overrides of every trial.
        given: the options that these set.
    """

    flags: list[str]
    shared: list[str]
    given: list[str]

    @property
    def train(self) -> list[str]:
        """The command that a trial's own options come after."""
        return ["sparse-pretrain", "train", *self.flags, *self.shared]


def parse(overrides: Sequence[Override], flags: Sequence[str]) -> Request:
    """Tell a sweep's own options from those of its trials.

    Raises:
        UserError: one that a sweep sets itself, or several values for one.
    """
    shared, given = [], []
    for override in overrides:
        option, text = override.key_or_group, str(override.input_line)
        if override.is_sweep_override():
            raise UserError(text, "several values", "one value: those to try are in hparams_search=…")
        if option == "run_dir":
            raise UserError(option, text.partition("=")[2], "runs_dir=FOLDER: each trial has its own folder in it")
        if option not in OWN:
            shared.append(text)
            given.append(option)
    return Request(list(flags), shared, given)


def run(cfg: SweepConfig, request: Request, compose: Compose, options: Sequence[str]) -> None:
    """Run the sweep to its end, or go on with it, and show what came out.

    Args:
        compose: the config of a trial from its own overrides, with types and names checked; raises UserError.
        options: the command line that this is, for whoever wants to repeat it.

    Raises:
        UserError: something does not fit, or too many trials failed.
        Interrupted: a signal; the same command continues.
    """
    check_installed()
    from sparse_pretrain.sweeping import space as spaces

    space = spaces.parse(cfg.hparams_search, cfg.sampler, request.given)
    _check_base(cfg)
    example = check_values(space, compose)
    if cfg.wandb is not None:
        from sparse_pretrain.sweeping.wandb_config import write_wandb

        path = write_wandb(Path(cfg.wandb).expanduser().absolute(), space, cfg, request.train)
        print(f"{path}: start it with\n  wandb sweep {shlex.quote(str(path))}")
        return
    with before_the_first_step():
        devices = prepare(cfg, example)
    _search(cfg, request, space, example, compose, devices, options)


def check_installed() -> None:
    """Raises UserError if there is no Optuna."""
    if importlib.util.find_spec("optuna") is None:
        hint = "pip install 'sparse-pretrain[sweep]' installs it"
        raise UserError("optuna", "not installed", "version 4 or newer", hint=hint)


def _check_base(cfg: SweepConfig) -> None:
    if cfg.trainer.stop_after is not None:
        raise UserError("trainer.stop_after", cfg.trainer.stop_after, "null: a trial ends with its run, or is pruned")
    if cfg.resume != "auto":
        raise UserError("resume", cfg.resume, "auto: an interrupted trial goes on from its own checkpoint")


def check_values(space: Sequence[Parameter], compose: Compose) -> TrainConfig:
    """See that every option exists and may have its outermost values; returns settings that can be run.

    Raises:
        UserError: naming the option; or, where none of many settings can be run, what is wrong with the first.
    """

    def setting(choose: Callable[[Parameter], Any]) -> list[str]:
        return [parameter.override(choose(parameter)) for parameter in space]

    # Each value beside the first ones of the other options.
    tried = [setting(lambda parameter: parameter.ends()[0])]
    for searched, end in [(parameter, end) for parameter in space for end in parameter.ends()[1:]]:
        tried.append(setting(lambda parameter: end if parameter is searched else parameter.ends()[0]))  # noqa: B023
    draw = random.Random(0)
    drawn = (setting(lambda parameter: draw.choice(parameter.ends())) for _ in range(DRAWS))
    configs = [compose(overrides) for overrides in tried]
    first: UserError | None = None
    for cfg in itertools.chain(configs, map(compose, drawn)):
        try:
            crosscheck.check(cfg)
        except UserError as error:
            first = first or error
            continue
        return train.with_absolute_paths(cfg)
    assert first is not None
    raise first


def prepare(cfg: SweepConfig, example: TrainConfig) -> list[str]:
    """What all trials need: devices, layers, data; returns the GPUs of each worker, as CUDA_VISIBLE_DEVICES has them.

    Raises:
        UserError: something is not there.
        Interrupted: a signal.
    """
    preflight.check_device(example)
    preflight.check_logger(example)
    preflight.check_layers(example)
    preflight.check_adapter(example)
    if example.init_from is not None:
        preflight.check_init(example)
    devices = _devices(cfg, example)
    from sparse_pretrain.data.build import prepare as prepare_data

    prepare_data(example.data)
    return devices


def _devices(cfg: SweepConfig, example: TrainConfig) -> list[str]:
    from sparse_pretrain.hardware import pick_device

    if pick_device(example.trainer.accelerator, "trainer.accelerator").type != "cuda":
        return []
    import torch

    each, there = example.trainer.devices, torch.cuda.device_count()
    if cfg.workers * each > there:
        raise UserError(
            "workers", f"{cfg.workers} with {each} GPUs each", f"at most {there // each}: there are {there}"
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = named if len(named) >= there else [str(number) for number in range(there)]
    return [",".join(names[worker * each : (worker + 1) * each]) for worker in range(cfg.workers)]


def _search(
    cfg: SweepConfig,
    request: Request,
    space: list[Parameter],
    example: TrainConfig,
    compose: Compose,
    devices: list[str],
    options: Sequence[str],
) -> None:
    from sparse_pretrain import sweep_report
    from sparse_pretrain.sweeping import record
    from sparse_pretrain.sweeping import space as spaces
    from sparse_pretrain.sweeping.pool import Pool
    from sparse_pretrain.sweeping.storage import absolute_url, open_storage, without_password
    from sparse_pretrain.sweeping.study import Trials, open_study

    def checked(overrides: list[str]) -> TrainConfig:
        config = compose(overrides)
        crosscheck.check(config)
        return train.with_absolute_paths(config)

    identity = record.identify(cfg, space, example)
    folder = record.folder_of(cfg, example, identity)
    url = None if cfg.storage is None else absolute_url(cfg.storage)
    if url is not None:
        open_storage(url, folder)  # before there is a folder
    record.check_same(folder, identity)
    with runs.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    study = open_study(open_storage(url, folder), folder, cfg, identity)
    hidden = f"storage={without_password(url)}" if url else ""
    shown = [hidden if option.startswith("storage=") else option for option in options]
    command = f"sparse-pretrain sweep {shlex.join(shown)}".strip()
    record.write(folder, command, url and without_password(url), identity)
    trials = Trials(study, folder, space, cfg, checked)
    begun, total = trials.all(), spaces.size(space)
    wanted = cfg.trials if total is None else min(cfg.trials, total)
    over = ", ".join(parameter.option for parameter in space)
    print(f"\n{folder.name}: {wanted} trials over {over}, {cfg.workers} at once; {cfg.sampler}, pruner {cfg.pruner}")
    if begun:
        ended = sum(trial.state.is_finished() for trial in begun)
        print(f"  {len(begun)} have been begun, {ended} of them have ended: going on")
    print(flush=True)
    Pool(trials, cfg.workers, request.train, devices, cfg.max_failures).run()
    if trials.exhausted:
        print(f"\nAll settings of the space have been tried: {len(trials.all())} trials, of {cfg.trials} asked for")
    left = trials.running()
    if left:
        print(f"\n{left} trials are still being run by other processes, which end the sweep")
        return
    sweep_report.run(SweepReportConfig(sweep=str(folder), storage=url))
