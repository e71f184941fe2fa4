"""Loaders whose items are steps of a run, and the Lightning data module that gives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sparse_pretrain.data.sampler import ExampleSampler, PackedSampler
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import ignore_signals
from sparse_pretrain.sharding import data_parallel_rank


class StepLoader:
    """What Lightning sees of a `DataLoader` whose items are steps of a run.

    Its length is the number of steps of the whole run, also when it starts in the middle: Lightning compares
    its own count of batches, which a resumed run continues, with that length. It counts as resumable
    (`state_dict`) because where it starts is the step, which is in the checkpoint. And as it is no
    `DataLoader`, Lightning does not replace its sampler by a distributed one: ranks are dealt with here.
    """

    def __init__(self, loader: DataLoader[Any], length: int) -> None:
        self.loader, self.length = loader, length

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def load_items(
    dataset: Dataset[Any], items: Sequence[int], length: int, num_workers: int = 0, pin_memory: bool = False
) -> StepLoader:
    """The items `items` of a dataset, each a whole batch, as a loader of `length`."""
    loader = DataLoader(
        dataset,
        sampler=items,
        batch_size=None,  # an item is a whole batch
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else it draws from the global one: no exact resume
    )
    return StepLoader(loader, length)


class TrainRows:
    """The sampler's rows of one rank, by step: a callable that can be pickled.

    Raises:
        UserError: naming trainer.batch_size, if it is not a multiple of `world_size`.
    """

    def __init__(self, sampler: PackedSampler | ExampleSampler, rank: int, world_size: int) -> None:
        if sampler.batch_size % world_size:
            raise UserError("trainer.batch_size", sampler.batch_size, f"a multiple of the {world_size} devices")
        self.sampler, self.rank, self.world_size = sampler, rank, world_size

    def __call__(self, step: int) -> np.ndarray:
        return self.sampler.rank_indices(step, self.rank, self.world_size)


def validation_items(rows: np.ndarray, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """One rank's items of validation, as rows of the split.

    Every rank gets the same number of items, none of them empty. Ranks take contiguous parts, whose sizes (and those
    of the items) may differ by one row: an exact mean is a sum over rows divided by their number, each summed over
    items and ranks. With fewer rows than ranks every rank takes all of them, which leaves that mean as it is.

    Args:
        rows: (count,) all that are to be read, at least one.
        batch_size: rows per item, over all ranks; at least one.
    """
    items = -(-len(rows) // batch_size)
    if len(rows) >= world_size:
        items = min(items, len(rows) // world_size)
        rows = np.array_split(rows, world_size)[rank]
    return np.array_split(rows, items)


class StepDataModule(lightning.LightningDataModule, ABC):
    """Batches for `Trainer.fit`: a train item is the batch of one optimizer step, this rank's rows of it. Which rows
    those are depends on the seed and the step alone. Rank, number of ranks and device are the trainer's.

    Args:
        sampler: which rows each step gets.
        total_steps: optimizer steps of the whole run.
        num_workers: processes that load train batches (validation is read in the main process).
        start_step: gives the first step to run, when the train loader is made; default: the trainer's global
            step.
    """

    def __init__(
        self,
        sampler: PackedSampler | ExampleSampler,
        total_steps: int,
        num_workers: int = 0,
        start_step: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.total_steps, self.num_workers, self.start_step = total_steps, num_workers, start_step

    @abstractmethod
    def train_loader(self, steps: range, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> StepLoader:
        """The batches of `steps` (first step to run, number of steps of the run), this rank's rows of each.

        Raises:
            UserError: naming trainer.batch_size, if it is not a multiple of `world_size`.
        """

    @abstractmethod
    def validation_loader(self, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> StepLoader:
        """Items of the validation split, of which each row is in one item of one rank: see `validation_items`."""

    def train_dataloader(self) -> StepLoader:
        trainer = self._trainer()
        start = self.start_step() if self.start_step else trainer.global_step
        return self.train_loader(
            range(start, self.total_steps),
            *data_parallel_rank(trainer),
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> StepLoader:
        trainer = self._trainer()
        return self.validation_loader(
            *data_parallel_rank(trainer),
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def _trainer(self) -> lightning.Trainer:
        if self.trainer is None:
            raise RuntimeError("loaders for a Trainer need one; without, see train_loader and validation_loader")
        return self.trainer
