"""Next-token prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.evaluation.perplexity import cross_entropies, token_losses
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.library import build_hf
from sparse_pretrain.objective import CAUSAL_LM
from sparse_pretrain.tasks.task import Batch, Sizes, Task, embedding_rows
from sparse_pretrain.tasks.token_targets import sum_and_count


class CausalLM(Task):
    """Batches: (examples, seq_len + 1) int64."""

    teaches = True

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        if isinstance(cfg.model, GPTConfig):
            return GPT(cfg.model, embedding_rows(cfg.model.vocab_size, sizes.vocab_size))
        return build_hf(cfg.model, CAUSAL_LM, sizes.vocab_size)

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        assert isinstance(cfg.data, TextConfig)
        return (torch.zeros(1, cfg.data.seq_len, dtype=torch.int64),)

    def targets(self, batch: Batch) -> int:
        assert isinstance(batch, Tensor)
        return batch[:, 1:].numel()

    def losses(self, batch: Batch, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, Tensor)
        logits = self.model(batch[:, :-1])
        loss = cross_entropies(logits, batch).mean()
        if self.teacher is None or not self.teacher.is_there:
            return loss, torch.zeros_like(loss)
        return loss, self.teacher.loss(logits, batch, step, first_row)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(batch, Tensor)
        losses = token_losses(self.model, batch)
        return {"loss": sum_and_count(losses.sum(dtype=torch.float64), losses.numel())}
