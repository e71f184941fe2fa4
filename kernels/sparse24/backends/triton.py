"""Plain Triton: a GEMM that decompresses the weight in registers. It saves bytes, not arithmetic: few tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24 import ops
from sparse24.backends.base import WEIGHT_GRADIENT, Product
from sparse24.backends.packed import PackedBackend
from sparse24.packing import Packed

MOST_TOKENS = 128  # beyond that a product is bound by arithmetic, which is that of the dense one


class Triton(PackedBackend):
    """`decompress.decompress_linear` on row-major packed weights, 9/16 of the dense bytes."""

    name = "triton"
    fragments = False

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

    def linear(self, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int, variant: str) -> Tensor:
        from sparse24.decompress import decompress_linear

        return decompress_linear(x, Packed(operand[0], operand[1], x.shape[1]), bias)

    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        raise NotImplementedError("`supports` says no")
