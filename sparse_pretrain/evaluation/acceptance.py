"""How good a draft model is for speculative sampling: how often the target model accepts the tokens it proposes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def token_acceptance(draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token: the probability that the target accepts what the draft proposes.

    draft, target: (tokens, vocab) logits of any float dtype. Returns two (tokens,) fp32: when sampling at temperature
    1, Σ_x min(p(x), q(x)) (Leviathan et al. 2023, §3.2); and when decoding greedily, 1 where the likeliest tokens
    agree, else 0.
    """
    sampled = torch.minimum(draft.float().softmax(-1), target.float().softmax(-1)).sum(-1)
    return sampled, (draft.argmax(-1) == target.argmax(-1)).float()


@torch.no_grad()
def total_acceptance(
    draft: nn.Module,
    target: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    vocab_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[Tensor, int]:
    """Sums of both acceptance rates, (2,) fp64 (sampled, greedy), and the number of tokens: quotients are the rates.

    Args:
        draft, target: token ids (batch, n) -> logits (batch, n, at least vocab_size).
        batches: each (batch, n + 1) int64; the last token of a sequence is not read.
        vocab_size: of the tokenizer; rows that pad an embedding are cut off.
    """
    training = draft.training
    draft.eval()
    sums, tokens = torch.zeros(2, dtype=torch.float64, device=device), 0
    for sequences in batches:
        inputs = sequences[:, :-1].to(device, non_blocking=True)
        with autocast():
            logits = [model(inputs).flatten(0, 1)[:, :vocab_size] for model in (draft, target)]
        sums += torch.stack([rate.sum(dtype=torch.float64) for rate in token_acceptance(*logits)])
        tokens += inputs.numel()
    draft.train(training)
    return sums, tokens


def tokens_per_pass(rate: float, draft_tokens: int) -> float:
    """Tokens that one pass of the target is expected to give when each of `draft_tokens` proposed ones is accepted with
    probability `rate`, on its own: (1 − α^(γ+1)) / (1 − α) (Leviathan et al. 2023, eq. 1), also for α = 1."""
    return sum(rate**i for i in range(draft_tokens + 1))
