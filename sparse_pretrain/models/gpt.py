"""A decoder-only transformer: GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) by configuration."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_pretrain.config import ModelConfig
from sparse_pretrain.models.blocks import Block, make_norm


class GPT(nn.Module):
    """Token ids to next-token logits.

    Args:
        cfg: the model's options.
        vocab_size: rows of the embedding; at least the tokenizer's vocabulary.
    """

    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.tok_embed = nn.Embedding(vocab_size, cfg.d_model)
        self.pos_embed = nn.Embedding(cfg.max_seq_len, cfg.d_model) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = nn.Linear(cfg.d_model, vocab_size, bias=False)
        if cfg.tied_embeddings:
            self.head.weight = self.tok_embed.weight
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

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, tokens) int64, at most `max_seq_len` of them; returns logits (batch, tokens, vocab)."""
        x = self.tok_embed(tokens)
        if self.pos_embed is not None:
            x = x + self.pos_embed(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.cfg.dropout, self.training)
        for block in self.blocks:
            if self.cfg.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
    ) -> Tensor:
        """Continue `tokens` (1, n) one sampled token at a time; temperature 0 takes the likeliest.

        Returns (1, n + new) ids; stops early after `stop_token`. Only the last `max_seq_len` tokens are seen.
        """
        self.eval()
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.cfg.max_seq_len :])[:, -1].float()
            if temperature == 0:
                next_token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -torch.inf)
                next_token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, next_token), dim=1)
            if stop_token is not None and next_token.item() == stop_token:
                break
        return tokens
