"""`sparse-pretrain COMMAND [overrides]`: composes the config, checks it, then runs the command.

Configs are composed and checked here first, so that a wrong option is one clear sentence; only then Hydra runs the
command, with everything Hydra's users know: `--help`, `--cfg job`, `-m` for grids, `--config-dir`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sparse_pretrain import config, preflight
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import config_dir


@dataclass(frozen=True)
class Command:
    schema: type
    summary: str


COMMANDS = {
    "train": Command(config.TrainConfig, "pre-train a model, dense or 2:4 sparse; without options: a comparison"),
    "evaluate": Command(config.EvaluateConfig, "loss and perplexity of a checkpoint"),
    "generate": Command(config.GenerateConfig, "text from a checkpoint"),
    "report": Command(config.ReportConfig, "an HTML page of one or more runs"),
    "doctor": Command(config.DoctorConfig, "what this machine can do"),
    "bench": Command(config.BenchConfig, "how fast 2:4 operators, layers and training steps are on this machine"),
}
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
        if name == "train" and not options:
            options = DEFAULT_TRAIN
            print(f"no options: the same as `sparse-pretrain train {' '.join(options)}`\n", flush=True)
        execute(name, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def overview() -> str:
    lines = ["sparse-pretrain COMMAND [option=value ...]", ""]
    lines += [f"  {name:10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "sparse-pretrain COMMAND --help lists a command's options."])


def execute(name: str, options: list[str]) -> None:
    """Check every job of the command line, then hand it to Hydra."""
    schema = COMMANDS[name].schema
    options = sorted(
        options, key=lambda option: option not in ("-m", "--multirun")
    )  # argparse wants overrides in one run
    is_run = _preflight(name, schema, options)
    command = importlib.import_module(f"sparse_pretrain.{name}") if is_run else None
    results: list[Path] = []
    failures: list[int] = []

    def task(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        assert command is not None
        try:
            # A run records the overrides it was composed from: the command that continues it.
            extra = [HydraConfig.get().overrides.task] if name == "train" else []
            results.append(command.run(config.load(schema, _plain(cfg)), *extra))
        except Exception as error:
            exit_code = getattr(error, "exit_code", None)
            if exit_code is None:
                raise
            print(f"error: {error}" if isinstance(error, UserError) else error, file=sys.stderr, flush=True)
            failures.append(exit_code)
            if not isinstance(error, UserError):
                sys.exit(exit_code)  # interrupted: not on to the next job of a grid

    _run_hydra(name, options, task)
    if name == "train" and results:
        command.finish(results)  # type: ignore[union-attr]
    if failures:
        sys.exit(failures[0])


def _run_hydra(name: str, options: list[str], task: Callable[[Any], None]) -> None:
    import hydra

    sys.argv = [f"sparse-pretrain {name}", *options]
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(task)()


def _plain(cfg: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    # The groups that only change other options leave nothing of their own.
    return {key: value for key, value in values.items() if key not in ("experiment", "debug")}  # type: ignore[misc]


def _preflight(name: str, schema: type, options: list[str]) -> bool:
    """Compose and check every job; returns whether the command line asks for work (and not for help, say)."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException, OverrideParseException

    parser = get_args_parser()
    parser.error = _unknown_flag  # type: ignore[method-assign]
    arguments = parser.parse_args(options)
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion:
        return False
    overrides = list(arguments.overrides)
    if arguments.config_dir:
        folder = Path(arguments.config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise UserError("--config-dir", arguments.config_dir, "a folder of YAML configs")
        overrides.append(f"hydra.searchpath=[file://{folder}]")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()  # expands glob(...) to the choices there are
        try:
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
        except OverrideParseException as error:
            raise UserError(
                str(error.override), "something that is not option=value", "option=value, as trainer.steps=100"
            ) from error
        sweep = [override for override in parsed if override.is_sweep_override()]
        if sweep and not arguments.multirun:
            raise UserError(
                str(sweep[0].input_line), "several values", "one value, or -m before the options for a grid of runs"
            )
        jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
        for job in jobs:
            try:
                composed = compose(name, overrides=job)
            except HydraException as error:
                raise _explain(error, schema, job) from error
            cfg: Any = config.load(schema, _plain(composed))
            if isinstance(cfg, config.TrainConfig):
                preflight.check(cfg)
    return True


def _explain(error: Exception, schema: type, job: list[str]) -> UserError:
    """Hydra's composition errors in our words."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return UserError(group, choice, sorted(error.options))
    key = getattr(error.__cause__, "full_key", None)
    if key:
        known = config.options(schema)
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
