"""The 2:4 linear layer as one autograd function.

A linear layer y = x Wᵀ + b is three matrix products in training:

    forward           Y  = X Ŵᵀ      contracts over in_features:   Ŵ is 2:4 along its rows
    input gradient    dX = dY Ŵ      contracts over out_features:  2:4 too if the mask is transposable
    weight gradient   dW = dYᵀ X     contracts over tokens:        2:4 if dY is pruned along tokens (MVUE)

Ŵ is the 2:4 weight of this step, W the dense master weight it was projected from. The projection has no
useful derivative, so dW, the gradient with respect to Ŵ, is given to W unchanged and dense: the
straight-through estimator. Entries that are pruned now get a gradient too, and can come back.

Why an `autograd.Function`: autograd would differentiate the projection, would multiply each gradient with
what the forward pass used, and has no place where dY could be pruned for one of the two products only. The
bias gradient sums dY as it came, unpruned.

In fp8 (S-STE, arXiv 2409.09099) every operand is quantised with one scale for the tensor, just before its product:

    Y = E4M3(X) E4M3(Ŵ)ᵀ        dX = E5M2(dY) E5M2(Ŵ)        dW = E5M2(MVUE(dY))ᵀ E5M2(X)

Saved for the backward pass: X (in fp8 only E5M2(X)), Ŵ as the dX product wants it (the very tensors, no copy) and,
for MVUE, where to find the random numbers: four integers instead of a mask, since they are a pure function of (seed,
step, layer, position).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse24 import ops
from sparse24.backends import split_choice
from sparse24.backends.base import Operand


class MvueKey(NamedTuple):
    """Which random numbers prune dY.

    seed: of the run, 64 bits.
    layer: index of the layer, an int or a 0-dim int64 tensor. Layers that share compiled code should use a
        tensor beside the counter: an int is compiled in, and many of them hit the limit of recompilations.
    counter: (2,) int64 on any device: optimizer step, and position of the first token in the global batch (a
        multiple of 4). A tensor, so that its values can change without recompiling anything.
    first_feature: of the layer, that dY begins with: not 0 where its features are spread over devices; as `layer`.
    """

    seed: int
    layer: int | Tensor
    counter: Tensor
    first_feature: int | Tensor = 0

    def position(self) -> Tensor:
        """(4,) int64: step, first token, layer, first feature. A copy: the trainer moves the counter on in place before
        the next forward pass."""
        return torch.cat([self.counter, self._tensor(self.layer), self._tensor(self.first_feature)])

    def _tensor(self, number: int | Tensor) -> Tensor:
        return number.view(1) if isinstance(number, Tensor) else self.counter.new_full((1,), number)


class SparseWeight(NamedTuple):
    """The 2:4 weight of this step, packed for its products. In fp8 the last tensor of an operand is its scale.

    forward: operand (out_features, in_features) of Y = X Ŵᵀ.
    input_gradient: operand (in_features, out_features) of dX = dY Ŵ; a dense one without tensors is the forward one's.
    weight_gradient: the choice (`backend` or `backend:variant`) for dW with MVUE; nothing of Ŵ is needed there.
    """

    forward: Operand
    input_gradient: Operand
    weight_gradient: str = "dense"


def fp8_weight(
    sparse_weight: Tensor, choice: str = "dense", input_weight: Tensor | None = None, group: str | None = None
) -> SparseWeight:
    """Ŵ (out_features, in_features) quantised: e4m3 as `choice` wants it for the forward product, e5m2 for dX, which
    may be with another weight. group: see `sparse_linear`."""
    backend, _ = split_choice(choice)
    quantized, scale = ops.fp8_quantize(sparse_weight, torch.float8_e4m3fn, group)
    quantized_dx, scale_dx = ops.fp8_quantize(
        sparse_weight if input_weight is None else input_weight, torch.float8_e5m2, group
    )
    return SparseWeight(
        Operand(choice, [*backend.pack_fp8(quantized), scale]), Operand("dense", [quantized_dx.t(), scale_dx])
    )


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    sparse_weight: Tensor | SparseWeight,
    bias: Tensor | None = None,
    mvue: MvueKey | None = None,
    fp8: bool = False,
    group: str | None = None,
) -> Tensor:
    """y = x @ Ŵᵀ + bias, with the straight-through gradient given to `weight`.

    Under autocast x, bias and a dense Ŵ are cast as `F.linear` would cast them, and a packed Ŵ must have that dtype
    already; gradients come back in the dtypes of the arguments.

    Args:
        x: (..., in_features); leading dimensions, flattened in order, are the tokens.
        weight: (out_features, in_features), the master weight; only its gradient is of interest.
        sparse_weight: the 2:4 weight of this step: (out_features, in_features) for dense products, or packed. Gets no
            gradient.
        bias: (out_features,) or None.
        mvue: if given, dY is pruned by `reference.mvue24` before dW = dYᵀX.
        fp8: products of e4m3 and e5m2 values; `sparse_weight` is then dense, or from `fp8_weight`.
        group: name of the process group over which the layer is spread (tensor parallelism): each of its ranks has a
            part of the weight, and the scales of fp8 are those of the whole tensors.

    Returns:
        (..., out_features) in the dtype of autocast, else of x.

    Raises:
        ValueError: shapes do not fit.
    """
    if isinstance(sparse_weight, Tensor):
        if weight.dim() != 2 or sparse_weight.shape != weight.shape:
            raise ValueError(
                "weight and sparse_weight must both be (out_features, in_features); "
                f"found {tuple(weight.shape)} and {tuple(sparse_weight.shape)}"
            )
        if fp8:
            sparse_weight = fp8_weight(sparse_weight.detach(), group=group)
        else:
            sparse_weight = SparseWeight(Operand("dense", [sparse_weight]), Operand("dense", []))
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., in_features={weight.shape[1]}); found {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (out_features={weight.shape[0]},); found {tuple(bias.shape)}")
    forward, input_gradient, weight_choice = sparse_weight
    seed, position = (0, None) if mvue is None else (mvue.seed, mvue.position())
    choices = (forward.choice, input_gradient.choice, weight_choice)
    operands = (*forward.tensors, *input_gradient.tensors)
    return _SparseLinear.apply(x, weight, bias, seed, position, choices, fp8, group, len(forward.tensors), *operands)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: int,
        position: Tensor | None,
        choices: tuple[str, str, str],
        fp8: bool,
        group: str | None,
        n_forward: int,
        *operands: Tensor,
    ) -> Tensor:
        ctx.x_dtype, ctx.weight_dtype, ctx.weight_shape = x.dtype, weight.dtype, weight.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.seed, ctx.choices, ctx.fp8, ctx.group = seed, choices, fp8, group
        out_features = weight.shape[0]
        x = _autocast(x)
        bias = None if bias is None else _autocast(bias)
        operand, operand_t = list(operands[:n_forward]), list(operands[n_forward:])
        if choices[0] == "dense" and not fp8:
            operand = [_autocast(operand[0])]
        if choices[1] == "dense" and not fp8:
            operand_t = [_autocast(operand_t[0]) if operand_t else operand[0].t()]
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        saved_x, x_scale = x if needs_dw else None, None
        if needs_dw and fp8:
            saved_x, x_scale = ops.fp8_quantize(x, torch.float8_e5m2, group)
        ctx.save_for_backward(
            saved_x,
            x_scale,
            position if needs_dw else None,
            *(operand_t if needs_dx else ()),
        )
        if fp8:
            return ops.fp8_linear(choices[0], operand, x, torch.float8_e4m3fn, bias, out_features, group)
        return ops.linear(choices[0], operand, x, bias, out_features)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, position, *operand_t = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_dx and ctx.fp8:
            dx = ops.fp8_linear("dense", operand_t, dy, torch.float8_e5m2, None, ctx.weight_shape[1], ctx.group)
        elif needs_dx:
            dx = ops.linear(ctx.choices[1], operand_t, dy, None, ctx.weight_shape[1])
        tokens_dy = dy.flatten(0, -2) if dy.dim() > 1 else dy.unsqueeze(0)
        if needs_dw:
            tokens_x = x.reshape(-1, x.shape[-1])
            if ctx.fp8:
                dw = ops.fp8_weight_gradient(tokens_dy, tokens_x, x_scale, ctx.seed, position, ctx.group)
            else:
                dw = ops.weight_gradient(ctx.choices[2], tokens_dy, tokens_x, ctx.seed, position)
            dw = dw.to(ctx.weight_dtype)
        if needs_db:
            db = tokens_dy.sum(dim=0).to(ctx.bias_dtype)
        return None if dx is None else dx.to(ctx.x_dtype), dw, db, *[None] * (len(ctx.needs_input_grad) - 3)


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to `F.linear`; itself outside autocast."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
