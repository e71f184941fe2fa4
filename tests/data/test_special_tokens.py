"""Tokenizers of published models, read from their files, and the tokens of theirs that stand for no text."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from toy_corpora import REPO, document

from sparse_pretrain.data.special_tokens import SpecialTokens, frame, special_tokens
from sparse_pretrain.data.tokenizer import (
    given_tokenizer_json,
    load_tokenizer,
    train_bpe,
    train_pair_bpe,
    train_wordpiece,
)
from sparse_pretrain.errors import UserError
from tests.shared_data import shared_data

TEXTS = [
    "Hello world, it's naïve ÀÉÎ!",
    "the  quick\tbrown\n\nfox 123,456.78 don't",
    "北京 大学 и 😀 e\u0301",
    "unbelievable antidisestablishmentarianism",
    " leading and trailing ",
    "",
]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def loaded(content: bytes) -> Tokenizer:
    return load_tokenizer(content, "test")


def test_bert_s_vocabulary_gives_bert_s_tokenizer():
    transformers = pytest.importorskip("transformers")
    vocab = shared_data("tokenizers/bert-base-uncased/vocab.txt")
    theirs = transformers.BertTokenizerFast(vocab=str(vocab))
    for path in (vocab, vocab.parent):
        ours = loaded(given_tokenizer_json(str(path)))
        for text in TEXTS + [document(seed) for seed in range(20)]:
            assert ours.encode(text).ids == theirs(text)["input_ids"]
        pair, expected = ours.encode(TEXTS[0], TEXTS[1]), theirs(TEXTS[0], TEXTS[1])
        assert (pair.ids, pair.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    assert ours.decode(ours.encode("Unbelievable, isn't it?").ids) == "unbelievable, isn ' t it?"
    assert special_tokens(ours) == SpecialTokens(pad=0, start=101, end=102, separator=102, mask=103, unknown=100)


def test_gpt2_s_files_give_gpt2_s_tokenizer():
    transformers = pytest.importorskip("transformers")
    folder = shared_data("tokenizers/gpt2")
    theirs = transformers.GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    for path in (folder, folder / "vocab.json"):
        ours = loaded(given_tokenizer_json(str(path)))
        for text in TEXTS + [document(seed) for seed in range(20)]:
            assert ours.encode(text).ids == theirs(text)["input_ids"]
            assert ours.decode(ours.encode(text).ids) == text
    special = special_tokens(ours)
    assert special == SpecialTokens(pad=None, start=50256, end=50256, separator=None, mask=None, unknown=None)
    assert (special.ids, special.fill) == ([50256], 50256)


def test_a_cased_vocabulary_keeps_capitals(tmp_path):
    pieces = [*BERT, "the", "The", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    ours = loaded(given_tokenizer_json(str(tmp_path)))
    assert ours.encode("The cats the", add_special_tokens=False).tokens == ["The", "cat", "##s", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(p for p in pieces if p != "The"))
    ours = loaded(given_tokenizer_json(str(tmp_path)))
    assert ours.encode("The cats the", add_special_tokens=False).tokens == ["the", "cat", "##s", "the"]


def test_tokens_of_a_trained_wordpiece():
    ours = loaded(train_wordpiece((document(seed) for seed in range(100)), 300))
    assert special_tokens(ours) == SpecialTokens(pad=0, start=2, end=3, separator=3, mask=4, unknown=1)
    encoding = ours.encode("A sparse mask", "ÜBER tensor")
    assert encoding.tokens[0] == "[CLS]"
    assert [encoding.tokens[i] for i, special in enumerate(encoding.special_tokens_mask) if special] == [
        "[CLS]",
        "[SEP]",
        "[SEP]",
    ]
    assert "sparse" in encoding.tokens
    assert "uber" in encoding.tokens
    assert ours.get_vocab_size() <= 300
    # written in a text, they are text
    assert 4 not in ours.encode("a [MASK] b").ids


def test_rare_characters_are_unknown(monkeypatch):
    from sparse_pretrain.data import tokenizer as module

    monkeypatch.setattr(module, "ALPHABET", 5)
    ours = loaded(train_wordpiece(iter(["aabb ccdd ee x aabb eeccz"] * 3), 40))
    assert special_tokens(ours).unknown in ours.encode("xyz").ids
    assert special_tokens(ours).unknown not in ours.encode("abcde").ids


@pytest.mark.parametrize("environment", [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "4"}])
@pytest.mark.parametrize("kind", ["wordpiece", "pair_bpe"])
def test_training_is_the_same_in_any_process(kind, environment):
    documents = (document(seed) for seed in range(60))
    content = (train_wordpiece if kind == "wordpiece" else train_pair_bpe)(documents, 350)
    script = (
        "import hashlib\nfrom toy_corpora import document\n"
        f"from sparse_pretrain.data.tokenizer import train_{kind} as train\n"
        "print(hashlib.sha256(train((document(s) for s in range(60)), 350)).hexdigest())"
    )
    path = os.pathsep.join([str(REPO), str(REPO / "tests" / "data")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(content).hexdigest()


def test_the_bpe_of_pairs_ends_texts():
    ours = loaded(train_pair_bpe((document(seed) for seed in range(50)), 350))
    assert special_tokens(ours) == SpecialTokens(pad=0, start=1, end=2, separator=2, mask=None, unknown=None)
    text = "mask über 层\n x"
    encoding = ours.encode(text)
    assert encoding.ids[-1] == 2
    assert ours.decode(encoding.ids) == text


def test_a_tokenizer_that_frames_nothing_gets_a_frame():
    ours = loaded(train_bpe((document(seed) for seed in range(50)), 350))
    frame(ours)
    plain = [ours.encode(text, add_special_tokens=False).ids for text in ("mask", "dense weight")]
    pair = ours.encode("mask", "dense weight")
    assert pair.ids == [*plain[0], 0, *plain[1], 0]
    assert pair.type_ids == [0] * (len(plain[0]) + 1) + [1] * (len(plain[1]) + 1)
    assert ours.encode("mask").ids == [*plain[0], 0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "null|found .*folder; allowed: bpe"),
        ({"vocab.txt": "a\nb\n[CLS]"}, r"without \[PAD\], \[UNK\], \[SEP\], \[MASK\]"),
        ({"vocab.txt": b"\xff\xfe"}, "codec can't decode"),
        ({"vocab.json": "{}"}, "without a merges.txt beside it"),
        ({"vocab.json": "[", "merges.txt": ""}, r"vocab\.json \("),
        ({"vocab.json": json.dumps({"a": 0}), "merges.txt": "a b"}, r"vocab\.json \("),
        ({"vocab.json": json.dumps({"a": 0}), "merges.txt": ""}, "without an end-of-text token"),
        ({"tokenizer.json": "{}"}, "allowed: bpe, wordpiece, or the path"),
    ],
)
def test_unusable_files_are_named(tmp_path, files, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"data\.tokenizer.*" + message):
        given_tokenizer_json(str(folder))


def test_no_tokenizer_at_all():
    with pytest.raises(UserError, match="data.tokenizer: found null"):
        given_tokenizer_json(None)


def test_gaps_in_special_tokens():
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    special = special_tokens(tokenizer)
    assert (special.pad, special.start, special.end, special.fill) == (None, None, 0, 0)
