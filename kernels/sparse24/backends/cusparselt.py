"""cuSPARSELt through PyTorch's operators (prototype API): the library path on sm_80 to sm_120, Hopper included.

Its compressed layout is its own, so Ŵ and Ŵᵀ are compressed apart, each from a dense copy; the algorithms are tried
one by one, since the library's own search often misses the best, and each is checked before it is used, since some
have returned wrong results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24 import ops
from sparse24.backends.base import Backend, Product, pad_rows

K_STEP, N_STEP = 16, 8  # what the contraction length and the columns of the dense operand are multiples of
ALGORITHMS = 70  # ids 0..69 are tried; those the library does not have are refused by it


class CuSparseLt(Backend):
    """`torch._cslt_compress` and `torch._cslt_sparse_mm`; a variant is an algorithm id."""

    name = "cusparselt"

    def supports(self, product: Product, device: torch.device) -> tuple[bool, str]:
        if device.type != "cuda":
            return False, "needs a CUDA device"
        if not torch.backends.cusparselt.is_available():
            return False, "this build of PyTorch has no cuSPARSELt, or the GPU is older than sm_80"
        if product.dtype not in (torch.bfloat16, torch.float16):
            return False, f"needs bf16 or fp16, found {product.dtype}"
        # SparseSemiStructuredTensorCUSPARSELT's constraints: the sparse operand by 16, the dense one by 8
        if product.m % 16 or product.k % K_STEP or product.n % N_STEP:
            return False, f"needs m and k in multiples of 16 and n of 8, found {product.m}, {product.k}, {product.n}"
        return True, ""

    def variants(self, product: Product, device: torch.device) -> list[str]:
        return [str(i) for i in range(ALGORITHMS)]

    def pack_weight(
        self, weight: Tensor, mask: Tensor, scale: Tensor | None, dtype: torch.dtype, forward: bool, transpose: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        masked = ops.sparse_weight(weight, mask, scale, dtype).contiguous()
        return (
            [torch._cslt_compress(masked)] if forward else [],
            [torch._cslt_compress(masked.t().contiguous())] if transpose else [],
        )

    def linear(self, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int, variant: str) -> Tensor:
        tokens = x.shape[0]
        x = pad_rows(x, N_STEP)
        y = torch._cslt_sparse_mm(operand[0], x.t(), bias=bias, transpose_result=True, alg_id=int(variant or 0))
        return y[:tokens]

    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        pruned = pad_rows(ops.mvue_prune(dy, seed, position), K_STEP)
        compressed = torch._cslt_compress(pruned.t().contiguous())
        return torch._cslt_sparse_mm(compressed, pad_rows(x, K_STEP), alg_id=int(variant or 0))
