"""What a run learns: a function of its data's task and its model's family. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import DataConfig
from sparse_pretrain.config_models import HFConfig, ModelConfig
from sparse_pretrain.errors import UserError

CAUSAL_LM = "causal_lm"  # the next token of a text
MASKED_LM = "masked_lm"  # the tokens hidden in a text
SEQ2SEQ = "seq2seq"  # a text from another one, by an encoder-decoder
CONDITIONAL_LM = "conditional_lm"  # the same by a decoder: the other text comes first
IMAGE_CLASSIFICATION = "image_classification"
TEXT_CLASSIFICATION = "text_classification"
QUESTION_ANSWERING = "question_answering"

_BY_FAMILY = {
    ("language_modeling", "gpt"): CAUSAL_LM,
    ("language_modeling", "bert"): MASKED_LM,
    ("text_to_text", "seq2seq"): SEQ2SEQ,
    ("text_to_text", "gpt"): CONDITIONAL_LM,
    ("image_classification", "vit"): IMAGE_CLASSIFICATION,
    ("image_classification", "torchvision"): IMAGE_CLASSIFICATION,
    ("image_classification", "hf"): IMAGE_CLASSIFICATION,
    ("text_classification", "bert"): TEXT_CLASSIFICATION,
    ("text_classification", "gpt"): TEXT_CLASSIFICATION,
    ("text_classification", "hf"): TEXT_CLASSIFICATION,
    ("question_answering", "bert"): QUESTION_ANSWERING,
    ("question_answering", "gpt"): QUESTION_ANSWERING,
    ("question_answering", "hf"): QUESTION_ANSWERING,
}


def objective_of(cfg: TrainConfig) -> str:
    """One of the objectives above.

    Raises:
        UserError: the model cannot learn from these data, or `model.path` is not a model of transformers.
    """
    return objective(cfg.model, cfg.data)


def objective(model: ModelConfig, data: DataConfig) -> str:
    found = _BY_FAMILY.get((data.task, model.family))
    if found is not None:
        return found
    if isinstance(model, HFConfig):
        return _hugging_face(model, data)
    families = dict.fromkeys([family for task, family in _BY_FAMILY if task == data.task] + ["hf"])
    raise UserError(
        "data",
        f"{data.name} ({data.task}), from which a {model.family} model cannot learn",
        f"data for it, or model.family {' or '.join(families)} for these",
    )


def hugging_face_config(cfg: HFConfig) -> Path:
    """The config.json that `model.path` means.

    Raises:
        UserError: it is not there.
    """
    path = Path(cfg.path).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError("model.path", cfg.path, "a folder with a model of transformers, or its config.json")
    return path


def is_encoder_decoder(model: HFConfig) -> bool:
    return bool(_values(model).get("is_encoder_decoder"))


def _hugging_face(model: HFConfig, data: DataConfig) -> str:
    pairs, both = data.task == "text_to_text", is_encoder_decoder(model)
    if both and not pairs:
        raise UserError("data", f"{data.name} for an encoder-decoder", "data with data.task=text_to_text")
    if pairs:
        return SEQ2SEQ if both else CONDITIONAL_LM
    names = " ".join(_values(model).get("architectures") or [])
    return MASKED_LM if "MaskedLM" in names or "PreTraining" in names else CAUSAL_LM


def _values(model: HFConfig) -> dict[str, Any]:
    try:
        values = json.loads(hugging_face_config(model).read_text())
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError("model.path", f"{model.path}, which is no JSON", "a config.json of transformers") from error
    if not isinstance(values, dict):
        raise UserError("model.path", f"{model.path}, which holds no JSON object", "a config.json of transformers")
    return values
