"""The Lightning data module over a token store: one item per optimizer step, resumable at any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparse_pretrain.data.corpus import Split
from sparse_pretrain.data.loaders import StepDataModule, StepLoader, TrainRows, load_items, validation_items
from sparse_pretrain.data.sampler import PackedSampler
from sparse_pretrain.data.token_store import TokenStore, check_length


class SequenceDataset(Dataset[Tensor]):
    """Item i: the sequences `rows(i)` of a split, as a LongTensor (sequences, seq_len + 1).

    Inputs are `item[:, :-1]`, targets `item[:, 1:]`. Tokens are mapped when first read, in the process that
    reads.
    """

    def __init__(self, store: TokenStore, split: Split, seq_len: int, rows: Callable[[int], np.ndarray]) -> None:
        self.store, self.split, self.seq_len, self.rows = store, split, seq_len, rows
        self._tokens: np.ndarray | None = None

    def __getitem__(self, item: int) -> Tensor:
        if self._tokens is None:
            self._tokens = self.store.split(self.split)
        positions = self.rows(item)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return torch.from_numpy(self._tokens[positions].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}  # pickling a memory map would copy the whole file


def train_loader(
    store: TokenStore,
    sampler: PackedSampler,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> StepLoader:
    """The batches of `steps` (first step to run, number of steps of the run), this rank's rows of each.

    Raises:
        UserError: naming trainer.batch_size, if it is not a multiple of `world_size`.
    """
    dataset = SequenceDataset(store, "train", sampler.seq_len, TrainRows(sampler, rank, world_size))
    return load_items(dataset, steps, steps.stop, num_workers, pin_memory)


def validation_loader(
    store: TokenStore,
    seq_len: int,
    batch_size: int,
    eval_batches: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> StepLoader:
    """The first `eval_batches * batch_size` sequences of the validation split, or all if there are fewer, once each
    whatever the number of ranks: see `validation_items`. Weigh a loss with its tokens (`item[:, 1:].numel()`)."""
    count = min((store.num_tokens("validation") - 1) // seq_len, eval_batches * batch_size)
    items = validation_items(np.arange(count), batch_size, rank, world_size)
    dataset = SequenceDataset(store, "validation", seq_len, items.__getitem__)
    return load_items(dataset, range(len(items)), len(items), pin_memory=pin_memory)


class TokenDataModule(StepDataModule):
    """Batches from a prepared token store. A train item: LongTensor (batch_size / world_size, seq_len + 1).

    Args:
        store: the tokens.
        seq_len: tokens per sequence.
        batch_size: sequences per optimizer step, over all ranks.
        seed: of the order.
        total_steps: optimizer steps of the whole run.
        eval_batches: at most that many batches of the validation split.
        num_workers, start_step: as StepDataModule.

    Raises:
        UserError: naming data.seq_len, if a split has not one whole sequence.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        total_steps: int,
        eval_batches: int,
        num_workers: int = 0,
        start_step: Callable[[], int] | None = None,
    ) -> None:
        check_length(store, seq_len)
        sampler = PackedSampler(store.num_tokens("train"), seq_len, batch_size, seed)
        super().__init__(sampler, total_steps, num_workers, start_step)
        self.store, self.seq_len, self.batch_size, self.eval_batches = store, seq_len, batch_size, eval_batches

    def train_loader(self, steps: range, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> StepLoader:
        assert isinstance(self.sampler, PackedSampler)
        return train_loader(self.store, self.sampler, steps, rank, world_size, self.num_workers, pin_memory)

    def validation_loader(self, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> StepLoader:
        return validation_loader(
            self.store, self.seq_len, self.batch_size, self.eval_batches, rank, world_size, pin_memory
        )
