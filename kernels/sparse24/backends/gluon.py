"""Our own sparse GEMMs on the sparse tensor cores, from ahead-of-time cubins."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24 import ops
from sparse24.backends.base import WEIGHT_GRADIENT, Product
from sparse24.backends.packed import PackedBackend
from sparse24.fragments import Fragments


class Gluon(PackedBackend):
    """`matmul.linear` and `matmul.outer` on fragment-ordered operands; a variant is a kernel of the manifest."""

    name = "gluon"
    fragments = True

    def supports(self, product: Product, device: torch.device) -> tuple[bool, str]:
        if device.type != "cuda":
            return False, "needs a CUDA device"
        if not ops.HAS_TRITON:
            return False, "packing needs triton, which is not installed"
        from sparse24 import matmul

        # the tokens of dW are padded with zeros, at no cost; a weight's dimensions are what they are
        k = -(-product.k // 64) * 64 if product.kind == WEIGHT_GRADIENT else product.k
        return matmul.supports(_form(product), product.m, product.n, k, product.dtype, _capability(device))

    def variants(self, product: Product, device: torch.device) -> list[str]:
        from sparse24 import matmul

        return matmul.variants(_form(product), product.dtype, _capability(device))

    def broken(self, device: torch.device) -> dict[str, str]:
        from sparse24 import selftest

        return selftest.broken(device.index or 0)

    def linear(self, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int, variant: str) -> Tensor:
        from sparse24 import matmul

        fragments = Fragments(operand[0], operand[1], features, x.shape[1], x.dtype)
        bias = None if bias is None else _aligned(bias)
        return matmul.linear(fragments, _aligned(x), bias, variant=variant or None)

    def pack_fp8(self, quantized: Tensor) -> list[Tensor]:
        from sparse24.fp8 import pack_fragments

        fragments = pack_fragments(quantized)
        return [fragments.values, fragments.metadata]

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
        from sparse24 import matmul

        fragments = Fragments(operand[0], operand[1], features, x.shape[1], x.dtype)
        bias = None if bias is None else _aligned(bias.bfloat16())
        return matmul.linear(fragments, _aligned(x), bias, variant=variant or None, scale=scale).to(dtype)

    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        from sparse24 import matmul
        from sparse24.mvue import mvue_pack

        packed = mvue_pack(dy, seed, position, x.dtype, fragments=True)
        assert isinstance(packed, Fragments)
        return matmul.outer(packed, _aligned(x), variant=variant or None)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and where the kernels can read it: the tensor, or a copy of what is a part of another one."""
    return tensor.contiguous() if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


def _form(product: Product) -> str:
    return "outer" if product.kind == WEIGHT_GRADIENT else "linear"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
