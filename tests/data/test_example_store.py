"""The example store: columns come back as they were written, and nothing that happens to it goes unnoticed."""

from __future__ import annotations

import errno
import json
import pickle

import numpy as np
import pytest

from sparse_pretrain.data import example_store
from sparse_pretrain.data.example_store import Column, Columns, ExampleStore, Plan, prepare
from sparse_pretrain.errors import UserError

COLUMNS = {
    "label": Column("int32"),
    "image": Column("uint8", (2, 3)),
    "tokens": Column("uint16", ragged=True),
    "offsets": Column("int32", (2,), ragged=True),
    "note": Column("json"),
}


def example(i: int) -> dict:
    rng = np.random.default_rng(i)
    return {
        "label": i,
        "image": rng.integers(0, 256, (2, 3)),
        "tokens": rng.integers(0, 60000, i % 4).tolist(),
        "offsets": rng.integers(-5, 5, (i % 3, 2)),
        "note": {"text": f"ü{i}", "list": [1, None]},
    }


def plan(read=None, **options) -> Plan:
    def entries():
        for i in range(20):
            yield ("validation" if i % 5 == 0 else "train"), example(i)
        yield "validation", {"note": "one more"}

    return Plan("toy", {"v": 1, **options}, COLUMNS, read or entries, lambda: {"num_classes": 20, "label_names": ["x"]})


def test_columns_come_back():
    store = prepare(plan())
    assert (store.num_examples("train"), store.num_examples("validation")) == (16, 4)
    assert (store.num_classes, store.label_names, store.vocab_size, store.tokenizer_path) == (20, ["x"], None, None)
    for split, numbers in (("train", [i for i in range(20) if i % 5]), ("validation", [0, 5, 10, 15])):
        columns = Columns(store, split)
        assert columns["label"].tolist() == numbers
        assert columns["label"].dtype == np.int32
        assert columns["image"].shape == (len(numbers), 2, 3)
        for row, i in enumerate(numbers):
            expected = example(i)
            assert np.array_equal(columns["image"][row], expected["image"])
            assert columns["tokens"][row].tolist() == expected["tokens"]
            assert np.array_equal(columns["offsets"][row], expected["offsets"])
            assert columns["note"][row] == expected["note"]
        with pytest.raises(ValueError, match="read-only"):
            columns["label"][0] = 1
    assert len(store.column("validation", "note")) == 5
    assert store.column("validation", "note")[4] == "one more"


def test_a_used_reader_pickles_without_its_columns():
    columns = Columns(prepare(plan()), "train")
    assert columns["label"][0] == 1
    pickled = pickle.dumps(columns)
    assert len(pickled) < 5000
    assert pickle.loads(pickled)["label"][0] == 1


def test_prepared_once(monkeypatch):
    store = prepare(plan())
    assert prepare(plan(read=lambda: pytest.fail("read again"))) == store
    assert prepare(plan(other=2)).folder != store.folder
    assert prepare(plan(other=2)).digest == store.digest


def test_the_digest_is_of_the_content():
    def other():
        yield "train", example(1)
        yield "validation", example(2)

    assert prepare(plan(other, other=1)).digest != prepare(plan()).digest


def test_damage_is_seen_and_repaired(capsys):
    store = prepare(plan())
    contents = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    for i, name in enumerate(sorted(contents)):
        damaged = contents[name][:-1] if i % 2 else b"?" + contents[name][1:]
        (store.folder / name).write_bytes(damaged)
        assert prepare(plan()) == store
        assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == contents
    assert "is damaged, building it anew" in capsys.readouterr().err
    (store.folder / "manifest.json").write_text(json.dumps({**store.manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99.*Delete the folder"):
        ExampleStore.open(store.folder)


def test_an_unfinished_store_is_built_anew():
    whole = prepare(plan())
    contents = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    (whole.folder / "manifest.json").unlink()
    (whole.folder / "left_over").write_text("x")
    (whole.folder / "train.label.bin").write_bytes(b"half")
    assert prepare(plan()) == whole
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == contents


def test_bad_input_leaves_nothing_behind(cache):
    def bad():
        yield "train", example(1)
        raise UserError("data.train", "a bad row", "good ones")

    with pytest.raises(UserError, match="a bad row"):
        prepare(plan(bad))
    assert [path.name for path in (cache / "examples").iterdir() if path.is_dir()] == []
    assert prepare(plan()).num_examples("train") == 16


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_named(split):
    def entries():
        yield ("validation" if split == "train" else "train"), example(1)

    with pytest.raises(UserError, match=rf"data\.{split}: found no examples for the {split} split of toy"):
        prepare(plan(entries))


def test_a_full_disk(monkeypatch, cache):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(example_store._Writer, "append", full)
    with pytest.raises(UserError, match=r"SPARSE_PRETRAIN_CACHE.*No space left"):
        prepare(plan())
    assert [path.name for path in (cache / "examples").iterdir() if path.is_dir()] == []
