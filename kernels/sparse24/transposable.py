"""Masks that are 2:4 along rows and along columns, and packing both ways, in one pass over the weight.

The search is exact: it finds the pattern of `reference.transposable_mask`, which takes the first of the largest of 90
scores, bit for bit. It does not form the 90. A score is fl(u + v), u the sum of the upper two row scores and v that
of the lower two, and every one of the 36 pairs of patterns can be the upper pair. Which lower pairs go with it is
told by its complement: pattern p has the complement 5 − p, and the lower rows may be the complements of the upper two
in either order; besides, if the upper rows are complements of each other, so may the lower be, in any of six ways.

Rounding is monotone, so the best score of an upper pair is fl(u + the largest v that goes with it). Hence:
    1. 36 sums v, and the largest for each set of lower pairs (21 sets);
    2. 36 sums u and 36 scores, in lexicographic order: the first of the largest is the upper pair of the first of the
       largest of all 90, since all scores of an upper pair come before those of the next;
    3. the lower pair: the first that reaches this score with this u. It need not be the one with the largest v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse24.codec import (
    count_flips,
    join4,
    keep_of_mask,
    keep_of_pattern,
    kept_bits,
    kept_pair,
    load_fours,
    load_mask,
    mask_of_keep,
    nibble_of_keep,
    pair_words,
    store_mask,
    store_metadata,
    store_values,
)
from sparse24.fragments import Fragments, packed_output
from sparse24.packing import Packed
from sparse24.prune import TRITON_DTYPES, check_mask, check_weight

TILE = 16  # blocks of 4x4 along either side: 64 x 64 entries, so that both results fill whole fragments


def transposable_mask_(weight: Tensor, mask: Tensor, flips: Tensor | None = None) -> None:
    """Overwrite a mask with `reference.transposable_mask(weight)` and count the entries that change.

    Args:
        weight: (rows, cols) float32, bfloat16 or float16, multiples of 4, any strides, on a CUDA device.
        mask: (rows, cols) boolean, any strides.
        flips: int64 of one element, which grows by the number of entries that changed; or None.

    Raises:
        ValueError: an argument does not fit.
    """
    _check_blocks(weight)
    _launch(weight, "transposable", mask, flips, None, weight.shape[0], weight.shape[1], None)


def pack_both(
    weight: Tensor,
    how: str,
    dtype: torch.dtype,
    *,
    mask: Tensor | None = None,
    flips: Tensor | None = None,
    fragments: bool = False,
    rows_padded_to: tuple[int, int] | None = None,
    out: tuple[Packed | Fragments, Packed | Fragments] | None = None,
) -> tuple[Packed | Fragments, Packed | Fragments]:
    """Pack a weight and its transpose under one transposable mask, reading the weight once.

    - "transposable" keeps the entries of `reference.transposable_mask`. A mask that is given is overwritten with the
      new one, and `flips` grows by the number of entries that changed.
    - "mask" packs the entries kept by the mask, which must be two in each group of four of a row and of a column. That
      is not checked: it would cost a synchronisation.

    A weight in the dtype of the values keeps every bit, NaNs included; else values are rounded once.

    Args:
        weight: (rows, cols) float32, bfloat16 or float16, multiples of 4, any strides, on a CUDA device.
        how: "transposable" or "mask".
        dtype: of the values: bfloat16, float16, or (not with `fragments`) float32.
        mask: (rows, cols) boolean, any strides: written by "transposable" (optional), read by "mask".
        flips: int64 of one element on the same device, for "transposable" with a mask.
        fragments: return `Fragments`, for which rows and cols must be multiples of 64.
        rows_padded_to: rows of the two results, at least rows and cols of the weight; further ones are zero, with
            metadata 0x4444.
        out: where to write to, as returned by an earlier call with the same shape.

    Returns:
        The packed weight and the packed transpose, (cols, rows).

    Raises:
        ValueError: an argument does not fit.
    """
    if how not in ("transposable", "mask"):
        raise ValueError(f"how must be transposable or mask; found {how!r}")
    rows, cols = _check_blocks(weight)
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TRITON_DTYPES))}; found {dtype}")
    if how == "mask" and mask is None:
        raise ValueError("mask must be given with how='mask'; found None")
    if flips is not None and (how != "transposable" or mask is None):
        raise ValueError("flips must be None without how='transposable' and a mask; found a tensor")
    padded_rows, padded_cols = rows_padded_to or (rows, cols)
    if padded_rows < rows or padded_cols < cols:
        raise ValueError(f"rows_padded_to must be at least {(rows, cols)}; found {(padded_rows, padded_cols)}")
    straight, transpose = out or (None, None)
    results = (
        packed_output(padded_rows, cols, dtype, weight.device, fragments, straight, name="out[0]"),
        packed_output(padded_cols, rows, dtype, weight.device, fragments, transpose, name="out[1]"),
    )
    _launch(weight, how, mask, flips, results, padded_rows, padded_cols, dtype)
    return results


def _check_blocks(weight: Tensor) -> tuple[int, int]:
    rows, cols = check_weight(weight)
    if rows % 4:
        raise ValueError(f"weight must be (rows, cols), multiples of 4; found {tuple(weight.shape)}")
    return rows, cols


def _launch(
    weight: Tensor,
    how: str,
    mask: Tensor | None,
    flips: Tensor | None,
    out: tuple[Packed | Fragments, Packed | Fragments] | None,
    padded_rows: int,
    padded_cols: int,
    dtype: torch.dtype | None,
) -> None:
    mask_bytes, mask_words = (None, False) if mask is None else check_mask(weight, mask, flips)
    buffers: list[Tensor | None] = [None] * 4
    if out is not None:
        buffers = [
            part for packed in out for part in (packed.values.view(torch.int32), packed.metadata.view(torch.int16))
        ]
    block_rows, block_cols = weight.shape[0] // 4, weight.shape[1] // 4
    grid = triton.cdiv(padded_rows, 4 * TILE) * triton.cdiv(padded_cols, 4 * TILE)
    if not grid:
        return
    with torch.cuda.device_of(weight):
        _transposable[(grid,)](
            weight, *buffers, mask_bytes, flips, block_rows, block_cols, padded_rows, padded_cols,
            -(-block_rows // 4), -(-block_cols // 4), *weight.stride(),
            *((0, 0) if mask_bytes is None else mask_bytes.stride()),
            SEARCH=how == "transposable", DTYPE=None if dtype is None else TRITON_DTYPES[dtype],
            FRAGMENTS=out is not None and isinstance(out[0], Fragments), ROW_MAJOR=weight.stride(1) == 1,
            MASK_WORDS=mask_words, T=TILE, num_warps=8,
        )  # fmt: skip


@triton.jit
def _transposable(
    weight_ptr, values_ptr, metadata_ptr, transpose_values_ptr, transpose_metadata_ptr, mask_ptr, flips_ptr,
    block_rows, block_cols, padded_rows, padded_cols, row_words, col_words,
    row_stride, col_stride, mask_row_stride, mask_col_stride,
    SEARCH: tl.constexpr, DTYPE: tl.constexpr, FRAGMENTS: tl.constexpr, ROW_MAJOR: tl.constexpr,
    MASK_WORDS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T x T blocks of 4x4, one a thread. Pointers that are None: not packed, no mask, changes not counted.

    row_words, col_words: int16 words of metadata for a column and for a row of the weight.
    """
    column_tiles = tl.cdiv(padded_cols, 4 * T)
    i = tl.program_id(0) // column_tiles * T
    j = tl.program_id(0) % column_tiles * T
    # for each of the four rows of a block four entries [T, T], and its mask word
    w0 = _row(weight_ptr, i, j, block_rows, block_cols, row_stride, col_stride, 0, T, ROW_MAJOR)
    w1 = _row(weight_ptr, i, j, block_rows, block_cols, row_stride, col_stride, 1, T, ROW_MAJOR)
    w2 = _row(weight_ptr, i, j, block_rows, block_cols, row_stride, col_stride, 2, T, ROW_MAJOR)
    w3 = _row(weight_ptr, i, j, block_rows, block_cols, row_stride, col_stride, 3, T, ROW_MAJOR)
    if not SEARCH or flips_ptr is not None:
        m0 = _mask_row(mask_ptr, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 0, T, MASK_WORDS)
        m1 = _mask_row(mask_ptr, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 1, T, MASK_WORDS)
        m2 = _mask_row(mask_ptr, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 2, T, MASK_WORDS)
        m3 = _mask_row(mask_ptr, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 3, T, MASK_WORDS)
    if SEARCH:
        k0, k1, k2, k3 = _best_pattern(_magnitudes(w0), _magnitudes(w1), _magnitudes(w2), _magnitudes(w3))
        n0, n1, n2, n3 = mask_of_keep(k0), mask_of_keep(k1), mask_of_keep(k2), mask_of_keep(k3)
        if flips_ptr is not None:
            differing = (m0 ^ n0) + (m1 ^ n1) + (m2 ^ n2) + (m3 ^ n3)
            inside = _inside(i, j, block_rows, block_cols, T)
            count_flips(flips_ptr, tl.where(inside, differing, 0))
        if mask_ptr is not None:
            _store_row(mask_ptr, n0, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 0, MASK_WORDS)
            _store_row(mask_ptr, n1, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 1, MASK_WORDS)
            _store_row(mask_ptr, n2, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 2, MASK_WORDS)
            _store_row(mask_ptr, n3, i, j, block_rows, block_cols, mask_row_stride, mask_col_stride, 3, MASK_WORDS)
    else:
        n0, n1, n2, n3 = m0, m1, m2, m3
        k0, k1, k2, k3 = keep_of_mask(m0), keep_of_mask(m1), keep_of_mask(m2), keep_of_mask(m3)

    if values_ptr is not None:
        # a byte a column, a bit a row
        both = n0 | (n1 << 1) | (n2 << 2) | (n3 << 3)
        c0, c1 = _keep_of_column(both, 0), _keep_of_column(both, 1)
        c2, c3 = _keep_of_column(both, 2), _keep_of_column(both, 3)
        inside = _inside(i, j, block_rows, block_cols, T)
        wide: tl.constexpr = DTYPE.primitive_bitwidth // 16
        values = _interleave(
            _words(k0, w0[0], w0[1], w0[2], w0[3], DTYPE, False), _words(k1, w1[0], w1[1], w1[2], w1[3], DTYPE, False),
            _words(k2, w2[0], w2[1], w2[2], w2[3], DTYPE, False), _words(k3, w3[0], w3[1], w3[2], w3[3], DTYPE, False),
        )  # fmt: skip
        nibbles = _interleave(_nibble(k0, inside), _nibble(k1, inside), _nibble(k2, inside), _nibble(k3, inside))
        store_values(values_ptr, values, 4 * i, j * wide, padded_rows, block_cols * wide, 16, FRAGMENTS)
        store_metadata(metadata_ptr, nibbles, 4 * i, j, padded_rows, col_words, FRAGMENTS, False)
        values = _interleave(
            _words(c0, w0[0], w1[0], w2[0], w3[0], DTYPE, True), _words(c1, w0[1], w1[1], w2[1], w3[1], DTYPE, True),
            _words(c2, w0[2], w1[2], w2[2], w3[2], DTYPE, True), _words(c3, w0[3], w1[3], w2[3], w3[3], DTYPE, True),
        )  # fmt: skip
        nibbles = _interleave(
            tl.trans(_nibble(c0, inside)), tl.trans(_nibble(c1, inside)), tl.trans(_nibble(c2, inside)),
            tl.trans(_nibble(c3, inside)),
        )  # fmt: skip
        store_values(transpose_values_ptr, values, 4 * j, i * wide, padded_cols, block_rows * wide, 16, FRAGMENTS)
        store_metadata(transpose_metadata_ptr, nibbles, 4 * j, i, padded_cols, row_words, FRAGMENTS, False)


# --- the parts of a tile ---


@triton.jit
def _inside(i, j, block_rows, block_cols, T: tl.constexpr):
    return ((i + tl.arange(0, T)) < block_rows)[:, None] & ((j + tl.arange(0, T)) < block_cols)[None, :]


@triton.jit
def _row(
    ptr, i, j, block_rows, block_cols, row_stride, col_stride, ROW: tl.constexpr, T: tl.constexpr,
    ROW_MAJOR: tl.constexpr
):  # fmt: skip
    ptr += ROW * row_stride
    return load_fours(ptr, i, j, block_rows, block_cols, 4 * row_stride, col_stride, T, T, ROW_MAJOR)


@triton.jit
def _mask_row(
    ptr, i, j, block_rows, block_cols, row_stride, col_stride, ROW: tl.constexpr, T: tl.constexpr,
    WORDS: tl.constexpr
):  # fmt: skip
    ptr += ROW * row_stride
    return load_mask(ptr, i, j, block_rows, block_cols, 4 * row_stride, col_stride, T, T, WORDS)


@triton.jit
def _store_row(
    ptr, word, i, j, block_rows, block_cols, row_stride, col_stride, ROW: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    store_mask(ptr + ROW * row_stride, word, i, j, block_rows, block_cols, 4 * row_stride, col_stride, WORDS)


@triton.jit
def _keep_of_column(both, COLUMN: tl.constexpr):
    bits = (both >> (8 * COLUMN)) & 15
    return bits == 0b0011, bits == 0b1100, (bits & 0b0010) != 0, (bits & 0b1000) != 0


@triton.jit
def _words(keep, x0, x1, x2, x3, DTYPE: tl.constexpr, TRANSPOSE: tl.constexpr):
    first, second = kept_bits(keep, x0, x1, x2, x3, DTYPE)
    if TRANSPOSE:
        first, second = tl.trans(first), tl.trans(second)
    return pair_words(first, second, DTYPE)


@triton.jit
def _nibble(keep, inside):
    return tl.where(inside, nibble_of_keep(keep), 0 | 1 << 2)


@triton.jit
def _interleave(x0, x1, x2, x3):
    """Four [T, W], rows 4 * t + 0..3 -> [4 * T, W]."""
    return tl.reshape(tl.permute(join4(x0, x1, x2, x3), (0, 2, 1)), (4 * x0.shape[0], x0.shape[1]))


# --- the search ---


@triton.jit
def _magnitude(x):
    cap = 2.0**123
    x = tl.abs(x.to(tl.float32))
    return tl.where(x < cap, x, cap)  # the cap if x is NaN


@triton.jit
def _magnitudes(x):
    """|x| of four entries, NaN and what is larger as `reference.SCORE_CAP`."""
    return _magnitude(x[0]), _magnitude(x[1]), _magnitude(x[2]), _magnitude(x[3])


@triton.jit
def _scores(a):
    """Of the six patterns of a row: 01 02 03 12 13 23."""
    return a[0] + a[1], a[0] + a[2], a[0] + a[3], a[1] + a[2], a[1] + a[3], a[2] + a[3]


@triton.jit
def _score_of(keep, a):
    """As in `_scores`."""
    first, second = kept_pair(keep, a[0], a[1], a[2], a[3])
    return first + second


@triton.jit
def _best_pattern(a0, a1, a2, a3):
    """The tuple `keep` of each of the four rows of the best pattern; a0..a3: `_magnitudes` of the rows."""
    s0, s1, s2, s3 = _scores(a0), _scores(a1), _scores(a2), _scores(a3)
    # upper rows that are complements of each other: the lower rows too, in any of six ways
    any_lower = s2[0] + s3[5]
    for q in tl.static_range(1, 6):
        any_lower = tl.maximum(any_lower, s2[q] + s3[5 - q])
    best = (s0[0] + s1[0]) + (s2[5] + s3[5])
    upper = tl.zeros_like(best).to(tl.int32)
    for p in tl.static_range(6):
        for q in tl.static_range(6):
            if p + q == 5:
                score = (s0[p] + s1[q]) + any_lower
            elif p < q:
                score = (s0[p] + s1[q]) + tl.maximum(s2[5 - q] + s3[5 - p], s2[5 - p] + s3[5 - q])
            elif p > q:
                score = (s0[p] + s1[q]) + tl.maximum(s2[5 - p] + s3[5 - q], s2[5 - q] + s3[5 - p])
            else:
                score = (s0[p] + s1[q]) + (s2[5 - p] + s3[5 - p])
            if p + q:
                upper = tl.where(score > best, 8 * p + q, upper)
                best = tl.maximum(score, best)

    p0, p1 = upper >> 3, upper & 7
    k0, k1 = keep_of_pattern(p0), keep_of_pattern(p1)
    u = _score_of(k0, a0) + _score_of(k1, a1)
    # the complements, the order that comes first in the lexicographic one first
    p2, p3 = 5 - tl.maximum(p0, p1), 5 - tl.minimum(p0, p1)
    v = _score_of(keep_of_pattern(p2), a2) + _score_of(keep_of_pattern(p3), a3)
    reached = u + v == best
    p2, p3 = tl.where(reached, p2, p3), tl.where(reached, p3, p2)
    complements = p0 + p1 == 5
    # backwards: the first that reaches the score is the last to be written
    for q in tl.static_range(5, -1, -1):
        reached = complements & (u + (s2[q] + s3[5 - q]) == best)
        p2, p3 = tl.where(reached, q, p2), tl.where(reached, 5 - q, p3)
    return k0, k1, keep_of_pattern(p2), keep_of_pattern(p3)
