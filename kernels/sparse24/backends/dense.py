"""Dense products on a masked weight: what every other backend is measured against and falls back to."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24 import ops, reference
from sparse24.backends.base import Backend, Product


class Dense(Backend):
    """cuBLAS, or the CPU's library, on Ŵ with its zeros stored. Both weight operands are one tensor.

    In fp8 cuBLAS serves e4m3 on sm_89 and newer; elsewhere, and for e5m2, the product is emulated in bf16.
    """

    name = "dense"

    def supports(self, product: Product, device: torch.device) -> tuple[bool, str]:
        return True, ""

    def pack_weight(
        self, weight: Tensor, mask: Tensor, scale: Tensor | None, dtype: torch.dtype, forward: bool, transpose: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        masked = ops.sparse_weight(weight, mask, scale, dtype)
        return [masked] if forward else [], [masked.t()] if transpose else []

    def linear(self, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int, variant: str) -> Tensor:
        return reference.linear_forward(x, operand[0], bias)

    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        return reference.linear_dw(ops.mvue_prune(dy, seed, position), x)

    def pack_fp8(self, quantized: Tensor) -> list[Tensor]:
        return [quantized]

    def fp8_linear(
        self,
        operand: list[Tensor],
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        features: int,
        variant: str,
        dtype: torch.dtype,
    ) -> Tensor:
        if not _has_fp8(x, features):
            return ops.fp8_linear_emulated(operand[0], x, scale, bias, dtype)
        weight, one = operand[0].t(), torch.ones_like(scale)
        if dtype == torch.float32:  # with which it takes no bias
            y = torch._scaled_mm(x, weight, scale, one, out_dtype=dtype)
            return y if bias is None else y + bias
        return torch._scaled_mm(x, weight, scale, one, bias=bias, out_dtype=dtype)


def _has_fp8(x: Tensor, features: int) -> bool:
    """Whether `torch._scaled_mm` takes x (tokens, k) and a weight (features, k)."""
    if not x.is_cuda or x.dtype != torch.float8_e4m3fn or x.shape[1] % 16 or features % 16:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 9)
