"""What becomes of a pruned model: a run folder, or a Hugging Face folder, as it was one before."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from sparse_pretrain import runs
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config_recipe import AdapterConfig, RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.huggingface.folder import CONFIG, read_safetensors, write_json, write_tensors
from sparse_pretrain.models.huggingface.packed import SECTION
from sparse_pretrain.schema import to_dict
from sparse_pretrain.sparsity.adapter_files import save_adapters
from sparse_pretrain.sparsity.adapters import LoRA, adapters_of, attach, make_adapter, merge_adapters
from sparse_pretrain.sparsity.swap import densify
from sparse_pretrain.tasks.build import build_task
from sparse_pretrain.tasks.task import Task
from sparse_pretrain.tasks.trained import Trained

# Layer -> U (out_features, rank) and V (rank, in_features) of the product that is added to its weight.
Factors = Mapping[str, tuple[Tensor, Tensor]]

_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


def plain_task(trained: Trained) -> Task:
    """The checkpoint's task with plain layers, which hold the weights that it computes with now: 2:4 ones where it is
    sparse, adapters merged."""
    if trained.cfg.recipe.projection == trained.cfg.recipe.adapter.kind == "none":
        return trained.task
    densify(trained.model)
    merge_adapters(trained.model)
    task = build_task(dataclasses.replace(trained.cfg, recipe=RecipeConfig("dense")), trained.task.sizes)
    task.model.load_state_dict(trained.model.state_dict())
    return task.to(next(trained.model.parameters()).device).eval()


def with_merged(trained: Trained, layers: Sequence[str]) -> list[str]:
    """Those whose weights are new: `layers`, and the ones into which `plain_task` merged adapters."""
    return list(dict.fromkeys([*layers, *adapters_of(trained.model)]))


def write_run(
    out: Path,
    trained: Trained,
    model: nn.Module,
    layers: Sequence[str],
    factors: Factors,
    recipe: RecipeConfig,
    facts: Mapping[str, Any],
) -> None:
    """A run folder of no training: the config of what was pruned but for the recipe, and one checkpoint, of its step.

    Args:
        trained: what was pruned.
        model: its model, pruned.
        layers: those pruned, by name.
        recipe: as `result_recipe` gives it.
        facts: what was done, for run.json.

    Raises:
        UserError: the folder cannot be written.
    """
    cfg = dataclasses.replace(trained.cfg, recipe=recipe, name=None, run_dir=str(out), resume="auto", init_from=None)
    task = build_task(cfg, trained.task.sizes)
    task.model.load_state_dict(model.state_dict(), strict=False)
    for name, (left, right) in factors.items():
        set_adapter(cast(LoRA, task.model.get_submodule(name).adapter), left, right)
    task.steps_done = trained.step
    task.sparse_training.prepare(trained.step)  # masks: where the zeros are not
    state: dict[str, Any] = {"state_dict": task.state_dict(), "loops": None}
    task.on_save_checkpoint(state)

    source = trained.checkpoint.parent.parent
    with runs.writing(out, "out"):
        (out / runs.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if trained.tokenizer_path.is_file():
            shutil.copyfile(trained.tokenizer_path, out / runs.TOKENIZER_FILE)
    known = runs.read_json(source / runs.RUN_FILE)
    values: dict[str, Any] = {name: known[name] for name in ("data", "corpus", "model") if name in known}
    runs.write_json(out / runs.RUN_FILE, {"id": secrets.token_hex(4), **values, "pruning": dict(facts)})
    runs.write_text(out / runs.CONFIG_FILE, yaml.safe_dump(to_dict(cfg), sort_keys=False))
    if factors:
        save_adapters(task.model, out / runs.ADAPTER_FILE)
    store.save(state, store.checkpoint_folder(out / runs.CHECKPOINTS, trained.step))


def result_recipe(name: str, pattern: str, layers: Sequence[str], adapter: AdapterConfig) -> RecipeConfig:
    """The recipe that has the pruned model: static masks for N:M zeros; other zeros are weights like any other."""
    grouped = ":" in pattern
    if not grouped and adapter.kind == "none":
        return RecipeConfig(name)
    projection = "static" if grouped else "none"
    return RecipeConfig(name, projection, pattern if grouped else "2:4", include=list(layers), adapter=adapter)


def write_folder(
    out: Path, source: Path, model: nn.Module, layers: Sequence[str], factors: Factors, adapter: AdapterConfig
) -> None:
    """A Hugging Face folder: the files of `source` with the weights of `layers` in place of the old ones, in the dtype
    of those; and the low-rank parts as `adapter.safetensors`, with the names that the layers have in `model`. What its
    config.json says of zeros is left out.

    Raises:
        UserError: the folder cannot be written.
    """
    new = _their_weights(source, model, layers)
    with runs.writing(out, "out"):
        for path in sorted(source.iterdir()):
            if not path.is_file() or any(path.match(pattern) for pattern in _OTHER_WEIGHTS):
                continue
            if path.suffix != ".safetensors":
                shutil.copyfile(path, out / path.name)
            elif path.name != runs.ADAPTER_FILE:
                tensors, metadata = read_safetensors(path, "checkpoint")
                for name in tensors:
                    found = next((key for key in new if _is_called(key, name)), None)
                    if found is not None:
                        tensors[name] = new[found].to(tensors[name].dtype).contiguous()
                write_tensors(out / path.name, tensors, metadata)
        config = runs.read_json(out / CONFIG)
        if config.pop(SECTION, None) is not None:
            write_json(out / CONFIG, config)
    if factors:
        for name, (u, v) in factors.items():
            layer = model.get_submodule(name)
            attach(layer, make_adapter(adapter, v.shape[1], u.shape[0]))
            set_adapter(cast(LoRA, layer.adapter), u, v)
        save_adapters(model, out / runs.ADAPTER_FILE)


def check_folder(source: Path, model: nn.Module, layers: Sequence[str]) -> None:
    """Whether `write_folder` can replace the weights of these layers.

    Raises:
        UserError: the files of `source` do not have them by their names.
    """
    there: set[str] = set()
    for path in source.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            there |= set(file.keys())
    for name in _their_weights(source, model, layers):
        if not any(_is_called(name, key) for key in there):
            raise UserError(
                "checkpoint", f"{source}, whose files do not name {name}", "one that transformers saved, or dense"
            )


def _is_called(name: str, in_file: str) -> bool:
    """Whether a tensor of a file is this one: files of a body alone lack the prefix."""
    return name == in_file or name.endswith(f".{in_file}")


def _their_weights(source: Path, model: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """The pruned weights by the names that transformers has for them."""
    if not huggingface.is_known(source):
        state = model.state_dict()
        return {f"{name}.weight".removeprefix("model."): state[f"{name}.weight"].cpu() for name in layers}
    converted = huggingface.convert(model)
    return {name: converted.tensors[name] for layer in layers for name in converted.layers[layer].theirs}


@torch.no_grad()
def set_adapter(adapter: LoRA, left: Tensor, right: Tensor) -> None:
    """Let the adapter add X Vᵀ Uᵀ. A column of U and the row of V that it is multiplied with may share their size as
    one likes: in A and B they have the same, so that one learning rate does for both.

    left: U (out_features, rank); right: V (rank, in_features).
    """
    left = left.float() * (adapter.rank / adapter.alpha)
    sizes = left.norm(dim=0), right.float().norm(dim=1)
    ratio = torch.where(sizes[1] > 0, sizes[0] / sizes[1], 1.0).sqrt()
    ratio = torch.where(ratio > 0, ratio, 1.0)
    adapter.a.copy_(right * ratio[:, None])
    adapter.b.copy_(left / ratio)
