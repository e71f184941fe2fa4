"""Prediction of hidden tokens (Devlin et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.config_models import BertConfig
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.library import build_hf
from sparse_pretrain.objective import MASKED_LM
from sparse_pretrain.tasks.task import Batch, Sizes, Task, embedding_rows
from sparse_pretrain.tasks.token_targets import IGNORED, token_loss, token_scores


class MaskedLM(Task):
    """Batches: tokens and labels, (examples, seq_len) int64; labels are -100 where nothing is hidden."""

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        if isinstance(cfg.model, BertConfig):
            return Bert(cfg.model, embedding_rows(cfg.model.vocab_size, sizes.vocab_size))
        return build_hf(cfg.model, MASKED_LM, sizes.vocab_size)

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        assert isinstance(cfg.data, TextConfig)
        return (torch.zeros(1, cfg.data.seq_len, dtype=torch.int64),)

    def targets(self, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        return (batch["labels"] != IGNORED).sum()

    def losses(self, batch: Batch, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, dict)
        loss = token_loss(self.model(batch["tokens"]), batch["labels"])
        return loss, torch.zeros_like(loss)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(batch, dict)
        return token_scores(self.model(batch["tokens"]), batch["labels"])
