"""`sparse-pretrain finetune`: a training run from a trained model, on data of a task of its own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_pretrain import crosscheck, runs, train
from sparse_pretrain.config import EvaluateConfig, FinetuneConfig, TrainConfig
from sparse_pretrain.config_data import DataConfig
from sparse_pretrain.config_models import HFConfig, ModelConfig, TransformerConfig
from sparse_pretrain.errors import UserError


@dataclass(frozen=True)
class Source:
    """A trained model: its options, and the tokenizer that its data must have (None = it reads no text)."""

    model: ModelConfig
    tokenizer: Path | None


def run(cfg: FinetuneConfig, command: str = "") -> Path:
    """Train, or go on training; returns the run folder.

    Raises:
        UserError, Interrupted: as `train.run` does; or there is no model at `checkpoint`, or an option that it decides.
    """
    source = find_source(cfg.checkpoint)
    data = with_tokenizer(cfg.data, source)
    # checked before the data are prepared, which may take long
    crosscheck.check(training(cfg, source, data, cfg.trainer.steps))
    steps = cfg.trainer.steps
    if cfg.epochs is not None:
        steps = math.ceil(cfg.epochs * _examples(training(cfg, source, data, steps)) / cfg.trainer.batch_size)
    return train.run(training(cfg, source, data, steps), command)


def _examples(cfg: TrainConfig) -> int:
    """Of an epoch: what the order of a run goes through."""
    from sparse_pretrain.data.build import data_module, prepare
    from sparse_pretrain.tasks.sampling import sampling

    module = data_module(
        cfg.data,
        prepare(cfg.data),
        batch_size=cfg.trainer.batch_size,
        seed=cfg.seed,
        total_steps=1,
        eval_batches=1,
        **sampling(cfg),
    )
    return module.sampler.num_sequences


def finish(run_dirs: list[Path]) -> None:
    """Show what came out: the table and page of every training run, and the task's own metrics."""
    from sparse_pretrain import evaluate

    train.finish(run_dirs)
    for run_dir in filter(runs.is_complete, run_dirs):
        print(f"\n{run_dir.name}:")
        evaluate.run(EvaluateConfig(checkpoint=str(run_dir)))


def find_source(path: str) -> Source:
    """The model of a run, checkpoint or Hugging Face folder.

    Raises:
        UserError: there is none.
    """
    from sparse_pretrain.checkpoint import store
    from sparse_pretrain.data.tokenizer_files import FILES
    from sparse_pretrain.models import huggingface

    folder = Path(path).expanduser().absolute()
    if huggingface.is_hugging_face(folder):
        model: ModelConfig = HFConfig(name=folder.name, path=str(folder))
        if huggingface.is_known(folder):
            model = huggingface.options(folder)
        return Source(model, folder if any((folder / name).is_file() for name in FILES) else None)
    run_dir = store.resolve(folder, "checkpoint").parent.parent
    tokenizer = run_dir / runs.TOKENIZER_FILE
    return Source(runs.read_config(run_dir).model, tokenizer if tokenizer.is_file() else None)


def with_tokenizer(data: DataConfig, source: Source) -> DataConfig:
    """The data, cut into the model's own tokens.

    Raises:
        UserError: they ask for other ones.
    """
    if source.tokenizer is None or not hasattr(data, "tokenizer"):
        return data
    if data.tokenizer not in (None, "bpe", "wordpiece"):
        raise UserError(
            "data.tokenizer", data.tokenizer, f"null: texts are cut as the checkpoint's were, by {source.tokenizer}"
        )
    changes: dict[str, Any] = {"tokenizer": str(source.tokenizer)}
    return dataclasses.replace(data, **changes)


def training(cfg: FinetuneConfig, source: Source, data: DataConfig, steps: int) -> TrainConfig:
    """The run that `finetune` means."""
    model = source.model
    if cfg.dropout is not None:
        if not isinstance(model, TransformerConfig):
            raise UserError("dropout", cfg.dropout, f"null with model.family={model.family}, which has no such option")
        model = dataclasses.replace(model, dropout=cfg.dropout)
    return TrainConfig(
        model=model,
        data=data,
        recipe=cfg.recipe,
        optimizer=cfg.optimizer,
        scheduler=dataclasses.replace(cfg.scheduler, warmup_steps=round(cfg.warmup_share * steps)),
        trainer=dataclasses.replace(cfg.trainer, steps=steps),
        logger=cfg.logger,
        seed=cfg.seed,
        name=cfg.name or f"{model.name}-{data.name}-{cfg.recipe.name}",
        runs_dir=cfg.runs_dir,
        run_dir=cfg.run_dir,
        resume=cfg.resume,
        init_from=None if isinstance(model, HFConfig) else cfg.checkpoint,
    )
