"""How a trained model holds its weights for evaluation and inference: dense, sparse, packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.sparsity.adapters import adapters_of
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.packed import PackedLinear, pack_model
from sparse_pretrain.sparsity.swap import densify


def represent(
    model: nn.Module, weights: str, dtype: torch.dtype | None = None, backends: Mapping[str, str] | None = None
) -> str:
    """Change how the model holds its weights, in place, and not what it computes; says what it holds then.

    Only of a run with `recipe.fp8` packed and dense weights are more precise: they are not quantised.

    Args:
        weights: auto (as they are), dense, sparse or packed.
        dtype: what to round packed weights to; null = as they are.
        backends: layer name -> what multiplies packed weights, see `packed.choose_backends`.

    Raises:
        UserError: `sparse` or `packed` for a model without layers in their sparse phase, or `packed` where they are
            not 2:4.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseLinear) and m.is_sparse]
    sparse, pattern = len(layers), "{}:{}".format(*layers[0].pattern) if layers else ""
    if weights in ("sparse", "packed") and not sparse:
        raise UserError(
            "weights", f"{weights}, but no layer of this checkpoint is in its sparse phase", ["auto", "dense"]
        )
    if weights == "packed" and pattern != "2:4":
        raise UserError("weights", f"packed, for a checkpoint that is {pattern} sparse", ["auto", "dense", "sparse"])
    adapted = sum(adapter.active for adapter in adapters_of(model).values())
    beside = f", {adapted} adapters beside them" if adapted else ""
    if weights == "packed":
        count = pack_model(model, backends, dtype)
        return f"packed: values and 2-bit metadata in {count} layers{beside}"
    if weights == "dense":
        densify(model)
        if sparse and adapted:
            return f"dense, adapters merged into the {pattern} weights of {sparse} layers"
        return f"dense, with {pattern} zeros in {sparse} layers" if sparse else f"dense{beside}"
    return f"{pattern} sparse in {sparse} layers{beside}" if sparse else f"dense{beside}"


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold all matrices, and what sparse layers make of them, in `dtype`, in place, for inference under autocast.
    Packed weights are made in it; norms, biases and buffers (the angles of rotary positions) stay as they are."""
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.product_dtype = dtype
            if layer.is_sparse:
                layer.project()  # from the master weight as it was, so that Ŵ is rounded once
    for parameter in (p for p in model.parameters() if p.dim() > 1):
        parameter.data = parameter.data.to(dtype)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Of all parameters and what sparse layers keep beside them, as they are held, and as they would be with dense
    weights in place of packed ones."""
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear | PackedLinear)]
    tensors = [*model.parameters(), *(buffer for layer in layers for buffer in layer.buffers(recurse=False))]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    saved = 0
    for layer in layers:
        if isinstance(layer, PackedLinear):
            saved += layer.out_features * layer.in_features * layer.dtype.itemsize
            saved -= sum(tensor.numel() * tensor.element_size() for tensor in layer.operand)
    return held, held + saved
