"""A backend in plain PyTorch, for tests of everything around backends."""

import torch
from sparse24 import ops
from sparse24.backends.base import Backend
from sparse24.packing import Packed, pack, unpack


class Reference(Backend):
    """Row-major packed operands, multiplied by unpacking them: right, and none too fast."""

    name = "reference"

    def supports(self, product, device):
        return (True, "") if product.k % 16 == 0 else (False, f"needs k in multiples of 16, found {product.k}")

    def variants(self, product, device):
        return ["a", "b"]

    def pack_weight(self, weight, mask, scale, dtype, forward, transpose):
        sparse = ops.sparse_weight(weight, mask, scale, dtype)
        packed = pack(sparse, mask) if forward else None
        packed_t = pack(sparse.t(), mask.t()) if transpose else None
        return [list(p[:2]) if p else [] for p in (packed, packed_t)]

    def linear(self, operand, x, bias, features, variant):
        y = x @ unpack(Packed(*operand, cols=x.shape[1])).t()
        return y if bias is None else y + bias

    def pack_fp8(self, quantized):
        integers = quantized.view(torch.uint8)
        packed = pack(integers.masked_fill(integers == 128, 0))  # -0
        return [packed.values, packed.metadata]

    def fp8_linear(self, operand, x, scale, bias, features, variant, dtype):
        weight = unpack(Packed(*operand, cols=x.shape[1])).view(x.dtype)
        return ops.fp8_linear_emulated(weight, x, scale, bias, torch.bfloat16).to(dtype)

    def weight_gradient(self, dy, x, seed, position, variant):
        return unpack(pack(ops.mvue_prune(dy, seed, position).t())) @ x
