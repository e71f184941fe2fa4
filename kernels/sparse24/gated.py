"""Activations of a feed-forward layer in one pass each way, and squared ReLU pruned to 2:4, packed or not.

`activations.gated_activation` and `pruned_relu2` are what a model calls; here are the kernels. Everything is computed
in float32 and rounded once. The backward kernels recompute what they need from the inputs, so nothing else is saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse24.activations import check_inputs
from sparse24.codec import (
    join4,
    kept_bits,
    load_fours,
    nibble_of_keep,
    pair_words,
    store_metadata,
    store_values,
    two_largest,
)
from sparse24.fragments import Fragments, packed_output
from sparse24.packing import Packed

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BLOCK = 1024  # features a program
_TILE = (16, 64)  # tokens and groups of four features a program


def gated_forward(kind: str, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """The activation of `activations.gated_activation`, on matrices.

    Args:
        kind: one of `activations.KINDS`.
        up, gate: (tokens, features), any strides, fastest if features are contiguous: a half of a fused product is
            as good as a tensor of its own.

    Returns:
        (tokens, features), contiguous, in the dtype of `up`.
    """
    check_inputs(kind, up, gate)
    out = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if grid := _grid(up):
        with torch.cuda.device_of(up):
            _forward[(grid,)](
                up, gate, out, up.shape[1], *up.stride(), *_strides(gate), KIND=kind, BLOCK=_BLOCK, num_warps=4
            )
    return out


def gated_backward(
    kind: str, dy: Tensor, up: Tensor, gate: Tensor | None = None, out: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `gated_forward` with respect to up and gate.

    Args:
        dy: (tokens, features), any strides.
        out: two tensors like up and gate, of any strides, to write to: the halves of one buffer, for example.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_inputs(kind, up, gate)
    if out is None:
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        out = dup, None if gate is None else torch.empty_like(dup)
    for name, x, like in (("dy", dy, up), ("out[0]", out[0], up), ("out[1]", out[1], gate)):
        if (x is None) != (like is None) or (
            x is not None and (x.shape != up.shape or x.dtype != up.dtype or x.device != up.device)
        ):
            found = "None" if x is None else f"{x.dtype} of {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be like up, {up.dtype} of {tuple(up.shape)} on {up.device}; found {found}")
    if grid := _grid(up):
        with torch.cuda.device_of(up):
            _backward[(grid,)](
                dy, up, gate, *out, up.shape[1], *dy.stride(), *up.stride(), *_strides(gate), *out[0].stride(),
                *_strides(out[1]), KIND=kind, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    return out


def relu2_prune_pack(
    x: Tensor, *, fragments: bool = False, out: Packed | Fragments | None = None
) -> Packed | Fragments:
    """h = relu(x)², rounded to x's dtype, pruned to 2:4 along features by magnitude and packed, in one pass.

    "Accelerating Transformer Inference and Training with 2:4 Activation Sparsity" (arXiv 2503.16672): squared ReLU
    activations are mostly zero already. The same as `pack(h, magnitude_mask(h))`.

    Args:
        x: (tokens, features) float32 (not with `fragments`), bfloat16 or float16, any strides; features a multiple
            of 4, with `fragments` of 64, and tokens of 16.
        out: where to write to, as returned by an earlier call with the same shape.

    Raises:
        ValueError: an argument does not fit.
    """
    tokens, groups = _groups(x)
    out = packed_output(tokens, 4 * groups, x.dtype, x.device, fragments, out)
    if grid := triton.cdiv(tokens, _TILE[0]) * triton.cdiv(groups, _TILE[1]):
        with torch.cuda.device_of(x):
            _relu2_prune_pack[(grid,)](
                x, out.values.view(torch.int32), out.metadata.view(torch.int16), tokens, groups, -(-groups // 4),
                *x.stride(), DTYPE=_DTYPES[x.dtype], FRAGMENTS=fragments, ROW_MAJOR=x.stride(1) == 1, R=_TILE[0],
                G=_TILE[1], num_warps=4,
            )  # fmt: skip
    return out


def relu2_prune(x: Tensor) -> Tensor:
    """What `relu2_prune_pack` packs, with its zeros: (tokens, features), contiguous, in the dtype of x.

    Raises:
        ValueError: an argument does not fit.
    """
    return _prune(x, None)


def relu2_prune_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `relu2_prune` with respect to x: 2·relu(x)·dy where h was kept, zero elsewhere.

    Args:
        dy: (tokens, features), the gradient of the pruned activation, dense, any strides, dtype of x.
        x: as given to `relu2_prune`; which entries were kept is found again from it.

    Returns:
        (tokens, features), contiguous.

    Raises:
        ValueError: an argument does not fit.
    """
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"dy must be {x.dtype} of {tuple(x.shape)} on {x.device}; "
            f"found {dy.dtype} of {tuple(dy.shape)} on {dy.device}"
        )
    return _prune(x, dy)


def _prune(x: Tensor, dy: Tensor | None) -> Tensor:
    tokens, groups = _groups(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grid := triton.cdiv(tokens, _TILE[0]) * triton.cdiv(groups, _TILE[1]):
        with torch.cuda.device_of(x):
            _relu2_prune[(grid,)](
                x, dy, out, tokens, groups, *x.stride(), *_strides(dy), DTYPE=_DTYPES[x.dtype],
                ROW_MAJOR=x.stride(1) == 1, DY_ROW_MAJOR=dy is None or dy.stride(1) == 1, R=_TILE[0], G=_TILE[1],
                num_warps=4,
            )  # fmt: skip
    return out


def _grid(up: Tensor) -> int:
    return up.shape[0] * triton.cdiv(up.shape[1], _BLOCK)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()


def _groups(x: Tensor) -> tuple[int, int]:
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16; found {x.dtype}")
    if x.dim() != 2 or x.shape[1] % 4:
        raise ValueError(f"x must be (tokens, features) with features a multiple of 4; found {tuple(x.shape)}")
    return x.shape[0], x.shape[1] // 4


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """The activation of float32 and its derivative. GELU and SiLU are both x·σ(s(x))."""
    if KIND == "relu2":
        relu = tl.where(x < 0.0, 0.0, x)  # unlike a maximum this keeps NaN
        value = relu * relu
        derivative = 2.0 * relu
    else:
        if KIND == "swiglu":
            s = x
            slope = 1.0
        else:
            # the tanh form of GELU: (1 + tanh z)/2 = σ(2z), z = √(2/π)·(x + 0.044715x³)
            square = x * x
            s = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
            slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        sigmoid = 1.0 / (1.0 + tl.exp(-s))
        value = x * sigmoid
        derivative = sigmoid + value * (1.0 - sigmoid) * slope
    return value, derivative


@triton.jit
def _row_and_cols(features, BLOCK: tl.constexpr):
    blocks = tl.cdiv(features, BLOCK)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), col.to(tl.int64)


@triton.jit
def _forward(
    up_ptr, gate_ptr, out_ptr, features, up_row_stride, up_col_stride, gate_row_stride, gate_col_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, col = _row_and_cols(features, BLOCK)
    inside = col < features
    y = tl.load(up_ptr + row * up_row_stride + col * up_col_stride, mask=inside).to(tl.float32)
    if gate_ptr is None:
        y, _ = _activation(y, KIND)
    else:
        gate = tl.load(gate_ptr + row * gate_row_stride + col * gate_col_stride, mask=inside).to(tl.float32)
        activated, _ = _activation(gate, KIND)
        y *= activated
    tl.store(out_ptr + row * features + col, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr, up_ptr, gate_ptr, dup_ptr, dgate_ptr, features, dy_row_stride, dy_col_stride, up_row_stride,
    up_col_stride, gate_row_stride, gate_col_stride, dup_row_stride, dup_col_stride, dgate_row_stride,
    dgate_col_stride, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, col = _row_and_cols(features, BLOCK)
    inside = col < features
    dy = tl.load(dy_ptr + row * dy_row_stride + col * dy_col_stride, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_row_stride + col * up_col_stride, mask=inside).to(tl.float32)
    if gate_ptr is None:
        _, derivative = _activation(up, KIND)
        dup = dy * derivative
    else:
        gate = tl.load(gate_ptr + row * gate_row_stride + col * gate_col_stride, mask=inside).to(tl.float32)
        activated, derivative = _activation(gate, KIND)
        dup = dy * activated
        dgate = dy * up * derivative
        dgate_ptr += row * dgate_row_stride + col * dgate_col_stride
        tl.store(dgate_ptr, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    dup_ptr += row * dup_row_stride + col * dup_col_stride
    tl.store(dup_ptr, dup.to(dup_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _relu2(x, DTYPE: tl.constexpr):
    value, derivative = _activation(x.to(tl.float32), "relu2")
    return value.to(DTYPE), derivative


@triton.jit
def _tile(groups, R: tl.constexpr, G: tl.constexpr):
    tiles = tl.cdiv(groups, G)
    return tl.program_id(0) // tiles * R, tl.program_id(0) % tiles * G


@triton.jit
def _relu2_prune_pack(
    x_ptr, values_ptr, metadata_ptr, tokens, groups, words, row_stride, col_stride, DTYPE: tl.constexpr,
    FRAGMENTS: tl.constexpr, ROW_MAJOR: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    row_start, group_start = _tile(groups, R, G)
    x0, x1, x2, x3 = load_fours(x_ptr, row_start, group_start, tokens, groups, row_stride, col_stride, R, G, ROW_MAJOR)
    h0, _ = _relu2(x0, DTYPE)
    h1, _ = _relu2(x1, DTYPE)
    h2, _ = _relu2(x2, DTYPE)
    h3, _ = _relu2(x3, DTYPE)
    keep = two_largest(h0.to(tl.float32), h1.to(tl.float32), h2.to(tl.float32), h3.to(tl.float32))
    first, second = kept_bits(keep, h0, h1, h2, h3, DTYPE)
    WIDE: tl.constexpr = DTYPE.primitive_bitwidth // 16  # float32 values are two words a group
    store_values(
        values_ptr,
        pair_words(first, second, DTYPE),
        row_start,
        group_start * WIDE,
        tokens,
        groups * WIDE,
        16,
        FRAGMENTS,
    )
    store_metadata(metadata_ptr, nibble_of_keep(keep), row_start, group_start, tokens, words, FRAGMENTS, False)


@triton.jit
def _relu2_prune(
    x_ptr, dy_ptr, out_ptr, tokens, groups, row_stride, col_stride, dy_row_stride, dy_col_stride, DTYPE: tl.constexpr,
    ROW_MAJOR: tl.constexpr, DY_ROW_MAJOR: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The kept values, or with dy the gradient."""
    row_start, group_start = _tile(groups, R, G)
    x0, x1, x2, x3 = load_fours(x_ptr, row_start, group_start, tokens, groups, row_stride, col_stride, R, G, ROW_MAJOR)
    h0, d0 = _relu2(x0, DTYPE)
    h1, d1 = _relu2(x1, DTYPE)
    h2, d2 = _relu2(x2, DTYPE)
    h3, d3 = _relu2(x3, DTYPE)
    y0, y1, y2, y3 = h0.to(tl.float32), h1.to(tl.float32), h2.to(tl.float32), h3.to(tl.float32)
    left, right, k1, k3 = two_largest(y0, y1, y2, y3)
    if dy_ptr is not None:
        dy0, dy1, dy2, dy3 = load_fours(
            dy_ptr, row_start, group_start, tokens, groups, dy_row_stride, dy_col_stride, R, G, DY_ROW_MAJOR
        )
        y0 = d0 * dy0.to(tl.float32)
        y1 = d1 * dy1.to(tl.float32)
        y2 = d2 * dy2.to(tl.float32)
        y3 = d3 * dy3.to(tl.float32)
    out = join4(
        tl.where(left | (~right & ~k1), y0, 0.0),
        tl.where(left | (~right & k1), y1, 0.0),
        tl.where(right | (~left & ~k3), y2, 0.0),
        tl.where(right | (~left & k3), y3, 0.0),
    )
    row = row_start + tl.arange(0, R)[:, None]
    col = 4 * group_start + tl.arange(0, 4 * G)[None, :]
    out_ptr += row.to(tl.int64) * (4 * groups) + col
    tl.store(out_ptr, tl.reshape(out, (R, 4 * G)).to(DTYPE), mask=(row < tokens) & (col < 4 * groups))
