"""A decoder-only transformer: GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) by configuration."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.models.blocks import Attention, Block, KeyValueCache, RotaryEmbedding, make_norm, run_blocks
from sparse_pretrain.models.generation import Step, sample


class GPT(nn.Module):
    """Token ids to next-token logits.

    Args:
        cfg: the model's options.
        vocab_size: rows of the embedding; at least the tokenizer's vocabulary.
    """

    def __init__(self, cfg: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.tok_embed = nn.Embedding(vocab_size, cfg.d_model)
        self.pos_embed = nn.Embedding(cfg.max_seq_len, cfg.d_model) if cfg.position == "learned" else None
        rotary = None
        if cfg.position == "rotary":  # one table for all blocks: with long contexts it is large
            rotary = RotaryEmbedding(cfg.d_model // cfg.n_head, cfg.max_seq_len, cfg.rope_theta)
        self.blocks = nn.ModuleList(
            Block(cfg, Attention(cfg, causal=True, n_kv_head=cfg.n_kv_head, rotary=rotary)) for _ in range(cfg.n_layer)
        )
        self.norm = make_norm(cfg)
        head = nn.Linear(cfg.d_model, vocab_size, bias=False)
        if cfg.tied_embeddings:
            head.weight = self.tok_embed.weight
        self.head: nn.Module = head
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layer)) for what is added to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("attn.out.weight", "ffn.down.weight"))
                std = 0.02 / math.sqrt(2 * self.cfg.n_layer) if residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Logits (batch, tokens, vocab); arguments as `hidden`'s."""
        return self.head(self.hidden(tokens, caches))

    def hidden(self, tokens: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """What the logits are made of, (batch, tokens, d_model).

        Args:
            tokens: (batch, tokens) int64; with those in the caches at most `max_seq_len`.
            caches: one a block, of the tokens before these; these are added.
        """
        first = caches[0].length if caches is not None else 0
        x = self.tok_embed(tokens)
        if self.pos_embed is not None:
            x = x + self.pos_embed(torch.arange(first, first + tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.cfg.dropout, self.training)
        return self.norm(run_blocks(self.blocks, x, self.cfg.activation_checkpointing and self.training, caches))

    def make_caches(self, max_tokens: int) -> list[KeyValueCache]:
        """Empty ones, for `forward`."""
        return [KeyValueCache(max_tokens) for _ in self.blocks]

    def step(self, max_tokens: int) -> Step:
        """For `generation`: logits of the next of up to `max_tokens` tokens; only the last `max_seq_len` are seen."""
        caches = self.make_caches(min(max_tokens, self.cfg.max_seq_len))

        def next_logits(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if tokens.shape[1] > self.cfg.max_seq_len:  # every token's position changes, so nothing cached is of use
                return self.head(self.hidden(tokens[:, -self.cfg.max_seq_len :])[:, -1])
            if rows is not None:
                for cache in caches:
                    cache.select(rows)
            return self.head(self.hidden(tokens[:, caches[0].length :], caches)[:, -1])

        return next_logits

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Continue the rows of `tokens` (batch, n); arguments and result are those of `generation.sample`."""
        self.eval()
        step = self.step(tokens.shape[1] + max_new_tokens)
        return sample(step, tokens, max_new_tokens, temperature, top_k, generator, stop_token, lengths)
