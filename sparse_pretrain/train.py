"""`sparse-pretrain train`: everything that is checked and prepared before the first step, then the run itself."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_pretrain import runs
from sparse_pretrain.config import TrainConfig, check, flatten, to_dict
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import before_the_first_step

if TYPE_CHECKING:
    from sparse_pretrain.data.token_store import TokenStore


def run(cfg: TrainConfig, overrides: Sequence[str] = ()) -> Path:
    """Train, or go on training, one run; returns its folder. `overrides` are what `cfg` was composed from.

    Raises:
        UserError: something about config, data, device, disk or checkpoint does not fit; nothing has been lost.
        Interrupted: a signal ended the run; its checkpoint is saved.
    """
    check(cfg)
    cfg = with_absolute_paths(cfg)
    run_dir = runs.resolve_run_dir(cfg)
    if runs.is_complete(run_dir) and cfg.resume != "never":
        runs.open_run(cfg, run_dir)
        print(f"{run_dir.name} is complete: {run_dir}")
        return run_dir
    with before_the_first_step():
        check_device(cfg)
        check_logger(cfg)
        check_layers(cfg)
        from sparse_pretrain.checkpoint import store
        from sparse_pretrain.data.token_store import prepare

        continues = bool(store.list_steps(run_dir / runs.CHECKPOINTS))
        source = None if continues or cfg.resume in ("auto", "never") else check_resume(cfg)
        tokens = prepare(cfg.data)
        check_vocabulary(cfg, tokens.vocab_size)
        runs.open_run(cfg, run_dir)
        check_disk(cfg, run_dir, tokens.vocab_size)
        with runs.locked(run_dir):
            for note in store.set_aside_damaged(run_dir / runs.CHECKPOINTS):
                print(note, file=sys.stderr)
            if continues:
                check_same_corpus(run_dir, tokens)
            if source is not None:
                check_same_tokenizer(source, tokens)
            facts = {
                **runs.read_json(run_dir / runs.RUN_FILE),
                "id": runs.run_id(run_dir),
                "command": f"sparse-pretrain train {shlex.join(overrides)}".strip(),
                "token_store": str(tokens.folder),
            }
            runs.write_json(run_dir / runs.RUN_FILE, facts)
            with runs.writing(run_dir):
                shutil.copyfile(tokens.tokenizer_path, run_dir / runs.TOKENIZER_FILE)
            from sparse_pretrain.launch import launch

            launch(cfg, run_dir)
    return run_dir


def finish(run_dirs: list[Path]) -> None:
    """Show what came out: one table and one page for all of these runs."""
    from sparse_pretrain.report import make_report

    out = (run_dirs[0] if len(run_dirs) == 1 else run_dirs[-1].parent) / "report.html"
    print()
    print(make_report(run_dirs, out))
    print(f"\nReport: {out}")


def with_absolute_paths(cfg: TrainConfig) -> TrainConfig:
    """The same files, from whichever folder the run is continued or evaluated."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    data = cfg.data
    changes: dict[str, Any] = {
        "train": [absolute(path) for path in data.train],
        "validation": [absolute(path) for path in data.validation],
    }
    if data.tokenizer != "bpe":
        changes["tokenizer"] = absolute(data.tokenizer)
    if data.hf_path and Path(data.hf_path).expanduser().is_dir():
        changes["hf_path"] = absolute(data.hf_path)
    return dataclasses.replace(cfg, data=dataclasses.replace(data, **changes))


def check_device(cfg: TrainConfig) -> None:
    """Raises UserError if the devices or the precision asked for are not there."""
    import torch

    from sparse_pretrain.hardware import pick_device, precision_dtype

    device = pick_device(cfg.trainer.accelerator, "trainer.accelerator")
    precision_dtype(cfg.trainer.precision, device, "trainer.precision")
    if device.type == "cuda" and cfg.trainer.devices > torch.cuda.device_count():
        raise UserError(
            "trainer.devices", cfg.trainer.devices, f"at most the {torch.cuda.device_count()} GPUs of this machine"
        )


def check_logger(cfg: TrainConfig) -> None:
    """Raises UserError if Weights & Biases is to be online without a login (it would stop and ask for one)."""
    if cfg.logger.wandb and cfg.logger.wandb_mode == "online":
        from sparse_pretrain.loggers import logged_in_to_wandb

        if not logged_in_to_wandb():
            raise UserError(
                "logger.wandb_mode", "online, but no login", ["offline"], "Run `wandb login` once, or set WANDB_API_KEY"
            )


def check_layers(cfg: TrainConfig) -> None:
    """Raises UserError if the recipe's layer patterns do not fit the model."""
    import torch

    from sparse_pretrain.sparsity.swap import select_layers
    from sparse_pretrain.tasks.causal_lm import build_model

    with torch.device("meta"):
        select_layers(build_model(cfg, vocab_size=cfg.model.vocab_size or 64), cfg.recipe)


def check_resume(cfg: TrainConfig) -> Path:
    """The run folder of the checkpoint that `resume` names.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    from sparse_pretrain.checkpoint import store

    checkpoint = store.resolve(Path(cfg.resume), option="resume")
    source = checkpoint.parent.parent
    there = flatten(to_dict(runs.read_config(source)))
    here = flatten(to_dict(cfg))
    for option in here:
        shapes = option.startswith("model.") and option not in ("model.name", "model.activation_checkpointing")
        selects = option in ("recipe.projection", "recipe.include", "recipe.exclude")
        if (shapes or selects) and there.get(option) != here[option]:
            raise UserError(
                "resume",
                f"a checkpoint of another model: {option}={there.get(option)} there, {here[option]} here",
                "a checkpoint of the same model and sparse layers",
            )
    if store.step_of(checkpoint) >= cfg.trainer.steps:
        raise UserError(
            "trainer.steps",
            f"{cfg.trainer.steps}, but resume names a checkpoint of step {store.step_of(checkpoint)}",
            "more",
        )
    return source


def check_same_corpus(run_dir: Path, tokens: TokenStore) -> None:
    """Raises UserError if this run has checkpoints that were trained on other tokens: its text has changed since."""
    known = runs.read_json(run_dir / runs.RUN_FILE).get("corpus", {}).get("digest", tokens.digest)
    if known != tokens.digest:
        raise UserError(
            "data",
            f"text or a tokenizer that changed since the checkpoints in {run_dir} were made",
            "the same as then, or a new run_dir",
        )


def check_same_tokenizer(source: Path, tokens: TokenStore) -> None:
    """Raises UserError if the token ids of the run in `source` mean something else than this run's."""
    if (source / runs.TOKENIZER_FILE).read_bytes() != tokens.tokenizer_path.read_bytes():
        raise UserError(
            "resume",
            "a checkpoint trained with another tokenizer",
            f"data.tokenizer={source / runs.TOKENIZER_FILE}, which is that checkpoint's",
        )


def check_vocabulary(cfg: TrainConfig, vocab_size: int) -> None:
    """Raises UserError if the model's embedding is too small for the tokenizer."""
    if cfg.model.vocab_size is not None and cfg.model.vocab_size < vocab_size:
        raise UserError("model.vocab_size", cfg.model.vocab_size, f"at least the tokenizer's {vocab_size}, or null")


def check_disk(cfg: TrainConfig, run_dir: Path, vocab_size: int) -> None:
    """Raises UserError if the checkpoints that this run keeps will not fit on the disk."""
    import torch

    from sparse_pretrain.tasks.causal_lm import build_model

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(cfg, vocab_size).parameters())
    # Weights and two moments in fp32, a mask byte; one checkpoint more than are kept is there while it is written.
    needed = parameters * 13 * (cfg.trainer.checkpoints_kept + 1)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            "run_dir",
            f"{free / 1e6:,.1f} MB free on the disk of {run_dir}",
            f"at least {needed / 1e6:,.1f} MB: trainer.checkpoints_kept={cfg.trainer.checkpoints_kept}, and one more",
        )
