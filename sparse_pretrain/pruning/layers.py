"""Layers that can be pruned, each seen as a matrix (out_features, in_features) and the rows it is multiplied with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn


def is_prunable(module: nn.Module) -> bool:
    """`nn.Linear`, `nn.Conv2d`, or Hugging Face's `Conv1D` (told by name: `transformers` need not be installed)."""
    return isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as (out_features, in_features); of a convolution, in_features are channels · height · width of
    its kernel, in this order."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.t() if _is_conv1d(layer) else weight.flatten(1)


def set_matrix(layer: nn.Module, values: Tensor) -> None:
    """Give the layer a weight, as (out_features, in_features) in any dtype."""
    weight = cast(Tensor, layer.weight).detach()
    weight.copy_(values.t() if _is_conv1d(layer) else values.reshape(weight.shape))


def obstacle(layer: nn.Module, group: int, low_rank: bool) -> str:
    """Why a layer cannot be pruned in groups of `group` inputs, with a low-rank part beside it; nothing if it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            return f"it is a convolution with groups={layer.groups}, padding={layer.padding} of {layer.padding_mode}"
        if low_rank:
            return "it is a convolution, beside which there is no low-rank part"
    in_features = matrix(layer).shape[1]
    return f"in_features={in_features} is not a multiple of {group}" if in_features % group else ""


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What the matrix is multiplied with, (rows, in_features) fp32: tokens, or the patches a convolution sees."""
    if isinstance(layer, nn.Conv2d):
        padding = cast("tuple[int, int]", layer.padding)
        x = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
    return x.flatten(0, -2).float()


@contextmanager
def gathering(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While open, sums up XᵀX, (in_features, in_features) fp32, over the inputs X of every layer; a layer that was
    given nothing has none."""
    grams: dict[str, Tensor] = {}
    # Layers that read one tensor, as queries, keys and values do, follow each other: it is multiplied once for all.
    last: list[Any] = [None, None, None]  # the tensor, how often it has been written into, its XᵀX

    def add(name: str, layer: nn.Module, x: Tensor) -> None:
        # another kernel sees other patches
        if last[0] is not x or last[1] != x._version or isinstance(layer, nn.Conv2d):
            rows = input_rows(layer, x)
            last[:] = x, x._version, rows.t() @ rows
        if name in grams:
            grams[name] += last[2]
        else:
            grams[name] = last[2].clone()

    def hook(name: str) -> Any:
        return lambda layer, args: add(name, layer, args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
