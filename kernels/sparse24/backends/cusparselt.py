"""cuSPARSELt through PyTorch's operators (prototype API): the library path on sm_80 to sm_120, Hopper included.

Its compressed layout is its own, so Ŵ and Ŵᵀ are compressed apart, each from a dense copy; the algorithms are tried
one by one, since the library's own search often misses the best, and each is checked before it is used, since some
have returned wrong results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24 import ops
from sparse24.backends.base import FORWARD, Backend, Product, pad_rows

# Constraints of PyTorch's SparseSemiStructuredTensorCUSPARSELT: what the sparse operand's sizes are multiples of, and
# the columns of the dense one
K_STEP, N_STEP = 16, 8
FP8_STEP, FP8_N_STEP = 32, 16
ALGORITHMS = 70  # ids 0..69 are tried; those the library does not have are refused by it


class CuSparseLt(Backend):
    """`torch._cslt_compress` and `torch._cslt_sparse_mm`; a variant is an algorithm id."""

    name = "cusparselt"

    def supports(self, product: Product, device: torch.device) -> tuple[bool, str]:
        if device.type != "cuda":
            return False, "needs a CUDA device"
        if not torch.backends.cusparselt.is_available():
            return False, "this build of PyTorch has no cuSPARSELt, or the GPU is older than sm_80"
        fp8 = product.dtype == torch.float8_e4m3fn
        if not fp8 and product.dtype not in (torch.bfloat16, torch.float16):
            return False, f"needs bf16, fp16 or e4m3, found {product.dtype}"
        if fp8 and torch.cuda.get_device_capability(device) < (8, 9):
            return False, "e4m3 needs sm_89 or newer"
        if fp8 and product.kind != FORWARD:
            return False, "e4m3 is for the forward product only"
        step, n_step = (FP8_STEP, FP8_N_STEP) if fp8 else (K_STEP, N_STEP)
        if product.m % step or product.k % step or product.n % n_step:
            return False, (
                f"needs m and k in multiples of {step} and n of {n_step}, found {product.m}, {product.k}, {product.n}"
            )
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

    def pack_fp8(self, quantized: Tensor) -> list[Tensor]:
        return [torch._cslt_compress(quantized)]

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
        tokens = x.shape[0]
        x = pad_rows(x.view(torch.uint8), FP8_N_STEP).view(x.dtype)
        y = torch._cslt_sparse_mm(
            operand[0],
            x.t(),
            alpha=scale.expand(features).contiguous(),  # for every row: a single number would be read on the host
            out_dtype=torch.bfloat16,
            transpose_result=True,
            alg_id=int(variant or 0),
        )[:tokens]
        return (y if bias is None else y + bias).to(dtype)

    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        pruned = pad_rows(ops.mvue_prune(dy, seed, position), K_STEP)
        compressed = torch._cslt_compress(pruned.t().contiguous())
        return torch._cslt_sparse_mm(compressed, pad_rows(x, K_STEP), alg_id=int(variant or 0))
