"""FP8 with one scale for the whole tensor: amax, then quantisation, on request with the transpose in the same pass;
and a quantised 2:4 matrix packed in fragment order.

e4m3fn is meant for weights and activations, e5m2 for gradients (Micikevicius et al., "FP8 formats for deep
learning", arXiv 2209.05433; S-STE trains so, arXiv 2409.09099).

The conversion is done in 32-bit arithmetic, since Triton offers e4m3fn only from compute capability 8.9 on, and so
that every device gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse24.codec import kept_pair, load_values, nibble_of_keep, store_metadata, store_values, two_largest
from sparse24.fragments import Fragments, packed_output
from sparse24.reference import SMALLEST_FP8_SCALE

# mantissa bits, exponent bias, largest finite value
FORMATS = {torch.float8_e4m3fn: (3, 7, 448.0), torch.float8_e5m2: (2, 15, 57344.0)}
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 2048  # elements a program
_TILE = (64, 64)
_PACKING_TILE = (16, 64)  # rows, groups


def amax(x: Tensor) -> Tensor:
    """The largest |x|: NaN if there is a NaN, 0 for an empty tensor. The same bits in every run.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.

    Returns:
        0-dim float32.

    Raises:
        ValueError: the dtype is none of these.
    """
    _check_input(x)
    # as integers non-negative floats keep their order, with NaN above infinity: an integer maximum suffices, and
    # is the same in whatever order the programs end
    result = torch.zeros((), dtype=torch.int32, device=x.device)
    if x.numel():
        rows, cols, row_stride, col_stride, matrix = _as_matrix(x)
        block_rows, block_cols = _block(rows, transposed=False)
        grid = (triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols),)
        with torch.cuda.device_of(x):
            _amax_kernel[grid](matrix, result, rows, cols, row_stride, col_stride, block_rows, block_cols, num_warps=4)
    return result.view(torch.float32)


def quantize(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """q and scale with q·scale ≈ x: q = fp8(x·(1/scale)), rounded to nearest, ties to even.

    The scale is amax / (largest finite value of the dtype): at least 2⁻¹²⁶, so that its reciprocal is finite, and
    1 if amax is 0. Finite values beyond the dtype's range become its largest, with their sign. What is not finite
    is never hidden: NaN stays NaN; an infinity stays one in e5m2 and becomes NaN in e4m3fn, which has none. If
    amax is not finite then the scale is not either, and every product with it is infinite or NaN.

    Args:
        x: float32, bfloat16 or float16, any shape and strides (`Packed.values` too: packing changes no value).
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        amax: 0-dim float32 on x's device, computed if neither it nor `scale` is given.
        scale: 0-dim float32 on x's device, used as it is.
        transposed: return the transpose as well, from the same pass; x must be a matrix then.

    Returns:
        q, contiguous, of x's shape; if `transposed`, the contiguous transpose of q; scale, 0-dim float32.

    Raises:
        ValueError: a dtype or shape does not fit, or both `amax` and `scale` are given.
    """
    _check_input(x)
    if dtype not in FORMATS:
        raise ValueError(f"dtype must be float8_e4m3fn or float8_e5m2; found {dtype}")
    if amax is not None and scale is not None:
        raise ValueError("amax and scale exclude each other; found both")
    for name, given in (("amax", amax), ("scale", scale)):
        if given is not None and (given.dim() or given.dtype != torch.float32 or given.device != x.device):
            raise ValueError(
                f"{name} must be 0-dim float32 on {x.device}; "
                f"found {given.dtype} of {tuple(given.shape)} on {given.device}"
            )
    if transposed and x.dim() != 2:
        raise ValueError(f"x must be a matrix for its transpose; found {tuple(x.shape)}")
    if amax is None and scale is None:
        amax = _amax_of(x)
    mantissa, bias, largest = FORMATS[dtype]
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    q_t = torch.empty(x.shape[::-1], dtype=dtype, device=x.device) if transposed else None
    used = torch.empty((), dtype=torch.float32, device=x.device) if scale is None else scale
    if transposed:
        (rows, cols), (row_stride, col_stride), matrix = x.shape, x.stride(), x
    else:
        rows, cols, row_stride, col_stride, matrix = _as_matrix(x)
    block_rows, block_cols = _block(rows, transposed)
    grid = (max(1, triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols)),)
    with torch.cuda.device_of(x):
        _quantize_kernel[grid](
            matrix,
            q.view(torch.uint8),
            None if q_t is None else q_t.view(torch.uint8),
            amax,
            used,
            rows,
            cols,
            row_stride,
            col_stride,
            mantissa,
            bias,
            largest,
            SMALLEST_FP8_SCALE,
            block_rows,
            block_cols,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return (q, used) if q_t is None else (q, q_t, used)


_amax_of = amax


def pack_fragments(quantized: Tensor) -> Fragments:
    """A 2:4 matrix in fp8 in fragment order: the two largest |q| of each group of four of a row, bit for bit.

    Args:
        quantized: (rows, cols) of either fp8 dtype, contiguous, at most two non-zeros in each group (not checked);
            rows a multiple of 16, cols of 64.

    Raises:
        ValueError: the shape or the dtype does not fit, or it is not contiguous.
    """
    if quantized.dim() != 2 or quantized.dtype not in FORMATS or not quantized.is_contiguous():
        raise ValueError(
            f"quantized must be a contiguous matrix in float8_e4m3fn or float8_e5m2; found {quantized.dtype} of "
            f"{tuple(quantized.shape)} with strides {quantized.stride()}"
        )
    rows, cols = quantized.shape
    out = packed_output(rows, cols, quantized.dtype, quantized.device, fragments=True)
    assert isinstance(out, Fragments)
    groups, (tile_rows, tile_groups) = cols // 4, _PACKING_TILE
    grid = triton.cdiv(rows, tile_rows) * triton.cdiv(groups, tile_groups)
    if grid:
        with torch.cuda.device_of(quantized):
            _pack_fragments[(grid,)](
                quantized.view(torch.int32), out.values, out.metadata.view(torch.int16), rows, groups,
                R=tile_rows, G=tile_groups, num_warps=4,
            )  # fmt: skip
    return out


def _check_input(x: Tensor) -> None:
    if x.dtype not in _INPUTS:
        raise ValueError(f"x must be float32, bfloat16 or float16; found {x.dtype}")


def _as_matrix(x: Tensor) -> tuple[int, int, int, int, Tensor]:
    """Rows, columns, their strides and a tensor with the data: contiguous ones are a single row."""
    if x.is_contiguous():
        return 1, x.numel(), x.numel(), 1, x
    matrix = x.reshape(-1, x.shape[-1])  # a view for every matrix and most others
    return matrix.shape[0], matrix.shape[1], matrix.stride(0), matrix.stride(1), matrix


def _block(rows: int, transposed: bool) -> tuple[int, int]:
    return (1, _BLOCK) if rows == 1 and not transposed else _TILE


@triton.jit
def _load_tile(x_ptr, rows, cols, row_stride, col_stride, R: tl.constexpr, C: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.maximum(tl.cdiv(cols, C), 1)  # an empty matrix has one program, for the scale
    row = pid // blocks * R + tl.arange(0, R)[:, None]
    col = pid % blocks * C + tl.arange(0, C)[None, :]
    inside = (row < rows) & (col < cols)
    x = tl.load(x_ptr + row * row_stride + col * col_stride, mask=inside, other=0.0).to(tl.float32)
    return x, row, col, inside


@triton.jit
def _amax_kernel(x_ptr, result_ptr, rows, cols, row_stride, col_stride, R: tl.constexpr, C: tl.constexpr):
    x, _, _, _ = _load_tile(x_ptr, rows, cols, row_stride, col_stride, R, C)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(result_ptr, tl.max(tl.reshape(magnitude, (R * C,)), axis=0), sem="relaxed")


@triton.jit
def to_fp8(y, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """The bits of a float32 in an fp8 format, int32 in 0..255: to nearest even, saturating, as `quantize` says."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    # a number of this size has the spacing of the subnormals of the format
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    MAGIC_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    bits = y.to(tl.int32, bitcast=True)
    infinite_or_nan = (bits & 0x7FFFFFFF) >= 0x7F800000
    clamped = tl.minimum(tl.abs(y), LARGEST)
    subnormal = (clamped + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = clamped.to(tl.int32, bitcast=True)
    normal = (code + ((code >> SHIFT) & 1) + ((1 << (SHIFT - 1)) - 1 - ((127 - BIAS) << 23))) >> SHIFT
    code = tl.where(clamped < 2.0 ** (1 - BIAS), subnormal, normal)
    INFINITY: tl.constexpr = 0x7C if MANTISSA == 2 else 0x7F
    special = tl.where((bits & 0x7FFFFFFF) == 0x7F800000, INFINITY, 0x7F)
    return tl.where(infinite_or_nan, special, code) | ((bits >> 24) & 0x80)


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, qt_ptr, amax_ptr, scale_ptr, rows, cols, row_stride, col_stride, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """q (rows, cols) contiguous and, unless its pointer is None, its transpose. amax_ptr None: the scale is read."""
    if amax_ptr is None:
        scale = tl.load(scale_ptr)
    else:
        amax = tl.load(amax_ptr)
        scale = tl.math.div_rn(amax, LARGEST)
        scale = tl.where(scale < SMALLEST_SCALE, tl.where(amax == 0.0, 1.0, SMALLEST_SCALE), scale)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
    reciprocal = tl.math.div_rn(1.0, scale)
    x, row, col, inside = _load_tile(x_ptr, rows, cols, row_stride, col_stride, R, C)
    q = to_fp8(x * reciprocal, MANTISSA, BIAS, LARGEST).to(tl.uint8)
    tl.store(q_ptr + row * cols + col, q, mask=inside)
    if qt_ptr is not None:
        row, col, inside = tl.trans(row), tl.trans(col), tl.trans(inside)
        tl.store(qt_ptr + col * rows + row, tl.trans(q), mask=inside)


@triton.jit
def _pack_fragments(q_ptr, values_ptr, metadata_ptr, rows, groups, R: tl.constexpr, G: tl.constexpr):
    """One tile of R rows and G groups. q_ptr: a group of four a 32-bit word."""
    column_tiles = tl.cdiv(groups, G)
    row_start = tl.program_id(0) // column_tiles * R
    group_start = tl.program_id(0) % column_tiles * G
    word = load_values(q_ptr, row_start, group_start, rows, groups, R, G, False)
    x0, x1, x2, x3 = word & 255, (word >> 8) & 255, (word >> 16) & 255, (word >> 24) & 255
    keep = two_largest(_rank(x0), _rank(x1), _rank(x2), _rank(x3))
    first, second = kept_pair(keep, x0, x1, x2, x3)
    even, odd = tl.split(tl.reshape(first | (second << 8), (R, G // 2, 2)))
    store_values(values_ptr, even | (odd << 16), row_start, group_start // 2, rows, groups // 2, 8, True)
    store_metadata(metadata_ptr, nibble_of_keep(keep), row_start, group_start, rows, groups // 4, True, True)


@triton.jit
def _rank(x):
    """Bits of fp8 without their sign are in the order of the magnitudes, NaN last."""
    return (x & 127).to(tl.float32)
