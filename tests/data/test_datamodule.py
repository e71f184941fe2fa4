"""The loaders: what a step gets, for any ranks and workers, and that Lightning resumes them at any step."""

from __future__ import annotations

import pickle
import warnings

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sparse_pretrain.data.datamodule import SequenceDataset, TokenDataModule, train_loader, validation_loader
from sparse_pretrain.data.sampler import PackedSampler
from sparse_pretrain.data.token_store import prepare
from sparse_pretrain.errors import UserError

SEQ_LEN, BATCH, STEPS = 16, 8, 12


@pytest.fixture
def store(make_config):
    return prepare(make_config())


@pytest.fixture
def sampler(store):
    return PackedSampler(store.num_tokens("train"), SEQ_LEN, BATCH, seed=1)


def test_items_are_the_sampled_sequences(store, sampler):
    tokens = store.split("train")
    for step, item in enumerate(train_loader(store, sampler, range(STEPS))):
        assert item.dtype == torch.int64
        expected = [tokens[j * SEQ_LEN : (j + 1) * SEQ_LEN + 1].tolist() for j in sampler.indices(step)]
        assert item.tolist() == expected


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 4])
def test_the_global_batch_does_not_depend_on_ranks_and_workers(store, sampler, num_workers, world_size):
    expected = list(train_loader(store, sampler, range(5)))
    ranks = [list(train_loader(store, sampler, range(5), rank, world_size, num_workers)) for rank in range(world_size)]
    for step in range(5):
        assert torch.equal(torch.cat([items[step] for items in ranks]), expected[step])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_start_in_the_middle_gives_the_tail(store, sampler, num_workers):
    whole = list(train_loader(store, sampler, range(STEPS)))
    loader = train_loader(store, sampler, range(5, STEPS), num_workers=num_workers)
    assert len(loader) == STEPS
    tail = list(loader)
    assert len(tail) == STEPS - 5
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], tail, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(store, sampler, num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(train_loader(store, sampler, range(3), num_workers=num_workers))
    list(validation_loader(store, SEQ_LEN, BATCH, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_used_dataset_pickles_without_its_tokens(store, sampler):
    dataset = SequenceDataset(store, "train", SEQ_LEN, sampler.indices)
    item = dataset[3]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 5000
    assert torch.equal(pickle.loads(pickled)[3], item)


def test_ranks_must_divide_the_batch(store, sampler):
    with pytest.raises(UserError, match=r"trainer\.batch_size"):
        train_loader(store, sampler, range(1), 0, 3)


def validation_items(store, eval_batches, world_size):
    loaders = [validation_loader(store, SEQ_LEN, BATCH, eval_batches, rank, world_size) for rank in range(world_size)]
    items = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(rank) for rank in items]
    assert len({len(rank) for rank in items}) == 1
    assert all(len(item) for rank in items for item in rank)
    return torch.cat([item for rank in items for item in rank])


@pytest.mark.parametrize("eval_batches", [1, 2, 3, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_validation_takes_the_first_sequences_once_each(store, eval_batches, world_size):
    tokens = store.split("validation")
    count = min((len(tokens) - 1) // SEQ_LEN, eval_batches * BATCH)
    expected = np.stack([tokens[j * SEQ_LEN : (j + 1) * SEQ_LEN + 1] for j in range(count)]).astype(np.int64)
    assert validation_items(store, eval_batches, world_size).tolist() == expected.tolist()


def test_validation_with_fewer_sequences_than_ranks_gives_every_rank_all(store):
    few = store.num_tokens("validation") // 3 - 1
    loaders = [validation_loader(store, few, 8, 1, rank, 8) for rank in range(8)]
    first = torch.cat(list(loaders[0]))
    assert 0 < len(first) < 8
    assert all(torch.equal(torch.cat(list(loader)), first) for loader in loaders)


class Recorder(lightning.LightningModule):
    """Keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_items: list[torch.Tensor] = []
        self.validated_at: list[int] = []

    def training_step(self, batch, batch_idx):
        assert batch_idx == self.trainer.global_step
        self.train_items.append(batch)
        return self.weight * batch.float().mean()

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.validated_at.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(store, folder, steps, resume=None, num_workers=0, **options) -> Recorder:
    data = TokenDataModule(
        store,
        seq_len=SEQ_LEN,
        batch_size=BATCH,
        seed=1,
        total_steps=STEPS,
        eval_batches=2,
        num_workers=num_workers,
    )
    model = Recorder()
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=4,
        callbacks=[checkpoint],
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, data, ckpt_path=resume)
    assert trainer.global_step == steps
    return model


@pytest.mark.parametrize(("stop", "num_workers"), [(1, 0), (4, 0), (7, 0), (7, 1), (11, 0), (12, 0)])
def test_lightning_resumes_with_the_very_next_batch(store, tmp_path, stop, num_workers):
    whole = fit(store, tmp_path / "whole", STEPS)
    assert len(whole.train_items) == STEPS
    assert whole.validated_at == [4, 8, 12]
    first = fit(store, tmp_path / "first", stop)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        checkpoint = tmp_path / "first" / f"step={stop}.ckpt"
        resumed = fit(store, tmp_path / "resumed", STEPS, resume=checkpoint, num_workers=num_workers)
    items = first.train_items + resumed.train_items
    assert len(items) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(items, whole.train_items, strict=True))
    assert {8, 12} - {step for step in (4, 8, 12) if step <= stop} <= set(resumed.validated_at)


def test_start_step_can_be_given(store, sampler):
    data = TokenDataModule(
        store,
        seq_len=SEQ_LEN,
        batch_size=BATCH,
        seed=1,
        total_steps=STEPS,
        eval_batches=1,
        start_step=lambda: 9,
    )
    data.trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    items = list(data.train_dataloader())
    assert len(items) == 3
    assert torch.equal(items[0], next(iter(train_loader(store, sampler, range(9, STEPS)))))


def test_too_long_sequences(store):
    with pytest.raises(UserError, match=r"data\.seq_len"):
        TokenDataModule(store, seq_len=10**6, batch_size=1, seed=1, total_steps=1, eval_batches=1)
