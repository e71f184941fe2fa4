"""A model of ours as transformers has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pretrain.config_models import ViTConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.heads import SpanPredictor, TextClassifier
from sparse_pretrain.models.huggingface.architecture import CLASSIFIER, PRE_TRAINING, SPANS
from sparse_pretrain.models.huggingface.config_file import check_option
from sparse_pretrain.models.huggingface.folder import CONFIG, GENERATION, WEIGHTS, write_json, write_tensors
from sparse_pretrain.models.huggingface.packed import PACKED, SECTION, write_packed
from sparse_pretrain.models.huggingface.registry import architecture_for
from sparse_pretrain.models.huggingface.rules import Rule, linear, to_theirs
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.models.vit import ViT

_GENERATING = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "MTModel")


@dataclass(frozen=True)
class Converted:
    """A model of ours as transformers has it.

    Attributes:
        config: config.json.
        tensors: by their names there; tied ones once.
        layers: our linear layers -> theirs, by name; each of theirs is a slice of rows of ours.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    layers: dict[str, Rule]

    @property
    def class_name(self) -> str:
        """The class of transformers that config.json names first."""
        return str((self.config.get("architectures") or ["AutoModel"])[0])


def convert(model: nn.Module, labels: Sequence[str] = ()) -> Converted:
    """One of our models, dense (not swapped), as transformers has it. Padding rows of the vocabulary stay: its logits
    are the same ones.

    Args:
        model: `GPT`, `Bert`, `Seq2Seq`, `ViT`, `TextClassifier` or `SpanPredictor`.
        labels: names of the classes.

    Raises:
        UserError: naming an option of the model that no architecture here can hold.
    """
    body = model.body if isinstance(model, TextClassifier | SpanPredictor) else model
    assert isinstance(body, GPT | Bert | Seq2Seq | ViT)
    head = {TextClassifier: CLASSIFIER, SpanPredictor: SPANS}.get(type(model), PRE_TRAINING)
    state = _float_state(body)
    cfg = body.cfg
    if not isinstance(cfg, ViTConfig):
        cfg = dataclasses.replace(cfg, vocab_size=len(state["tok_embed.weight"]))
    architecture = architecture_for(cfg)
    check_option(cfg, "activation_sparsity", ["none"], architecture.model_type)
    if head not in architecture.classes:
        raise UserError("checkpoint", f"a {architecture.model_type} with a head for {head}", list(architecture.classes))
    config: dict[str, Any] = {"architectures": [architecture.classes[head]], "model_type": architecture.model_type}
    config |= architecture.write_config(cfg)
    if not isinstance(cfg, ViTConfig):
        config["vocab_size"] = cfg.vocab_size
    rules = architecture.body(cfg)
    if head == PRE_TRAINING:
        rules += architecture.head(cfg)
    else:
        state |= {name: tensor for name, tensor in _float_state(model).items() if not name.startswith("body.")}
        for ours, theirs in architecture.other_heads[head].items():
            rules += [rule for rule in linear(ours, theirs, ()) if rule.ours in state]
    if head == CLASSIFIER or isinstance(cfg, ViTConfig):
        config |= _labels(len(state["classifier.weight" if head == CLASSIFIER else "head.weight"]), labels)
    layers = {rule.ours.removesuffix(".weight"): rule for rule in rules if rule.ours.endswith(".weight")}
    return Converted(config, to_theirs(rules, state), layers)


def _float_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}


def _labels(classes: int, labels: Sequence[str]) -> dict[str, Any]:
    names = labels or [f"LABEL_{i}" for i in range(classes)]
    found: dict[str, Any] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return found | ({"problem_type": "regression"} if classes == 1 else {})


def save(
    converted: Converted,
    folder: Path,
    special_ids: Mapping[str, int | None] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, model.safetensors and, for models that generate, generation_config.json.

    Args:
        folder: is there, and loses files of these names.
        special_ids: `eos_token_id` and so on, by their names in config.json; null = there is none; `max_length` is of
            generation_config.json alone. Without them that file is not written.
        dtype: of the weights; null = as they are.

    Raises:
        UserError: a weight is too large for `dtype`.
    """
    tensors = converted.tensors
    if dtype is not None:
        tensors = {name: _rounded(name, t, dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    config = {key: value for key, value in converted.config.items() if key not in ("dtype", "torch_dtype")}
    largest = max((t for t in tensors.values() if t.is_floating_point()), key=Tensor.numel)
    config["torch_dtype"] = str(largest.dtype).removeprefix("torch.")
    if special_ids is not None:
        generation = {name: value for name, value in special_ids.items() if value is not None}
        if converted.class_name.endswith(_GENERATING):
            write_json(folder / GENERATION, generation)
        config |= {name: value for name, value in special_ids.items() if name != "max_length"}
    write_json(folder / CONFIG, config)
    if config.get(SECTION, {}).get("format") == PACKED:
        write_packed(folder, tensors, config[SECTION])
    else:
        write_tensors(folder / WEIGHTS, tensors, {})


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    if rounded.isinf().sum() > tensor.isinf().sum():
        raise UserError("dtype", f"{dtype}".removeprefix("torch.") + f", in which {name} overflows", ["fp32", "bf16"])
    return rounded
