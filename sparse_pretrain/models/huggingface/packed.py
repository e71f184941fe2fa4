"""2:4 weights on disk: the two kept values of each group of four, and two bits each for where they were.

A folder as transformers has it, but for the layers that the `sparsity_config` of its config.json lists as `targets`.
In place of NAME.weight, (out, in), model.safetensors holds

    NAME.weight.values    (out, in/2), the kept entries of each group of four inputs, in order
    NAME.weight.metadata  (out, ceil(in/16)) int16, the position (0..3) of each in its group, eight in a word, the first
                          in the lowest bits; a word that is not filled ends with the positions 0, 1 of empty groups

as `sparse24.packing.Packed` has them in memory; `transposed` says whether the architecture's own weights are (in, out).
The metadata of the file has the SHA-256 of its tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sparse24.packing import Packed, pack, unpack
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparse_pretrain.errors import UserError
from sparse_pretrain.models.huggingface.config_file import ConfigFile
from sparse_pretrain.models.huggingface.folder import WEIGHTS, read_safetensors, read_tensors, write_tensors

SECTION, DENSE, PACKED, VERSION = "sparsity_config", "dense", "packed-24", 1
_SHA256 = "sha256"


def write_packed(folder: Path, tensors: Mapping[str, Tensor], section: Mapping[str, Any]) -> None:
    """Write model.safetensors with the weights of `section`'s targets packed.

    Args:
        tensors: dense, as transformers has them.

    Raises:
        ValueError: a target has more than two non-zeros in a group of four inputs.
    """
    targets = {f"{name}.weight" for name in section["targets"]}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in targets:
            packed = pack(tensor.t() if section["transposed"] else tensor)
            stored |= {f"{name}.values": packed.values, f"{name}.metadata": packed.metadata}
        else:
            stored[name] = tensor
    write_tensors(folder / WEIGHTS, stored, {_SHA256: _digest(stored)})


def read_packed(folder: Path, option: str) -> dict[str, Tensor | Packed]:
    """The tensors of a packed folder, checked: those of its targets by the names of their weights, packed.

    Raises:
        UserError: naming `option`: the checksum is wrong, a part is missing or of the wrong shape or dtype, or a group
            does not have two different positions in ascending order.
    """
    stored, metadata = read_safetensors(folder / WEIGHTS, option)
    if metadata.get(_SHA256) != _digest(stored):
        raise UserError(option, f"{folder / WEIGHTS} with a wrong checksum", "the file as it was exported")
    tensors: dict[str, Tensor | Packed] = {}
    for name, tensor in stored.items():
        if not name.endswith((".weight.values", ".weight.metadata")):
            tensors[name] = tensor
            continue
        weight = name.rpartition(".")[0]
        if weight in tensors:
            continue
        values, words = (stored.get(f"{weight}.{part}", torch.empty(0)) for part in ("values", "metadata"))
        packed = Packed(values, words, 2 * values.shape[-1] if values.dim() else 0)
        problem = damage(packed)
        if problem:
            raise UserError(option, f"{folder / WEIGHTS}, where {weight} has {problem}", "packed 2:4 weights")
        tensors[weight] = packed
    return tensors


def damage(packed: Packed) -> str | None:
    """What is wrong with a packed matrix, or None if each of its groups has two positions in ascending order."""
    values, metadata, cols = packed
    if values.dim() != 2 or cols % 4 or not values.is_floating_point():
        return f"values of shape {tuple(values.shape)} and {values.dtype}"
    expected = (values.shape[0], -(-cols // 16))
    if metadata.shape != expected or metadata.dtype != torch.int16:
        return f"metadata of shape {tuple(metadata.shape)} and {metadata.dtype}, not {expected} and torch.int16"
    shift = 4 * torch.arange(4, dtype=torch.int32)
    nibbles = metadata.to(torch.int32).unsqueeze(2) >> shift
    first, second = nibbles & 3, (nibbles >> 2) & 3
    wrong = (first >= second).flatten(1)
    if wrong.any():
        row, group = (int(i) for i in wrong.nonzero()[0])
        return f"positions that do not ascend in group {group} of row {row}"
    return None


def section_of(config: ConfigFile) -> dict[str, Any]:
    """What config.json says of N:M zeros; empty if it says nothing.

    Raises:
        UserError: it is not as `export` writes it, or of packed weights in another version.
    """
    section = config.get(SECTION, {})
    ours = dataclasses.replace(config, values=section)
    if not all(isinstance(name, str) for name in ours.get("targets", [])):
        raise ours.error("targets", section["targets"], "names of layers")
    ours.get("sparsity_structure", "2:4")
    if section.get("format") == PACKED:
        ours.only("format_version", VERSION, default=None)
        ours.only("transposed", False, True, default=None)
    return section


def read_weights(config: ConfigFile) -> dict[str, Tensor]:
    """All tensors of a folder as transformers has them, packed ones dense.

    Raises:
        UserError: naming `config.option`: files are missing or damaged.
    """
    section = section_of(config)
    if section.get("format") != PACKED:
        return read_tensors(config.folder, config.option)
    return dense_tensors(read_packed(config.folder, config.option), section)


def dense_tensors(tensors: Mapping[str, Tensor | Packed], section: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `write_packed` was given, bit for bit (zeros without their sign)."""
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Packed):
            weight = unpack(tensor)
            dense[name] = weight.t().contiguous() if section["transposed"] else weight
        else:
            dense[name] = tensor
    return dense


def semi_structured(packed: Packed) -> SparseSemiStructuredTensor:
    """PyTorch's own 2:4 tensor, on the device of `packed`: on a GPU of the backend that PyTorch prefers, on a CPU,
    where it can be made but not multiplied, of CUTLASS.

    Raises:
        ValueError: it is not in fp16 or bf16, in which alone PyTorch's is 2:4.
    """
    if packed.values.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"values must be float16 or bfloat16; found {packed.values.dtype}")
    dense = unpack(packed)
    if dense.is_cuda:
        return to_sparse_semi_structured(dense)
    values, metadata = sparse_semi_structured_from_dense_cutlass(dense)
    return SparseSemiStructuredTensorCUTLASS(dense.shape, values, metadata, None, None, None)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
