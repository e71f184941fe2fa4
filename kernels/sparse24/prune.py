"""Weight to packed 2:4 weight in one pass over memory, along rows; and back to a dense matrix.

The three projections that work on single groups of four: by magnitude, by soft threshold, and under a mask that is
given. They share one kernel, which reads the weight once and writes the packed form once; a mask that is refreshed
is read and written in the same pass, and its changes are counted on the way.
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
    kept_bits,
    kept_pair,
    load_fours,
    load_mask,
    load_nibbles,
    load_values,
    mask_of_keep,
    nibble_of_keep,
    pair_words,
    store_mask,
    store_metadata,
    store_values,
    two_largest,
    value_bits,
)
from sparse24.fragments import Fragments, packed_output
from sparse24.packing import Packed

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
METHODS = ("magnitude", "soft_threshold", "mask")


def prune_pack(
    weight: Tensor,
    how: str,
    dtype: torch.dtype,
    *,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    flips: Tensor | None = None,
    fragments: bool = False,
    rows_padded_to: int | None = None,
    out: Packed | Fragments | None = None,
) -> Packed | Fragments:
    """Project a weight to 2:4 along its rows and pack it.

    Computed in float32 whatever the dtype of the weight, and rounded once at the end:

    - "magnitude" keeps the entries of `reference.magnitude_mask`. A mask that is given is overwritten with the new
      one, and `flips` grows by the number of entries that changed.
    - "soft_threshold" packs scale · `reference.soft_threshold`. A packed group has two values, so a group that
      holds a NaN comes back as two NaNs and two zeros, not as four NaNs; and so do three or four infinities.
    - "mask" packs the entries kept by the mask, which must be two in each group of four of a row. That is not
      checked: it would cost a synchronisation.

    A weight in the dtype of the values keeps every bit, NaNs included (except with "soft_threshold").

    Args:
        weight: (rows, cols) float32, bfloat16 or float16, any strides, on a CUDA device.
        how: "magnitude", "soft_threshold" or "mask".
        dtype: of the values: bfloat16, float16, or (not with `fragments`) float32.
        mask: (rows, cols) boolean, any strides: written by "magnitude" (optional), read by "mask".
        scale: 0-dim float32 on the same device, for "soft_threshold"; None is 1.
        flips: int64 of one element on the same device, for "magnitude" with a mask.
        fragments: return `Fragments`, for which cols must be a multiple of 64, and the rows (padded) of 16.
        rows_padded_to: rows of the result, at least those of the weight; further ones are zero, with metadata 0x4444.
        out: where to write to, as returned by an earlier call with the same shape.

    Returns:
        `Packed`, or `Fragments` if asked for.

    Raises:
        ValueError: an argument does not fit.
    """
    if how not in METHODS:
        raise ValueError(f"how must be one of {', '.join(METHODS)}; found {how!r}")
    rows, cols = check_weight(weight)
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TRITON_DTYPES))}; found {dtype}")
    if how == "mask" and mask is None:
        raise ValueError("mask must be given with how='mask'; found None")
    if how == "soft_threshold" and mask is not None:
        raise ValueError("mask must be None with how='soft_threshold'; found a tensor")
    if how != "soft_threshold" and scale is not None:
        raise ValueError(f"scale must be None with how={how!r}; found a tensor")
    if scale is not None and (scale.dim() or scale.dtype != torch.float32 or scale.device != weight.device):
        raise ValueError(
            f"scale must be 0-dim float32 on {weight.device}; found {scale.dtype} of {tuple(scale.shape)} "
            f"on {scale.device}"
        )
    if flips is not None and (how != "magnitude" or mask is None):
        raise ValueError("flips must be None without how='magnitude' and a mask; found a tensor")
    padded = rows if rows_padded_to is None else rows_padded_to
    if padded < rows:
        raise ValueError(f"rows_padded_to must be at least the {rows} rows of weight; found {padded}")
    out = packed_output(padded, cols, dtype, weight.device, fragments, out)
    _launch(weight, how, mask, scale, flips, padded, out, dtype)
    return out


def update_mask(weight: Tensor, mask: Tensor, flips: Tensor | None = None) -> None:
    """Overwrite a mask with `reference.magnitude_mask(weight)` and count the entries that change.

    Args:
        weight: (rows, cols) float32, bfloat16 or float16, any strides, on a CUDA device.
        mask: (rows, cols) boolean, any strides.
        flips: int64 of one element, which grows by the number of entries that changed; or None.

    Raises:
        ValueError: an argument does not fit.
    """
    rows, _ = check_weight(weight)
    _launch(weight, "magnitude", mask, None, flips, rows, None, None)


def check_weight(weight: Tensor) -> tuple[int, int]:
    """(rows, cols) of a weight that the kernels take; ValueError if they do not."""
    if weight.dtype not in TRITON_DTYPES:
        raise ValueError(f"weight must be float32, bfloat16 or float16; found {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(f"weight must be (rows, cols) with cols a multiple of 4; found {tuple(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def check_mask(weight: Tensor, mask: Tensor, flips: Tensor | None) -> tuple[Tensor, bool]:
    """The mask as the kernels read it: int32, a group a word, if its memory allows; else int8. And which it is."""
    if mask.shape != weight.shape or mask.dtype != torch.bool or mask.device != weight.device:
        raise ValueError(
            f"mask must be boolean of shape {tuple(weight.shape)} on {weight.device}; "
            f"found {mask.dtype} of {tuple(mask.shape)} on {mask.device}"
        )
    if flips is not None and (flips.numel() != 1 or flips.dtype != torch.int64 or flips.device != weight.device):
        raise ValueError(
            f"flips must be int64 of one element on {weight.device}; "
            f"found {flips.dtype} of {tuple(flips.shape)} on {flips.device}"
        )
    if mask.stride(1) == 1 and mask.stride(0) % 4 == 0 and mask.data_ptr() % 4 == 0 and mask.storage_offset() % 4 == 0:
        return mask.view(torch.int32), True
    return mask.view(torch.int8), False


def _launch(
    weight: Tensor,
    how: str,
    mask: Tensor | None,
    scale: Tensor | None,
    flips: Tensor | None,
    padded: int,
    out: Packed | Fragments | None,
    dtype: torch.dtype | None,
) -> None:
    mask_bytes, mask_words = (None, False) if mask is None else check_mask(weight, mask, flips)
    groups = weight.shape[1] // 4
    # a thread reads 16 bytes along whichever dimension is contiguous
    row_major = weight.stride(1) == 1
    tile = (16, 64) if row_major else (64, 16)
    grid = triton.cdiv(padded, tile[0]) * triton.cdiv(groups, tile[1])
    if not grid:
        return
    with torch.cuda.device_of(weight):
        _prune_pack[(grid,)](
            weight, None if out is None else out.values.view(torch.int32),
            None if out is None else out.metadata.view(torch.int16), mask_bytes, scale, flips,
            weight.shape[0], padded, groups, -(-groups // 4), *weight.stride(),
            *((0, 0) if mask_bytes is None else mask_bytes.stride()),
            HOW=how, DTYPE=None if dtype is None else TRITON_DTYPES[dtype], FRAGMENTS=isinstance(out, Fragments),
            ROW_MAJOR=row_major, MASK_WORDS=mask_words, R=tile[0], G=tile[1], num_warps=4,
        )  # fmt: skip


@triton.jit
def _prune_pack(
    weight_ptr, values_ptr, metadata_ptr, mask_ptr, scale_ptr, flips_ptr,
    rows, padded, groups, words, row_stride, col_stride, mask_row_stride, mask_col_stride,
    HOW: tl.constexpr, DTYPE: tl.constexpr, FRAGMENTS: tl.constexpr, ROW_MAJOR: tl.constexpr,
    MASK_WORDS: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One tile of R rows and G groups. Pointers that are None: not packed, no mask, scale 1, changes not counted."""
    column_tiles = tl.cdiv(groups, G)
    row_start = tl.program_id(0) // column_tiles * R
    group_start = tl.program_id(0) % column_tiles * G
    x0, x1, x2, x3 = load_fours(
        weight_ptr, row_start, group_start, rows, groups, row_stride, col_stride, R, G, ROW_MAJOR
    )
    f0, f1, f2, f3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    if HOW == "mask":
        keep = keep_of_mask(load_mask(
            mask_ptr, row_start, group_start, rows, groups, mask_row_stride, mask_col_stride, R, G, MASK_WORDS
        ))  # fmt: skip
    else:
        keep = two_largest(f0, f1, f2, f3)
        if mask_ptr is not None:
            new = mask_of_keep(keep)
            if flips_ptr is not None:
                old = load_mask(
                    mask_ptr, row_start, group_start, rows, groups, mask_row_stride, mask_col_stride, R, G, MASK_WORDS
                )
                count_flips(flips_ptr, old ^ new)
            store_mask(
                mask_ptr, new, row_start, group_start, rows, groups, mask_row_stride, mask_col_stride, MASK_WORDS
            )
    if values_ptr is not None:
        if HOW == "soft_threshold":
            first, second = kept_pair(keep, f0, f1, f2, f3)
            third = _third_largest(tl.abs(f0), tl.abs(f1), tl.abs(f2), tl.abs(f3))
            first, second = _shrink(first, third), _shrink(second, third)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr)
                first, second = first * scale, second * scale
            first, second = value_bits(first, DTYPE), value_bits(second, DTYPE)
        else:
            first, second = kept_bits(keep, x0, x1, x2, x3, DTYPE)
        word = pair_words(first, second, DTYPE)
        # float32 values are two words a group
        wide: tl.constexpr = DTYPE.primitive_bitwidth // 16
        store_values(values_ptr, word, row_start, group_start * wide, padded, groups * wide, 16, FRAGMENTS)
        store_metadata(
            metadata_ptr, nibble_of_keep(keep), row_start, group_start, padded, words, FRAGMENTS, False
        )  # fmt: skip


@triton.jit
def _third_largest(a0, a1, a2, a3):
    """Of four non-negative numbers; NaN if one is."""
    NAN: tl.constexpr = tl.PropagateNan.ALL
    low = tl.maximum(tl.minimum(a0, a1, NAN), tl.minimum(a2, a3, NAN), NAN)
    return tl.minimum(low, tl.minimum(tl.maximum(a0, a1, NAN), tl.maximum(a2, a3, NAN), NAN), NAN)


@triton.jit
def _shrink(x, threshold):
    """x moved towards zero by threshold <= |x|: x − copysign(threshold, x)."""
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return x - (threshold.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


def unpack_dense(packed: Packed | Fragments) -> Tensor:
    """The dense (rows, cols) matrix, in the dtype of the values, zero (+0) where nothing was kept.

    For products with the masked weight that are not sparse. Values keep every bit.

    Raises:
        ValueError: the parts of `packed` do not fit each other, or the dtype of the values is not float32, bfloat16
            or float16.
    """
    if isinstance(packed, Fragments):
        fragments, rows, dtype = True, packed.rows, packed.dtype
    else:
        fragments, rows, dtype = False, packed.values.shape[0], packed.values.dtype
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"values must be float32, bfloat16 or float16; found {dtype}")
    packed_output(rows, packed.cols, dtype, packed.values.device, fragments, packed, name="packed")
    dense = torch.empty((rows, packed.cols), dtype=dtype, device=packed.values.device)
    groups, tile = packed.cols // 4, (16, 64)
    grid = triton.cdiv(rows, tile[0]) * triton.cdiv(groups, tile[1])
    if grid:
        with torch.cuda.device_of(dense):
            _unpack[(grid,)](
                packed.values.view(torch.int32), packed.metadata.view(torch.int16),
                dense.view(torch.int32 if dtype == torch.float32 else torch.int16), rows, groups, -(-groups // 4),
                FRAGMENTS=fragments, R=tile[0], G=tile[1], num_warps=4,
            )  # fmt: skip
    return dense


@triton.jit
def _unpack(
    values_ptr, metadata_ptr, dense_ptr, rows, groups, words, FRAGMENTS: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """One tile of R rows and G groups. dense_ptr: integers as wide as the values."""
    column_tiles = tl.cdiv(groups, G)
    row_start = tl.program_id(0) // column_tiles * R
    group_start = tl.program_id(0) % column_tiles * G
    position = load_nibbles(metadata_ptr, row_start, group_start, rows, words, R, G, FRAGMENTS)
    if dense_ptr.dtype.element_ty == tl.int32:
        word = load_values(values_ptr, row_start, 2 * group_start, rows, 2 * groups, R, 2 * G, False)
        first, second = tl.split(tl.reshape(word, (R, G, 2)))
    else:
        word = load_values(values_ptr, row_start, group_start, rows, groups, R, G, FRAGMENTS)
        first, second = word.to(tl.int16), (word >> 16).to(tl.int16)
    at_first, at_second = position & 3, position >> 2
    entries = join4(
        tl.where(at_first == 0, first, 0),
        tl.where(at_first == 1, first, tl.where(at_second == 1, second, 0)),
        tl.where(at_first == 2, first, tl.where(at_second == 2, second, 0)),
        tl.where(at_second == 3, second, 0),
    )
    store_values(
        dense_ptr, tl.reshape(entries, (R, 4 * G)), row_start, 4 * group_start, rows, 4 * groups, 16, False
    )  # fmt: skip
