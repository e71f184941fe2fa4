"""What an encoder has to guess: BERT's masking of words (Devlin et al. 2019, §3.1 and the whole-word variant)."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models

from sparse_pretrain.data.random_numbers import uniform
from sparse_pretrain.data.special_tokens import SpecialTokens

NO_TARGET = -100
MASKED, REPLACED = 0.8, 0.1  # of the tokens to guess; the rest stay as they are
WORDS, CHOICE, TOKEN = range(3)  # purposes of random numbers
SPACES = (
    "Ġ",
    "Ċ",
    "ĉ",
    "č",
    "▁",
)  # space, newline, tab, return in byte-level vocabularies; SentencePiece's space


class WordBorders:
    """Which tokens begin a word: in WordPiece those without `##`; else those that begin with a space, or follow one
    that ends with a space or a newline. Special tokens are never part of a word."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens, size: int) -> None:
        self.opens = np.zeros(size, bool)  # by token id: begins a word, whatever is before it
        self.closes = np.zeros(size, bool)  # by token id: what follows it begins a word
        for piece, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            if isinstance(tokenizer.model, models.WordPiece):
                self.opens[token_id] = not piece.startswith(tokenizer.model.continuing_subword_prefix)
            else:
                self.opens[token_id] = piece.startswith(SPACES)
                self.closes[token_id] = piece.endswith(SPACES)
        self.opens[special.ids] = self.closes[special.ids] = True

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where words begin in `tokens` (rows, length): bool of the same shape."""
        starts = self.opens[tokens]
        starts[:, 1:] |= self.closes[tokens[:, :-1]]
        starts[:, 0] = True
        return starts


def words_to_guess(
    starts: np.ndarray, may: np.ndarray, share: float, seed: int, step: int, examples: np.ndarray
) -> np.ndarray:
    """Which tokens are to be guessed: whole words, in a random order, as long as more than half of a word still fits.

    So each row gives the number of tokens nearest to `share` of those that may be guessed, and at least one. A word
    with more tokens than that counts as as many words.

    Args:
        starts: (rows, length) bool, where words begin.
        may: (rows, length) bool, which tokens may be guessed.
        share: of those.
        seed, step, examples: what the choice depends on; examples (rows,).

    Returns:
        (rows, length) bool.
    """
    rows, length = starts.shape
    wanted = np.maximum(np.rint(share * may.sum(1)), may.any(1)).astype(np.int64)[:, None]
    word = np.cumsum(starts, axis=1) - 1
    flat = (word + np.arange(rows)[:, None] * length).ravel()
    size = np.bincount(flat, minlength=rows * length)[flat].reshape(rows, length)
    too_long = size > wanted
    numbers = uniform(seed, step, examples, 2 * length, WORDS)
    key = np.where(too_long, numbers[:, length:], np.take_along_axis(numbers[:, :length], word, axis=1))
    key[~may] = 2.0  # behind all others
    size[too_long] = 1
    order = np.argsort(key, axis=1)  # a word's tokens share a key, and so lie side by side
    key, size = np.take_along_axis(key, order, axis=1), np.take_along_axis(size, order, axis=1)
    first = np.ones_like(starts)
    first[:, 1:] = key[:, 1:] != key[:, :-1]
    before = np.maximum.accumulate(np.where(first, np.arange(length), 0), axis=1)  # tokens of the words before it
    chosen = np.empty_like(starts)
    np.put_along_axis(chosen, order, (key < 1) & (2 * before + size <= 2 * wanted), axis=1)
    return chosen


class Masking:
    """Hides tokens of a batch: of those to guess 80 % become the mask token, 10 % a random one, 10 % stay.

    Args:
        tokenizer: has a mask token.
        special: its special tokens, which are never hidden nor put in.
        size: its vocabulary.
        share: of the tokens to guess.
        whole_words: guess all tokens of a word or none; else each token by itself.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: SpecialTokens, size: int, share: float, whole_words: bool
    ) -> None:
        assert special.mask is not None
        self.mask, self.share = special.mask, share
        self.borders = WordBorders(tokenizer, special, size) if whole_words else None
        self.ordinary = np.setdiff1d(np.arange(size), special.ids)
        self.is_special = np.zeros(size, bool)
        self.is_special[special.ids] = True

    def __call__(self, tokens: np.ndarray, seed: int, step: int, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees, and what it is to guess (NO_TARGET elsewhere): twice (rows, length), like `tokens`."""
        may = ~self.is_special[tokens]
        starts = np.ones_like(may) if self.borders is None else self.borders.starts(tokens)
        chosen = words_to_guess(starts, may, self.share, seed, step, examples)
        choice = uniform(seed, step, examples, tokens.shape[1], CHOICE)
        random = uniform(seed, step, examples, tokens.shape[1], TOKEN)
        seen = np.where(chosen & (choice < MASKED), self.mask, tokens)
        replaced = chosen & (choice >= MASKED) & (choice < MASKED + REPLACED)
        seen[replaced] = self.ordinary[(random[replaced] * len(self.ordinary)).astype(np.int64)]
        return seen, np.where(chosen, tokens, NO_TARGET)
