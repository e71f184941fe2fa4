"""The run folder: where it is, what is in it, and how it is read and written. Imports no torch.

RUN_DIR/
    config.yaml     the whole config, resolved
    run.json        id, command, git commit, versions, hardware, corpus, model size, table of layers
    tokenizer.json  a copy of the tokenizer
    metrics.csv     one row per logged step
    masks/          corners of a few masks, over time
    decay-search/   the short runs that found recipe.decay.factor=auto
    checkpoints/    step-00000100/…, each with copies of config.yaml, run.json and metrics.csv
    adapter.safetensors  the adapters of a complete run, if it has any
    summary.json    the final figures; there only when the run is complete
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.schema import flatten, load, to_dict

CONFIG_FILE, RUN_FILE, SUMMARY_FILE, CHECKPOINTS = "config.yaml", "run.json", "summary.json", "checkpoints"
METRICS_FILE, TOKENIZER_FILE = "metrics.csv", "tokenizer.json"
ADAPTER_FILE = "adapter.safetensors"
COPIED = (CONFIG_FILE, RUN_FILE, METRICS_FILE)  # into each checkpoint, whose checksums tell whether they are whole
DECAY_SEARCH = "decay-search"
# `seconds` is training time: without validation and checkpoints, and without the time between a stop and a resume.
METRICS_COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "phase",
    "train/loss",
    "train/distillation_loss",
    "train/grad_norm",
    "train/lr",
    "train/tokens_per_second",
    "train/mfu",
    "train/memory_gb",
    "train/dropped_steps",
    "sparsity/flip_rate",
    "val/loss",
    "val/accuracy",
    "val/acceptance",
)


# What may differ between two runs that must give the same numbers: so not part of a run's identity.
RUNTIME_OPTIONS = (
    "name",
    "runs_dir",
    "run_dir",
    "resume",
    "logger",
    "data.num_workers",
    "trainer.devices",
    "trainer.nodes",
    "trainer.timeout",
    "trainer.strategy",
    "trainer.tensor_parallel",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.checkpoints_kept",
    "trainer.async_checkpoints",
    "trainer.checkpoint_mirror",
    "trainer.peak_tflops",
    "trainer.stop_after",
)


def identity(cfg: TrainConfig) -> dict[str, Any]:
    """The options that decide a run's numbers, flattened: two runs with the same identity give the same result."""
    deciding = {
        option: value
        for option, value in flatten(to_dict(cfg)).items()
        if not any(option == runtime or option.startswith(f"{runtime}.") for runtime in RUNTIME_OPTIONS)
    }
    if cfg.resume not in ("auto", "never"):
        deciding["resume"] = cfg.resume  # starts from another run's weights
    return deciding


def resolve_run_dir(cfg: TrainConfig) -> Path:
    """RUN_DIR, stable across restarts: the run's name and a hash of its identity, no time stamp."""
    if cfg.run_dir is not None:
        return Path(cfg.run_dir).expanduser().resolve()
    digest = hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.runs_dir).expanduser().resolve() / f"{run_name(cfg)}-{digest}"


def run_name(cfg: TrainConfig) -> str:
    return cfg.name or f"{cfg.model.name}-{cfg.recipe.name}"


def read_config(run_dir: Path) -> TrainConfig:
    """The config that a run trains with: as given, and `recipe.decay.factor=auto` as what has been found for it.

    Raises:
        UserError: as `read_given_config`.
    """
    cfg = read_given_config(run_dir)
    found = read_json(run_dir / RUN_FILE).get("decay_search")
    if cfg.recipe.decay.factor == "auto" and found:
        cfg.recipe.decay.factor = float(found["factor"])
    return cfg


def read_given_config(run_dir: Path) -> TrainConfig:
    """The config that a run was started with.

    Raises:
        UserError: not a run folder, one whose config.yaml is damaged, or one written by a version with other options.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError("run_dir", run_dir, "a run folder, one that holds config.yaml")
    values = read_yaml(path)
    if values is None:
        raise UserError("run_dir", f"{path}, which is damaged", "a run folder with a whole config.yaml")
    return load(TrainConfig, values)


def copy_in_checkpoint(run_dir: Path, name: str) -> bytes | None:
    """A file of the run folder as the newest checkpoint has it whole, if one does."""
    for manifest in sorted(run_dir.glob(f"{CHECKPOINTS}/step-*/manifest.json"), reverse=True):
        try:
            content = (manifest.parent / name).read_bytes()
            if hashlib.sha256(content).hexdigest() == json.loads(manifest.read_bytes())["files"][name]["sha256"]:
                return content
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or of a version without copies
            continue
    return None


def read_facts(run_dir: Path) -> dict[str, Any]:
    """run.json of a run that may go on: as its newest checkpoint has it, else as it is."""
    copy = copy_in_checkpoint(run_dir, RUN_FILE)
    return read_json(run_dir / RUN_FILE) if copy is None else dict(json.loads(copy))


def restore_metrics(run_dir: Path) -> None:
    """Have metrics.csv as the newest checkpoint has it: no row of before it is lost, whatever became of the file."""
    copy = copy_in_checkpoint(run_dir, METRICS_FILE)
    if copy is not None:
        write_text(run_dir / METRICS_FILE, copy.decode("utf-8"))


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; None if it holds something else, or is damaged."""
    return _mapping(path.read_bytes())


def _mapping(content: bytes) -> dict[str, Any] | None:
    try:
        values = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return values if isinstance(values, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run folder; empty if it is not there or damaged: a run can write it again."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def is_complete(run_dir: Path) -> bool:
    return bool(read_json(run_dir / SUMMARY_FILE))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, without a last line that a kill cut short, and without damaged ones."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    with io.StringIO(text[: text.rfind("\n") + 1], newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if None not in (*row, *row.values())]
        return [row for row in rows if row.get("step", "").isdecimal()]


@contextmanager
def writing(path: Path, option: str = "run_dir") -> Iterator[None]:
    """Turn a full disk or a missing permission into one sentence naming the option and its folder.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(option, f"{path}, which cannot be written ({error.strerror})", "a writable folder") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one piece."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def open_run(cfg: TrainConfig, run_dir: Path) -> None:
    """Make `run_dir` the folder of this run: create it, or check that it holds this very run.

    Raises:
        UserError: the folder cannot be written, holds a run with other options, or holds one and `resume=never`.
    """
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    path, copy = run_dir / CONFIG_FILE, copy_in_checkpoint(run_dir, CONFIG_FILE)
    contents = [path.read_bytes()] if path.is_file() else []
    contents += [] if copy is None else [copy]
    if contents:
        if cfg.resume == "never":
            raise UserError("resume", f"never, but {run_dir} holds a run", "auto, or another run_dir")
        problems = [_difference(cfg, run_dir, content) for content in contents]
        if all(problems):  # else one of both is damaged
            raise problems[-1]  # type: ignore[misc]
    write_text(run_dir / CONFIG_FILE, yaml.safe_dump(to_dict(cfg), sort_keys=False))


def _difference(cfg: TrainConfig, run_dir: Path, content: bytes) -> UserError | None:
    """What tells that a run whose config.yaml holds `content` is not this one."""
    values = _mapping(content)
    if values is None:
        if not any(run_dir.glob(f"{CHECKPOINTS}/*")):  # nothing that could be another run's
            return None
        return UserError(
            "run_dir", f"{run_dir / CONFIG_FILE}, which is damaged", "a run folder with a whole config.yaml"
        )
    try:
        there, here = identity(load(TrainConfig, values)), identity(cfg)
    except UserError as error:
        return error
    different = [key for key in here if there.get(key) != here[key]]
    if not different:
        return None
    key = different[0]
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    return UserError(
        "run_dir",
        f"{run_dir}, holding a run with {key}={there.get(key)} where this one has {here[key]}{more}",
        "the folder of the same run, or a new one",
    )


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process, until it ends in whatever way.

    Raises:
        UserError: another process trains this run.
    """
    with writing(run_dir):
        file = open(run_dir / ".lock", "w")  # noqa: SIM115 (below)
    os.register_at_fork(after_in_child=file.close)  # data workers live on for some seconds when this process is killed
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("run_dir", f"{run_dir}, which another process is training", "a run of your own") from error
        yield


def run_id(run_dir: Path) -> str:
    """The run's id, kept over restarts (loggers use it to go on with the same run)."""
    known = read_facts(run_dir).get("id")
    return known or secrets.token_hex(4)


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of the git checkout that `folder` is in, and whether tracked files differ from it; None = it is in no
    checkout, or git is not installed."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
