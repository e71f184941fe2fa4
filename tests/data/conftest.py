"""A cache of its own for every test, and no network."""

from __future__ import annotations

import os

import pytest
from toy_corpora import write_corpus

from sparse_pretrain.config_data import TextConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def corpus_file(tmp_path):
    return write_corpus(tmp_path / "corpus.txt", range(300))


@pytest.fixture
def make_config(corpus_file):
    def make(**options) -> TextConfig:
        values = {
            "name": "toy",
            "source": "text",
            "train": [str(corpus_file)],
            "vocab_size": 400,
            "seq_len": 16,
            "num_workers": 0,
        }
        return TextConfig(**{**values, **options})

    return make
