"""Checkpoints of all kinds as `export` writes them: as transformers has them, with what belongs beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from sparse_pretrain import runs
from sparse_pretrain.config import ExportConfig
from sparse_pretrain.config_data import QuestionsConfig, SentencesConfig
from sparse_pretrain.config_models import BertConfig, HFConfig, Seq2SeqConfig, TorchvisionConfig, ViTConfig
from sparse_pretrain.data.special_tokens import frame, special_tokens
from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.huggingface.folder import read_config_file, read_safetensors, read_tensors
from sparse_pretrain.models.huggingface.from_gguf import convert as convert_gguf
from sparse_pretrain.models.huggingface.packed import SECTION, read_weights, section_of
from sparse_pretrain.models.huggingface.peft import LowRank, add_adapters
from sparse_pretrain.models.huggingface.rules import Rule
from sparse_pretrain.models.huggingface.sparsity_section import is_conv1d_architecture
from sparse_pretrain.models.huggingface.tokenizer_files import copy_others, write_image_processor, write_tokenizer
from sparse_pretrain.sparsity.adapter_files import adapters_in
from sparse_pretrain.sparsity.adapters import LoRA, adapters_of, merge_adapters
from sparse_pretrain.sparsity.linear import SparseLinear, is_conv1d
from sparse_pretrain.sparsity.swap import densify
from sparse_pretrain.tasks.trained import Trained, load_trained


@dataclass
class Source:
    """What is to be exported.

    Attributes:
        text: what it is, for the user.
        model: dense, as transformers has it.
        write_others: writes what belongs beside weights and config.json into a folder.
        ids: of special tokens, for config.json; null = it has its own.
        pattern, recipe: of its sparse weights.
        adapters: our layers -> those that stay apart.
        notes: what the user should know.
    """

    text: str
    model: huggingface.Converted
    write_others: Callable[[Path], None]
    ids: dict[str, int | None] | None = None
    pattern: str = "2:4"
    recipe: str | None = None
    adapters: dict[str, LowRank] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_source(cfg: ExportConfig, scratch: Path) -> Source:
    """The model that `checkpoint` names. scratch: a folder for files in between."""
    path = Path(cfg.checkpoint).expanduser()
    if path.suffix == ".gguf":
        folder = scratch / "gguf"
        convert_gguf(path, folder)
        return _from_folder(cfg, folder, str(path))
    if huggingface.is_hugging_face(path):
        return _from_folder(cfg, path, str(path.absolute()))
    return _from_run(cfg, load_trained(cfg.checkpoint, torch.device("cpu")), scratch)


def _from_folder(cfg: ExportConfig, folder: Path, name: str) -> Source:
    """A Hugging Face folder of any architecture, its files as they are, with adapters that `prune` may have left."""
    file = read_config_file(folder, "checkpoint")
    model_type, section, tensors = file.get("model_type", ""), section_of(file), read_weights(file)
    config = {name: value for name, value in file.values.items() if name != SECTION}
    model = huggingface.Converted(config, tensors, {})
    apart: dict[str, LowRank] = {}
    path = folder / runs.ADAPTER_FILE
    if path.is_file():
        options, layers = adapters_in(path)
        if options.kind != LoRA.kind:
            raise UserError("checkpoint", f"{path} of kind {options.kind}", [LoRA.kind])
        parameters, _ = read_safetensors(path, "checkpoint")
        adapters = {
            layer: LowRank(parameters[f"{layer}.adapter.a"], parameters[f"{layer}.adapter.b"], options.alpha)
            for layer in layers
        }
        model = huggingface.Converted(config, tensors, _layers_of(folder, model_type, tensors, layers))
        if _stay_apart(cfg, name, options.kind, model_type in ("vit", "deit")):
            apart = adapters
        else:
            add_adapters(tensors, adapters, model.layers)
    return Source(
        text=f"{name}, a {model_type}",
        model=model,
        write_others=lambda out: copy_others(folder, out),
        pattern=section.get("sparsity_structure", "2:4"),
        recipe=section.get("recipe"),
        adapters=apart,
    )


def _layers_of(folder: Path, model_type: str, tensors: Iterable[str], layers: list[str]) -> dict[str, Rule]:
    """Layers by the names that they have when we load the folder -> theirs."""
    if huggingface.is_known(folder):
        return huggingface.layers(folder, tensors)
    conv1d = is_conv1d_architecture(model_type)
    return {
        layer: Rule(f"{layer}.weight", (f"{layer.removeprefix('model.')}.weight",), transposed=conv1d)
        for layer in layers
    }


def _from_run(cfg: ExportConfig, trained: Trained, scratch: Path) -> Source:
    """A run's checkpoint: the weights that it computes with."""
    model, options, recipe = trained.model, trained.cfg.model, trained.cfg.recipe
    if isinstance(options, TorchvisionConfig):
        raise UserError("checkpoint", f"{trained.checkpoint}, a model of torchvision", "one that transformers has")
    sparse = any(isinstance(module, SparseLinear) and module.is_sparse for module in model.modules())
    apart = _take_adapters(cfg, trained)
    densify(model)
    try:
        merge_adapters(model)
    except ValueError as error:
        raise UserError("adapters", f"merged, but {error}", ["apart"]) from error
    facts = runs.read_json(trained.checkpoint.parent.parent / runs.RUN_FILE).get("corpus", {})
    ids: dict[str, int | None] | None = None
    content = trained.tokenizer_path.read_bytes() if trained.tokenizer_path.is_file() else None
    names: dict[str, str] = {}
    if content is not None:
        ids, names = _special(content, trained)
        if isinstance(trained.cfg.data, SentencesConfig | QuestionsConfig):
            content = _framing(content)
    if isinstance(options, HFConfig):
        converted, ids = _convert_hf(model, scratch), None
    else:
        converted = huggingface.convert(model, facts.get("label_names") or ())

    def write_others(folder: Path) -> None:
        copy_others(scratch, folder)
        if content is not None:
            length = getattr(options, "max_seq_len", 0)
            write_tokenizer(folder, content, names, length, types=isinstance(options, BertConfig))
        if facts.get("mean"):
            size = getattr(options, "image_size", 0) or getattr(trained.cfg.data, "image_size", 0)
            write_image_processor(folder, size, facts["mean"], facts["std"])

    notes = []
    if recipe.projection != "none" and not sparse:
        notes.append("the checkpoint is of a dense phase of its run, so its weights are dense")
    return Source(
        text=f"{trained.checkpoint} (step {trained.step})",
        model=converted,
        write_others=write_others,
        ids=ids,
        pattern=recipe.pattern if recipe.projection != "none" else "2:4",
        recipe=recipe.name,
        adapters={name.removeprefix("body."): adapter for name, adapter in apart.items()},
        notes=notes,
    )


def _take_adapters(cfg: ExportConfig, trained: Trained) -> dict[str, LowRank]:
    """The adapters that are to stay apart, which then add nothing to the model any more."""
    adapters = {name: adapter for name, adapter in adapters_of(trained.model).items() if adapter.active}
    if not adapters:
        return {}
    kind = next(iter(adapters.values())).kind
    if not _stay_apart(cfg, str(trained.checkpoint), kind, isinstance(trained.cfg.model, ViTConfig)):
        return {}
    taken = {}
    for name, adapter in adapters.items():
        assert isinstance(adapter, LoRA)
        taken[name] = LowRank(adapter.a, adapter.b, adapter.alpha)
        adapter.active = False
    return taken


def _stay_apart(cfg: ExportConfig, checkpoint: str, kind: str, vision: bool) -> bool:
    """Whether a checkpoint's adapters are to be kept apart (else they are merged).

    Raises:
        UserError: it is not said, or there is no way to.
    """
    if cfg.format != "adapters" and cfg.adapters is None:
        raise UserError("adapters", f"nothing, but {checkpoint} has adapters", ["merged", "apart"])
    if cfg.format == "packed" and cfg.adapters == "merged":
        raise UserError("adapters", "merged with format=packed, where they would fill up the zeros", ["apart"])
    apart = cfg.format == "adapters" or cfg.adapters == "apart"
    if apart and (kind != LoRA.kind or vision):
        found = "apart for a vision transformer" if vision else f"apart for recipe.adapter.kind={kind}"
        hint = f"{runs.ADAPTER_FILE} beside the checkpoint has them for sparse-pretrain"
        raise UserError("adapters", f"{found}, which PEFT has no form for", ["merged"], hint)
    return apart


def _convert_hf(model: nn.Module, scratch: Path) -> huggingface.Converted:
    """A model of transformers itself, which was trained in a wrapper."""
    own: Any = model.model
    layers = {
        name: module for name, module in own.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    for module in layers.values():
        if hasattr(module, "adapter"):  # merged, or taken out
            del module.adapter
    own.save_pretrained(scratch)
    config = read_config_file(scratch, "checkpoint").values
    tensors = read_tensors(scratch, "checkpoint")
    rules = {
        f"model.{name}": Rule(f"model.{name}.weight", (f"{name}.weight",), transposed=is_conv1d(module))
        for name, module in layers.items()
    }
    return huggingface.Converted(config, tensors, rules)


def _special(content: bytes, trained: Trained) -> tuple[dict[str, Any], dict[str, str]]:
    """Ids for config.json and tokens for the tokenizer's, by their names there."""
    options = trained.cfg.model
    tokenizer = Tokenizer.from_buffer(content)
    tokens = special_tokens(tokenizer)
    roles = {"pad_token": tokens.pad, "unk_token": tokens.unknown, "mask_token": tokens.mask}
    if isinstance(options, BertConfig):
        roles |= {"cls_token": tokens.start, "sep_token": tokens.separator}
        ids: dict[str, Any] = {"pad_token_id": tokens.fill}
    else:
        roles |= {"bos_token": tokens.start, "eos_token": tokens.end}
        ids = {"bos_token_id": tokens.start, "eos_token_id": tokens.end, "pad_token_id": tokens.pad}
    if isinstance(options, Seq2SeqConfig):
        start = tokens.fill if tokens.start is None else tokens.start
        ids |= {"decoder_start_token_id": start, "forced_eos_token_id": None, "max_length": options.max_seq_len}
        ids["pad_token_id"] = tokens.fill
    return ids, {name: str(tokenizer.id_to_token(token)) for name, token in roles.items() if token is not None}


def _framing(content: bytes) -> bytes:
    """The tokenizer.json that puts around texts what fine-tuning put there."""
    tokenizer = Tokenizer.from_buffer(content)
    frame(tokenizer)
    return tokenizer.to_str().encode()
