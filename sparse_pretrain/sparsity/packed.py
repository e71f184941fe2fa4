"""A 2:4 layer that holds its weight packed: values and 2-bit metadata, 9/16 of the bytes in bf16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sparse24.reference import Packed, pack, unpack
from torch import Tensor, nn

from sparse_pretrain.sparsity.adapters import add_adapter
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.swap import replace


class PackedLinear(nn.Module):
    """Y = X Ŵᵀ + b, for inference; Ŵ is rebuilt for each product."""

    values: Tensor
    metadata: Tensor

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        packed = pack(layer.current_weight(), layer.out_by_in(layer.mask))
        self.register_buffer("values", packed.values)
        self.register_buffer("metadata", packed.metadata)
        self.cols = packed.cols
        self.bias = layer.bias
        if hasattr(layer, "adapter"):
            self.adapter = layer.adapter
            self.register_forward_hook(add_adapter)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        return F.linear(x, unpack(Packed(self.values, self.metadata, self.cols)), self.bias)


def pack_model(model: nn.Module) -> int:
    """Replace the 2:4 layers of `model` that are in their sparse phase by packed ones, in place; returns how many.
    Adapters stay beside them.

    Raises:
        ValueError: their pattern is not 2:4.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, SparseLinear) and m.is_sparse]
    for name, layer in layers:
        if layer.pattern != (2, 4):
            raise ValueError(f"{name} is {'{}:{}'.format(*layer.pattern)}: only 2:4 can be packed")
    with torch.no_grad():
        for name, layer in layers:
            replace(model, name, PackedLinear(layer))
    return len(layers)
