"""Which sequences a step trains on: a pure function of (seed, step)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from sparse_pretrain.errors import UserError


@functools.lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def epoch_permutation(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the sequences in `epoch`: (num_sequences,) int64, a permutation, read-only.

    Sorts raw output of Philox with key (seed, epoch), a stream that NumPy promises never to change; the
    algorithm of `Generator.permutation` may.
    """
    philox = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.argsort(philox.random_raw(num_sequences), kind="stable")
    order.flags.writeable = False
    return order


class _Sampler:
    """What batch each step gets of `num_sequences` sequences or examples, `batch_size` of them over all ranks. An
    epoch takes every one once, in an order of its own that `seed` decides; a batch may span epochs. Has no state."""

    batch_size: int
    seed: int

    @property
    def num_sequences(self) -> int:
        raise NotImplementedError

    def indices(self, step: int) -> np.ndarray:
        """The sequences of the batch at `step`, the same for any number of ranks: (batch_size,) int64."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_sequences)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = epoch_permutation(self.num_sequences, self.seed, int(epoch))[offsets[here]]
        return indices

    def rank_indices(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Rank `rank`'s rows of the batch at `step`: (batch_size / world_size,) int64."""
        local = self.batch_size // world_size
        return self.indices(step)[rank * local : (rank + 1) * local]


@dataclass(frozen=True)
class PackedSampler(_Sampler):
    """Cuts packed tokens into sequences and says which of them make up the batch of each step.

    Sequence j covers the tokens j*seq_len to (j+1)*seq_len, both included: seq_len inputs and, one further
    on, as many targets; each token is a target once per epoch.

    Args:
        num_tokens: tokens of the split.
        seq_len: tokens per sequence.
        batch_size: sequences per step, over all ranks.
        seed: of the order.

    Raises:
        UserError: naming data.seq_len, if there is not one whole sequence.
    """

    num_tokens: int
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_sequences < 1:
            raise UserError(
                "data.seq_len",
                f"{self.seq_len} with {self.num_tokens} tokens",
                f"at most {self.num_tokens - 1}",
            )

    @property
    def num_sequences(self) -> int:
        return (self.num_tokens - 1) // self.seq_len


@dataclass(frozen=True)
class ExampleSampler(_Sampler):
    """Says which examples make up the batch of each step.

    Args:
        num_examples: of the split, at least one.
        batch_size: examples per step, over all ranks.
        seed: of the order.
    """

    num_examples: int
    batch_size: int
    seed: int

    @property
    def num_sequences(self) -> int:
        return self.num_examples
