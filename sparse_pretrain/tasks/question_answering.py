"""Where in a text the answer to a question begins and ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import QuestionsConfig
from sparse_pretrain.config_models import BertConfig, GPTConfig
from sparse_pretrain.models.heads import SpanPredictor
from sparse_pretrain.models.library import build_hf
from sparse_pretrain.objective import QUESTION_ANSWERING
from sparse_pretrain.tasks.classification import text_body
from sparse_pretrain.tasks.task import Batch, Sizes, Task, batch_size
from sparse_pretrain.tasks.token_targets import sum_and_count


class QuestionAnswering(Task):
    """Batches: tokens, mask, token_types (examples, n), start and end (examples,) int64: positions."""

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        if isinstance(cfg.model, BertConfig | GPTConfig):
            return SpanPredictor(text_body(cfg.model, sizes))
        return build_hf(cfg.model, QUESTION_ANSWERING, sizes.vocab_size)

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        assert isinstance(cfg.data, QuestionsConfig)
        tokens = torch.zeros(1, cfg.data.seq_len, dtype=torch.int64)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def targets(self, batch: Batch) -> int:
        return batch_size(batch)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(examples, 2, n): of each token as start and as end."""
        return self.model(batch["tokens"], batch["mask"], batch["token_types"])

    def losses(self, batch: Batch, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, dict)
        loss = F.cross_entropy(self.logits(batch).flatten(0, 1).float(), _positions(batch))
        return loss, torch.zeros_like(loss)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """accuracy: of start and end together."""
        assert isinstance(batch, dict)
        logits, positions = self.logits(batch), _positions(batch)
        total = F.cross_entropy(logits.flatten(0, 1).float(), positions, reduction="sum")
        right = (logits.argmax(-1).flatten() == positions).view(-1, 2).all(dim=1).sum()
        return {"loss": sum_and_count(total, len(positions)), "accuracy": sum_and_count(right, len(logits))}


def _positions(batch: dict[str, Tensor]) -> Tensor:
    """start, end, start, … (2 · examples,)."""
    return torch.stack((batch["start"], batch["end"]), dim=1).flatten()
