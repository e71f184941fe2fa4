"""The files of a Hugging Face folder: config.json and safetensors, in one file or in shards with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_pretrain.errors import UserError
from sparse_pretrain.models.huggingface.config_file import ConfigFile

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKENIZER, TOKENIZER_CONFIG = "generation_config.json", "tokenizer.json", "tokenizer_config.json"


def is_hugging_face(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_config_file(folder: Path, option: str) -> ConfigFile:
    """config.json of a folder.

    Raises:
        UserError: naming `option`: it is not there, or no JSON object.
    """
    return ConfigFile(_read_json(folder / CONFIG, option), folder, option)


def read_tensors(folder: Path, option: str) -> dict[str, Tensor]:
    """All tensors of a folder, as they are stored.

    Raises:
        UserError: naming `option`: files are missing or damaged, or there are weights in another format alone.
    """
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX, option).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(option, f"{folder / INDEX} without a weight_map", "an index of safetensors shards")
        files = sorted({str(name) for name in index.values()})
        if any(Path(name).name != name for name in files):
            raise UserError(option, f"{folder / INDEX} with shards in other folders", "shards beside their index")
    elif (folder / WEIGHTS).is_file():
        index, files = None, [WEIGHTS]
    else:
        others = sorted(path.name for pattern in ("*.bin", "*.pt*", "*.h5") for path in folder.glob(pattern))
        found = f"{folder} with {', '.join(others)}" if others else f"{folder} without weights"
        raise UserError(option, found, f"{WEIGHTS}, or shards with {INDEX}: other formats can run code when read")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= read_safetensors(folder / name, option)[0]
    if index is not None and (missing := sorted(index.keys() - tensors.keys())):
        raise UserError(option, f"{folder}, whose shards lack {', '.join(missing[:4])}", "all tensors of the index")
    return tensors


def read_safetensors(path: Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one file.

    Raises:
        UserError: naming `option`: it is not there, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(option, f"{path}, which cannot be read ({error})", "whole safetensors") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, which those may read who may read the folder.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    os.chmod(path, 0o644)  # safetensors makes it the owner's alone


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path, option: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(option, f"{path}, which cannot be read ({error})", "a Hugging Face folder") from error
    if not isinstance(values, dict):
        raise UserError(option, f"{path}, which holds no JSON object", "a Hugging Face folder")
    return values
