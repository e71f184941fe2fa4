"""Loss and perplexity of a causal language model over given sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
