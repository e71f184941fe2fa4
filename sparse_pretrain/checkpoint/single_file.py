"""A whole checkpoint as one safetensors file: every tensor under its dotted name, whatever number of ranks wrote it.

All that is no tensor is one more, `structure`: the bytes of `torch.save`, which are read with weights_only=True. The
header's metadata say the optimizer steps done, what the writer adds, and `sha256`: of the file, with zeros in the place
of these 64 digits.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparse_pretrain.checkpoint.files import STRUCTURE, Place, put_tensors, take_tensors
from sparse_pretrain.disk import sync_folder

SUFFIX = ".safetensors"
_UNKNOWN = "0" * 64  # in the place of the checksum, while it is made
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write(state: dict[str, Any], step: int, path: Path, facts: dict[str, str]) -> None:
    """Write a checkpoint's state of plain tensors as the file `path`: whole, or not at all.

    Args:
        step: optimizer steps done.
        facts: further metadata for the header.

    Raises:
        OSError: the disk is full or not writable.
    """
    tensors: dict[str, Tensor] = {}
    content = io.BytesIO()
    torch.save(take_tensors(state, "", tensors), content)
    tensors[STRUCTURE] = torch.frombuffer(content.getbuffer(), dtype=torch.uint8)
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so each begins at a multiple
    dtypes = {dtype: code for code, dtype in _DTYPES.items()}
    entries, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": dtypes[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}

    def header(digest: str) -> bytes:
        text = json.dumps({"__metadata__": {"step": str(step), "sha256": digest, **facts}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            digest = hashlib.sha256(header(_UNKNOWN))
            file.write(header(_UNKNOWN))
            for name in names:
                data = tensors[name].reshape(-1).view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
            file.seek(0)
            file.write(header(digest.hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def facts(path: Path) -> dict[str, str]:
    """The metadata in the header of such a file: `step`, and what its writer added.

    Raises:
        SafetensorError, OSError: there is no such header.
    """
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def damage(path: Path) -> str | None:
    """What is wrong with such a file, or None if it is as it was written."""
    try:
        shown = facts(path).get("sha256", "")
    except (SafetensorError, OSError) as error:
        return f"no whole safetensors file: {error}"
    with open(path, "rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        if len(shown) != len(_UNKNOWN):
            return "a safetensors file that `consolidate` did not write"
        digest = hashlib.sha256(size + header.replace(shown.encode(), _UNKNOWN.encode()))
        found = hashlib.file_digest(file, lambda: digest).hexdigest()
    return None if found == shown else "a wrong checksum"


def read(path: Path, place: Place | None = None) -> dict[str, Any]:
    """As `files.read`: the state, or of each `DTensor` that `place` gives this rank's part, and no more is read."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: _read(file, name, place) for name in names}
    structure = io.BytesIO(tensors.pop(STRUCTURE).numpy().tobytes())
    return put_tensors(torch.load(structure, weights_only=True), tensors)


def _read(file: Any, name: str, place: Place | None) -> Tensor:
    stored = file.get_slice(name)
    target = None
    if place is not None:
        target = place(name, torch.Size(stored.get_shape()), _DTYPES[stored.get_dtype()])
    if not isinstance(target, DTensor):
        return file.get_tensor(name).clone()  # else it is a view of the file, for as long as the run lasts
    for chunk in target.__create_chunk_list__():
        part = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        target.to_local().copy_(stored[part])
    return target
