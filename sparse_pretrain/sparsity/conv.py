"""The 2:4 sparse convolution that takes the place of an `nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from sparse24 import ops
from sparse24.autograd import sparse_linear
from torch import Tensor, nn

from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.sparsity.linear import SparseLinear


@dataclass(frozen=True)
class Geometry:
    """What a convolution is beside its weight; pairs are (height, width).

    padding: zeros on both sides, as `F.conv2d` takes them.
    border: what padding of other kinds, or of other widths on the two sides, adds first: (left, right, top, bottom).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    border: tuple[int, int, int, int]
    mode: str

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
        if conv.padding == "same":  # the odd one, if there is one, comes last
            height, width = dh * (kh - 1), dw * (kw - 1)
            border = (width // 2, width - width // 2, height // 2, height - height // 2)
        else:
            ph, pw = (0, 0) if isinstance(conv.padding, str) else conv.padding
            border = (pw, pw, ph, ph)
        zeros = conv.padding_mode == "zeros"
        plain = zeros and border[0] == border[1] and border[2] == border[3]
        return cls(
            kernel=(kh, kw),
            stride=_pair(conv.stride),
            padding=(border[2], border[0]) if plain else (0, 0),
            dilation=(dh, dw),
            groups=conv.groups,
            border=(0, 0, 0, 0) if plain else border,
            mode="constant" if zeros else conv.padding_mode,
        )

    def framed(self, x: Tensor) -> Tensor:
        """x with its border; what all else here is given."""
        return F.pad(x, self.border, self.mode) if any(self.border) else x

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Of an input of this size (height, width), its border included."""
        height, width = (
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, padding, dilation, kernel, stride in zip(
                size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    def input_size(self, size: Sequence[int]) -> tuple[int, int]:
        """The smallest input, its border not included, whose output is of this size."""
        left, right, top, bottom = self.border
        height, width = (
            max((length - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding - border, 1)
            for length, padding, dilation, kernel, stride, border in zip(
                size, self.padding, self.dilation, self.kernel, self.stride, (top + bottom, left + right), strict=True
            )
        )
        return height, width

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, *self.arguments)

    @property
    def arguments(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """The last ones of `F.conv2d`."""
        return self.stride, self.padding, self.dilation, self.groups

    def patches(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) as what each output position sees: (batch, positions, channels·kh·kw).

        A copy of kh·kw / (sh·sw) times the size of x, which the backward pass of a product keeps; of a 1x1 convolution
        a view.
        """
        if self.kernel == (1, 1) and self.padding == (0, 0):
            return x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2).transpose(1, 2)
        return F.unfold(x, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)


class SparseConv2d(SparseLinear):
    """A convolution with Ŵ: the linear layer of `weight.flatten(1)` over all patches of its input.

    Groups of four run along in_channels · kh · kw, as im2col products contract: for a 1x1 convolution along the input
    channels. (Zhou et al. 2021 order kh · kw · in_channels.) The tokens of a layer are its output positions, image
    after image.

    Everything of SparseLinear holds, with `mask` and the like in the 4-dimensional shape of `weight`. Patches are made
    only where something but a dense product uses them: a sparse product, or fp8. Else, and always with groups > 1, Ŵ
    is a dense tensor that the convolution itself uses ("masked dense"), with the same gradients.

    Args:
        dense: the layer to replace. Its weight is made contiguous if it is not.
        recipe: as for SparseLinear; no fp8 with groups > 1.
    """

    def __init__(self, dense: nn.Conv2d, recipe: RecipeConfig) -> None:
        if not dense.weight.is_contiguous():  # channels last: `out_by_in` shares memory
            dense.weight.data = dense.weight.data.contiguous()
        super().__init__(dense, recipe)
        self.geometry = Geometry.of(dense)

    def out_by_in(self, tensor: Tensor) -> Tensor:
        return tensor.view(tensor.shape[0], -1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_channels, height, width) or one image without batch, as for `nn.Conv2d`."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return super().forward(self.geometry.framed(x))

    def _input_square(self, x: Tensor) -> Tensor:
        return self.geometry.patches(x.square().sum(dim=0, keepdim=True)).flatten(0, 1).sum(dim=0)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.geometry.convolve(x, self.as_weight(weight), self.bias)

    def _sparse_product(self, x: Tensor, weight: Tensor) -> Tensor:
        x = _autocast(x)  # before patches are made of it
        height, width = self.geometry.output_size(x.shape[2:])
        operands = self._operands()
        if self.packed is not None or self.plan.weight_gradient != "dense":
            y = sparse_linear(self.geometry.patches(x), weight, operands, self.bias, self.mvue, self.fp8)
            return y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        sparse_weight = _autocast(self.as_weight(operands.forward.tensors[0]))
        input_weight = None if self.input_weight is None else _autocast(self.as_weight(self.input_weight))
        bias = None if self.bias is None else _autocast(self.bias)
        seed, position = (0, None) if self.mvue is None else (self.mvue.seed, self.mvue.position())
        geometry = self.geometry.arguments
        return _MaskedConv2d.apply(x, self.weight, bias, sparse_weight, input_weight, geometry, seed, position)


class _MaskedConv2d(torch.autograd.Function):
    """What `sparse24.autograd.sparse_linear` does over patches, by convolutions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sparse_weight: Tensor,
        input_weight: Tensor | None,  # of dX, if it is another one
        geometry: tuple[Any, ...],
        seed: int,
        position: Tensor | None,
    ) -> Tensor:
        ctx.geometry, ctx.seed, ctx.x_shape, ctx.weight_dtype = geometry, seed, x.shape, weight.dtype
        needs_dw = ctx.needs_input_grad[1]
        weight_of_dx = sparse_weight if input_weight is None else input_weight
        ctx.save_for_backward(x if needs_dw else None, weight_of_dx, position if needs_dw else None)
        return F.conv2d(x, sparse_weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_of_dx, position = ctx.saved_tensors
        if x is None:
            x = dy.new_empty(1).expand(ctx.x_shape)
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]

        stride, padding, dilation, groups = ctx.geometry

        def gradients(dy: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
            return torch.ops.aten.convolution_backward(
                dy, x, weight_of_dx, [dy.shape[1]], stride, padding, dilation, False, (0, 0), groups, wanted
            )

        dx, dw, db = gradients(dy, (needs_dx, needs_dw and position is None, needs_db))
        if position is not None:
            images, features, height, width = dy.shape
            tokens = ops.mvue_prune(dy.permute(0, 2, 3, 1).reshape(-1, features), ctx.seed, position)
            pruned = tokens.view(images, height, width, features).permute(0, 3, 1, 2)
            dw = gradients(pruned, (False, True, False))[1]
        return dx, None if dw is None else dw.to(ctx.weight_dtype), db, *[None] * (len(ctx.needs_input_grad) - 3)


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to `F.conv2d`; itself outside autocast."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
