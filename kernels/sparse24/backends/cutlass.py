"""CUTLASS through PyTorch's operators (prototype API): sm_80 to sm_89; they refuse other devices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparse24 import ops
from sparse24.backends.base import WEIGHT_GRADIENT, Backend, Product, pad_rows

N_STEP = 8  # columns of the dense operand


class Cutlass(Backend):
    """`torch._sparse_semi_structured_mm`, packed by `_sparse_semi_structured_tile` in one pass both ways.

    The tile operator prunes greedily; on a weight that is masked already it finds the mask again, since every
    non-zero of a transposable 2:4 block can be kept.
    """

    name = "cutlass"

    def supports(self, product: Product, device: torch.device) -> tuple[bool, str]:
        if device.type != "cuda":
            return False, "needs a CUDA device"
        if torch.cuda.get_device_capability(device)[0] != 8:
            return False, "PyTorch's CUTLASS operators run on sm_80 to sm_89 only"
        if product.dtype not in (torch.bfloat16, torch.float16):
            return False, f"needs bf16 or fp16, found {product.dtype}"
        if product.kind == WEIGHT_GRADIENT:
            return False, "no way to pack MVUE's result that is fast enough to gain anything"
        # SparseSemiStructuredTensorCUTLASS's constraints, for the weight and (transposed) for its other operand
        if product.m % 64 or product.k % 64 or product.n % N_STEP:
            return False, f"needs m and k in multiples of 64 and n of 8, found {product.m}, {product.k}, {product.n}"
        return True, ""

    def pack_weight(
        self, weight: Tensor, mask: Tensor, scale: Tensor | None, dtype: torch.dtype, forward: bool, transpose: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        masked = ops.sparse_weight(weight, mask, scale, dtype).contiguous()
        if not transpose:  # the mask may be 2:4 along rows only
            return list(sparse_semi_structured_from_dense_cutlass(masked)), []
        values, meta, values_t, meta_t, _ = torch._sparse_semi_structured_tile(masked, algorithm="", use_cutlass=True)
        return [values, meta] if forward else [], [values_t, meta_t]

    def linear(self, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int, variant: str) -> Tensor:
        values, meta = operand
        tokens = x.shape[0]
        x = pad_rows(x, N_STEP)
        if bias is None:
            y = torch._sparse_semi_structured_mm(values, meta, x.t())
        else:
            y = torch._sparse_semi_structured_addmm(bias, values, meta, x.t())
        return y[:features, :tokens].t()

    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        raise NotImplementedError("`supports` says no")
