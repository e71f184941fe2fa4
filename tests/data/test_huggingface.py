"""Hugging Face datasets, from a local folder: no network in tests."""

from __future__ import annotations

import json

import pytest
from toy_corpora import document

from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.data.sources import open_corpus
from sparse_pretrain.data.token_store import prepare
from sparse_pretrain.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, seeds in (("train", range(200)), ("validation", range(200, 230))):
        rows = [{"text": document(seed), "url": f"u{seed}", "n": seed} for seed in seeds] + [{"text": ""}]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder, **options) -> TextConfig:
    values = {"name": "hf", "source": "huggingface", "hf_path": str(folder), "vocab_size": 400, "seq_len": 16}
    return TextConfig(**{**values, **options})


@pytest.mark.parametrize("streaming", [False, True])
def test_splits(folder, streaming):
    cfg = config(folder, hf_streaming=streaming, hf_validation_split="validation")
    corpus = open_corpus(cfg)
    assert list(corpus.documents("train")) == [document(seed) for seed in range(200)]
    assert list(corpus.documents("validation")) == [document(seed) for seed in range(200, 230)]


def test_streaming_or_not_gives_the_same_store(folder):
    stores = [prepare(config(folder, hf_streaming=streaming)) for streaming in (False, True)]
    assert stores[0].digest == stores[1].digest
    assert stores[0].num_documents("train") + stores[0].num_documents("validation") == 200


def test_max_documents(folder):
    cfg = config(folder, hf_validation_split="validation", max_documents=7, hf_streaming=True)
    corpus = open_corpus(cfg)
    assert len(list(corpus.documents("train"))) == len(list(corpus.documents("validation"))) == 7


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hf_train_split": "trian"}, r"data\.hf_train_split: found trian.*train.*validation"),
        ({"hf_validation_split": "test"}, r"data\.hf_validation_split: found test.*train.*validation"),
        ({"hf_config": "en"}, r"data\.hf_config: found en.*default"),
        (
            {"hf_text_column": "texts"},
            r"data\.hf_text_column: found texts; allowed: text, url; did you mean text",
        ),
        ({"hf_text_column": "n"}, r"data\.hf_text_column: found n; allowed: text, url"),
        ({"hf_path": "no-such-owner/no-such-dataset"}, r"data\.hf_path: found no-such-owner/no-such-dataset"),
        ({"hf_path": None}, r"data\.hf_path: found nothing"),
    ],
)
def test_errors_name_the_option_and_what_there_is(folder, streaming, options, message):
    with pytest.raises(UserError, match=message):
        list(open_corpus(config(folder, hf_streaming=streaming, **options)).read())


def test_a_finished_store_needs_neither_dataset_nor_network(folder, monkeypatch):
    cfg = config(folder)
    store = prepare(cfg)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("read again"))
    assert prepare(cfg) == store


def test_files_that_hold_something_else_are_named(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match=r"data\.hf_path: found .*broken; allowed: a dataset.*JSON parse error"):
        list(open_corpus(config(folder)).read())


def test_a_dataset_that_needs_code_of_its_own_is_refused(folder, monkeypatch):
    def load_dataset(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data\.hf_path.*no longer supported"):
        list(open_corpus(config(folder)).read())
