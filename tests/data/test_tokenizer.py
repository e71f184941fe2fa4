"""The byte-level BPE: any text comes back as it was, and training always gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from toy_corpora import REPO, document

from sparse_pretrain.data import tokenizer as tokenizer_module
from sparse_pretrain.data.sources import open_corpus
from sparse_pretrain.data.tokenizer import (
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    tokenizer_json,
    train_bpe,
    vocab_size,
)
from sparse_pretrain.errors import UserError


@pytest.fixture(scope="module")
def content() -> bytes:
    return train_bpe((document(seed) for seed in range(100)), 400)


def random_texts() -> list[str]:
    rng = random.Random(0)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(map(chr, rng.choices(points, k=200))) for _ in range(50)]
    texts += [bytes(rng.choices(range(256), k=200)).decode("latin-1") for _ in range(9)]
    return [*texts, "a  b\t\n\n \r\n  c", " ", "\x00", "<|endoftext|>", "x<|endoftext|>y", "e\u0301 é 👩‍👩‍👧"]


def test_round_trip_on_any_text(content):
    tokenizer = load_tokenizer(content, "test")
    for text in random_texts():
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_end_of_text_written_in_a_document_is_not_the_end_of_it(content):
    tokenizer = load_tokenizer(content, "test")
    ids = encode_documents(tokenizer, ["x<|endoftext|>y", "z"], np.uint16)
    assert np.flatnonzero(ids == end_of_text_id(tokenizer)).tolist()[-1] == len(ids) - 1
    assert (ids == end_of_text_id(tokenizer)).sum() == 2


def test_encoding_does_not_depend_on_batching(content, monkeypatch):
    tokenizer = load_tokenizer(content, "test")
    texts = [document(seed) for seed in range(50)]
    whole = encode_documents(tokenizer, texts, np.uint16)
    monkeypatch.setattr(tokenizer_module, "ENCODE_CHARACTERS", 1)
    assert np.array_equal(whole, encode_documents(tokenizer, texts, np.uint16))
    assert len(encode_documents(tokenizer, [], np.uint16)) == 0


def test_sizes(content):
    tokenizer = load_tokenizer(content, "test")
    assert vocab_size(tokenizer) == 400
    assert end_of_text_id(tokenizer) == 0
    tiny = load_tokenizer(train_bpe(iter(["aab"]), 10_000), "test")
    assert 257 <= vocab_size(tiny) < 270


@pytest.mark.parametrize(
    "environment",
    [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "4"}, {"TOKENIZERS_PARALLELISM": "false"}],
)
def test_training_is_the_same_in_any_process_with_any_threads(content, environment):
    script = (
        "import hashlib\nfrom toy_corpora import document\n"
        "from sparse_pretrain.data.tokenizer import train_bpe\n"
        "print(hashlib.sha256(train_bpe((document(s) for s in range(100)), 400)).hexdigest())"
    )
    path = os.pathsep.join([str(REPO), str(REPO / "tests" / "data")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "random", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(content).hexdigest()


def test_training_reads_no_more_than_its_sample(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_BYTES", 1000)
    documents = (document(seed) for seed in range(100))
    train_bpe(documents, 300)
    assert len(list(documents)) > 90


def test_a_trained_tokenizer_is_kept_and_repaired(make_config, cache, monkeypatch):
    cfg = make_config()
    content = tokenizer_json(cfg, open_corpus(cfg))
    (path,) = (cache / "tokenizers").glob("*.json")
    path.write_bytes(content[: len(content) // 2])
    assert tokenizer_json(cfg, open_corpus(cfg)) == content
    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda *args: pytest.fail("trained again"))
    assert tokenizer_json(cfg, open_corpus(cfg)) == content


def test_a_given_tokenizer(make_config, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert tokenizer_json(make_config(tokenizer=str(path)), None) == content


@pytest.mark.parametrize("kind", ["missing", "not json", "no end of text"])
def test_an_unusable_tokenizer_is_named(make_config, tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    if kind == "not json":
        path.write_text("{}")
    elif kind == "no end of text":
        path.write_text(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str())
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        tokenizer_json(make_config(tokenizer=str(path)), None)


def test_no_documents():
    with pytest.raises(UserError, match="without documents"):
        train_bpe(iter([]), 300)
