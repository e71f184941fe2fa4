"""A text from another one: translation, and generation from a description."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import PairsConfig
from sparse_pretrain.config_models import GPTConfig, Seq2SeqConfig
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.library import build_hf
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.objective import CONDITIONAL_LM, SEQ2SEQ
from sparse_pretrain.tasks.task import Batch, Sizes, Task, embedding_rows
from sparse_pretrain.tasks.token_targets import IGNORED, token_loss, token_scores


class _TextToText(Task):
    """What both ways share: the loss over the target's tokens, with `data.label_smoothing`."""

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(examples, n, vocab), for labels (examples, n)."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        return (batch["labels"] != IGNORED).sum()

    def losses(self, batch: Batch, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, dict)
        assert isinstance(self.cfg.data, PairsConfig)
        loss = token_loss(self.logits(batch), batch["labels"], self.cfg.data.label_smoothing)
        return loss, torch.zeros_like(loss)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """The loss here is without label smoothing."""
        assert isinstance(batch, dict)
        return token_scores(self.logits(batch), batch["labels"])


class EncoderDecoder(_TextToText):
    """Batches: source (examples, n), source_mask (the same, boolean), target (examples, m + 1) with its start and end
    tokens, labels (examples, m)."""

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        if isinstance(cfg.model, Seq2SeqConfig):
            return Seq2Seq(cfg.model, embedding_rows(cfg.model.vocab_size, sizes.vocab_size))
        return build_hf(cfg.model, SEQ2SEQ, sizes.vocab_size)

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        assert isinstance(cfg.data, PairsConfig)
        return tuple(torch.zeros(1, n, dtype=torch.int64) for n in (cfg.data.max_source_len, cfg.data.max_target_len))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["source"], batch["target"][:, :-1], batch["source_mask"])


class ConditionalLM(_TextToText):
    """By a decoder. Batches: tokens (examples, n + 1): source and target in a row; labels (examples, n)."""

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        if isinstance(cfg.model, GPTConfig):
            return GPT(cfg.model, embedding_rows(cfg.model.vocab_size, sizes.vocab_size))
        return build_hf(cfg.model, CONDITIONAL_LM, sizes.vocab_size)

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        return (torch.zeros(1, cfg.data.tokens_per_example - 1, dtype=torch.int64),)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["tokens"][:, :-1])
