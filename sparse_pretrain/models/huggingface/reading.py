"""A folder of transformers as a model of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pretrain.config_models import (
    BertConfig,
    GPTConfig,
    ModelConfig,
    Seq2SeqConfig,
    TransformerConfig,
    ViTConfig,
)
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.huggingface.architecture import Architecture
from sparse_pretrain.models.huggingface.config_file import ConfigFile
from sparse_pretrain.models.huggingface.folder import TOKENIZER, read_config_file
from sparse_pretrain.models.huggingface.packed import read_weights, section_of
from sparse_pretrain.models.huggingface.registry import ARCHITECTURES
from sparse_pretrain.models.huggingface.rules import Rule, from_theirs
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.models.vit import ViT


@dataclass(frozen=True)
class Loaded:
    """A Hugging Face folder as a model of ours.

    Attributes:
        cfg: its options; `vocab_size` is set.
        state_dict: its weights in float32; those of a head that the folder does not have are not in it.
        missing: names of ours that are not in `state_dict`: a head that begins anew.
        left_behind: names of theirs that ours has no place for: of other heads.
        num_classes: of a vision transformer, else 0.
        tokenizer_path: its tokenizer.json, if there is one.
        sparse_layers: our linear layers whose weights have N:M zeros, if an export of ours says so.
        pattern: those zeros', as 2:4.
    """

    cfg: TransformerConfig
    state_dict: dict[str, Tensor]
    missing: tuple[str, ...]
    left_behind: tuple[str, ...]
    num_classes: int
    tokenizer_path: Path | None
    sparse_layers: tuple[str, ...] = ()
    pattern: str = "2:4"


def load(folder: Path, option: str = "checkpoint") -> Loaded:
    """Read a folder of transformers: config.json and safetensors, in one file or in shards; packed ones of ours too.

    Raises:
        UserError: naming `option`: files are missing or damaged, the architecture is none of those here, or it has
            options or tensors that our models cannot hold.
    """
    config = read_config_file(folder, option)
    cfg = options(folder, option)
    model_type = config.values["model_type"]
    architecture = ARCHITECTURES[model_type]
    num_classes = _num_classes(config.values) if isinstance(cfg, ViTConfig) else 0
    section = section_of(config)
    tensors = _tied_once(_modern_names(read_weights(config), architecture), architecture, cfg, config)
    with torch.device("meta"):
        wanted = build(cfg, num_classes).state_dict()
    rules = [*architecture.body(cfg), *architecture.head(cfg)]
    state = from_theirs(rules, tensors, wanted)
    used = {name for rule in rules for name in rule.theirs}
    left_behind = tuple(sorted(name for name in tensors.keys() - used if not _matches(name, architecture.ignored)))
    missing = tuple(name for name in wanted if name not in state)
    where = f"{folder}, a {model_type}"
    for name in left_behind:
        if not _matches(name, architecture.left_behind):
            raise UserError(option, f"{where} with {name}", "tensors of this architecture alone")
    for name in missing:
        if "head" not in name.partition(".")[0]:
            theirs = next(rule.theirs for rule in rules if rule.ours == name)
            raise UserError(option, f"{where} without {' or '.join(theirs)}", "all tensors of its architecture")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            found, allowed = tuple(tensor.shape), tuple(wanted[name].shape)
            raise UserError(
                option, f"{where}, whose tensor for {name} is {found}", f"{allowed}, as its config.json says"
            )
    tokenizer = folder / TOKENIZER
    targets = {f"{name}.weight" for name in section.get("targets", [])}
    return Loaded(
        cfg,
        state,
        missing,
        left_behind,
        num_classes,
        tokenizer if tokenizer.is_file() else None,
        tuple(rule.ours.removesuffix(".weight") for rule in rules if targets.issuperset(rule.theirs)),
        section.get("sparsity_structure", "2:4"),
    )


def is_known(folder: Path, option: str = "checkpoint") -> bool:
    """Whether `load` reads Hugging Face folders of such a config.json: of an architecture, and with options, that our
    models can hold. The others are models of transformers itself."""
    read_config_file(folder, option)
    try:
        options(folder, option)
    except UserError:
        return False
    return True


def options(folder: Path, option: str = "checkpoint") -> TransformerConfig:
    """The options of the model that `load` makes of a folder; raises what it raises about config.json."""
    config = read_config_file(folder, option)
    model_type = config.get("model_type", "")
    if model_type not in ARCHITECTURES:
        raise config.error("model_type", model_type, list(ARCHITECTURES))
    cfg = ARCHITECTURES[model_type].read_config(config)
    assert isinstance(cfg, TransformerConfig)
    return cfg


def layers(folder: Path, tensors: Iterable[str], option: str = "checkpoint") -> dict[str, Rule]:
    """The layers of the model that `load` makes of a folder -> the layers of theirs that they are.

    Args:
        tensors: the names in the folder, which for a body alone lack a prefix.
    """
    architecture = ARCHITECTURES[read_config_file(folder, option).values["model_type"]]
    rules = [rule for rule in architecture.body(options(folder, option)) if rule.ours.endswith(".weight")]
    if not any(name.startswith(architecture.prefix) for name in tensors):
        short = [tuple(name.removeprefix(architecture.prefix) for name in rule.theirs) for rule in rules]
        rules = [dataclasses.replace(rule, theirs=theirs) for rule, theirs in zip(rules, short, strict=True)]
    return {rule.ours.removesuffix(".weight"): rule for rule in rules}


def build(cfg: ModelConfig, num_classes: int = 0) -> nn.Module:
    """The model that `load` found the options of, with initial weights."""
    if isinstance(cfg, ViTConfig):
        return ViT(cfg, num_classes)
    assert isinstance(cfg, GPTConfig | BertConfig | Seq2SeqConfig)
    assert cfg.vocab_size is not None
    if isinstance(cfg, GPTConfig):
        return GPT(cfg, cfg.vocab_size)
    return Bert(cfg, cfg.vocab_size) if isinstance(cfg, BertConfig) else Seq2Seq(cfg, cfg.vocab_size)


def _num_classes(values: Mapping[str, Any]) -> int:
    return len(values["id2label"]) if isinstance(values.get("id2label"), dict) else values.get("num_labels", 2)


def _modern_names(tensors: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """With the names that a whole model's tensors have today: those of a body alone lack the prefix, and TensorFlow's
    norms have gamma and beta."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        tensors = {name.removesuffix(old) + new if name.endswith(old) else name: t for name, t in tensors.items()}
    if any(name.startswith(architecture.prefix) for name in tensors):
        return tensors
    return {f"{architecture.prefix}{name}": tensor for name, tensor in tensors.items()}


def _tied_once(
    tensors: dict[str, Tensor], architecture: Architecture, cfg: TransformerConfig, config: ConfigFile
) -> dict[str, Tensor]:
    """Each of tied tensors once, by the name that the rules have for it."""
    if isinstance(cfg, GPTConfig) and not cfg.tied_embeddings:
        return tensors
    for again, name in architecture.tied.items():
        if again in tensors:
            tensor = tensors.pop(again)
            kept = tensors.setdefault(name, tensor)
            if kept.dtype != tensor.dtype or not torch.equal(kept, tensor):
                found = f"{config.folder}, where {again} is not {name}"
                raise UserError(config.option, found, "tied weights that are the same, as its config.json says")
    return tensors


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
