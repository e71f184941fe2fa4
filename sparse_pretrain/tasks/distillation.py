"""Distillation losses of a causal language model: what a teacher says of each token, and how far a student is from it.

Everything here is fp32, per token, over the tokenizer's vocabulary: rows that pad an embedding are cut off before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """A teacher's distribution for each token, at the temperature.

    Attributes:
        log_probs: (tokens, outcomes) fp32. Without `indices` the outcomes are the vocabulary.
        indices: (tokens, k) int64, or None. With them the outcomes are these k tokens and, last, all others as one.
    """

    log_probs: Tensor
    indices: Tensor | None = None


def make_targets(logits: Tensor, temperature: float, top_k: int | None) -> Targets:
    """The targets for a teacher's logits, (tokens, vocab) of any float dtype.

    Of the `top_k` likeliest outcomes, if that is set and below the vocabulary, and of the others together.
    """
    log_probs = (logits.float() / temperature).log_softmax(-1)
    if top_k is None or top_k >= logits.shape[-1]:
        return Targets(log_probs)
    indices = log_probs.topk(top_k).indices
    return Targets(_outcomes(log_probs, indices), indices)


def divergences(targets: Targets, logits: Tensor, temperature: float) -> Tensor:
    """temperature² · KL(teacher ‖ student) of each token: (tokens,) fp32, in nats.

    The square keeps the gradient's size, which falls by it, comparable with the task loss's (Hinton et al. 2015, §2;
    so does AST's code). With top-k targets the KL is that over k + 1 outcomes, which is at most the whole one.

    logits: the student's, (tokens, vocab) of any float dtype.
    """
    log_probs = _outcomes((logits.float() / temperature).log_softmax(-1), targets.indices)
    return temperature**2 * (targets.log_probs.exp() * (targets.log_probs - log_probs)).sum(-1)


def furthest_behind(student: Tensor, reference: Tensor, share: float) -> Tensor:
    """AdaSPEC's selection (Hu et al. 2025): the tokens on which the student has most to gain.

    student, reference: (tokens,) divergence of each from the teacher. Returns the indices of the `share` of tokens
    (rounded, at least one) with the largest student − reference; of equal ones the first.
    """
    order = (student.detach() - reference).argsort(descending=True, stable=True)
    return order[: max(1, round(share * len(order)))]


def _outcomes(log_probs: Tensor, indices: Tensor | None) -> Tensor:
    """(tokens, vocab) log-probabilities as (tokens, k + 1): those at `indices`, and the log of the others' sum."""
    if indices is None:
        return log_probs
    others = log_probs.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat((log_probs.gather(-1, indices), others), dim=-1)
