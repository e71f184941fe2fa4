"""`sparse-pretrain train`: everything that is checked and prepared before the first step, then the run itself."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from sparse_pretrain import runs
from sparse_pretrain.config import TrainConfig, check, flatten, to_dict
from sparse_pretrain.errors import UserError


def run(cfg: TrainConfig, overrides: Sequence[str] = ()) -> Path:
    """Train, or go on training, one run; returns its folder. `overrides` are what `cfg` was composed from.

    Raises:
        UserError: something about config, data, device, disk or checkpoint does not fit; nothing has been lost.
        Interrupted: a signal ended the run; its checkpoint is saved.
    """
    check(cfg)
    run_dir = runs.resolve_run_dir(cfg)
    if (run_dir / runs.SUMMARY_FILE).is_file() and cfg.resume != "never":
        runs.open_run(cfg, run_dir)
        print(f"{run_dir.name} is complete: {run_dir}")
        return run_dir
    check_device(cfg)
    check_logger(cfg)
    check_resume(cfg)

    from sparse_pretrain.data.token_store import prepare

    tokens = prepare(cfg.data)
    check_vocabulary(cfg, tokens.vocab_size)
    runs.open_run(cfg, run_dir)
    check_disk(cfg, run_dir, tokens.vocab_size)
    with runs.locked(run_dir):
        command = f"sparse-pretrain train {shlex.join(overrides)}".strip()
        runs.write_json(run_dir / runs.RUN_FILE, {"id": runs.run_id(run_dir), "command": command})
        shutil.copyfile(tokens.tokenizer_path, run_dir / runs.TOKENIZER_FILE)
        from sparse_pretrain.launch import launch

        launch(cfg, run_dir)
    return run_dir


def finish(run_dirs: list[Path], runs_dir: Path) -> None:
    """Show what came out: one table and one page for all of these runs."""
    from sparse_pretrain.report import make_report

    out = (run_dirs[0] if len(run_dirs) == 1 else runs_dir) / "report.html"
    print()
    print(make_report(run_dirs, out))
    print(f"\nReport: {out}")


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


def check_resume(cfg: TrainConfig) -> None:
    """Raises UserError if `resume` names a checkpoint that is missing, damaged, or of another model."""
    if cfg.resume in ("auto", "never"):
        return
    from sparse_pretrain.checkpoint import store

    checkpoint = store.resolve(Path(cfg.resume), option="resume")
    there = flatten(to_dict(runs.read_config(checkpoint.parent.parent)))
    here = flatten(to_dict(cfg))
    for option in here:
        shapes_model = option.startswith("model.") and option not in ("model.name", "model.activation_checkpointing")
        if (shapes_model or option in ("recipe.projection", "recipe.include", "recipe.exclude")) and there.get(
            option
        ) != here[option]:
            raise UserError(
                "resume",
                f"a checkpoint of another model: {option}={there.get(option)} there, {here[option]} here",
                "a checkpoint of the same model and sparse layers",
            )
    steps_done = store.step_of(checkpoint)
    if steps_done >= cfg.trainer.steps:
        raise UserError(
            "trainer.steps", f"{cfg.trainer.steps}, but resume names a checkpoint of step {steps_done}", "more"
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
            f"{free / 1e9:.2f} GB free on the disk of {run_dir}",
            f"{needed / 1e9:.2f} GB for {cfg.trainer.checkpoints_kept} + 1 checkpoints (trainer.checkpoints_kept)",
        )
