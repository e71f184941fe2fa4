"""The order of the sequences: a pure function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_pretrain.data.sampler import PackedSampler, epoch_permutation
from sparse_pretrain.errors import UserError


@pytest.mark.parametrize("batch_size", [1, 4, 7, 250])
def test_every_sequence_once_per_epoch(batch_size):
    sampler = PackedSampler(num_tokens=100 * 8 + 3, seq_len=8, batch_size=batch_size, seed=1)
    assert sampler.num_sequences == 100
    order = np.concatenate([sampler.indices(step) for step in range(-(-300 // batch_size))])
    epochs = order[:300].reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_steps_in_any_order_give_the_same():
    sampler = PackedSampler(801, 8, 7, seed=3)
    forwards = [sampler.indices(step) for step in range(60)]
    epoch_permutation.cache_clear()
    backwards = [PackedSampler(801, 8, 7, seed=3).indices(step) for step in reversed(range(60))]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert forwards[0].dtype == np.int64


def test_the_order_never_changes():
    # Fixed for good: a run resumed with a later version must see the same batches.
    assert PackedSampler(81, 8, 10, seed=1).indices(0).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]


def test_seeds_differ():
    assert not np.array_equal(
        PackedSampler(801, 8, 50, seed=1).indices(0), PackedSampler(801, 8, 50, seed=2).indices(0)
    )
    PackedSampler(801, 8, 50, seed=2**63 - 1).indices(0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(world_size):
    sampler = PackedSampler(801, 8, 16, seed=1)
    for step in (0, 5, 6, 100):
        rows = [sampler.rank_indices(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(rows), sampler.indices(step))


def test_at_most_two_orders_are_kept():
    sampler = PackedSampler(801, 8, 50, seed=1)
    for step in range(20):
        sampler.indices(step)
    assert epoch_permutation.cache_info().currsize <= 2


def test_too_few_tokens():
    assert PackedSampler(9, 8, 1, seed=1).num_sequences == 1
    with pytest.raises(UserError, match=r"data\.seq_len.*at most 7"):
        PackedSampler(8, 8, 1, seed=1)
