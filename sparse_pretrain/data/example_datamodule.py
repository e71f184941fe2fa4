"""The data module of everything that is not plain next-token prediction: rows in, a dict of tensors out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from sparse_pretrain.data.batches import Batch, Collate, tensors
from sparse_pretrain.data.corpus import Split
from sparse_pretrain.data.loaders import StepDataModule, StepLoader, TrainRows, load_items, validation_items
from sparse_pretrain.data.masking import Masking
from sparse_pretrain.data.random_numbers import VALIDATION_STEP
from sparse_pretrain.data.sampler import ExampleSampler, PackedSampler
from sparse_pretrain.data.special_tokens import special_tokens
from sparse_pretrain.data.token_store import TokenStore
from sparse_pretrain.errors import UserError


class BatchDataset(Dataset[Batch]):
    """Item i: the batch of the rows `rows(i)`; in training i is the step."""

    def __init__(self, rows: Callable[[int], np.ndarray], collate: Collate, training: bool) -> None:
        self.rows, self.collate, self.training = rows, collate, training

    def __getitem__(self, item: int) -> Batch:
        return self.collate(self.rows(item), item if self.training else None)


class ExampleDataModule(StepDataModule):
    """Batches that `train` and `validation` make of rows. Validation reads at most `eval_batches * batch_size` rows:
    all, or as many evenly spread over the split.

    Args:
        sampler: which rows each step gets.
        train, validation: make the batches.
        num_validation: rows of the validation split.
        eval_batches: at most that many batches of it.
        total_steps, num_workers, start_step: as StepDataModule.
    """

    def __init__(
        self,
        sampler: PackedSampler | ExampleSampler,
        train: Collate,
        validation: Collate,
        *,
        num_validation: int,
        eval_batches: int,
        total_steps: int,
        num_workers: int = 0,
        start_step: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(sampler, total_steps, num_workers, start_step)
        self.train, self.validation = train, validation
        self.num_validation, self.eval_batches = num_validation, eval_batches

    def train_loader(self, steps: range, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> StepLoader:
        dataset = BatchDataset(TrainRows(self.sampler, rank, world_size), self.train, training=True)
        return load_items(dataset, steps, steps.stop, self.num_workers, pin_memory)

    def validation_loader(self, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> StepLoader:
        count = min(self.num_validation, self.eval_batches * self.sampler.batch_size)
        rows = np.arange(count) * self.num_validation // count
        items = validation_items(rows, self.sampler.batch_size, rank, world_size)
        dataset = BatchDataset(items.__getitem__, self.validation, training=False)
        return load_items(dataset, range(len(items)), len(items), pin_memory=pin_memory)


class MaskedBatches:
    """Sequences of a token store as an encoder learns from them: start id, text, separator; some of it hidden.

    tokens (B, L) with hidden ones, labels (B, L): what is hidden there, -100 elsewhere. In validation the same tokens
    are hidden each time.
    """

    def __init__(
        self, store: TokenStore, split: Split, seq_len: int, seed: int, masking: Masking, frame: list[int]
    ) -> None:
        self.store, self.split, self.seq_len = store, split, seq_len
        self.seed, self.masking, self.frame = seed, masking, frame
        self._tokens: np.ndarray | None = None

    def __call__(self, rows: np.ndarray, step: int | None) -> Batch:
        if self._tokens is None:
            self._tokens = self.store.split(self.split)
        text = self.seq_len - 2
        tokens = np.empty((len(rows), self.seq_len), np.int64)
        tokens[:, 0], tokens[:, -1] = self.frame
        tokens[:, 1:-1] = self._tokens[rows[:, None] * text + np.arange(text)]
        seen, labels = self.masking(tokens, self.seed, VALIDATION_STEP if step is None else step, rows)
        return tensors(tokens=seen, labels=labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}  # pickling a memory map would copy the whole file


def masked_data_module(
    store: TokenStore,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    eval_batches: int,
    mask_share: float,
    whole_words: bool,
    **options: Any,
) -> ExampleDataModule:
    """Batches for masked language modelling.

    Args:
        tokenizer: that of `store`.
        seq_len: tokens per sequence, start id and separator included.
        mask_share, whole_words: which tokens are to be guessed: see Masking.
        options: of StepDataModule.

    Raises:
        UserError: naming data.tokenizer, if it has no mask token; data.seq_len, if it is too small or too large.
    """
    special = special_tokens(tokenizer)
    if special.mask is None:
        raise UserError(
            "data.tokenizer",
            "a tokenizer without a mask token, for a model that learns from hidden words",
            "wordpiece, or the path of a tokenizer with [MASK] or <mask>",
        )
    if seq_len < 3:
        raise UserError("data.seq_len", seq_len, "at least 3: two tokens frame a sequence")
    text = seq_len - 2
    samplers = [PackedSampler(store.num_tokens(split), text, batch_size, seed) for split in ("train", "validation")]
    masking = Masking(tokenizer, special, store.vocab_size, mask_share, whole_words)
    edge = special.fill if special.separator is None else special.separator
    frame = [edge if special.start is None else special.start, edge]
    return ExampleDataModule(
        samplers[0],
        MaskedBatches(store, "train", seq_len, seed, masking, frame),
        MaskedBatches(store, "validation", seq_len, seed, masking, frame),
        num_validation=samplers[1].num_sequences,
        eval_batches=eval_batches,
        **options,
    )
