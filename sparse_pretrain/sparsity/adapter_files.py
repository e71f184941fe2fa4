"""The adapters of a model as a safetensors file of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pretrain.config_recipe import AdapterConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.sharding import whole
from sparse_pretrain.sparsity.adapters import Adapter, adapters_of

_FORMAT = {"format": "sparse-pretrain adapters", "format_version": "1"}


def save_adapters(model: nn.Module, path: str | Path, write: bool = True) -> None:
    """Write the adapters of `model`, and nothing else of it, as one safetensors file, replaced in one piece.

    Where they are sharded, every rank has to call it, and one of them with `write`.

    Tensors are named `LAYER.adapter.a` and so on; the metadata says kind, options and format version.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
        ValueError: the model has no adapters, or ones that differ in kind or options.
    """
    from safetensors.torch import save  # here: the recipes alone need no file format

    adapters = adapters_of(model)
    tensors = {name: whole(parameter.detach()).cpu().contiguous() for name, parameter in _parameters(adapters).items()}
    if not write:
        return
    content = save(tensors, metadata=_FORMAT | _common_options(adapters))
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # give the room back
            partial.unlink()
        raise UserError(
            str(path), f"that it cannot be written ({error.strerror})", "a file in a writable folder with room for it"
        ) from error


@torch.no_grad()
def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Set the adapters of `model` to those that `save_adapters` wrote; do not call `start` on them any more.

    Raises:
        UserError, ValueError: as `read_adapters`. Nothing is changed then.
    """
    tensors = read_adapters(model, path)
    for name, parameter in _parameters(adapters_of(model)).items():
        parameter.copy_(tensors[name])


def read_adapters(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The parameters in a file of `save_adapters`, by name, for a model that has adapters already, of the same kind
    and options, at the same layers; it may be on `meta`.

    Raises:
        UserError: naming recipe.adapter.path, what is wrong with the file, and what would fit.
        ValueError: the model's adapters differ in kind or options, or are merged.
    """
    option = "recipe.adapter.path"
    adapters = adapters_of(model)
    if not adapters:
        raise UserError(option, f"{path}, for a model without adapters", "null where recipe.adapter.kind=none")
    if any(adapter.original is not None for adapter in adapters.values()):
        raise ValueError("the model's adapters are merged: call unmerge_adapters before loading others")
    found, tensors = _read_file(path)
    wanted = _common_options(adapters)
    if found != wanted:
        raise UserError(option, f"{path} with {_list(found)}", f"{_list(wanted)}, as this run's recipe.adapter")
    parameters = _parameters(adapters)
    for problem, names in (
        ("lacks", parameters.keys() - tensors.keys()),
        ("holds beside this model's", tensors.keys() - parameters.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
            layers = ", ".join(list(adapters)[:4]) + (", …" if len(adapters) > 4 else "")
            raise UserError(option, f"{path}, which {problem} {shown}", f"adapters of exactly these layers: {layers}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                option,
                f"{path}, whose {name} is {tuple(tensors[name].shape)}",
                f"{tuple(parameter.shape)} for this model",
            )
    return tensors


def adapters_in(path: str | Path) -> tuple[AdapterConfig, list[str]]:
    """What a file of `save_adapters` holds: kind and options, and the names of the layers.

    Raises:
        UserError: naming recipe.adapter.path, and what is wrong with the file.
    """
    options, tensors = _read_file(path)
    kind = options.pop("kind")
    values: dict[str, Any] = {name: json.loads(text) for name, text in options.items()}
    return AdapterConfig(kind, **values), list(dict.fromkeys(name.rpartition(".adapter.")[0] for name in tensors))


def with_options_of_file(cfg: AdapterConfig) -> AdapterConfig:
    """Where `path` names a file: options that are left at their defaults are those of its adapters.

    Raises:
        UserError: naming recipe.adapter.path, and what is wrong with the file.
    """
    if cfg.path is None:
        return cfg
    default, file = AdapterConfig(), adapters_in(cfg.path)[0]
    if cfg.kind != file.kind:
        return cfg
    names = ("rank", "rank_share", "alpha", "group", "train_groups")
    left = [name for name in names if getattr(cfg, name) == getattr(default, name)]
    return dataclasses.replace(cfg, **{name: getattr(file, name) for name in left})


def _read_file(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Kind and options as text, and the parameters by name."""
    from safetensors import SafetensorError, safe_open

    option = "recipe.adapter.path"
    allowed = "a file of adapters that a run or save_adapters wrote, as RUN_DIR/adapter.safetensors"
    if not Path(path).is_file():
        raise UserError(option, f"{path}, which {'is no file' if Path(path).exists() else 'does not exist'}", allowed)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(option, f"{path}, which cannot be read ({error})", allowed) from error
    if any(metadata.get(key) != value for key, value in _FORMAT.items()):
        raise UserError(option, f"{path}, a safetensors file that holds no adapters of this format", allowed)
    return {key: value for key, value in metadata.items() if key not in _FORMAT}, tensors


def _common_options(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Kind and options of all adapters, for the metadata."""
    options = [{"kind": adapter.kind, **adapter.options()} for adapter in adapters.values()]
    if not options:
        raise ValueError("the model has no adapters")
    if any(other != options[0] for other in options):
        raise ValueError("the model's adapters differ in kind or options: one file holds only adapters that agree")
    return options[0]


def _list(options: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(options.items()))


def _parameters(adapters: Mapping[str, Adapter]) -> dict[str, nn.Parameter]:
    """`LAYER.adapter.a` and so on -> Parameter."""
    return {
        f"{layer}.adapter.{name}": parameter
        for layer, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }
