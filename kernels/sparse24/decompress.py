"""y = x Ŵᵀ for few tokens: a dense product that reads the packed weight, 9/16 of its bytes, and fills in the zeros.

With few tokens a linear layer is bound by reading its weight, so less to read is less time; with many it is bound by
arithmetic, of which this saves none. The dense tile exists in registers and shared memory only. The same for
dX = dY Ŵ with the packed transpose.

Few tokens mean few tiles of the result, too few to keep the memory of a large GPU busy. Then k is split: each part
writes its own sum, and a second kernel adds them in order, so that the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse24.codec import join4
from sparse24.packing import Packed

BLOCK_M = 64  # rows of the weight a program: one warpgroup of wgmma
MOST_TOKENS_A_TILE = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_SPLITS = 8


@triton.jit
def _decompress_linear(
    x_ptr, values_ptr, metadata_ptr, bias_ptr, y_ptr, n, m, k, words, x_row_stride, steps_a_split,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """One tile [BM, BN] of yᵀ; with SPLIT the sum of one part of k, without bias, into y (splits, n, m) fp32.

    values_ptr: int32 for 16-bit dtypes, a word is the pair of a group; fp32 otherwise. words: of metadata, a row.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    row_ok, token_ok = row < m, token < n
    row64, token64 = row.to(tl.int64), token.to(tl.int64)
    group = tl.arange(0, BK // 4)
    groups = k // 4
    x_rows = x_ptr + token64[None, :] * x_row_stride
    metadata_rows = metadata_ptr + row64[:, None] * words
    if dtype == tl.float32:
        value_rows = values_ptr + row64[:, None] * (2 * groups)
    else:
        value_rows = values_ptr + row64[:, None] * groups

    acc = tl.zeros((BM, BN), tl.float32)
    first = split * steps_a_split * BK
    for start in range(first, tl.minimum(first + steps_a_split * BK, k), BK):
        g = start // 4 + group
        e = start // 16 + tl.arange(0, BK // 16)
        meta = tl.load(metadata_rows + e[None, :], mask=row_ok[:, None] & (e[None, :] < words), other=0).to(tl.int32)
        nibble = tl.reshape(meta[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :], (BM, BK // 4))
        position0, position1 = nibble & 3, (nibble >> 2) & 3
        if dtype == tl.float32:
            v = start // 2 + tl.arange(0, BK // 2)
            pair = tl.load(value_rows + v[None, :], mask=row_ok[:, None] & (v[None, :] < 2 * groups), other=0)
            value0, value1 = tl.split(tl.reshape(pair, (BM, BK // 4, 2)))
            c0 = tl.where(position0 == 0, value0, 0.0)
            c1 = tl.where(position0 == 1, value0, tl.where(position1 == 1, value1, 0.0))
            c2 = tl.where(position0 == 2, value0, tl.where(position1 == 2, value1, 0.0))
            c3 = tl.where(position1 == 3, value1, 0.0)
        else:
            # the four entries of a group in 64 bits: two shifts place both values, and nothing is selected
            pair = tl.load(value_rows + g[None, :], mask=row_ok[:, None] & (g[None, :] < groups), other=0)
            fours = (pair & 0xFFFF).to(tl.int64) << (16 * position0).to(tl.int64)
            fours |= ((pair >> 16) & 0xFFFF).to(tl.int64) << (16 * position1).to(tl.int64)
            low, high = fours.to(tl.int32), (fours >> 32).to(tl.int32)
            c0, c1 = low.to(tl.int16).to(dtype, bitcast=True), (low >> 16).to(tl.int16).to(dtype, bitcast=True)
            c2, c3 = high.to(tl.int16).to(dtype, bitcast=True), (high >> 16).to(tl.int16).to(dtype, bitcast=True)
        dense = tl.reshape(join4(c0, c1, c2, c3), (BM, BK))
        col = start + tl.arange(0, BK)
        x = tl.load(x_rows + col[:, None], mask=token_ok[None, :] & (col[:, None] < k), other=0.0)
        acc = tl.dot(dense, x, acc, input_precision="ieee")

    inside = row_ok[:, None] & token_ok[None, :]
    if SPLIT:
        y_ptr += split.to(tl.int64) * n * m
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=row_ok, other=0).to(tl.float32)[:, None]
    tl.store(y_ptr + token64[None, :] * m + row[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_splits(partial_ptr, bias_ptr, y_ptr, n, m, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y (n, m) = the sum of partial (SPLITS, n, m) in order, plus bias (m,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1)
    at = token.to(tl.int64) * m + row
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + tl.cast(n, tl.int64) * m * split + at, mask=row < m, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=row < m, other=0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=row < m)


def decompress_linear(x: Tensor, packed: Packed, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y = x Ŵᵀ + bias, sums in float32.

    Args:
        x: (tokens, k), bf16, fp16 or fp32, rows contiguous; any number of tokens, though only few make sense.
        packed: Ŵ (m, k) of x's dtype, contiguous.
        bias: (m,) of any floating dtype, contiguous, or None.
        out: (tokens, m) of x's dtype, contiguous, to be written.

    Returns:
        (tokens, m) in x's dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    n, m = _check(x, packed, bias, out)
    y = torch.empty(n, m, dtype=x.dtype, device=x.device) if out is None else out
    if y.numel():
        _launch(x, packed, bias, y, _splits(n, m, packed.cols, x.dtype, _processors(x.device)))
    return y


def _launch(x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, splits: int) -> None:
    values, metadata, k = packed
    n, m = y.shape
    block_n, block_k = _blocks(n, x.dtype)
    if x.dtype != torch.float32:
        values = values.view(torch.int32)
    steps = triton.cdiv(triton.cdiv(k, block_k), splits)
    target = y if splits == 1 else torch.empty(splits, n, m, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _decompress_linear[(triton.cdiv(m, BLOCK_M), triton.cdiv(n, block_n), splits)](
            x, values, metadata, bias, target, n, m, k, metadata.shape[1], x.stride(0), steps,
            BN=block_n, BM=BLOCK_M, BK=block_k, SPLIT=splits > 1, num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            _add_splits[(triton.cdiv(m, 1024), n)](target, bias, y, n, m, SPLITS=splits, BLOCK=1024, num_warps=4)


def _blocks(n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens and columns of a step. A long step has less overhead; a stage of x should stay within 16 KB."""
    block_n = min(MOST_TOKENS_A_TILE, max(16, triton.next_power_of_2(n)))
    if dtype == torch.float32:
        return block_n, 32
    return block_n, 128 if block_n <= 32 else 64


def _splits(n: int, m: int, k: int, dtype: torch.dtype, processors: int) -> int:
    """Parts of k: as many as fill the GPU twice, while the sums stay within a quarter of the weight's bytes."""
    block_n, block_k = _blocks(n, dtype)
    tiles = triton.cdiv(m, BLOCK_M) * triton.cdiv(n, block_n)
    steps = triton.cdiv(k, block_k)
    affordable = k * dtype.itemsize * 9 // 16 // (4 * 2 * 4 * n)  # a row's bytes; a sum is written and read, 4 bytes
    splits = max(1, min(2 * processors // tiles, affordable, steps // 2, MOST_SPLITS))
    return triton.cdiv(steps, triton.cdiv(steps, splits))  # none of them empty


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor | None) -> tuple[int, int]:
    values, metadata, k = packed
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32; found {x.dtype}")
    if x.dim() != 2 or x.shape[1] != k or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            f"x must be (tokens, k={k}) with contiguous rows; found {tuple(x.shape)} with strides {x.stride()}"
        )
    m = values.shape[0]
    if k % 4 or values.shape != (m, k // 2) or values.dtype != x.dtype or not values.is_contiguous():
        raise ValueError(
            f"values must be contiguous {x.dtype} of shape (m, k/2) with k={k} a multiple of 4; "
            f"found {values.dtype} of {tuple(values.shape)} with strides {values.stride()}"
        )
    words = -(-k // 16)
    if metadata.shape != (m, words) or metadata.dtype != torch.int16 or not metadata.is_contiguous():
        raise ValueError(
            f"metadata must be contiguous int16 of shape {(m, words)}; found {metadata.dtype} of "
            f"{tuple(metadata.shape)} with strides {metadata.stride()}"
        )
    if bias is not None and (bias.shape != (m,) or not bias.is_contiguous() or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating point of shape {(m,)}; found {bias.dtype} of {tuple(bias.shape)}")
    n = x.shape[0]
    if out is not None and (out.shape != (n, m) or out.dtype != x.dtype or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous {x.dtype} of shape {(n, m)}; found {out.dtype} of {tuple(out.shape)}")
    return n, m
