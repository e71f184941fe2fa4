"""What the config.json of an exported folder says of N:M zeros in its weights.

The words are those of compressed-tensors' `sparsity_config`, which had such a section before it gave up sparse formats;
transformers passes it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_pretrain.models.huggingface.packed import DENSE, PACKED, VERSION

# Architectures of `Conv1D` layers, whose weights are (in, out)
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def describe(
    tensors: Mapping[str, Tensor], model_type: str, pattern: tuple[int, int], recipe: str | None, packed: bool
) -> dict[str, Any] | None:
    """The section, read off the weights themselves; None if no layer has the pattern.

    Args:
        tensors: dense, as transformers has them.
        pattern: (n, m): at most n non-zeros in each group of m consecutive inputs.
        recipe: how they came about.
        packed: whether the targets are to be packed: matrices alone, no convolutions.
    """
    transposed = is_conv1d_architecture(model_type)
    targets = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and (tensor.dim() == 2 or (tensor.dim() == 4 and not packed))
        and has_pattern(tensor.t() if transposed else tensor.flatten(1), pattern)
    ]
    if not targets:
        return None
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    return {
        "format": PACKED if packed else DENSE,
        "format_version": VERSION,
        "sparsity_structure": "{}:{}".format(*pattern),
        "global_sparsity": round(zeros / sum(tensor.numel() for tensor in tensors.values()), 6),
        "targets": sorted(targets),
        "transposed": transposed,
        "recipe": recipe,
    }


def is_conv1d_architecture(model_type: str) -> bool:
    """Whether its linear layers hold their weights as (in, out)."""
    return model_type in _CONV1D


def has_pattern(weight: Tensor, pattern: tuple[int, int]) -> bool:
    """Whether a matrix (out, in) has at most n non-zeros in each group of m inputs, and any at all."""
    n, m = pattern
    if weight.shape[1] % m:
        return False
    counts = (weight.reshape(len(weight), -1, m) != 0).sum(dim=2)
    return 0 < int(counts.max()) <= n
