"""An encoder that learns from hidden words: BERT (Devlin et al. 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.config_models import BertConfig
from sparse_pretrain.models.blocks import ACTIVATIONS, Attention, Block, make_norm, run_blocks


class MaskedWordHead(nn.Module):
    """What a word was, from its hidden features: logits with the embedding's weights."""

    def __init__(self, cfg: BertConfig, tok_embed: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        self.activation = ACTIVATIONS.get(cfg.activation, F.gelu)  # a gated FFN has none that would do here
        self.norm = make_norm(cfg)
        self.out = nn.Linear(cfg.d_model, tok_embed.num_embeddings, bias=cfg.bias)
        self.out.weight = tok_embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab)."""
        return self.out(self.norm(self.activation(self.dense(x))))


class Bert(nn.Module):
    """Token ids to logits of what each token was before some were hidden.

    Args:
        cfg: the model's options.
        vocab_size: rows of the embedding; at least the tokenizer's vocabulary.
    """

    def __init__(self, cfg: BertConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.tok_embed = nn.Embedding(vocab_size, cfg.d_model)
        self.pos_embed = nn.Embedding(cfg.max_seq_len, cfg.d_model)
        self.type_embed = nn.Embedding(cfg.token_types, cfg.d_model)
        self.embed_norm = make_norm(cfg)
        self.blocks = nn.ModuleList(
            Block(cfg, Attention(cfg, causal=False), cfg.norm_place) for _ in range(cfg.n_layer)
        )
        self.norm = make_norm(cfg) if cfg.norm_place == "pre" else nn.Identity()
        self.head: nn.Module = MaskedWordHead(cfg, self.tok_embed)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Logits (batch, tokens, vocab); arguments as `hidden`'s."""
        return self.head(self.hidden(tokens, mask, token_types))

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """What the logits are made of, (batch, tokens, d_model).

        Args:
            tokens: (batch, tokens) int64, at most `max_seq_len` of them.
            mask: (batch, tokens) boolean, True = a token, False = padding; null = all are tokens.
            token_types: (batch, tokens) int64, which text of a pair a token is of; null = 0.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        types = torch.zeros_like(tokens) if token_types is None else token_types
        x = self.tok_embed(tokens) + self.pos_embed(positions) + self.type_embed(types)
        x = F.dropout(self.embed_norm(x), self.cfg.dropout, self.training)
        return self.norm(run_blocks(self.blocks, x, self.cfg.activation_checkpointing and self.training, mask=mask))
