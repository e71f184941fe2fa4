"""What there is to know about one architecture of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparse_pretrain.config_models import ModelConfig
from sparse_pretrain.models.huggingface.config_file import ConfigFile
from sparse_pretrain.models.huggingface.rules import Rule

# Heads of a model
PRE_TRAINING, CLASSIFIER, SPANS = "pre-training", "classifier", "spans"


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers and what it is in our models.

    Attributes:
        model_type: in config.json.
        prefix: of the tensors of the body; a folder of the body alone does not have it.
        classes: head -> the class of transformers.
        read_config: config.json -> our options; raises UserError if ours cannot hold it.
        write_config: our options -> what of config.json is this architecture's own; raises UserError if it cannot.
        body, head: the tensors of the model without its head, and of the head that it is pre-trained with; of our
            options, in which `vocab_size` is set.
        other_heads: head -> its layers in ours and in theirs.
        tied: tensors that are the same as another one, which they may be there beside, or in place of: lm_head's where
            our options do not untie it.
        ignored: shell-style patterns of buffers.
        left_behind: patterns of tensors of heads that are not among ours.
    """

    model_type: str
    prefix: str
    classes: dict[str, str]
    read_config: Callable[[ConfigFile], ModelConfig]
    write_config: Callable[[Any], dict[str, Any]]
    body: Callable[[Any], list[Rule]]
    head: Callable[[Any], list[Rule]]
    other_heads: dict[str, dict[str, str]]
    tied: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
