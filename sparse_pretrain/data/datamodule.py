"""The Lightning data module over a token store: one item per optimizer step, resumable at any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_pretrain.data.corpus import Split
from sparse_pretrain.data.sampler import PackedSampler
from sparse_pretrain.data.token_store import TokenStore, check_length
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import ignore_signals


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


class StepLoader:
    """What Lightning sees of a `DataLoader` whose items are steps of a run.

    Its length is the number of steps of the whole run, also when it starts in the middle: Lightning compares
    its own count of batches, which a resumed run continues, with that length. It counts as resumable
    (`state_dict`) because where it starts is the step, which is in the checkpoint. And as it is no
    `DataLoader`, Lightning does not replace its sampler by a distributed one: ranks are dealt with here.
    """

    def __init__(self, loader: DataLoader[Tensor], length: int) -> None:
        self.loader, self.length = loader, length

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.loader

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


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
    if sampler.batch_size % world_size:
        raise UserError("trainer.batch_size", sampler.batch_size, f"a multiple of the {world_size} devices")
    rows = _TrainRows(sampler, rank, world_size)
    dataset = SequenceDataset(store, "train", sampler.seq_len, rows)
    loader = _loader(dataset, steps, num_workers, pin_memory)
    return StepLoader(loader, steps.stop)


def validation_loader(
    store: TokenStore,
    seq_len: int,
    batch_size: int,
    eval_batches: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> StepLoader:
    """The first `eval_batches * batch_size` sequences of the validation split, or all if there are fewer.

    They are the same whatever the number of ranks, and every rank gets the same number of items, none of them
    empty. Ranks take contiguous parts, whose sizes (and those of the items) may differ by one sequence: an
    exact mean is the sum of the losses over the sum of the tokens (`item[:, 1:].numel()`), each summed over
    items and ranks. With fewer sequences than ranks every rank takes all of them, which leaves that mean as
    it is.
    """
    count = min((store.num_tokens("validation") - 1) // seq_len, eval_batches * batch_size)
    sequences = np.arange(count)
    items = -(-count // batch_size)
    if count >= world_size:
        sequences = np.array_split(sequences, world_size)[rank]
        items = min(items, count // world_size)
    dataset = SequenceDataset(store, "validation", seq_len, np.array_split(sequences, items).__getitem__)
    return StepLoader(_loader(dataset, range(items), 0, pin_memory), items)


class _TrainRows:
    """The sampler's rows of one rank: a callable that can be pickled."""

    def __init__(self, sampler: PackedSampler, rank: int, world_size: int) -> None:
        self.sampler, self.rank, self.world_size = sampler, rank, world_size

    def __call__(self, step: int) -> np.ndarray:
        return self.sampler.rank_indices(step, self.rank, self.world_size)


def _loader(dataset: SequenceDataset, items: Sequence[int], num_workers: int, pin_memory: bool) -> DataLoader[Tensor]:
    return DataLoader(
        dataset,
        sampler=items,
        batch_size=None,  # an item is a whole batch
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else it draws from the global one: no exact resume
    )


class TokenDataModule(lightning.LightningDataModule):
    """Batches for `Trainer.fit`, from a prepared token store.

    A train item is the batch of one optimizer step: LongTensor (batch_size / world_size, seq_len + 1). Which
    sequences it holds depends on `seed` and the step alone. Rank, number of ranks and device are the
    trainer's.

    Args:
        store: the tokens.
        seq_len: tokens per sequence.
        batch_size: sequences per optimizer step, over all ranks.
        seed: of the order.
        total_steps: optimizer steps of the whole run.
        eval_batches: at most that many batches of the validation split.
        num_workers: processes that load train batches (validation is read in the main process).
        start_step: gives the first step to run, when the train loader is made; default: the trainer's global
            step.

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
        super().__init__()
        check_length(store, seq_len)
        self.store, self.seq_len, self.batch_size = store, seq_len, batch_size
        self.total_steps, self.eval_batches, self.num_workers = total_steps, eval_batches, num_workers
        self.start_step = start_step
        self.sampler = PackedSampler(store.num_tokens("train"), seq_len, batch_size, seed)

    def train_dataloader(self) -> StepLoader:
        trainer = self._trainer()
        start = self.start_step() if self.start_step else trainer.global_step
        return train_loader(
            self.store,
            self.sampler,
            range(start, self.total_steps),
            trainer.global_rank,
            trainer.world_size,
            self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> StepLoader:
        trainer = self._trainer()
        return validation_loader(
            self.store,
            self.seq_len,
            self.batch_size,
            self.eval_batches,
            trainer.global_rank,
            trainer.world_size,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def _trainer(self) -> lightning.Trainer:
        if self.trainer is None:
            raise RuntimeError("a TokenDataModule gives loaders only once a Trainer uses it; see train_loader")
        return self.trainer
