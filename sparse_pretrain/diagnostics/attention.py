"""Attention sinks: tokens that get attention whatever they say, and what they give those who attend to them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_pretrain.diagnostics.activations import Moments
from sparse_pretrain.models.blocks import Attention


def attention_probabilities(layer: Attention, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a layer attends to, and the values there.

    Args:
        x: the layer's input, (batch, tokens, d_model).
        mask: (batch, tokens) boolean, True = a token; None = all are.

    Returns:
        (batch, heads, queries, keys) float32, each query's a distribution over the keys that it sees, and the values
        (batch, heads, tokens, head_dim) float32.
    """
    q, k, v = layer.project(x)
    shared_by = layer.n_head // layer.n_kv_head
    k, v = k.repeat_interleave(shared_by, dim=1).float(), v.repeat_interleave(shared_by, dim=1).float()
    scores = q.float() @ k.transpose(-1, -2) / math.sqrt(layer.head_dim)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if layer.causal:
        visible = visible.tril()
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    return scores.masked_fill(~visible, -torch.inf).softmax(-1), v


def sink_scores(attention: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """α_k, the mean attention that key k gets from the queries that see it (Gu et al., ICLR 2025):
    1 / (T − k + 1) · Σ_{i ≥ k} A_ik with `causal`, else 1 / T · Σ_i A_ik.

    Args:
        attention: (batch, heads, queries, keys); 0 where a query does not see a key.
        mask: (batch, tokens) boolean, True = a token; others are neither queries nor keys. None = all are.

    Returns:
        α (batch, heads, keys), and how many queries see each key, (batch, keys): 0 for what is no token.
    """
    tokens = attention.shape[-1]
    queries = torch.ones(len(attention), tokens, device=attention.device) if mask is None else mask.float()
    seen_by = queries.flip(-1).cumsum(-1).flip(-1) if causal else queries.sum(-1, keepdim=True).expand_as(queries)
    seen_by = seen_by * queries
    total = (attention * queries[:, None, :, None]).sum(-2)
    return total / seen_by.clamp(min=1)[:, None], seen_by


class HeadMeter:
    """Collects, over batches, what the heads of one attention layer do.

    Of the keys only those that at least half of the tokens see are candidates for a sink: with causal attention the
    last ones, seen by few, would often look like one by chance.

    Args:
        epsilon: α_k above this is a sink.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.sequences = 0
        self.sums: dict[str, Tensor] = {}
        self.output = Moments()

    def update(self, attention: Tensor, values: Tensor, causal: bool, mask: Tensor | None) -> None:
        """Arguments as of `attention_probabilities` and `sink_scores`."""
        alpha, seen_by = sink_scores(attention, causal, mask)
        tokens = torch.ones_like(seen_by, dtype=torch.bool) if mask is None else mask
        candidate = (2 * seen_by >= tokens.sum(-1, keepdim=True)) & tokens
        highest, sink = alpha.masked_fill(~candidate[:, None], -1).max(-1)
        output = attention @ values
        share, cosine = tag(output, values, sink, causal, tokens)
        is_sink = alpha > self.epsilon
        self._add("first_alpha", alpha[..., 0])
        self._add("first_sink", is_sink[..., 0])
        self._add("highest_alpha", highest)
        self._add("any_sink", highest > self.epsilon)
        self._add("rank1_share", share)
        self._add("tag_cosine", cosine)
        self._add("highest_at", torch.nn.functional.one_hot(sink, alpha.shape[-1]))
        self._add("sinks_at", (is_sink & candidate[:, None]).transpose(1, 2))
        self._add("candidates_at", candidate)
        self.sequences += len(attention)
        self.output.update(output.transpose(0, 1)[:, tokens])

    def _add(self, name: str, values: Tensor) -> None:
        total = values.double().sum(0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def result(self) -> dict[str, Any]:
        """Lists over heads, means over sequences: `first_alpha` and `first_sink` (α of the first token; how often it is
        a sink), `highest_alpha` and `any_sink` (the same of the candidate with the highest α), `highest_at` (its
        position, where it is most often), `rank1_share` and `tag_cosine` (see `tag`), `output_kurtosis`. Over
        positions: `sink_at`, how often one of them is a sink, over heads and sequences; None where no candidate is."""
        heads = {
            name: (self.sums[name] / self.sequences).tolist()
            for name in ("first_alpha", "first_sink", "highest_alpha", "any_sink", "rank1_share", "tag_cosine")
        }
        at, counts = self.sums["sinks_at"].mean(-1).tolist(), self.sums["candidates_at"].tolist()
        return {
            **heads,
            "highest_at": self.sums["highest_at"].argmax(-1).tolist(),
            "output_kurtosis": self.output.kurtosis().tolist(),
            "sink_at": [sinks / count if count else None for sinks, count in zip(at, counts, strict=True)],
        }


def tag(output: Tensor, values: Tensor, sink: Tensor, causal: bool, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How much of what a head gives to its tokens is the value of one key, the sink ("tag", arXiv 2502.00919).

    With o_i the head's output for token i and v the sink's value: Σ_i (o_i·v / ‖v‖)² / Σ_i ‖o_i‖², and the mean cosine
    of o_i and v. Over the tokens that see the sink, without the sink itself; 0 if there are none.

    Args:
        output: (batch, heads, tokens, head_dim).
        values: the same shape.
        sink: (batch, heads) int64, positions.
        tokens: (batch, tokens) boolean, True = a token.

    Returns:
        Share and cosine, (batch, heads) each.
    """
    position = torch.arange(output.shape[2], device=output.device)
    tagged = (position > sink[..., None]) if causal else (position != sink[..., None])
    tagged = (tagged & tokens[:, None]).to(output.dtype)
    value = values.gather(2, sink[..., None, None].expand(*sink.shape, 1, values.shape[-1]))
    along = (output * torch.nn.functional.normalize(value, dim=-1)).sum(-1)
    lengths = output.norm(dim=-1)
    share = (along.square() * tagged).sum(-1) / (lengths.square() * tagged).sum(-1).clamp(min=1e-30)
    cosine = (along / lengths.clamp(min=1e-30) * tagged).sum(-1) / tagged.sum(-1).clamp(min=1)
    return share, cosine
