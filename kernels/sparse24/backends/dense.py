"""Dense products on a masked weight: what every other backend is measured against and falls back to."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24 import ops, reference
from sparse24.backends.base import Backend, Product


class Dense(Backend):
    """cuBLAS, or the CPU's library, on Ŵ with its zeros stored. Both weight operands are one tensor."""

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
