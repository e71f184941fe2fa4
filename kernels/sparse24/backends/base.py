"""What a backend is: one way to multiply by a 2:4 matrix, and to bring that matrix into the form it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input_gradient", "weight_gradient"
KINDS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)


@dataclass(frozen=True)
class Product:
    """One of the three products of a linear layer, with the 2:4 operand on the left: (m, k) times (k, n)."""

    kind: str
    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype

    @property
    def m(self) -> int:
        """Rows of the 2:4 operand: Ŵ, Ŵᵀ, or the pruned dYᵀ."""
        return self.in_features if self.kind == INPUT_GRADIENT else self.out_features

    @property
    def k(self) -> int:
        """Contraction length, along which the operand is 2:4."""
        return {FORWARD: self.in_features, INPUT_GRADIENT: self.out_features, WEIGHT_GRADIENT: self.tokens}[self.kind]

    @property
    def n(self) -> int:
        """Columns of the dense operand."""
        return self.in_features if self.kind == WEIGHT_GRADIENT else self.tokens


class Operand(NamedTuple):
    """A 2:4 matrix as one backend wants it.

    choice: `backend` or `backend:variant`, what to multiply with.
    tensors: the matrix in that backend's own form.
    """

    choice: str
    tensors: list[Tensor]


class Backend(ABC):
    """One way to compute the products. Every method but `supports` may assume that `supports` said yes."""

    name: str

    @abstractmethod
    def supports(self, product: Product, device: torch.device) -> tuple[bool, str]:
        """Whether it can compute this product on this device, and if not, why not."""

    def variants(self, product: Product, device: torch.device) -> list[str]:
        """Algorithms to choose from by measuring, best guess first; `""` where there is only one."""
        return [""]

    def broken(self, device: torch.device) -> dict[str, str]:
        """Variants that must not be used on this device, and why; to find out may take some seconds."""
        return {}

    @abstractmethod
    def pack_weight(
        self, weight: Tensor, mask: Tensor, scale: Tensor | None, dtype: torch.dtype, forward: bool, transpose: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Ŵ as operands: M⊙W, or with a scale β·S(W) (`reference.soft_threshold`).

        Args:
            weight: (out_features, in_features), any floating dtype and strides.
            mask: boolean of that shape, 2:4 along the rows; along the columns too if `transpose`. With a scale it is
                that of the magnitudes, and is not read by all backends.
            scale: β, 0-dim float32, or None.
            dtype: of the values.
            forward: whether the operand for Y = X Ŵᵀ is wanted, 2:4 along in_features.
            transpose: whether the operand for dX = dY Ŵ is wanted, 2:4 along out_features.

        Returns:
            tensors of the two operands; an empty list for one that is not wanted.
        """

    @abstractmethod
    def linear(self, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int, variant: str) -> Tensor:
        """x (tokens, k), contiguous, times the transpose of an operand (features, k), plus bias (features,):
        (tokens, features).

        Any number of tokens but 0, not only the one that `supports` was asked about: the last micro-batch and
        validation have others.
        """

    @abstractmethod
    def weight_gradient(self, dy: Tensor, x: Tensor, seed: int, position: Tensor, variant: str) -> Tensor:
        """mvue24(dY)ᵀ X: dy (tokens, out_features) of any strides, x (tokens, in_features) contiguous ->
        (out_features, in_features). Any number of tokens but 0, as for `linear`.

        seed and position ((4,) int64: step, first token, layer, first feature) say which random numbers prune dY.
        """

    # for products of dtype e4m3, which are forward ones only

    def pack_fp8(self, quantized: Tensor) -> list[Tensor]:
        """Ŵ in e4m3 (out_features, in_features), contiguous, as the operand for Y = X Ŵᵀ."""
        raise NotImplementedError("`supports` says no")

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
        """scale · x (tokens, k) times the transpose of an operand (features, k), plus bias: (tokens, features) in
        `dtype`, where a backend may round to bf16 first. x: e4m3, contiguous; scale: 0-dim float32."""
        raise NotImplementedError("`supports` says no")


def pad_rows(x: Tensor, step: int) -> Tensor:
    """x (rows, columns) with zero rows up to a multiple of `step`; itself if it has one."""
    missing = -x.shape[0] % step
    return F.pad(x, (0, 0, 0, missing)) if missing else x
