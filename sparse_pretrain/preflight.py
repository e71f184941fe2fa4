"""Everything that is checked before a run starts: what is wrong is one sentence, and nothing has been lost.

`check` needs the config alone (and no torch); the others look at devices, checkpoints, tokens and the disk.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_pretrain import runs
from sparse_pretrain.config import CHOICES, RecipeConfig, TrainConfig, TrainerConfig, flatten, to_dict
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.data.token_store import TokenStore


def check(cfg: TrainConfig) -> None:
    """The checks across options that need neither data nor a device.

    Raises:
        UserError: for the first combination that cannot work.
    """
    model, data, recipe, trainer = cfg.model, cfg.data, cfg.recipe, cfg.trainer
    if model.d_model % model.n_head:
        raise UserError("model.n_head", model.n_head, f"a divisor of model.d_model={model.d_model}")
    if model.position == "rotary" and (model.d_model // model.n_head) % 2:
        raise UserError(
            "model.n_head",
            model.n_head,
            f"one for which model.d_model / model.n_head is even (model.d_model={model.d_model}, rotary positions)",
        )
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        raise UserError("model.n_kv_head", model.n_kv_head, f"a divisor of model.n_head={model.n_head}")
    if data.seq_len > model.max_seq_len:
        raise UserError("data.seq_len", data.seq_len, f"at most model.max_seq_len={model.max_seq_len}")
    if data.source == "text" and not data.train:
        raise UserError("data.train", "nothing", "a list of files, folders or globs, as data.train=[corpus/*.txt]")
    if data.source == "huggingface" and not data.hf_path:
        raise UserError("data.hf_path", "nothing", "the name of a Hugging Face dataset, or a local folder")
    if len(cfg.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optimizer.betas):
        raise UserError("optimizer.betas", cfg.optimizer.betas, "two numbers, each at least 0 and below 1")
    if cfg.scheduler.warmup_steps > trainer.steps:
        raise UserError("scheduler.warmup_steps", cfg.scheduler.warmup_steps, f"at most trainer.steps={trainer.steps}")
    _check_recipe(recipe)
    _check_batch(trainer)
    if cfg.name is not None and not re.fullmatch(r"[A-Za-z0-9._-]+", cfg.name):
        raise UserError("name", repr(cfg.name), "letters, digits, '.', '_' and '-'")


def _check_recipe(recipe: RecipeConfig) -> None:
    schedule = recipe.schedule
    if schedule.dense_warmup + schedule.dense_finetune > 1:
        raise UserError(
            "recipe.schedule.dense_finetune",
            f"{schedule.dense_finetune:g} with recipe.schedule.dense_warmup={schedule.dense_warmup:g}",
            "shares of the run that add up to at most 1",
        )
    if recipe.decay.factor > 0 and recipe.decay.place == "none":
        raise UserError("recipe.decay.place", "none with a decay factor above 0", CHOICES["recipe.decay.place"][1:])
    if recipe.projection == "none":
        for option, used in (
            ("recipe.weight_gradient", recipe.weight_gradient != "dense"),
            ("recipe.decay.factor", recipe.decay.factor > 0),
            ("recipe.fp8", recipe.fp8),
            ("recipe.include", recipe.include is not None),
            ("recipe.exclude", bool(recipe.exclude)),
        ):
            if used:
                raise UserError(option, "set for a dense recipe", "this only with recipe.projection other than none")


def _check_batch(trainer: TrainerConfig) -> None:
    if trainer.batch_size % trainer.devices:
        raise UserError("trainer.batch_size", trainer.batch_size, f"a multiple of trainer.devices={trainer.devices}")
    per_device = trainer.batch_size // trainer.devices
    if trainer.micro_batch_size is not None and per_device % trainer.micro_batch_size:
        raise UserError(
            "trainer.micro_batch_size",
            trainer.micro_batch_size,
            f"a divisor of the {per_device} sequences per device (trainer.batch_size / trainer.devices)",
        )


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
