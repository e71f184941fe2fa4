"""From the options of data to a prepared store, and from that to batches: one way in for every task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_pretrain.config_data import (
    DataConfig,
    ImagesConfig,
    PairsConfig,
    QuestionsConfig,
    SentencesConfig,
    TextConfig,
)
from sparse_pretrain.data import batches, images, pairs, questions, sentences, token_store
from sparse_pretrain.data.datamodule import TokenDataModule
from sparse_pretrain.data.example_datamodule import ExampleDataModule, masked_data_module
from sparse_pretrain.data.example_store import KIND, ExampleStore
from sparse_pretrain.data.loaders import StepDataModule
from sparse_pretrain.data.sampler import ExampleSampler
from sparse_pretrain.data.token_store import TokenStore
from sparse_pretrain.data.tokenizer import load_tokenizer

Store = TokenStore | ExampleStore


def prepare(cfg: DataConfig) -> Store:
    """The prepared data that `cfg` describes: opened if it is in the cache, else built and kept there.

    Of several processes one builds and the others wait for it. A damaged store is built anew.

    Raises:
        UserError: naming the option at fault, or SPARSE_PRETRAIN_CACHE if the cache cannot be written.
    """
    if isinstance(cfg, TextConfig):
        return token_store.prepare(cfg)
    if isinstance(cfg, PairsConfig):
        return pairs.prepare(cfg)
    if isinstance(cfg, ImagesConfig):
        return images.prepare(cfg)
    if isinstance(cfg, SentencesConfig):
        return sentences.prepare(cfg)
    assert isinstance(cfg, QuestionsConfig)
    return questions.prepare(cfg)


def open_store(folder: Path) -> Store:
    """A store that `prepare` made, by its folder.

    Raises:
        UserError: if something is missing or damaged, saying what to delete.
    """
    try:
        kind = json.loads((folder / "manifest.json").read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None  # TokenStore says what is wrong
    return ExampleStore.open(folder) if kind == KIND else TokenStore.open(folder)


def data_module(
    cfg: DataConfig,
    store: Store,
    *,
    batch_size: int,
    seed: int,
    total_steps: int,
    eval_batches: int,
    start_step: Callable[[], int] | None = None,
    objective: str = "causal",
    mask_share: float = 0.15,
    whole_words: bool = True,
) -> StepDataModule:
    """Batches of `store` for a run.

    Args:
        cfg: the options that `store` was prepared with.
        batch_size: examples per optimizer step, over all ranks.
        seed: of the order, and of what is random in an example.
        total_steps: optimizer steps of the whole run.
        eval_batches: at most that many batches of the validation split.
        start_step: gives the first step to run, when the train loader is made; default: the trainer's global step.
        objective: what texts are made into. language_modeling: causal or masked. text_to_text: causal (one text that
            goes on) or seq2seq (source and target apart).
        mask_share, whole_words: of `masked`: see `masking.Masking`.

    Raises:
        UserError: naming data.seq_len or data.tokenizer, if the text or its tokenizer does not do for that.
    """
    options: dict[str, Any] = {"total_steps": total_steps, "num_workers": cfg.num_workers, "start_step": start_step}
    if isinstance(store, TokenStore):
        assert isinstance(cfg, TextConfig)
        options |= {"seq_len": cfg.seq_len, "batch_size": batch_size, "seed": seed, "eval_batches": eval_batches}
        if objective == "causal":
            return TokenDataModule(store, **options)
        tokenizer = load_tokenizer(store.tokenizer_path.read_bytes(), "data.tokenizer")
        return masked_data_module(store, tokenizer, mask_share=mask_share, whole_words=whole_words, **options)
    train, validation = (_collate(cfg, store, split, seed, objective) for split in ("train", "validation"))
    return ExampleDataModule(
        ExampleSampler(store.num_examples("train"), batch_size, seed),
        train,
        validation,
        num_validation=store.num_examples("validation"),
        eval_batches=eval_batches,
        **options,
    )


def _collate(cfg: DataConfig, store: ExampleStore, split: Any, seed: int, objective: str) -> batches.Collate:
    if isinstance(cfg, PairsConfig):
        kind = batches.Seq2SeqBatches if objective == "seq2seq" else batches.ContinuationBatches
        return kind(store, split, cfg.max_source_len, cfg.max_target_len)
    if isinstance(cfg, ImagesConfig):
        return batches.ImageBatches(store, split, seed, cfg.flip, cfg.crop_padding)
    if isinstance(cfg, SentencesConfig):
        return batches.SentenceBatches(store, split, cfg.seq_len)
    assert isinstance(cfg, QuestionsConfig)
    return batches.QuestionBatches(store, split, cfg.seq_len)
