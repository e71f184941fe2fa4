"""Low-rank adapters as the `peft` library has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparse_pretrain.models.huggingface.folder import write_json, write_tensors
from sparse_pretrain.models.huggingface.rules import Rule

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class LowRank:
    """Y += (alpha / rank) · X Aᵀ Bᵀ: a (rank, in_features), b (out_features, rank)."""

    a: Tensor
    b: Tensor
    alpha: float


def add_adapters(tensors: dict[str, Tensor], adapters: Mapping[str, LowRank], rules: Mapping[str, Rule]) -> None:
    """Merge adapters into the weights of a checkpoint of theirs, in place; arguments as `write_adapters`'."""
    for name, adapter in adapters.items():
        rule = rules[name]
        delta = adapter.b.float() @ adapter.a.float() * (adapter.alpha / len(adapter.a))
        parts = delta.split(rule.rows) if len(rule.theirs) > 1 else (delta,)
        for weight, part in zip(rule.theirs, parts, strict=True):
            dense = tensors[weight]
            tensors[weight] = (dense.float() + (part.t() if rule.transposed else part)).to(dense.dtype)


def write_adapters(folder: Path, adapters: Mapping[str, LowRank], rules: Mapping[str, Rule], model_class: str) -> None:
    """A folder for `PeftModel.from_pretrained`. Where one layer of ours is several of theirs, these share A and have
    rows of B.

    Args:
        folder: is there.
        adapters: our layers -> theirs.
        rules: our layers -> which layers of theirs they are.
        model_class: of transformers.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, adapter in adapters.items():
        rule = rules[name]
        parts = adapter.b.split(rule.rows) if len(rule.theirs) > 1 else (adapter.b,)
        for weight, b in zip(rule.theirs, parts, strict=True):
            layer = weight.removesuffix(".weight")
            tensors[f"base_model.model.{layer}.lora_A.weight"] = adapter.a.detach().float().cpu().clone()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = b.detach().float().cpu().clone()
            ranks[layer], alphas[layer] = len(adapter.a), adapter.alpha
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, {})
    config = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if model_class.endswith(end)), None),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(rules[name].transposed for name in adapters),
        # by expressions over names
        "rank_pattern": {re.escape(layer): value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(layer): value for layer, value in alphas.items() if value != alpha},
    }
    write_json(folder / ADAPTER_CONFIG, config)
