"""An encoder-decoder: the Transformer (Vaswani et al. 2017), BART and Marian by configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.config_models import Seq2SeqConfig
from sparse_pretrain.models.blocks import (
    Attention,
    Block,
    DecoderBlock,
    KeyValueCache,
    SinusoidalPositions,
    make_norm,
    run_blocks,
)
from sparse_pretrain.models.generation import Step, beam_search, sample

DecoderCaches = list[tuple[KeyValueCache, KeyValueCache]]  # one a block: of the target, of the source


class Stack(nn.Module):
    """Positions, blocks and norms: the encoder, or the decoder."""

    def __init__(self, cfg: Seq2SeqConfig, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.cfg = cfg
        sinusoidal = cfg.position == "sinusoidal"
        self.pos_embed = (SinusoidalPositions if sinusoidal else nn.Embedding)(cfg.max_seq_len, cfg.d_model)
        self.embed_norm = make_norm(cfg) if cfg.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(cfg) if cfg.norm_place == "pre" else nn.Identity()

    def forward(self, x: Tensor, first: int = 0, **inputs: Any) -> Tensor:
        """Embedded tokens (batch, tokens, d_model) at positions `first` … through the blocks, which get `inputs`."""
        x = x + self.pos_embed(torch.arange(first, first + x.shape[1], device=x.device))
        x = F.dropout(self.embed_norm(x), self.cfg.dropout, self.training)
        return self.norm(run_blocks(self.blocks, x, self.cfg.activation_checkpointing and self.training, **inputs))


class Seq2Seq(nn.Module):
    """Token ids of a source, and of a target so far, to logits of the target's next token.

    Args:
        cfg: the model's options.
        vocab_size: rows of the one embedding of source, target and output; at least the tokenizer's vocabulary.
    """

    def __init__(self, cfg: Seq2SeqConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.tok_embed = nn.Embedding(vocab_size, cfg.d_model)
        self.embed_scale = math.sqrt(cfg.d_model) if cfg.scale_embedding else 1.0
        self.encoder = Stack(
            cfg, [Block(cfg, Attention(cfg, causal=False), cfg.norm_place) for _ in range(cfg.n_layer)]
        )
        self.decoder = Stack(
            cfg, [DecoderBlock(cfg, cfg.norm_place) for _ in range(cfg.n_decoder_layer or cfg.n_layer)]
        )
        self.head = nn.Linear(cfg.d_model, vocab_size, bias=cfg.bias)
        self.head.weight = self.tok_embed.weight
        self._init_weights()

    def _init_weights(self) -> None:
        """fairseq's: N(0, 1/d_model) for embeddings, Glorot's for the rest."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, nn.Embedding):  # after the layers: the output's weights are the embedding's
                nn.init.normal_(module.weight, std=self.cfg.d_model**-0.5)

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Logits (batch, target tokens, vocab); arguments as those of `encode` and `decode`."""
        return self.decode(target, self.encode(source, source_mask), source_mask)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The memory, (batch, source tokens, d_model).

        Args:
            source: (batch, source tokens) int64, at most `max_seq_len` of them.
            source_mask: (batch, source tokens) boolean, True = a token, False = padding; null = all are tokens.
        """
        return self.encoder(self._embed(source), mask=source_mask)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        source_mask: Tensor | None = None,
        caches: DecoderCaches | None = None,
    ) -> Tensor:
        """Logits (batch, target tokens, vocab).

        Args:
            target: (batch, target tokens) int64 from the start token on; with those in the caches at most
                `max_seq_len`.
            memory: what `encode` gave.
            caches: of the tokens before these, which are added, and of the memory.
        """
        first = caches[0][0].length if caches is not None else 0
        x = self._embed(target)
        return self.head(self.decoder(x, first, memory=memory, memory_mask=source_mask, caches=caches))

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.embed_scale

    def make_caches(self, max_tokens: int, source_tokens: int) -> DecoderCaches:
        """Empty ones, for `decode`."""
        return [(KeyValueCache(max_tokens), KeyValueCache(source_tokens)) for _ in self.decoder.blocks]

    def step(self, source: Tensor, source_mask: Tensor | None, max_tokens: int, beams: int = 1) -> Step:
        """For `generation`: logits of the next of up to `max_tokens` target tokens, for `beams` rows a source."""
        memory = self.encode(source, source_mask).repeat_interleave(beams, dim=0)
        mask = None if source_mask is None else source_mask.repeat_interleave(beams, dim=0)
        caches = self.make_caches(max_tokens, source.shape[1])

        def next_logits(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if rows is not None:
                for own, _ in caches:  # beams change places within a source, so its keys stay where they are
                    own.select(rows)
            return self.decode(tokens[:, caches[0][0].length :], memory, mask, caches)[:, -1]

        return next_logits

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        source_mask: Tensor | None,
        start_token: int,
        end_token: int,
        max_new_tokens: int,
        beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Tensor:
        """The target of each source, by beam search, or greedily with one beam.

        Returns (batch, 1 + new) int64, from the start token on, new at most `max_new_tokens` and `max_seq_len`; shorter
        rows are filled with `end_token`.
        """
        self.eval()
        start = torch.full_like(source[:, :1], start_token)
        max_new_tokens = min(max_new_tokens, self.cfg.max_seq_len)
        step = self.step(source, source_mask, max_new_tokens, beams)
        if beams == 1:
            return sample(step, start, max_new_tokens, temperature=0, stop_token=end_token)
        return beam_search(step, start, beams, max_new_tokens, end_token, length_penalty)
