"""Generating tokens one at a time, by sampling or beam search, from any model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (tokens (batch, n) int64, rows) -> logits of the next token, (batch, vocab). The first n - 1 tokens of row i are those
# that row rows[i] had in the call before; rows = null: the same row.
Step = Callable[[Tensor, Tensor | None], Tensor]


@torch.no_grad()
def sample(
    step: Step,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Continue each row of `tokens` (batch, n) by sampled tokens; temperature 0 takes the likeliest.

    Args:
        top_k: sample from so many of the likeliest tokens; null = from all.
        stop_token: ends its row.
        lengths: (batch,) int64, how many tokens of each row are its prompt, at least one, if not all; the rest is
            padding, in whose place its continuation begins.

    Returns:
        (batch, n + new) int64, new at most `max_new_tokens`; rows that end earlier are filled with `stop_token`.
    """
    prompts = tokens
    if lengths is None:
        lengths = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    first = int(lengths.min())
    tokens = prompts[:, :first]
    for position in range(first, prompts.shape[1] + max_new_tokens):
        new = _pick(step(tokens, None).float(), temperature, top_k, generator)
        if stop_token is not None:
            new = new.masked_fill(ended, stop_token)
        if position < prompts.shape[1]:
            new = torch.where(position < lengths, prompts[:, position], new)
        tokens = torch.cat((tokens, new[:, None]), dim=1)
        if stop_token is not None:
            ended |= (new == stop_token) & (position >= lengths)
            if ended.all():
                break
    return tokens


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(batch, vocab) -> (batch,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def beam_search(
    step: Step, start: Tensor, beams: int, max_new_tokens: int, end_token: int, length_penalty: float = 1.0
) -> Tensor:
    """The best continuation of each row of `start` (batch, n) that a beam search finds: the one whose sum of log
    probabilities, divided by its number of new tokens (the end token included) to the power of `length_penalty`, is
    highest. The search of a row ends when its best unfinished beam scores below all of its `beams` finished ones (the
    default of transformers' `generate`).

    Args:
        step: is given batch * beams rows, those of a row of `start` side by side.
        beams: how many continuations are followed at once.

    Returns:
        (batch, n + new) int64, new at most `max_new_tokens`; shorter rows are filled with `end_token`.
    """
    batch, n = start.shape
    tokens = start.new_full((batch, beams, n + max_new_tokens), end_token)
    tokens[:, :, :n] = start[:, None]
    scores = torch.full((batch, beams), -torch.inf, device=start.device)
    scores[:, 0] = 0  # the beams are still the same
    finished, finished_scores = tokens.clone(), torch.full_like(scores, -torch.inf)
    searching = torch.ones(batch, 1, dtype=torch.bool, device=start.device)
    first_rows = beams * torch.arange(batch, device=start.device)[:, None]
    rows: Tensor | None = None
    for new in range(1, max_new_tokens + 1):
        log_probs = step(tokens[:, :, : n + new - 1].flatten(0, 1), rows).float().log_softmax(-1)
        vocab = log_probs.shape[-1]
        totals = (scores.view(-1, 1) + log_probs).view(batch, -1)
        # Of a beam at most one continuation is its end, so twice as many leave enough to go on with
        totals, choices = totals.topk(2 * beams)
        parents, candidates = choices // vocab, _take(tokens, choices // vocab)
        candidates[:, :, n + new - 1] = choices % vocab
        ends = choices % vocab == end_token if new < max_new_tokens else torch.ones_like(choices, dtype=torch.bool)

        normed = (totals / new**length_penalty).masked_fill(~(ends & searching), -torch.inf)[:, :beams]
        finished_scores, best = torch.cat((finished_scores, normed), dim=1).topk(beams)
        finished = _take(torch.cat((finished, candidates[:, :beams]), dim=1), best)

        scores, best = totals.masked_fill(ends, -torch.inf).topk(beams)
        tokens = _take(candidates, best)
        rows = (first_rows + parents.gather(1, best)).flatten()
        searching &= scores[:, :1] / new**length_penalty > finished_scores[:, -1:]
        if not searching.any():
            break
    found = finished[:, 0]
    used = (found != end_token).any(0).nonzero().flatten().tolist()
    return found[:, : max([n - 1, *used]) + 2]


def _take(beams: Tensor, which: Tensor) -> Tensor:
    """beams[b, which[b]]: (batch, beams, n), (batch, k) -> (batch, k, n)."""
    return beams.gather(1, which[:, :, None].expand(-1, -1, beams.shape[2]))
