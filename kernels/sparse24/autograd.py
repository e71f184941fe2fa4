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

Saved for the backward pass: X, Ŵ (the very tensor, no copy) and, for MVUE, where to find the random numbers:
three integers instead of a mask, since they are a pure function of (seed, step, layer, position).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse24.reference import linear_dw, linear_dx, linear_forward, uniform24


class MvueKey(NamedTuple):
    """Which random numbers prune dY.

    seed: of the run, 64 bits.
    layer: index of the layer, an int or a 0-dim int64 tensor. Layers that share compiled code should use a
        tensor beside the counter: an int is compiled in, and many of them hit the limit of recompilations.
    counter: (2,) int64 on any device: optimizer step, and position of the first token in the global batch (a
        multiple of 4). A tensor, so that its values can change without recompiling anything.
    """

    seed: int
    layer: int | Tensor
    counter: Tensor


def sparse_linear(
    x: Tensor, weight: Tensor, sparse_weight: Tensor, bias: Tensor | None = None, mvue: MvueKey | None = None
) -> Tensor:
    """y = x @ sparse_weightᵀ + bias, with the straight-through gradient given to `weight`.

    Under autocast x, sparse_weight and bias are cast as `F.linear` would cast them; gradients come back in
    the dtypes of the arguments.

    Args:
        x: (..., in_features); leading dimensions, flattened in order, are the tokens.
        weight: (out_features, in_features), the master weight; only its gradient is of interest.
        sparse_weight: (out_features, in_features), the 2:4 weight of this step; gets no gradient.
        bias: (out_features,) or None.
        mvue: if given, dY is pruned by `reference.mvue24` before dW = dYᵀX.

    Returns:
        (..., out_features).

    Raises:
        ValueError: shapes do not fit.
    """
    if weight.dim() != 2 or sparse_weight.shape != weight.shape:
        raise ValueError(
            "weight and sparse_weight must both be (out_features, in_features); "
            f"found {tuple(weight.shape)} and {tuple(sparse_weight.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., in_features={weight.shape[1]}); found {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (out_features={weight.shape[0]},); found {tuple(bias.shape)}")
    if mvue is None:
        return _SparseLinear.apply(x, weight, sparse_weight, bias, 0, None)
    seed, layer, counter = mvue
    if not isinstance(layer, Tensor):
        layer = torch.full((), layer, dtype=torch.int64, device=counter.device)
    # a copy of three integers: the trainer moves the counter on in place before the next forward pass
    position = torch.cat([counter, layer.view(1)])
    return _SparseLinear.apply(x, weight, sparse_weight, bias, seed, position)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        sparse_weight: Tensor,
        bias: Tensor | None,
        seed: int,
        position: Tensor | None,
    ) -> Tensor:
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.seed = seed
        x, sparse_weight = _autocast(x), _autocast(sparse_weight)
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x if needs_dw else None,
            sparse_weight if needs_dx else None,
            position if needs_dw else None,
        )
        return linear_forward(x, sparse_weight, None if bias is None else _autocast(bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, sparse_weight, position = ctx.saved_tensors
        needs_dx, needs_dw, _, needs_db = ctx.needs_input_grad[:4]
        dx = dw = db = None
        if needs_dx:
            dx = linear_dx(dy, sparse_weight).to(ctx.x_dtype)
        tokens_dy = dy.flatten(0, -2) if dy.dim() > 1 else dy.unsqueeze(0)
        if needs_dw:
            uniform = None
            if position is not None:
                step, first_token, layer = position.to(dy.device)
                tokens, features = tokens_dy.shape
                uniform = uniform24(ctx.seed, step, layer, tokens, features, first_token, dy.device)
            dw = linear_dw(tokens_dy, x.reshape(-1, x.shape[-1]), uniform).to(ctx.weight_dtype)
        if needs_db:
            db = tokens_dy.sum(dim=0).to(ctx.bias_dtype)
        return dx, dw, None, db, None, None


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to `F.linear`; itself outside autocast."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
