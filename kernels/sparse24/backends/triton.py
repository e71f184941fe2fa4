"""Plain Triton: a GEMM that decompresses the weight in registers. It saves bytes, not arithmetic: few tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24 import ops
from sparse24.backends.base import WEIGHT_GRADIENT, Backend, Product
from sparse24.packing import Packed

MOST_TOKENS = 128  # beyond that a product is bound by arithmetic, which is that of the dense one


class Triton(Backend):
    """`decompress.decompress_linear` on row-major packed weights, 9/16 of the dense bytes."""

    name = "triton"

    def supports(self, product: Product, device: torch.device) -> tuple[bool, str]:
        if not ops.HAS_TRITON:
            return False, "triton is not installed"
        if device.type != "cuda":
            return False, "needs a CUDA device"
        if product.kind == WEIGHT_GRADIENT:
            return False, "only for products with a weight"
        if product.tokens > MOST_TOKENS:
            return False, f"only for few tokens (at most {MOST_TOKENS}), found {product.tokens}"
        if product.dtype not in (torch.bfloat16, torch.float16):
            return False, f"needs bf16 or fp16, found {product.dtype}"
        return True, ""

    def pack_weight(
        self, weight: Tensor, mask: Tensor, dtype: torch.dtype, forward: bool, transpose: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        from sparse24.prune import prune_pack
        from sparse24.transposable import pack_both

        if forward and transpose:
            packed, packed_t = pack_both(weight, "mask", dtype, mask=mask)
            return [packed.values, packed.metadata], [packed_t.values, packed_t.metadata]
        one = (weight.t(), mask.t()) if transpose else (weight, mask)
        packed = prune_pack(one[0], "mask", dtype, mask=one[1])
        tensors = [packed.values, packed.metadata]
        return (tensors, []) if forward else ([], tensors)

    def linear(self, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int, variant: str) -> Tensor:
        from sparse24.decompress import decompress_linear

        return decompress_linear(x, Packed(operand[0], operand[1], x.shape[1]), bias)

    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        raise NotImplementedError("`supports` says no")
