"""The operators as a layer uses them: the kernel on a GPU, the reference elsewhere.

What runs inside a model is a custom operator with a fake implementation, so that torch.compile traces through it
without a graph break; what runs once per optimizer step is a plain function.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from sparse24 import reference

HAS_TRITON = find_spec("triton") is not None


def use_kernels(tensor: Tensor) -> bool:
    """Whether Triton kernels serve this tensor."""
    return HAS_TRITON and tensor.is_cuda


# --- once per optimizer step ---


def refresh_mask_(weight: Tensor, mask: Tensor, projection: str, pattern: tuple[int, int] = (2, 4)) -> Tensor:
    """Recompute a mask in place from its weight (or other scores); on a GPU and for 2:4 in one pass over both.

    Args:
        weight: (out_features, in_features), floating point, any strides.
        mask: boolean of that shape, any strides.
        projection: `magnitude` or `transposable`.
        pattern: N and M; transposable masks are 2:4.

    Returns:
        how many entries changed, 0-dim int64.
    """
    if not use_kernels(weight) or pattern != (2, 4):
        transposable = projection == "transposable"
        new = reference.transposable_mask(weight) if transposable else reference.magnitude_mask(weight, *pattern)
        flips = (new != mask).sum()
        mask.copy_(new)
        return flips
    flips = torch.zeros((), dtype=torch.int64, device=weight.device)
    if projection == "transposable":
        from sparse24.transposable import transposable_mask_

        transposable_mask_(weight, mask, flips)
    else:
        from sparse24.prune import update_mask

        update_mask(weight, mask, flips)
    return flips


def sparse_weight(
    weight: Tensor, mask: Tensor, scale: Tensor | None, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Ŵ as a dense matrix: M⊙W, or with a scale β·S(W), rounded once to the dtype of the result.

    Args:
        weight: (out_features, in_features), floating point, any strides.
        mask: boolean of that shape; not used with a scale.
        scale: β, 0-dim float32 on the same device, or None.
        dtype: of a new result, which is contiguous wherever the weight is.
        out: where to write instead.
    """
    if out is None:
        out = torch.empty_like(weight, dtype=dtype)
    if scale is None:
        return torch.mul(weight, mask, out=out)
    if not use_kernels(weight):
        return out.copy_(reference.soft_threshold(weight) * scale)
    from sparse24.prune import prune_pack, unpack_dense

    return out.copy_(unpack_dense(prune_pack(weight, "soft_threshold", out.dtype, scale=scale)))


# --- in the model ---


@torch.library.custom_op(
    "sparse24::mvue_prune", mutates_args=(), schema="(Tensor dy, int seed, Tensor position) -> Tensor"
)
def _mvue_prune_kernel(dy: Tensor, seed: int, position: Tensor) -> Tensor:
    from sparse24 import mvue

    return mvue.mvue_prune(dy, seed, position)


@_mvue_prune_kernel.register_fake
def _(dy: Tensor, seed: int, position: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


def mvue_prune(dy: Tensor, seed: int, position: Tensor) -> Tensor:
    """`reference.mvue24` of dY (tokens, features) under the random numbers of seed and position.

    position: (4,) int64: optimizer step, first token of dY in the global batch, layer, first feature of dY in it.
    """
    if use_kernels(dy):
        return _mvue_prune_kernel(dy, seed, position)
    step, token, layer, feature = position.to(dy.device)
    tokens, features = dy.shape
    return reference.mvue24(dy, reference.uniform24(seed, step, layer, tokens, features, token, feature, dy.device))


@torch.library.custom_op(
    "sparse24::linear",
    mutates_args=(),
    schema="(str choice, Tensor[] operand, Tensor x, Tensor? bias, int features) -> Tensor",
)
def _linear(choice: str, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int) -> Tensor:
    from sparse24.backends import split_choice

    if not x.shape[0]:
        return x.new_empty(0, features)
    backend, variant = split_choice(choice)
    return backend.linear(operand, x.contiguous(), bias, features, variant).contiguous()


@_linear.register_fake
def _(choice: str, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return x.new_empty(x.shape[0], features)


def linear(choice: str, operand: list[Tensor], x: Tensor, bias: Tensor | None, features: int) -> Tensor:
    """x (..., k) times the transpose of a 2:4 operand (features, k), plus bias: (..., features)."""
    if choice == "dense":
        return reference.linear_forward(x, operand[0], bias)  # plain operators: compilers see through them
    return _linear(choice, operand, x.reshape(-1, x.shape[-1]), bias, features).view(*x.shape[:-1], features)


@torch.library.custom_op(
    "sparse24::weight_gradient",
    mutates_args=(),
    schema="(str choice, Tensor dy, Tensor x, int seed, Tensor position) -> Tensor",
)
def _weight_gradient(choice: str, dy: Tensor, x: Tensor, seed: int, position: Tensor) -> Tensor:
    from sparse24.backends import split_choice

    if not x.shape[0]:
        return x.new_zeros(dy.shape[1], x.shape[1], dtype=torch.float32)
    backend, variant = split_choice(choice)
    return backend.weight_gradient(dy, x.contiguous(), seed, position, variant).float()


@_weight_gradient.register_fake
def _(choice: str, dy: Tensor, x: Tensor, seed: int, position: Tensor) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32)


def weight_gradient(choice: str, dy: Tensor, x: Tensor, seed: int, position: Tensor | None) -> Tensor:
    """dW = dYᵀ X, with dY (tokens, out_features) pruned by MVUE first if `position` is given."""
    if position is None:
        return reference.linear_dw(dy, x)
    if choice == "dense":
        return reference.linear_dw(mvue_prune(dy, seed, position), x)
    return _weight_gradient(choice, dy, x, seed, position)


# --- in the model, in fp8 ---


@torch.library.custom_op(
    "sparse24::fp8_quantize", mutates_args=(), schema="(Tensor x, ScalarType dtype, Tensor? amax) -> (Tensor, Tensor)"
)
def _fp8_quantize_kernel(x: Tensor, dtype: torch.dtype, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    from sparse24 import fp8

    q, scale = fp8.quantize(x, dtype, amax=amax)  # type: ignore[misc]
    return q, scale


@_fp8_quantize_kernel.register_fake
def _(x: Tensor, dtype: torch.dtype, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.float32)


def fp8_quantize(x: Tensor, dtype: torch.dtype, group: str | None = None) -> tuple[Tensor, Tensor]:
    """`reference.fp8_quantize`: q, contiguous, and its scale.

    group: name of the process group whose ranks each hold a part of the tensor, which has one scale.
    """
    amax = None if group is None else _amax(x, group)
    return _fp8_quantize_kernel(x, dtype, amax) if use_kernels(x) else reference.fp8_quantize(x, dtype, amax)


def _amax(x: Tensor, group: str) -> Tensor:
    """Over the parts of all ranks. As integers, of which NaN is the largest: a maximum of floats may lose it."""
    own = x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    largest = torch.ops._c10d_functional.all_reduce(own.view(torch.int32), "max", group)
    return torch.ops._c10d_functional.wait_tensor(largest).view(torch.float32)


@torch.library.custom_op(
    "sparse24::fp8_linear",
    mutates_args=(),
    schema=(
        "(str choice, Tensor[] operand, Tensor x, Tensor scale, Tensor? bias, int features, ScalarType dtype) -> Tensor"
    ),
)
def _fp8_linear(
    choice: str,
    operand: list[Tensor],
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    from sparse24.backends import split_choice

    if not x.shape[0]:
        return x.new_empty(0, features, dtype=dtype)
    backend, variant = split_choice(choice)
    return backend.fp8_linear(operand, x, scale, bias, features, variant, dtype).contiguous()


@_fp8_linear.register_fake
def _(
    choice: str,
    operand: list[Tensor],
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], features, dtype=dtype)


def fp8_linear(
    choice: str,
    operand: list[Tensor],
    x: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    features: int,
    group: str | None = None,
) -> Tensor:
    """x (..., k), quantised to `dtype` here, times the transpose of an operand (features, k) of `pack_fp8` with its
    scale behind it, plus bias: (..., features) in x's dtype. group: see `fp8_quantize`."""
    *matrix, weight_scale = operand
    q, scale = fp8_quantize(x.reshape(-1, x.shape[-1]), dtype, group)
    scale = scale * weight_scale
    if choice == "dense" and not q.is_cuda:
        y = fp8_linear_emulated(matrix[0], q, scale, bias, x.dtype)
    else:
        y = _fp8_linear(choice, matrix, q, scale, bias, features, x.dtype)
    return y.view(*x.shape[:-1], features)


def fp8_linear_emulated(weight: Tensor, x: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale · x weightᵀ + bias, rounded once to `dtype`: weight (features, k) and x (tokens, k) in fp8."""
    y = reference.fp8_matmul(x, weight.t(), scale)
    return (y if bias is None else y + bias).to(dtype)


def fp8_weight_gradient(
    dy: Tensor, x: Tensor, x_scale: Tensor, seed: int, position: Tensor | None, group: str | None = None
) -> Tensor:
    """dW = E5M2(dY)ᵀ x in float32, dY pruned by MVUE first if `position` is given; x and its scale quantised.
    group: see `fp8_quantize`."""
    if position is not None:
        dy = mvue_prune(dy, seed, position)
    q, scale = fp8_quantize(dy, torch.float8_e5m2, group)
    return reference.fp8_matmul(q.t(), x, scale * x_scale)
