"""Loss and perplexity of a causal language model, over given sequences or over a text in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.errors import UserError

LARGEST_EXPONENT = 700.0  # e to more than 709 is no float


def token_losses(model: nn.Module, sequences: Tensor) -> Tensor:
    """Cross-entropy of predicting tokens 1 … n from those before them.

    sequences: (batch, n + 1) int64; returns (batch · n,) fp32, in nats.
    """
    return cross_entropies(model(sequences[:, :-1]), sequences)


def cross_entropies(logits: Tensor, sequences: Tensor) -> Tensor:
    """The same from the logits of tokens 0 … n - 1, (batch, n, vocab)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def total_loss(
    model: nn.Module, batches: Iterable[Tensor], device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> tuple[Tensor, int]:
    """Summed loss (0-dim fp64, nats) and number of predicted tokens; the mean is their quotient, whatever the sizes of
    the batches (each (n, seq_len + 1) int64)."""
    training = model.training
    model.eval()
    loss, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for sequences in batches:
        with autocast():
            losses = token_losses(model, sequences.to(device, non_blocking=True))
        loss += losses.sum(dtype=torch.float64)
        tokens += losses.numel()
    model.train(training)
    return loss, tokens


def windows(tokens: np.ndarray, seq_len: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """Windows over a text, one every `stride` tokens, that read seq_len tokens each and predict those that the window
    before did not.

    tokens: (n,) ids of any integer dtype. Yields batches (at most batch_size, at most seq_len + 1) int64, of which the
    last token is only predicted, each with the number of first predictions to leave out: none in the window that the
    text begins with, seq_len - stride in all others. So every token but the first is predicted once, from at least
    seq_len - stride + 1 tokens wherever there are as many before it. The last window may be shorter; with
    stride = seq_len nothing overlaps.
    """

    def shape(start: int) -> tuple[int, int]:
        return min(seq_len + 1, len(tokens) - start), seq_len - stride if start else 0

    starts = range(0, max(1, len(tokens) - 1 - (seq_len - stride)), stride)
    for (length, known), alike in groupby(starts, shape):
        rows = np.fromiter(alike, np.int64)
        for first in range(0, len(rows), batch_size):
            batch = tokens[rows[first : first + batch_size, None] + np.arange(length)]
            yield torch.from_numpy(batch.astype(np.int64)), known


@torch.no_grad()
def text_loss(
    model: nn.Module,
    tokens: np.ndarray,
    seq_len: int,
    stride: int,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> float:
    """Negative log-likelihood in nats of all tokens of a text but the first, summed in fp64: the sliding window of
    https://huggingface.co/docs/transformers/perplexity with max_length = seq_len + 1. That page weighs the mean of
    each window with one token too few; this is the sum itself.

    Args:
        model: token ids (batch, n) -> logits (batch, n, vocab).
        tokens: (n,) ids of the whole text, at least 2.
        seq_len: tokens the model reads at once.
        stride: tokens by which the window moves on.

    Raises:
        UserError: a stride below 1 or above seq_len, or a text of fewer than 2 tokens.
    """
    if not 1 <= stride <= seq_len:
        raise UserError("stride", stride, f"1 to {seq_len}, the tokens that the model reads at once")
    if len(tokens) < 2:
        raise UserError("text", f"{len(tokens)} tokens", "at least 2")
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for batch, known in windows(tokens, seq_len, stride, batch_size):
        sequences = batch.to(device, non_blocking=True)
        with autocast():
            logits = model(sequences[:, :-1])[:, known:]
        loss += cross_entropies(logits, sequences[:, known:]).sum(dtype=torch.float64)
    model.train(training)
    return float(loss)


def perplexities(loss: float, tokens: int, text: str) -> dict[str, float]:
    """Perplexity by token and by word and bits per byte, from the summed loss (nats) of a text.

    Words and bytes (UTF-8) are those of `text` as it is written, before any detokenizing, so that models with
    different tokenizers can be compared (lm-evaluation-harness, task `wikitext`). Words are what whitespace separates.

    Args:
        loss: of the whole text, as `text_loss` gives it.
        tokens: predicted, one fewer than the text has.
        text: the raw text, with at least one word.
    """
    return {
        "perplexity": math.exp(min(loss / tokens, LARGEST_EXPONENT)),
        "word_perplexity": math.exp(min(loss / len(text.split()), LARGEST_EXPONENT)),
        "bits_per_byte": loss / math.log(2) / len(text.encode("utf-8")),
    }
