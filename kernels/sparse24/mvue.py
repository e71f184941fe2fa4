"""Unbiased 2:4 pruning of gradients along tokens (`reference.mvue24`) in one pass, packed or dense.

The product dW = dYᵀX contracts over tokens, so what it wants is dYᵀ packed along its rows, while dY has its features
contiguous. A program reads a tile coalesced along features, prunes it with a group of four tokens in the registers of
one thread, and exchanges only the packed words, a quarter of a tile in float32, to write them along tokens.

The random numbers are those of `philox.uniform24`, and every operation of the reference is done here in its order, so
results are the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse24.codec import join4, pair_words, store_metadata, store_values, value_bits
from sparse24.fragments import FRAGMENT_COLS, Fragments, packed_output
from sparse24.packing import Packed
from sparse24.philox import KEY_STEPS, MULTIPLIERS, ROUNDS

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# groups of 16 tokens, for which one call of Philox serves, and features of a tile: lines of 128 bytes both ways
_QUADS, _FEATURES = 8, 64
# read by kernels
_MULTIPLIER_0, _MULTIPLIER_1 = (tl.constexpr(m) for m in MULTIPLIERS)
_KEY_STEP_0, _KEY_STEP_1 = (tl.constexpr(s) for s in KEY_STEPS)
_ROUNDS = tl.constexpr(ROUNDS)


def mvue_pack(
    grad: Tensor,
    seed: int,
    position: Tensor,
    dtype: torch.dtype,
    *,
    fragments: bool = False,
    rows_padded_to: int | None = None,
    out: Packed | Fragments | None = None,
) -> Packed | Fragments:
    """`reference.mvue24(grad, uniform24(...))`, transposed and packed: a matrix (features, tokens), 2:4 along tokens.

    The same as `pack` of that matrix wherever it is 2:4. Of a group that is not finite, hence four NaNs in the
    reference, two NaNs are kept.

    Args:
        grad: (tokens, features) float32, bfloat16 or float16, any strides, fastest if features are contiguous.
        seed: of the random numbers, 64 bits; negative values wrap.
        position: (4,) int64 on the same device: optimizer step, first token of grad in the global batch (a multiple
            of 4; not checked, so as not to wait for the device), layer, first feature of grad in the layer.
        dtype: of the values: bfloat16, float16 or (not with `fragments`) float32; computed in float32, rounded once.
        fragments: return `Fragments`.
        rows_padded_to: rows of the result, at least the features; further ones are zero, with metadata 0x4444. With
            `fragments` it must be a multiple of 16, and so must the features if it is not given.
        out: where to write to, as returned by an earlier call with the same shape.

    Returns:
        `Packed` with tokens padded by zeros to a multiple of 4, or `Fragments` with tokens padded to one of 64.

    Raises:
        ValueError: an argument does not fit.
    """
    tokens, features = _check(grad, position)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16; found {dtype}")
    rows = features if rows_padded_to is None else rows_padded_to
    if rows < features:
        raise ValueError(f"rows_padded_to must be at least the {features} features of grad; found {rows}")
    multiple = FRAGMENT_COLS if fragments else 4
    cols = triton.cdiv(tokens, multiple) * multiple
    out = packed_output(rows, cols, dtype, grad.device, fragments, out)
    _launch(grad, seed, position, rows, cols // 4, out.values.view(torch.int32), out.metadata.view(torch.int16), None,
            dtype, fragments)  # fmt: skip
    return out


def mvue_prune(grad: Tensor, seed: int, position: Tensor, out: Tensor | None = None) -> Tensor:
    """`reference.mvue24(grad, uniform24(seed, step, layer, tokens, features, first_token, first_feature))`, dense.

    Args:
        grad, seed, position: as for `mvue_pack`.
        out: contiguous, like grad; where to write to.

    Returns:
        (tokens, features), contiguous, in grad's dtype.

    Raises:
        ValueError: an argument does not fit.
    """
    tokens, features = _check(grad, position)
    if out is None:
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    elif out.shape != grad.shape or out.dtype != grad.dtype or out.device != grad.device or not out.is_contiguous():
        raise ValueError(
            f"out must be {grad.dtype} of {tuple(grad.shape)}, contiguous, on {grad.device}; found {out.dtype} of "
            f"{tuple(out.shape)} with strides {out.stride()} on {out.device}"
        )
    _launch(grad, seed, position, features, triton.cdiv(tokens, 4), None, None, out, grad.dtype, False)
    return out


def _check(grad: Tensor, position: Tensor) -> tuple[int, int]:
    if grad.dtype not in _DTYPES or grad.dim() != 2:
        raise ValueError(
            f"grad must be float32, bfloat16 or float16 of shape (tokens, features); "
            f"found {grad.dtype} of {tuple(grad.shape)}"
        )
    if position.shape != (4,) or position.dtype != torch.int64 or position.device != grad.device:
        raise ValueError(
            f"position must be int64 of shape (4,) on {grad.device}; "
            f"found {position.dtype} of {tuple(position.shape)} on {position.device}"
        )
    return grad.shape[0], grad.shape[1]


def _launch(
    grad: Tensor,
    seed: int,
    position: Tensor,
    rows: int,
    groups: int,
    values: Tensor | None,
    metadata: Tensor | None,
    dense: Tensor | None,
    dtype: torch.dtype,
    fragments: bool,
) -> None:
    tokens, features = grad.shape
    grid = triton.cdiv(rows, _FEATURES) * triton.cdiv(groups, 4 * _QUADS)
    if not grid:
        return
    with torch.cuda.device_of(grad):
        _mvue[(grid,)](
            grad, position.contiguous(), values, metadata, dense, _signed32(seed), _signed32(seed >> 32), tokens,
            features, rows, groups, triton.cdiv(groups, 4), *grad.stride(), DTYPE=_DTYPES[dtype], FRAGMENTS=fragments,
            Q=_QUADS, F=_FEATURES, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _signed32(x: int) -> int:
    """The low 32 bits as a signed number, so that every seed has the same type for the compiler."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@triton.jit
def philox_4x32(c0, c1, c2, c3, key0, key1):
    """`philox.philox_4x32` with `philox.ROUNDS` rounds, all uint32."""
    for _ in tl.static_range(_ROUNDS):
        # one instruction each: the whole product, whose halves are two registers
        product0, product1 = c0.to(tl.uint64) * _MULTIPLIER_0, c2.to(tl.uint64) * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product1 >> 32).to(tl.uint32) ^ c1 ^ key0,
            product1.to(tl.uint32),
            (product0 >> 32).to(tl.uint32) ^ c3 ^ key1,
            product0.to(tl.uint32),
        )
        key0, key1 = key0 + _KEY_STEP_0, key1 + _KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def _load_token(ptr, token, tokens, inside, stride):
    x = tl.load(ptr + token.to(tl.int64) * stride, mask=inside & (token < tokens), other=0.0)
    return x.to(tl.float32)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def estimate(x0, x1, x2, x3, word):
    """`reference.mvue24` of a group, float32, with the random 32-bit word of its uniform number.

    Four booleans that tell which entries are kept: the first is 0, else it is 1, else it is 2; the second is 1, else
    it is 2, else it is 3. And what `scaled` needs.
    """
    uniform = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8  # 2⁻²⁴
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    high01, high23 = _max(a0, a1), _max(a2, a3)
    largest = _max(high01, high23)
    rest = _min(a0, a1) + _min(a2, a3) + _min(high01, high23)
    half = _min(rest - (rest - largest) * 0.5, rest)
    first = uniform * half
    second = half - first
    after_1 = a2 + a3
    # fewer than two non-zeros: the lowest free positions beside it, as `pack` has it
    degenerate = half == 0.0
    first_in_0 = (first < a0) | degenerate
    first_in_01 = (first < a0 + a1) | degenerate
    second_in_01 = ((second > after_1) | (a1 > half) | (degenerate & (after_1 == 0.0))) & first_in_0
    second_in_012 = ((second > a3) | (a2 > half) | second_in_01) & first_in_01
    return first_in_0, first_in_01, second_in_01, second_in_012, half


@triton.jit
def scaled(x, half):
    """An entry as it is if kept: max(|x|, half) with the sign of x."""
    bits = _max(tl.abs(x), half).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (bits | (x.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _load_group(grad_ptr, token, tokens, inside, stride):
    x0 = _load_token(grad_ptr, token, tokens, inside, stride)
    x1 = _load_token(grad_ptr, token + 1, tokens, inside, stride)
    x2 = _load_token(grad_ptr, token + 2, tokens, inside, stride)
    x3 = _load_token(grad_ptr, token + 3, tokens, inside, stride)
    return x0, x1, x2, x3


@triton.jit
def _kept(grad_ptr, token, tokens, inside, stride, word, DTYPE: tl.constexpr):
    """Prune one group of tokens: bits of the two kept values, and their nibble of metadata."""
    x0, x1, x2, x3 = _load_group(grad_ptr, token, tokens, inside, stride)
    first_in_0, first_in_01, second_in_01, second_in_012, half = estimate(x0, x1, x2, x3, word)
    first = scaled(tl.where(first_in_0, x0, tl.where(first_in_01, x1, x2)), half)
    second = scaled(tl.where(second_in_01, x1, tl.where(second_in_012, x2, x3)), half)
    nibble = tl.where(first_in_0, 0, tl.where(first_in_01, 1, 2)) | tl.where(
        second_in_01, 4, tl.where(second_in_012, 8, 12)
    )
    return value_bits(first, DTYPE), value_bits(second, DTYPE), nibble


@triton.jit
def _store_pruned(
    grad_ptr, dense_ptr, token, tokens, features, inside, stride, word, DTYPE: tl.constexpr
):  # fmt: skip
    """Prune one group of tokens and store all four."""
    x0, x1, x2, x3 = _load_group(grad_ptr, token, tokens, inside, stride)
    first_in_0, first_in_01, second_in_01, second_in_012, half = estimate(x0, x1, x2, x3, word)
    # products, as in the reference: NaN times 0 is NaN
    y0 = scaled(x0, half) * first_in_0.to(tl.float32)
    y1 = scaled(x1, half) * ((first_in_0 ^ first_in_01) | second_in_01).to(tl.float32)
    y2 = scaled(x2, half) * (~first_in_01 | (second_in_01 ^ second_in_012)).to(tl.float32)
    y3 = scaled(x3, half) * (~second_in_012).to(tl.float32)
    dense_ptr += token.to(tl.int64) * features
    tl.store(dense_ptr, y0.to(DTYPE), mask=inside & (token < tokens))
    tl.store(dense_ptr + features, y1.to(DTYPE), mask=inside & (token + 1 < tokens))
    tl.store(dense_ptr + 2 * features, y2.to(DTYPE), mask=inside & (token + 2 < tokens))
    tl.store(dense_ptr + 3 * features, y3.to(DTYPE), mask=inside & (token + 3 < tokens))


@triton.jit
def _along_tokens(x0, x1, x2, x3):
    """Groups 0, 1, 2, 3 of each quad, [Q, F] each, as [F, 4 * Q]."""
    x = join4(x0, x1, x2, x3)
    return tl.reshape(tl.permute(x, (1, 0, 2)), (x.shape[1], 4 * x.shape[0]))


@triton.jit(do_not_specialize=["key0", "key1"])
def _mvue(
    grad_ptr, position_ptr, values_ptr, metadata_ptr, dense_ptr, key0, key1, tokens, features, rows, groups, words,
    token_stride, feature_stride, DTYPE: tl.constexpr, FRAGMENTS: tl.constexpr, Q: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """A tile of 16·Q tokens and F features. dense_ptr None: packed; else dense, and nothing packed."""
    tiles = tl.cdiv(rows, F)
    feature_start = tl.program_id(0) % tiles * F
    quad_start = tl.program_id(0) // tiles * Q
    feature = (feature_start + tl.arange(0, F))[None, :]
    quad = (quad_start + tl.arange(0, Q))[:, None]
    inside = feature < features

    first_group = tl.load(position_ptr + 1) >> 2
    key0, key1 = key0.to(tl.uint32), key1.to(tl.uint32)
    step, layer = tl.load(position_ptr).to(tl.uint32), tl.load(position_ptr + 2).to(tl.uint32)
    zero = tl.zeros((Q, F), tl.uint32)
    first_feature = tl.load(position_ptr + 3).to(tl.uint32)
    c0, c2, c3 = zero + (first_feature + feature.to(tl.uint32)), zero + step, zero + layer
    block = zero + ((first_group >> 2).to(tl.uint32) + quad.to(tl.uint32))
    word0, word1, word2, word3 = philox_4x32(c0, block, c2, c3, key0, key1)
    ahead = (first_group & 3).to(tl.int32)
    if ahead != 0:  # the quads of these tokens lie across two blocks of random numbers each
        next0, next1, next2, _ = philox_4x32(c0, block + 1, c2, c3, key0, key1)
        one, two = ahead == 1, ahead == 2
        word0, word1, word2, word3 = (
            tl.where(one, word1, tl.where(two, word2, word3)),
            tl.where(one, word2, tl.where(two, word3, next0)),
            tl.where(one, word3, tl.where(two, next0, next1)),
            tl.where(one, next0, tl.where(two, next1, next2)),
        )

    grad_ptr += feature.to(tl.int64) * feature_stride
    token = 16 * quad
    if dense_ptr is not None:
        dense_ptr += feature
        _store_pruned(grad_ptr, dense_ptr, token, tokens, features, inside, token_stride, word0, DTYPE)
        _store_pruned(grad_ptr, dense_ptr, token + 4, tokens, features, inside, token_stride, word1, DTYPE)
        _store_pruned(grad_ptr, dense_ptr, token + 8, tokens, features, inside, token_stride, word2, DTYPE)
        _store_pruned(grad_ptr, dense_ptr, token + 12, tokens, features, inside, token_stride, word3, DTYPE)
    else:
        f0, s0, n0 = _kept(grad_ptr, token, tokens, inside, token_stride, word0, DTYPE)
        f1, s1, n1 = _kept(grad_ptr, token + 4, tokens, inside, token_stride, word1, DTYPE)
        f2, s2, n2 = _kept(grad_ptr, token + 8, tokens, inside, token_stride, word2, DTYPE)
        f3, s3, n3 = _kept(grad_ptr, token + 12, tokens, inside, token_stride, word3, DTYPE)
        WIDE: tl.constexpr = DTYPE.primitive_bitwidth // 16  # float32 values are two words a group
        if WIDE == 1:
            pair = _along_tokens(f0 | (s0 << 16), f1 | (s1 << 16), f2 | (s2 << 16), f3 | (s3 << 16))
        else:
            pair = pair_words(_along_tokens(f0, f1, f2, f3), _along_tokens(s0, s1, s2, s3), DTYPE)
        store_values(values_ptr, pair, feature_start, 4 * WIDE * quad_start, rows, groups * WIDE, 16, FRAGMENTS)
        nibbles = _along_tokens(n0, n1, n2, n3)
        store_metadata(metadata_ptr, nibbles, feature_start, 4 * quad_start, rows, words, FRAGMENTS, False)
