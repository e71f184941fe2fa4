"""Masking: which tokens are to be guessed, and random numbers that only (seed, step, example) decide."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from toy_corpora import document

from sparse_pretrain.data.masking import NO_TARGET, Masking, WordBorders, words_to_guess
from sparse_pretrain.data.random_numbers import uniform
from sparse_pretrain.data.special_tokens import special_tokens
from sparse_pretrain.data.tokenizer import load_tokenizer, train_bpe, train_wordpiece, vocab_size
from sparse_pretrain.seeds import hash_seed

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(train_wordpiece((document(seed) for seed in range(100)), 100), "test")


@pytest.fixture(scope="module")
def sequences(tokenizer):
    ids = tokenizer.encode("\n".join(document(seed) for seed in range(400)), add_special_tokens=False).ids
    rows = len(ids) // (LENGTH - 2)
    tokens = np.empty((rows, LENGTH), np.int64)
    tokens[:, 0], tokens[:, -1] = 2, 3
    tokens[:, 1:-1] = np.array(ids[: rows * (LENGTH - 2)]).reshape(rows, -1)
    tokens[:, 30] = 3  # the end of a document
    return tokens


def masking(tokenizer, share=0.15, whole_words=True) -> Masking:
    return Masking(tokenizer, special_tokens(tokenizer), vocab_size(tokenizer), share, whole_words)


def test_uniform_is_splitmix64():
    def by_hand(state):
        while True:
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
            yield z ^ (z >> 31)

    numbers = uniform(seed=7, step=11, examples=np.array([3, 12345]), count=5, purpose=2)
    for example, row in zip((3, 12345), numbers, strict=True):
        start = next(by_hand((example * 0x9E3779B97F4A7C15 + hash_seed(7, 11, 2) - 0x9E3779B97F4A7C15) % 2**64))
        generator = by_hand(start)
        assert row.tolist() == [(next(generator) >> 11) / 2**53 for _ in range(5)]


def test_uniform_is_uniform_and_depends_on_everything():
    numbers = uniform(1, 2, np.arange(2000), 50, 0)
    assert abs(numbers.mean() - 0.5) < 0.005
    assert np.abs(np.histogram(numbers, 20, (0, 1))[0] / 5000 - 1).max() < 0.08
    assert np.abs(np.corrcoef(numbers[:, :8].T) - np.eye(8)).max() < 0.1
    assert np.array_equal(numbers[7:9], uniform(1, 2, np.array([7, 8]), 50, 0))
    assert np.array_equal(numbers[:, :3], uniform(1, 2, np.arange(2000), 3, 0))
    for other in (
        uniform(2, 2, np.arange(9), 50, 0),
        uniform(1, 3, np.arange(9), 50, 0),
        uniform(1, 2, np.arange(9), 50, 1),
    ):
        assert not (numbers[:9] == other).any()


def test_share_and_kinds(tokenizer, sequences):
    seen, labels = masking(tokenizer)(sequences, 1, 2, np.arange(len(sequences)))
    chosen = labels != NO_TARGET
    ordinary = sequences > 4
    assert not (chosen & ~ordinary).any()
    assert np.array_equal(labels[chosen], sequences[chosen])
    assert np.array_equal(seen[~chosen], sequences[~chosen])
    assert abs(chosen.sum() / ordinary.sum() - 0.15) < 0.005
    wanted = np.rint(0.15 * ordinary.sum(1))
    assert np.abs(chosen.sum(1) - wanted).max() <= 3
    hidden, kept = seen[chosen] == 4, seen[chosen] == sequences[chosen]
    assert abs(hidden.mean() - 0.8) < 0.02
    assert abs(kept.mean() - 0.1) < 0.02
    replaced = seen[chosen][~hidden & ~kept]
    assert replaced.min() > 4
    assert len(np.unique(replaced)) > 60
    assert not (seen[sequences <= 4] != sequences[sequences <= 4]).any()


@pytest.mark.parametrize("whole_words", [True, False])
def test_words_are_hidden_whole_or_not_at_all(tokenizer, sequences, whole_words):
    _, labels = masking(tokenizer, whole_words=whole_words)(sequences, 1, 2, np.arange(len(sequences)))
    chosen = labels != NO_TARGET
    pieces = np.array([tokenizer.id_to_token(i) for i in range(vocab_size(tokenizer))])[sequences]
    goes_on = np.char.startswith(pieces[:, 1:], "##") & (sequences[:, :-1] > 4)
    split = (chosen[:, 1:] != chosen[:, :-1])[goes_on]
    assert goes_on.sum() > 1000
    assert not split.any() if whole_words else split.mean() > 0.1


def test_against_a_loop_over_words():
    rng = np.random.default_rng(0)
    rows, length = 40, 30
    starts, may = rng.random((rows, length)) < 0.6, rng.random((rows, length)) < 0.9
    starts[:, 0] = True
    starts |= ~may  # special tokens are words of their own
    starts[:, 1:] |= ~may[:, :-1]
    examples = np.arange(rows) * 3
    chosen = words_to_guess(starts, may, 0.2, 5, 6, examples)
    numbers = uniform(5, 6, examples, 2 * length, 0)
    for row in range(rows):
        wanted = max(round(0.2 * may[row].sum()), 1)
        words: list[list[int]] = []
        for i in range(length):
            if starts[row, i]:
                words.append([])
            words[-1].append(i)
        candidates = []
        for number, word in enumerate(words):
            if not may[row, word[0]]:
                continue
            if len(word) > wanted:
                candidates += [(numbers[row, length + i], [i]) for i in word]
            else:
                candidates.append((numbers[row, number], word))
        expected: set[int] = set()
        for _, word in sorted(candidates):
            if len(expected) + len(word) / 2 > wanted:
                break
            expected.update(word)
        assert set(np.flatnonzero(chosen[row])) == expected


def test_always_at_least_one_and_none_where_there_is_nothing():
    one_word = np.zeros((2, 12), bool)
    one_word[:, 0] = True
    may = np.stack([np.ones(12, bool), np.zeros(12, bool)])
    chosen = words_to_guess(one_word, may, 0.01, 1, 1, np.arange(2))
    assert chosen.sum(1).tolist() == [1, 0]


def test_only_seed_step_and_example_decide(tokenizer, sequences):
    mask = masking(tokenizer)
    rows = np.arange(40)
    whole = mask(sequences[rows], 3, 9, rows)
    for part in (rows[:7], rows[7:]):
        seen, labels = mask(sequences[part], 3, 9, part)
        assert np.array_equal(seen, whole[0][part])
        assert np.array_equal(labels, whole[1][part])
    for seed, step, examples in ((4, 9, rows), (3, 10, rows), (3, 9, rows + 1)):
        assert not np.array_equal(mask(sequences[rows], seed, step, examples)[1], whole[1])


def test_borders_in_byte_level_tokens():
    content = train_bpe((document(seed) for seed in range(100)), 400)
    tokenizer = load_tokenizer(content, "test")
    text = "sparse dense\n\nmask\tweight prune. tensor"
    ids = np.array([tokenizer.encode(text).ids])
    borders = WordBorders(tokenizer, special_tokens(tokenizer), vocab_size(tokenizer))
    pieces = tokenizer.encode(text).tokens
    words, current = [], ""
    for piece, starts in zip(pieces, borders.starts(ids)[0], strict=True):
        if starts and current:
            words.append(current)
            current = ""
        current += piece
    assert [word.strip("ĠĊĉ") for word in [*words, current] if word.strip("ĠĊĉ")] == [
        "sparse", "dense", "mask", "weight", "prune.", "tensor",
    ]  # fmt: skip


def test_borders_around_special_tokens():
    tokenizer = Tokenizer(models.WordPiece({"[CLS]": 0, "[SEP]": 1, "[MASK]": 2, "a": 3, "##b": 4}, unk_token="a"))
    borders = WordBorders(tokenizer, special_tokens(tokenizer), 5)
    starts = borders.starts(np.array([[0, 4, 4, 3, 4, 1, 4]]))
    assert starts.tolist() == [[True, True, False, True, False, True, True]]


def test_fast_enough_to_feed_a_gpu(tokenizer, sequences):
    mask = masking(tokenizer)
    tokens = np.resize(sequences, (256, 128))
    mask(tokens, 1, 0, np.arange(256))
    start = time.process_time()
    for step in range(10):
        mask(tokens, 1, step, np.arange(256))
    assert 2560 / (time.process_time() - start) > 3000  # sequences of 128 a second on one core; usually ten times that
