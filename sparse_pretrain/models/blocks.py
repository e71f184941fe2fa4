"""The parts of a transformer block: normalisation, positions, attention, feed-forward network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sparse24.activations import pruned_relu2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_pretrain.config_models import GATED_ACTIVATIONS, TransformerConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # as GPT-2
    "gelu_erf": F.gelu,  # as BERT
    "relu": F.relu,
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
}


def make_norm(cfg: TransformerConfig) -> nn.Module:
    if cfg.norm == "rms_norm":
        return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al. 2021) in the half-split convention of GPT-NeoX and Llama."""

    def __init__(self, head_dim: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Rotate queries or keys (batch, heads, tokens, head_dim) at positions `first` …, in fp32, back to their
        dtype."""
        here = slice(first, first + x.shape[-2])
        low, high = x.float().chunk(2, dim=-1)
        return (x * self.cos[here] + torch.cat((-high, low), dim=-1) * self.sin[here]).to(x.dtype)


class SinusoidalPositions(nn.Module):
    """Fixed positions (Vaswani et al. 2017), sines in the first half and cosines in the second, as Marian has them; the
    order of features is arbitrary."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** -(torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
        self.register_buffer("table", torch.cat((angles.sin(), angles.cos()), dim=1).float(), persistent=False)
        self.table: Tensor

    def forward(self, positions: Tensor) -> Tensor:
        """(tokens,) int64 -> (tokens, d_model)."""
        return self.table[positions]


class KeyValueCache:
    """The keys and values that an attention layer attends to, in memory for `max_tokens` of them."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.length = max_tokens, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new tokens, (batch, heads, tokens, head_dim); returns those of all tokens."""
        if self._keys is None or self._values is None:
            shape = (*keys.shape[:2], self.max_tokens, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        end = self.length + keys.shape[2]
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self.contents()

    def contents(self) -> tuple[Tensor, Tensor]:
        """Those of all tokens, once there are some."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, as many as it has, (batch,) int64: beam search."""
        if self.length:
            for stored in self.contents():
                stored.copy_(stored[rows])


class Attention(nn.Module):
    """Self-attention, multi-head or grouped-query (Ainslie et al. 2023).

    Args:
        cfg: d_model, n_head, bias, dropout.
        causal: whether a token sees only those before it.
        n_kv_head: null = n_head.
        rotary: how positions are told, if here.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        causal: bool,
        n_kv_head: int | None = None,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.n_head = cfg.n_head
        self.n_kv_head = n_kv_head or cfg.n_head
        self.head_dim = cfg.d_model // cfg.n_head
        self.causal = causal
        self.dropout = cfg.dropout
        self.qkv = nn.Linear(cfg.d_model, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=cfg.bias)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        self.rotary = rotary

    def project(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, tokens, head_dim), keys and values (batch, kv_heads, tokens, head_dim) of x at
        positions `first` …"""
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, self.n_head + 2 * self.n_kv_head, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.rotary is not None:
            q, k = self.rotary(q, first), self.rotary(k, first)
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x: (batch, tokens, d_model), and so is the result.

        Args:
            mask: (batch, tokens) boolean, True = a token, which may be attended to; only without `causal`.
            cache: of the tokens before x, to which x is added; only with `causal`.
        """
        q, k, v = self.project(x, cache.length if cache is not None else 0)
        new = q.shape[2]
        if cache is not None:
            k, v = cache.append(k, v)
        seen = k.shape[2]
        visible = None if mask is None else mask[:, None, None, :]
        if 1 < new < seen:  # each sees the cached tokens and the new ones up to itself
            visible = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and new == seen,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to what the encoder made of the source."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.n_head = cfg.n_head
        self.dropout = cfg.dropout
        self.q = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        self.kv = nn.Linear(cfg.d_model, 2 * cfg.d_model, bias=cfg.bias)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """x: (batch, tokens, d_model), and so is the result.

        Args:
            memory: (batch, source tokens, d_model), the encoder's.
            mask: (batch, source tokens) boolean, True = a token.
            cache: of the memory's keys and values, computed at the first call.
        """
        if cache is not None and cache.length:
            k, v = cache.contents()
        else:
            k, v = (self._heads(part) for part in self.kv(memory).chunk(2, dim=-1))
            if cache is not None:
                cache.append(k, v)
        y = F.scaled_dot_product_attention(
            self._heads(self.q(x)),
            k,
            v,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_head, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """The FFN: an activation between two linear layers, or a gated one (GEGLU, SwiGLU: Shazeer 2020).

    With `activation_sparsity` 2:4, of each four consecutive hidden features of a token at most the two largest are left
    (Haziza et al. 2025, arXiv 2503.16672), in training and evaluation. What is sparse is the input of `down`; its
    products are dense ones all the same, so this changes what is learned and saves no time.
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.prunes_hidden = cfg.activation_sparsity != "none"
        self.up = nn.Linear(cfg.d_model, cfg.ffn_width, bias=cfg.bias)
        gated = cfg.activation in GATED_ACTIVATIONS
        self.gate = nn.Linear(cfg.d_model, cfg.ffn_width, bias=cfg.bias) if gated else None
        self.down = nn.Linear(cfg.ffn_width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_model), and so is the result."""
        up = self.up(x)
        if self.prunes_hidden:
            return self.down(pruned_relu2(up))
        if self.gate is None:
            return self.down(ACTIVATIONS[self.activation](up))
        return self.down(ACTIVATIONS["silu" if self.activation == "swiglu" else "gelu"](self.gate(x)) * up)


class ResidualBlock(nn.Module):
    """Parts that are added to the residual stream, each with a norm before it (pre) or after the sum (post)."""

    def __init__(self, cfg: TransformerConfig, norm_place: str) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.pre = norm_place == "pre"

    def add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        y = F.dropout(part(norm(x) if self.pre else x), self.dropout, self.training)
        return x + y if self.pre else norm(x + y)


class Block(ResidualBlock):
    """Attention and FFN."""

    def __init__(self, cfg: TransformerConfig, attention: Attention, norm_place: str = "pre") -> None:
        super().__init__(cfg, norm_place)
        self.attn_norm = make_norm(cfg)
        self.attn = attention
        self.ffn_norm = make_norm(cfg)
        self.ffn = FeedForward(cfg)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x: (batch, tokens, d_model), and so is the result; `mask` and `cache` as in `Attention`."""
        x = self.add(x, self.attn_norm, lambda y: self.attn(y, mask, cache))
        return self.add(x, self.ffn_norm, self.ffn)


class DecoderBlock(ResidualBlock):
    """Causal attention, attention to the encoder's output, and FFN."""

    def __init__(self, cfg: TransformerConfig, norm_place: str) -> None:
        super().__init__(cfg, norm_place)
        self.attn_norm = make_norm(cfg)
        self.attn = Attention(cfg, causal=True)
        self.cross_norm = make_norm(cfg)
        self.cross_attn = CrossAttention(cfg)
        self.ffn_norm = make_norm(cfg)
        self.ffn = FeedForward(cfg)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        cache: tuple[KeyValueCache, KeyValueCache] | None = None,
    ) -> Tensor:
        """x: (batch, tokens, d_model), and so is the result; `memory` and its mask as in `CrossAttention`.

        Args:
            cache: of the tokens before x, and of the memory.
        """
        own, cross = cache or (None, None)
        x = self.add(x, self.attn_norm, lambda y: self.attn(y, cache=own))
        x = self.add(x, self.cross_norm, lambda y: self.cross_attn(y, memory, memory_mask, cross))
        return self.add(x, self.ffn_norm, self.ffn)


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, checkpointed: bool, caches: Sequence[Any] | None = None, **inputs: Any
) -> Tensor:
    """x through the blocks, each with its own of `caches`, if given, and all with the same `inputs`; `checkpointed`
    keeps only what goes into each and computes the rest again for gradients."""
    for block, cache in zip(blocks, caches or [None] * len(blocks), strict=True):
        if checkpointed and cache is None:
            x = checkpoint(block, x, use_reentrant=False, **inputs)
        else:
            x = block(x, cache=cache, **inputs)
    return x
