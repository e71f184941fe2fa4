"""What a run's objective asks of its data module."""

from __future__ import annotations

from typing import Any

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_models import BertConfig
from sparse_pretrain.objective import MASKED_LM, SEQ2SEQ, objective_of


def sampling(cfg: TrainConfig) -> dict[str, Any]:
    """What of the model decides how batches are made."""
    objective = objective_of(cfg)
    if objective == MASKED_LM and isinstance(cfg.model, BertConfig):
        return {"objective": "masked", "mask_share": cfg.model.mask_share, "whole_words": cfg.model.whole_words}
    if objective == MASKED_LM:
        return {"objective": "masked"}
    return {"objective": "seq2seq" if objective == SEQ2SEQ else "causal"}
