"""One way in for every task: what a step gets does not depend on ranks, workers or where the run began."""

from __future__ import annotations

import json
import pickle

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from toy_corpora import document, write_corpus

from sparse_pretrain.config_data import ImagesConfig, PairsConfig, QuestionsConfig, SentencesConfig, TextConfig
from sparse_pretrain.data.build import data_module, open_store, prepare
from sparse_pretrain.data.datamodule import TokenDataModule
from sparse_pretrain.data.loaders import validation_items
from sparse_pretrain.data.tokenizer import load_tokenizer, train_wordpiece
from sparse_pretrain.errors import UserError

BATCH, STEPS = 8, 20
KINDS = ["causal", "masked", "seq2seq", "continuation", "images", "sentences", "questions"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small data set of every task."""
    folder = tmp_path_factory.mktemp("files")
    write_corpus(folder / "corpus.txt", range(60))
    (folder / "tokenizer.json").write_bytes(train_wordpiece((document(seed) for seed in range(50)), 150))
    for name, count in (("train", 50), ("dev", 21)):
        (folder / f"{name}.en").write_text("".join(f"The mask {i}\n" for i in range(count)))
        (folder / f"{name}.de").write_text("".join(f"Die Maske {i}\n" for i in range(count)))
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(f"mask {i}\t{i % 2}\n" for i in range(count)))
        qas = [
            {"id": str(i), "question": f"mask {i}?", "answers": [{"text": "tensor", "answer_start": 7}]}
            for i in range(count)
        ]
        (folder / f"{name}.json").write_text(
            json.dumps({"data": [{"paragraphs": [{"context": "sparse tensor", "qas": qas}]}]})
        )
        for i in range(count):
            path = folder / name / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(autouse=True)
def cache(files, monkeypatch):
    """One for all tests of this file."""
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(files / "cache"))


def config(files, kind):
    def both(pattern):
        return {
            split: [str(files / pattern.format(name))] for split, name in (("train", "train"), ("validation", "dev"))
        }

    tokenizer = str(files / "tokenizer.json")
    if kind in ("causal", "masked"):
        return TextConfig(
            name="t", source="text", train=[str(files / "corpus.txt")], tokenizer=tokenizer, seq_len=16, num_workers=0
        )
    if kind in ("seq2seq", "continuation"):
        paths = {
            split: [str(files / f"{name}.{side}") for side in ("en", "de")]
            for split, name in (("train", "train"), ("validation", "dev"))
        }
        return PairsConfig(name="p", vocab_size=280, max_source_len=8, max_target_len=9, num_workers=0, **paths)
    if kind == "images":
        return ImagesConfig(name="i", image_size=6, crop_padding=1, num_workers=0, **both("{}"))
    if kind == "sentences":
        return SentencesConfig(name="s", tokenizer=tokenizer, seq_len=12, num_workers=0, **both("{}.tsv"))
    return QuestionsConfig(
        name="q", tokenizer=tokenizer, seq_len=24, stride=4, max_query_len=8, num_workers=0, **both("{}.json")
    )


def module(files, kind, num_workers=0, **options):
    cfg = config(files, kind)
    cfg.num_workers = num_workers
    objective = {"masked": "masked", "seq2seq": "seq2seq"}.get(kind, "causal")
    values = {"batch_size": BATCH, "seed": 1, "total_steps": STEPS, "eval_batches": 1000, "objective": objective}
    return data_module(cfg, prepare(cfg), **{**values, **options})


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def joined(items):
    if isinstance(items[0], torch.Tensor):
        return torch.cat(items)
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


SHAPES = {
    "causal": {"": (BATCH, 17)},
    "masked": {"tokens": (BATCH, 16), "labels": (BATCH, 16)},
    "seq2seq": {"source": (BATCH, 8), "source_mask": (BATCH, 8), "target": (BATCH, 10), "labels": (BATCH, 9)},
    "continuation": {"tokens": (BATCH, 17), "labels": (BATCH, 16)},
    "images": {"images": (BATCH, 3, 6, 6), "labels": (BATCH,)},
    "sentences": {"tokens": (BATCH, 12), "mask": (BATCH, 12), "token_types": (BATCH, 12), "labels": (BATCH,)},
    "questions": {"tokens": (BATCH, 24), "mask": (BATCH, 24), "token_types": (BATCH, 24), "start": (BATCH,), "end": (BATCH,), "index": (BATCH,)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(files, kind):
    item = next(iter(module(files, kind).train_loader(range(1))))
    item = {"": item} if isinstance(item, torch.Tensor) else item
    assert {name: tuple(value.shape) for name, value in item.items()} == SHAPES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_neither_ranks_nor_workers_nor_the_start_show(files, kind):
    whole = list(module(files, kind).train_loader(range(STEPS)))
    assert len(whole) == STEPS
    again = list(module(files, kind).train_loader(range(STEPS)))
    assert all(equal(a, b) for a, b in zip(whole, again, strict=True))
    late = module(files, kind, num_workers=1).train_loader(range(13, STEPS))
    assert len(late) == STEPS
    assert all(equal(a, b) for a, b in zip(whole[13:], late, strict=True))
    ranks = [list(module(files, kind).train_loader(range(9), rank, 4)) for rank in range(4)]
    for step in range(9):
        assert equal(joined([items[step] for items in ranks]), whole[step])
    other = next(iter(module(files, kind, seed=2).train_loader(range(STEPS))))
    assert not equal(other, whole[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_has_every_row_once(files, kind, world_size):
    data = module(files, kind)
    parts = [list(data.validation_loader(rank, world_size)) for rank in range(world_size)]
    assert len({len(items) for items in parts}) == 1
    everything = joined([item for items in parts for item in items])
    alone = joined(list(module(files, kind, batch_size=1024).validation_loader()))
    assert equal(everything, alone)
    if kind not in ("causal", "masked"):
        assert len(everything["labels" if "labels" in everything else "start"]) == 21


def test_part_of_a_validation_split_is_spread_over_it(files):
    items = list(module(files, "questions", eval_batches=1).validation_loader())
    assert joined(items)["index"].tolist() == [0, 2, 5, 7, 10, 13, 15, 18]


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"), [(21, 8, 4), (8, 8, 8), (9, 8, 8), (3, 8, 4), (1, 1, 1), (100, 7, 3)]
)
def test_validation_items(count, batch_size, world_size):
    parts = [validation_items(np.arange(count), batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(items) for items in parts}) == 1
    assert all(len(item) for items in parts for item in items)
    rows = [np.concatenate(items).tolist() for items in parts]
    if count >= world_size:
        assert [row for part in rows for row in part] == list(range(count))
        assert max(len(item) for items in parts for item in items) <= -(-batch_size // world_size) + 1
    else:
        assert rows == [list(range(count))] * world_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_used_dataset_pickles_without_its_data(files, kind):
    loader = module(files, kind).train_loader(range(STEPS))
    dataset = loader.loader.dataset
    item = dataset[3]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000
    assert equal(pickle.loads(pickled)[3], item)


def test_masked_sequences_are_framed(files):
    cfg = config(files, "masked")
    store = prepare(cfg)
    tokens = store.split("train")
    data = module(files, "masked")
    for step, item in enumerate(data.train_loader(range(5))):
        for i, row in enumerate(data.sampler.indices(step)):
            hidden = item["labels"][i] >= 0
            whole = torch.where(hidden, item["labels"][i], item["tokens"][i]).tolist()
            assert whole == [2, *tokens[row * 14 : (row + 1) * 14].tolist(), 3]
            assert 1 <= hidden.sum() <= 4
    first, second = (joined(list(module(files, "masked", seed=seed).validation_loader())) for seed in (1, 1))
    assert equal(first, second)


def test_other_shares_and_pieces(files):
    share = {}
    for mask_share in (0.15, 0.6):
        items = joined(list(module(files, "masked", mask_share=mask_share, whole_words=False).validation_loader()))
        share[mask_share] = float((items["labels"] >= 0).float().mean())
    assert share[0.6] > 3 * share[0.15]


def test_a_tokenizer_without_a_mask_cannot_be_masked(files):
    cfg = config(files, "masked")
    cfg.tokenizer, cfg.vocab_size = "bpe", 300
    options = {"batch_size": 2, "seed": 1, "total_steps": 1, "eval_batches": 1, "objective": "masked"}
    with pytest.raises(UserError, match=r"data\.tokenizer: found a tokenizer without a mask token.*wordpiece"):
        data_module(cfg, prepare(cfg), **options)
    cfg = config(files, "masked")
    cfg.seq_len = 2
    with pytest.raises(UserError, match=r"data\.seq_len: found 2; allowed: at least 3"):
        data_module(cfg, prepare(cfg), **options)


def test_wordpiece_trains_on_a_corpus(files):
    cfg = config(files, "masked")
    cfg.tokenizer, cfg.vocab_size = "wordpiece", 160
    store = prepare(cfg)
    tokenizer = load_tokenizer(store.tokenizer_path.read_bytes(), "test")
    assert store.eot_id == tokenizer.token_to_id("[SEP]")
    assert isinstance(data_module(cfg, store, batch_size=2, seed=1, total_steps=1, eval_batches=1), TokenDataModule)


@pytest.mark.parametrize("kind", KINDS)
def test_stores_open_by_their_folder(files, kind):
    cfg = config(files, kind)
    store = prepare(cfg)
    assert open_store(store.folder) == store


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_example_once(files, kind):
    data = module(files, kind)
    rows = 50
    if kind in ("causal", "masked"):
        rows = (prepare(config(files, kind)).num_tokens("train") - 1) // {"causal": 16, "masked": 14}[kind]
    assert data.sampler.num_sequences == rows
    order = np.concatenate([data.sampler.indices(step) for step in range(-(-rows // BATCH))])[:rows]
    assert sorted(order) == list(range(rows))


def test_fewer_examples_than_a_batch(files):
    """A batch goes through them more than once."""
    item = next(iter(module(files, "sentences", batch_size=120).train_loader(range(1))))
    (_, counts) = item["tokens"].unique(dim=0, return_counts=True)
    assert len(item["labels"]) == 120
    assert set(counts.tolist()) == {2, 3}


def test_a_missing_store(tmp_path):
    with pytest.raises(UserError, match="Delete the folder"):
        open_store(tmp_path / "nothing")


def test_lightning_reads_the_loaders(files):
    class Keep(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.items = torch.nn.Parameter(torch.zeros(())), []

        def training_step(self, batch, batch_idx):
            self.items.append(batch)
            return self.weight * batch["images"].mean()

        def validation_step(self, batch, batch_idx):
            self.items.append(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    keep = Keep()
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=3,
    )  # fmt: skip
    trainer.fit(keep, module(files, "images", start_step=lambda: 0))
    data = module(files, "images")
    expected = [*list(data.train_loader(range(3))), *data.validation_loader()]
    assert len(keep.items) == len(expected) == 6
    assert all(equal(a, b) for a, b in zip(keep.items, expected, strict=True))


def test_ranks_must_divide_the_batch(files):
    with pytest.raises(UserError, match=r"trainer\.batch_size: found 8; allowed: a multiple of the 3 devices"):
        module(files, "sentences").train_loader(range(1), 0, 3)
