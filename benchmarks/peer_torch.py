"""PyTorch's own 2:4 training path, to compare with: `SparseSemiStructuredTensor` with the weight pruned every step.

What torchao's `SemiSparseLinear` did until torchao dropped it: one kernel prunes 4x4 tiles (greedily, not optimally)
and packs the weight both ways, the forward pass and dX are sparse, dW is dense. PyTorch tests it on sm_80 to sm_89
only; on other devices it is tried and checked all the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS


def tensor_class(device: torch.device) -> type:
    """CUTLASS where it runs, else cuSPARSELt."""
    if torch.cuda.get_device_capability(device)[0] == 8:
        return SparseSemiStructuredTensorCUTLASS
    return SparseSemiStructuredTensorCUSPARSELT


class PeerLinear(nn.Module):
    """A linear layer without bias, whose weight (out_features, in_features) is pruned and packed at every use."""

    def __init__(self, dense: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = dense.weight, dtype

    def packed(self) -> Tensor:
        weight = self.weight.detach().to(self.dtype)
        return tensor_class(weight.device).prune_dense_static_sort(weight)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _PeerLinear.apply(x.to(self.dtype), self.weight, self.packed())


class _PeerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.packed, ctx.weight_dtype = packed, weight.dtype
        return F.linear(x, packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        tokens_dy = dy.reshape(-1, dy.shape[-1])
        dx = (tokens_dy @ ctx.packed).view(x.shape)
        dw = tokens_dy.t() @ x.reshape(-1, x.shape[-1])
        return dx, dw.to(ctx.weight_dtype), None


def swap(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the linear layers of a module, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, PeerLinear(child, dtype))
        else:
            swap(child, dtype)


def check(layer: PeerLinear, tokens: int = 256) -> float:
    """‖result - expected‖ / ‖expected‖ of the worse of both products; expected from what it says it has packed.

    Raises:
        RuntimeError: what it packed is not 2:4 along rows and columns, or not made of the weight's entries.
    """
    packed = layer.packed()
    out_features, in_features = layer.weight.shape
    eye = torch.eye(in_features, dtype=layer.dtype, device=layer.weight.device)
    dense = F.linear(eye, packed).t()  # each entry is one product with 1: exact
    kept = dense != 0
    weight = layer.weight.detach().to(layer.dtype)
    if not torch.equal(dense[kept], weight[kept]):
        raise RuntimeError("the packed weight does not hold the weight's own entries")
    for mask in (kept, kept.t()):
        if (mask.reshape(mask.shape[0], -1, 4).sum(2) > 2).any():
            raise RuntimeError("the packed weight is not 2:4 along rows and columns")
    generator = torch.Generator(weight.device).manual_seed(0)

    def randn(features: int) -> Tensor:
        return torch.randn(tokens, features, generator=generator, device=weight.device).to(layer.dtype)

    x, dy = randn(in_features), randn(out_features)
    pairs = ((F.linear(x, packed), F.linear(x, dense)), (dy @ packed, dy @ dense))
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
