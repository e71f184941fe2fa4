"""The task of a run, and its model."""

from __future__ import annotations

import torch
from torch import nn

from sparse_pretrain import objective
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.classification import ImageClassification, TextClassification
from sparse_pretrain.tasks.masked_lm import MaskedLM
from sparse_pretrain.tasks.question_answering import QuestionAnswering
from sparse_pretrain.tasks.task import Sizes, Task
from sparse_pretrain.tasks.text_to_text import ConditionalLM, EncoderDecoder

TASKS: dict[str, type[Task]] = {
    objective.CAUSAL_LM: CausalLM,
    objective.MASKED_LM: MaskedLM,
    objective.SEQ2SEQ: EncoderDecoder,
    objective.CONDITIONAL_LM: ConditionalLM,
    objective.IMAGE_CLASSIFICATION: ImageClassification,
    objective.TEXT_CLASSIFICATION: TextClassification,
    objective.QUESTION_ANSWERING: QuestionAnswering,
}


def task_class(cfg: TrainConfig) -> type[Task]:
    return TASKS[objective.objective_of(cfg)]


def build_task(cfg: TrainConfig, sizes: Sizes) -> Task:
    return task_class(cfg)(cfg, sizes)


def build_model(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
    """The run's model, dense, with its initial weights: a function of the seed alone."""
    torch.manual_seed(cfg.seed)
    return task_class(cfg).build(cfg, sizes)
