"""The parts of a transformer block: normalisation, positions, attention, feed-forward network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sparse24.activations import pruned_relu2
from torch import Tensor, nn

from sparse_pretrain.config import ModelConfig

GATED_ACTIVATIONS = ("geglu", "swiglu")


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rms_norm":
        return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


def ffn_width(cfg: ModelConfig) -> int:
    """d_ff as given, else 4 d_model, or 8/3 d_model rounded up to a multiple of 64 for the gated activations
    (Shazeer 2020: the same number of parameters)."""
    if cfg.d_ff is not None:
        return cfg.d_ff
    if cfg.activation in GATED_ACTIVATIONS:
        return -(-8 * cfg.d_model // (3 * 64)) * 64
    return 4 * cfg.d_model


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

    def forward(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (batch, heads, tokens, head_dim), in fp32, back to their dtype."""
        tokens = x.shape[-2]
        first, second = x.float().chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return (x * self.cos[:tokens] + rotated * self.sin[:tokens]).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, multi-head or grouped-query (Ainslie et al. 2023)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head or cfg.n_head
        self.head_dim = cfg.d_model // cfg.n_head
        self.dropout = cfg.dropout
        self.qkv = nn.Linear(cfg.d_model, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=cfg.bias)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        rotary = cfg.position == "rotary"
        self.rotary = RotaryEmbedding(self.head_dim, cfg.max_seq_len, cfg.rope_theta) if rotary else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, d_model), and so is the result."""
        batch, tokens, d_model = x.shape
        heads = self.qkv(x).view(batch, tokens, self.n_head + 2 * self.n_kv_head, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return self.out(y.transpose(1, 2).reshape(batch, tokens, d_model))


class FeedForward(nn.Module):
    """The FFN: GELU (tanh form, as GPT-2), squared ReLU (So et al. 2021), GEGLU or SwiGLU (Shazeer 2020).

    With `activation_sparsity` 2:4, of each four consecutive hidden features of a token at most the two largest are left
    (Haziza et al. 2025, arXiv 2503.16672), in training and evaluation. What is sparse is the input of `down`; its
    products are dense ones all the same, so this changes what is learned and saves no time.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        width = ffn_width(cfg)
        self.activation = cfg.activation
        self.prunes_hidden = cfg.activation_sparsity != "none"
        self.up = nn.Linear(cfg.d_model, width, bias=cfg.bias)
        gated = cfg.activation in GATED_ACTIVATIONS
        self.gate = nn.Linear(cfg.d_model, width, bias=cfg.bias) if gated else None
        self.down = nn.Linear(width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_model), and so is the result."""
        up = self.up(x)
        if self.prunes_hidden:
            hidden = pruned_relu2(up)
        elif self.gate is None:
            hidden = F.relu(up).square() if self.activation == "relu2" else F.gelu(up, approximate="tanh")
        elif self.activation == "swiglu":
            hidden = F.silu(self.gate(x)) * up
        else:
            hidden = F.gelu(self.gate(x), approximate="tanh") * up
        return self.down(hidden)


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(cfg)
        self.attn = Attention(cfg)
        self.ffn_norm = make_norm(cfg)
        self.ffn = FeedForward(cfg)
        self.dropout = cfg.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attn(self.attn_norm(x)), self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)
