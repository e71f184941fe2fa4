"""`sparse-pretrain COMMAND [overrides]`: composes the config, checks it, then runs the command.

Configs are composed and checked here first, so that a wrong option is one clear sentence; only then Hydra runs the
command, with everything Hydra's users know: `--help`, `--cfg job`, `-m` for grids, `--config-dir`.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sparse_pretrain import cluster, config, crosscheck, launch, schema
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import Interrupted
from sparse_pretrain.paths import config_dir

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


@dataclass(frozen=True)
class Command:
    schema: type
    summary: str
    module: str = ""  # in which it is, if not in one of its own name


COMMANDS = {
    "train": Command(config.TrainConfig, "pre-train a model, dense or 2:4 sparse; without options: a comparison"),
    "finetune": Command(config.FinetuneConfig, "train a trained model on a task: GLUE, SQuAD, translation, images, …"),
    "decay-search": Command(config.DecaySearchConfig, "find the decay factor of a run by the flip rates of short ones"),
    "compare": Command(
        config.CompareConfig, "recipes on equal budgets: each with several seeds, then table and picture"
    ),
    "sweep": Command(
        config.SweepConfig, "search options for the lowest validation loss: Optuna, parallel, pruned, resumable"
    ),
    "sweep-report": Command(config.SweepReportConfig, "a sweep's trials, best options and pictures"),
    "plan": Command(config.PlanConfig, "memory, communication, time and cost of a run on a cluster, beforehand"),
    "prune": Command(config.PruneConfig, "prune a trained model once, layer by layer: Wanda, SparseGPT, OATS"),
    "evaluate": Command(config.EvaluateConfig, "how good a checkpoint is: perplexity, or the metrics of its task"),
    "generate": Command(config.GenerateConfig, "text from a checkpoint"),
    "export": Command(config.ExportConfig, "a checkpoint as a folder for transformers, lm-eval and PEFT"),
    "consolidate": Command(
        config.ConsolidateConfig, "a checkpoint, whatever number of ranks wrote it, as one safetensors file"
    ),
    "inspect": Command(
        config.InspectConfig, "attention sinks, outliers, masks and spectra of checkpoints, side by side", "inspection"
    ),
    "sparsest": Command(config.SparsestConfig, "the sparsest networks that solve a small task, against pruning"),
    "report": Command(config.ReportConfig, "an HTML page of one or more runs"),
    "doctor": Command(config.DoctorConfig, "what this machine can do"),
    "bench": Command(config.BenchConfig, "how fast 2:4 operators, layers and training steps are on this machine"),
}
TRAINING = ("train", "finetune")  # commands that make a run folder
TOGETHER = ("train", "finetune", "compare", "decay-search")  # that ranks which a launcher started may run
LAUNCHERS = ["basic", "slurm"]  # of Hydra's: the runs here, one after the other, or each as a job of a cluster
# What `train` does without any option.
DEFAULT_TRAIN = ["-m", "recipe=dense,ste,fst"]


def main(arguments: list[str] | None = None) -> None:
    """Console entry point. Exits with 0, 2 (bad input), 75 (interrupted; run again to continue) or a rank's code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    name, options = arguments[0], arguments[1:]
    try:
        if name == "--version":
            from sparse_pretrain import __version__

            print(f"sparse-pretrain {__version__}")
            return
        if name not in COMMANDS:
            raise UserError("command", name, list(COMMANDS))
        rank = cluster.find()
        if rank is None or rank.ranks == 1:
            execute(name, options)
        elif name in TOGETHER:
            launch.together(rank, lambda: execute(name, options))
        else:
            raise UserError("command", f"{name} with {rank.counted}", TOGETHER, "This one is for one process")
    except UserError as error:
        if cluster.tells():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def file_name(command: str) -> str:
    """Of the config, and of the module if `COMMANDS` does not say another."""
    return command.replace("-", "_")


def overview() -> str:
    lines = ["sparse-pretrain COMMAND [option=value ...]", ""]
    lines += [f"  {name:14}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "sparse-pretrain COMMAND --help lists a command's options."])


def execute(name: str, options: list[str]) -> None:
    """Check every job of the command line, then hand it to Hydra."""
    if name == "train" and not options:
        options = DEFAULT_TRAIN
        print(f"no options: the same as `sparse-pretrain train {' '.join(options)}`\n", flush=True)
    options = sorted(
        options, key=lambda option: option not in ("-m", "--multirun")
    )  # argparse wants overrides in one run
    if name == "compare":
        _compare(options)
        return
    if name == "sweep":
        _sweep(options)
        return
    if name in TRAINING and _submits(name, options):
        return
    jobs = _preflight(name, options)
    module = COMMANDS[name].module or file_name(name)
    command = importlib.import_module(f"sparse_pretrain.{module}") if jobs else None
    _finish(name, command, *_run_jobs(name, options, command))


def _compare(options: list[str]) -> None:
    """A grid of `train` with another end."""
    from sparse_pretrain import compare

    arguments = _arguments(options)
    flags = [option for option in options if option not in (*arguments.overrides, "-m", "--multirun")]
    with _configs():
        request = compare.parse(_parse(arguments.overrides))
    one_run = [*flags, *request.one_run()]
    if _asks_for_text(arguments):
        if arguments.cfg and len(request.recipes) > 1:
            raise UserError("recipe", ",".join(request.recipes), "one value with --cfg, which shows one run's config")
        _run_jobs("compare", one_run, None)
        return
    (cfg,) = _preflight("compare", one_run)
    grids = [["-m", *flags, *grid] for grid in request.grids(cfg)]
    comparison = compare.Comparison(cfg, [job for grid in grids for job in _preflight("train", grid)], options)
    results: list[Path] = []
    failures: list[int] = []
    for grid in grids:
        ended, failed = _run_jobs("train", grid, comparison)
        results += ended
        failures += failed
    _finish("train", comparison, results, failures)


def _submits(name: str, options: list[str]) -> bool:
    """Hand the jobs of the command line to a cluster, where `hydra/launcher` says so."""
    dry_run = "--dry-run" in options
    arguments = _arguments([option for option in options if option != "--dry-run"])
    with _configs():
        parsed = _parse(arguments.overrides)
    chosen = [override.value() for override in parsed if override.get_key_element() == "hydra/launcher"]
    launcher = str(chosen[-1]) if chosen else "basic"
    if launcher not in LAUNCHERS:
        raise UserError("hydra/launcher", launcher, LAUNCHERS)
    if launcher == "basic":
        if dry_run:
            raise UserError("--dry-run", "without a job to show", "this only with hydra/launcher=slurm")
        return False
    if _asks_for_text(arguments):
        return False
    flags = ["--config-dir", str(Path(arguments.config_dir).expanduser().resolve())] if arguments.config_dir else []
    launching = [str(override.input_line) for override in parsed if override.key_or_group.startswith("hydra")]
    overrides = [option for option in arguments.overrides if option not in launching]
    multirun = ["-m"] if arguments.multirun else []
    jobs = _preflight(name, [*multirun, *flags, *overrides], elsewhere=True)
    sizes = sorted({(job.trainer.nodes, job.trainer.devices) for job in jobs})
    if len(sizes) > 1:
        raise UserError("trainer.devices", "jobs of several sizes", "one size of all jobs with hydra/launcher=slurm")
    from hydra import compose
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    try:
        from sparse_pretrain import submit
    except ImportError as error:
        raise UserError(
            "hydra/launcher", f"{launcher}, but no submitit", LAUNCHERS[:1], "Install sparse-pretrain[slurm]"
        ) from error

    with _configs():
        grid = BasicSweeper.split_arguments(_parse(overrides), max_batch_size=None)[0]
        try:
            composed = compose(
                file_name(name), overrides=[f"runs_dir={jobs[0].runs_dir}", *launching], return_hydra_config=True
            )
        except HydraException as error:
            known = OmegaConf.load(config_dir() / "hydra" / "launcher" / f"{launcher}.yaml")
            option = str(getattr(error.__cause__, "full_key", "hydra.launcher"))
            raise UserError(option, "no such option", [f"hydra.launcher.{key!s}" for key in known]) from error
        settings: Any = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    settings["dry_run"] |= dry_run
    submit.submit([[name, *flags, *job] for job in grid], jobs[0].trainer, settings)
    return True


def _sweep(options: list[str]) -> None:
    """Trials of `train`, each composed of the command line and what is suggested for it."""
    arguments = _arguments(options)
    if _asks_for_text(arguments):
        _run_jobs("sweep", options, None)
        return
    from sparse_pretrain import sweep

    if arguments.multirun:
        raise UserError("options", "-m", "none: a sweep is many runs by itself")
    flags = [option for option in options if option not in arguments.overrides]
    with _configs():
        request = sweep.parse(_parse(arguments.overrides), flags)
    (cfg,) = _preflight("sweep", options, check=False)

    def compose(overrides: list[str]) -> config.TrainConfig:
        (trial,) = _preflight("train", [*flags, *request.shared, *overrides], check=False)
        return trial

    try:
        sweep.run(cfg, request, compose, options)
    except Interrupted as end:
        print(end, file=sys.stderr)
        sys.exit(end.exit_code)


def _finish(name: str, command: Any, results: list[Path], failures: list[int]) -> None:
    if name in TRAINING and results:
        command.finish(results)
    if failures:
        sys.exit(failures[0])


def _run_jobs(name: str, options: list[str], command: Any) -> tuple[list[Path], list[int]]:
    """Have Hydra call `command.run` with the config of each job (with None it prints what was asked for instead);
    returns what it returned, and the exit codes of the jobs that failed."""
    results: list[Path] = []
    failures: list[int] = []

    def task(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        try:
            # A run records the command that continues it.
            overrides = HydraConfig.get().overrides.task
            extra = [shlex.join(["sparse-pretrain", name, *overrides])] if name in TRAINING else []
            results.append(command.run(schema.load(COMMANDS[name].schema, _plain(cfg)), *extra))
        except Exception as error:
            exit_code = getattr(error, "exit_code", None)
            if exit_code is None:
                raise
            if str(error):
                print(f"error: {error}" if isinstance(error, UserError) else error, file=sys.stderr, flush=True)
            failures.append(exit_code)
            if exit_code != UserError.exit_code:
                sys.exit(exit_code)  # interrupted: not on to the next job of a grid

    _run_hydra(name, options, task)
    return results, failures


def _run_hydra(name: str, options: list[str], task: Callable[[Any], None]) -> None:
    import hydra

    sys.argv = [f"sparse-pretrain {name}", *options]
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=file_name(name))(task)()


def _plain(cfg: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:  # as of a text's length, from a model that has none
        reason = str(error).splitlines()[0].lower()
        raise UserError(str(error.full_key), reason, "a value, or a model and data that go together") from error
    assert isinstance(values, dict)
    # The groups that only change other options leave nothing of their own.
    return {key: value for key, value in values.items() if key not in ("experiment", "debug")}  # type: ignore[misc]


def _preflight(name: str, options: list[str], check: bool = True, elsewhere: bool = False) -> list[Any]:
    """Compose every job and check it, without `check` its options one by one alone; none if the command line asks for
    help, say, and not for work. `elsewhere` is for jobs whose ranks this process is none of."""
    from hydra import compose
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException

    expected = COMMANDS[name].schema
    arguments = _arguments(options)
    if _asks_for_text(arguments):
        return []
    overrides = list(arguments.overrides)
    if arguments.config_dir:
        folder = Path(arguments.config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise UserError("--config-dir", arguments.config_dir, "a folder of YAML configs")
        overrides.append(f"hydra.searchpath=[file://{folder}]")
    with _configs():
        parsed = _parse(overrides)
        sweep = [override for override in parsed if override.is_sweep_override()]
        if sweep and not arguments.multirun:
            raise UserError(
                str(sweep[0].input_line), "several values", "one value, or -m before the options for a grid of runs"
            )
        jobs = []
        for job in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]:
            try:
                composed = compose(file_name(name), overrides=job)
            except HydraException as error:
                raise _explain(error, expected, job) from error
            cfg: Any = schema.load(expected, _plain(composed))
            if check and not elsewhere and hasattr(cfg, "trainer") and not isinstance(cfg, config.PlanConfig):
                cluster.check(cfg.trainer)
            if check and isinstance(cfg, config.TrainConfig):
                crosscheck.check(cfg)
            jobs.append(cfg)
    return jobs


def _arguments(options: list[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _unknown_flag  # type: ignore[method-assign]
    return parser.parse_args(options)


def _asks_for_text(arguments: argparse.Namespace) -> bool:
    """Whether Hydra prints something, as help or a config, in place of running a job."""
    asked = arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion
    return any(asked)


def _configs() -> AbstractContextManager[None]:
    from hydra import initialize_config_dir

    return initialize_config_dir(str(config_dir()), version_base="1.3")


def _parse(overrides: list[str]) -> list[Override]:
    """Overrides in Hydra's grammar, inside `_configs()`, whose files `glob(...)` is about."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        loader = GlobalHydra.instance().config_loader()
        return OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    except OverrideParseException as error:
        raise UserError(
            str(error.override), "something that is not option=value", "option=value, as trainer.steps=100"
        ) from error


def _explain(error: Exception, expected: type, job: list[str]) -> UserError:
    """Hydra's composition errors in our words."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return UserError(group, choice, sorted(error.options))
    key = getattr(error.__cause__, "full_key", None)
    if key:
        known = schema.options(expected)
        group = str(key).rpartition(".")[0]
        same_group = [option for option in known if option.rpartition(".")[0] == group]
        return UserError(str(key), "no such option", _nearest(str(key), known) or same_group or known)
    message = str(error).splitlines()[0]
    option = next((override.partition("=")[0] for override in job if override.partition("=")[0] in message), "options")
    return UserError(option, message.rstrip("."), "a group or option that `--help` lists")


def _unknown_flag(message: str) -> NoReturn:
    raise UserError("options", message, "option=value, -m, --cfg job, --config-dir FOLDER, --help")


def _nearest(key: str, known: list[str]) -> list[str]:
    import difflib

    name = key.rpartition(".")[2]
    return [option for option in known if option.rpartition(".")[2] == name] or difflib.get_close_matches(
        key, known, n=3
    )


if __name__ == "__main__":
    main()
