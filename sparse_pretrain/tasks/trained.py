"""A trained model from a checkpoint, ready to be evaluated or to generate."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_pretrain import runs
from sparse_pretrain.checkpoint import single_file, store
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import DataConfig, ImagesConfig, PairsConfig, TextConfig
from sparse_pretrain.config_models import HFConfig, ModelConfig, Seq2SeqConfig, ViTConfig
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from sparse_pretrain.objective import is_encoder_decoder
from sparse_pretrain.schema import load
from sparse_pretrain.sparsity.adapter_files import adapters_in, load_adapters
from sparse_pretrain.sparsity.swap import densify
from sparse_pretrain.tasks.build import build_model, build_task
from sparse_pretrain.tasks.task import Sizes, Task


@dataclass(frozen=True)
class Trained:
    """task: its model is in evaluation mode, in the phase (dense or sparse) that the checkpoint's next step would train
    in."""

    checkpoint: Path
    step: int
    cfg: TrainConfig
    task: Task
    tokenizer_path: Path

    @property
    def model(self) -> nn.Module:
        return self.task.model


def load_trained(path: str, device: torch.device, option: str = "checkpoint") -> Trained:
    """The model of a checkpoint folder, of a run folder's newest whole checkpoint, or of a Hugging Face folder.

    Raises:
        UserError: naming `option`: there is none, it is damaged, or it is of an architecture that is not known.
    """
    folder = Path(path).expanduser()
    if huggingface.is_hugging_face(folder):
        return _load_hugging_face(folder, device, option)
    return _load_checkpoint(store.resolve(folder, option), device)


def _load_checkpoint(checkpoint: Path, device: torch.device) -> Trained:
    """Of one that has been verified."""
    cfg = config_of(checkpoint)
    state = store.read(checkpoint)
    task = build_task(cfg, Sizes(**state["sizes"]))
    task.load_state_dict(state["state_dict"])
    task.to(device).eval()
    task.sparse_training.load_state_dict(state["sparse_training"])
    task.sparse_training.prepare(state["steps_done"], refresh=False)
    return Trained(checkpoint, state["steps_done"], cfg, task, tokenizer_of(checkpoint)[0])


def config_of(checkpoint: Path) -> TrainConfig:
    """The options of the run that a verified checkpoint is of.

    Raises:
        UserError: see `runs.read_config`.
    """
    if checkpoint.is_file():
        return load(TrainConfig, json.loads(single_file.facts(checkpoint)["config"]))
    return runs.read_config(checkpoint.parent.parent)


def tokenizer_of(source: Path) -> tuple[Path, str | None]:
    """The tokenizer of a verified checkpoint or a Hugging Face folder: where it is, and its SHA-256, if it has one."""
    if source.is_file():
        return Path("RUN_DIR") / runs.TOKENIZER_FILE, single_file.facts(source).get("tokenizer_sha256")
    folder = source if huggingface.is_hugging_face(source) else source.parent.parent
    path = folder / runs.TOKENIZER_FILE
    return path, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _load_hugging_face(folder: Path, device: torch.device, option: str) -> Trained:
    """As a run of no steps, with the adapters of an adapter.safetensors beside the weights, as `prune` leaves one, or
    the N:M sparse layers that `export` names. Architectures that ours do not cover are transformers' own models."""
    model: ModelConfig
    adapters, recipe = folder / runs.ADAPTER_FILE, RecipeConfig("dense")
    if huggingface.is_known(folder):
        loaded = huggingface.load(folder, option)
        model, sizes, weights = loaded.cfg, Sizes(num_classes=loaded.num_classes), loaded.state_dict
        if loaded.sparse_layers and not adapters.is_file():
            recipe = RecipeConfig("exported", "static", loaded.pattern, include=list(loaded.sparse_layers))
        for names, what in ((loaded.missing, "initial weights for"), (loaded.left_behind, "no place for")):
            if names:
                print(f"  {folder.name}: {what} {', '.join(names)}", file=sys.stderr)
    else:
        model, sizes, weights = HFConfig(name=folder.name, path=str(folder)), Sizes(), None
    if adapters.is_file():
        recipe.adapter, recipe.include = adapters_in(adapters)
    cfg = TrainConfig(model=model, data=_data_of(model, folder.name), recipe=recipe)
    task = build_task(cfg, sizes)
    if weights is not None:
        task.model.load_state_dict(weights, strict=False)
    if adapters.is_file():
        load_adapters(task.model, adapters)
    task.sparse_training.prepare(0)  # adapters and masks are there from the first step on
    return Trained(folder, 0, cfg, task.to(device).eval(), folder / "tokenizer.json")


def _data_of(model: ModelConfig, name: str) -> DataConfig:
    """Such as a model of the family learned from."""
    if isinstance(model, ViTConfig):
        return ImagesConfig(name=name, image_size=model.image_size, channels=model.channels)
    length = getattr(model, "max_seq_len", 1024)
    if isinstance(model, Seq2SeqConfig) or (isinstance(model, HFConfig) and is_encoder_decoder(model)):
        return PairsConfig(name=name, format="lines", max_source_len=length, max_target_len=length)
    return TextConfig(name=name, source="text", seq_len=min(length, 1024))


def load_weights(task: Task, path: Path) -> None:
    """Give a run that starts the weights of another one's checkpoint, without optimizer and adapters: the master
    weights, of which its recipe makes masks anew; for a dense recipe those that the checkpoint computes with, 2:4 zeros
    and all. A model for another task takes the body and keeps its new head.

    Args:
        path: a checkpoint that has been verified, or a Hugging Face folder.

    Raises:
        UserError: it has no weights for this model.
    """
    cpu = torch.device("cpu")
    of_transformers = huggingface.is_hugging_face(path)
    source = _load_hugging_face(path, cpu, "init_from") if of_transformers else _load_checkpoint(path, cpu)
    if isinstance(source.cfg.model, HFConfig) and not isinstance(task.cfg.model, HFConfig):
        raise UserError("init_from", f"{path}, of an architecture of transformers alone", "model=hf model.path=FOLDER")
    if task.cfg.recipe.projection == "none":
        densify(source.model)
    weights = source.model.state_dict()
    if any(".adapter." in name for name in weights):
        print(f"  {path} has adapters, which stay behind: recipe.adapter.path brings them")
    load_matching(task, weights, path)


def load_matching(task: Task, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load what the model and `weights` (names as in a dense model) both have, of the same shapes.

    Raises:
        UserError: there is nothing that both have.
    """
    with torch.device("meta"):
        plain = build_model(task.cfg, task.sizes).state_dict()
    found = {}
    for name, expected in plain.items():
        for key in (name, name.removeprefix("body."), f"body.{name}"):
            if key in weights and weights[key].shape == expected.shape:
                found[name] = weights[key]
                break
    if not found:
        raise UserError("init_from", f"{path}, which has no weights of this model", "a checkpoint of the same model")
    task.model.load_state_dict(found, strict=False)
    new = sorted(set(plain) - set(found))
    if new:
        print(f"  {len(new)} tensors are new, not from {path}: {', '.join(new[:4])}{', …' if len(new) > 4 else ''}")
