"""Fragment order: a packed matrix stored so that sparse tensor-core instructions read it without any shuffle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse24.packing import Packed

FRAGMENT_ROWS, FRAGMENT_COLS = 16, 64
_16_BIT = (torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fragments(NamedTuple):
    """A 2:4 matrix (rows, cols) in the order in which `mma.sp` and `wgmma.sp` hold it in registers.

    A warp reads the compressed operand of one instruction as one 16-byte load a lane, and the metadata of 64
    columns as one 4-byte load. With lane = 4g + t, g = 0..7, t = 0..3 (PTX ISA, "Matrix Fragments for sparse
    mma.m16n8k32" and "mma.m16n8k64"):

    16-bit dtypes, one instruction for 32 columns, S its (16, 16) stored tile:
        values (rows/16, cols/64, 2 instructions, 32 lanes, 4): S[g][2t:2t+2], S[g+8][2t:2t+2], S[g][2t+8:2t+10],
            S[g+8][2t+8:2t+10], the first value of a pair in the low half.
        metadata (rows/16, cols/64, 32 lanes): E[g][t] in the low half, E[g+8][t] in the high one, E the four
            int16 words of `Packed` of a row in these 64 columns. The first instruction takes its metadata from
            the lanes t = 0, 1 (sparsity selector 0), the second from t = 2, 3 (selector 1).
    fp8, one instruction for 64 columns, S its (16, 32) stored tile:
        values (rows/16, cols/64, 32 lanes, 4): S[g][4t:4t+4], S[g+8][4t:4t+4], S[g][4t+16:4t+20],
            S[g+8][4t+16:4t+20], the first value in the lowest byte.
        metadata (rows/16, cols/64, 32 lanes): E[g + 8(t & 1)][t >> 1], E the two 32-bit words of a row, each
            two int16 words of `Packed`, the first in the low half (selector 0).

    values, metadata: int32, contiguous.
    rows: a multiple of 16.
    cols: of the dense matrix, a multiple of 64.
    dtype: of the stored values.
    """

    values: Tensor
    metadata: Tensor
    rows: int
    cols: int
    dtype: torch.dtype


def fragment_shapes(rows: int, cols: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `Fragments.values` and `Fragments.metadata`, both int32.

    Raises:
        ValueError: rows, cols or dtype have no fragment order.
    """
    if rows % FRAGMENT_ROWS:
        raise ValueError(f"rows must be a multiple of {FRAGMENT_ROWS} in fragment order; found {rows}")
    if cols % FRAGMENT_COLS:
        raise ValueError(f"cols must be a multiple of {FRAGMENT_COLS} in fragment order; found {cols}")
    tiles = (rows // FRAGMENT_ROWS, cols // FRAGMENT_COLS)
    if dtype in _16_BIT:
        return (*tiles, 2, 32, 4), (*tiles, 32)
    if dtype in _FP8:
        return (*tiles, 32, 4), (*tiles, 32)
    names = ", ".join(str(d).removeprefix("torch.") for d in (*_16_BIT, *_FP8))
    raise ValueError(f"dtype must be one of {names} in fragment order; found {dtype}")


def to_fragments(packed: Packed) -> Fragments:
    """The same matrix in fragment order, bit for bit.

    Raises:
        ValueError: rows is not a multiple of 16, cols not of 64, the dtype is neither 16-bit nor fp8, or the
            parts of `packed` do not fit each other.
    """
    values, metadata, cols = packed
    rows, dtype = values.shape[0], values.dtype
    fragment_shapes(rows, cols, dtype)
    if values.shape != (rows, cols // 2):
        raise ValueError(f"values must be (rows, cols/2) with cols={cols}; found {tuple(values.shape)}")
    if metadata.shape != (rows, cols // 16) or metadata.dtype != torch.int16:
        raise ValueError(
            f"metadata must be int16 of shape {(rows, cols // 16)}; found {metadata.dtype} of {tuple(metadata.shape)}"
        )
    tiles = (rows // 16, cols // 64)
    word = values.contiguous().view(torch.int32)  # two values, or four of fp8
    if dtype in _16_BIT:
        # dimensions: tile, row half, g | tile, instruction, column half, t
        word = word.reshape(tiles[0], 2, 8, tiles[1], 2, 2, 4).permute(0, 3, 4, 2, 6, 5, 1).contiguous()
        # tile, row half, g | tile, t
        index = metadata.reshape(tiles[0], 2, 8, tiles[1], 4).permute(0, 3, 2, 4, 1).contiguous()
        word, index = word.reshape(*tiles, 2, 32, 4), index.reshape(*tiles, 32, 2)
        return Fragments(word, index.view(torch.int32).squeeze(-1), rows, cols, dtype)
    word = word.reshape(tiles[0], 2, 8, tiles[1], 2, 4).permute(0, 3, 2, 5, 4, 1).contiguous()
    index = metadata.contiguous().view(torch.int32).reshape(tiles[0], 2, 8, tiles[1], 2).permute(0, 3, 2, 4, 1)
    return Fragments(word.reshape(*tiles, 32, 4), index.contiguous().reshape(*tiles, 32), rows, cols, dtype)


def packed_output(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    fragments: bool = False,
    out: Packed | Fragments | None = None,
    name: str = "out",
) -> Packed | Fragments:
    """What a packing kernel writes to: `out` if it fits, or else new memory, not filled.

    Raises:
        ValueError: there is no such layout, or `out` is not this one, contiguous and on this device.
    """
    if cols % 4:
        raise ValueError(f"cols must be a multiple of 4; found {cols}")
    if fragments:
        (values, metadata), dtypes = fragment_shapes(rows, cols, dtype), (torch.int32, torch.int32)
    else:
        values, metadata, dtypes = (rows, cols // 2), (rows, -(-cols // 16)), (dtype, torch.int16)
    if out is None:
        new = [torch.empty(s, dtype=d, device=device) for s, d in zip((values, metadata), dtypes, strict=True)]
        return Fragments(new[0], new[1], rows, cols, dtype) if fragments else Packed(new[0], new[1], cols)
    if not isinstance(out, kind := Fragments if fragments else Packed):
        raise ValueError(f"{name} must be {kind.__name__}; found {type(out).__name__}")
    if out.cols != cols or (isinstance(out, Fragments) and (out.rows, out.dtype) != (rows, dtype)):
        raise ValueError(f"{name} must be a matrix ({rows}, {cols}) of {dtype}; found another")
    for part, tensor, shape, needed in (
        ("values", out.values, values, dtypes[0]),
        ("metadata", out.metadata, metadata, dtypes[1]),
    ):
        if tensor.shape != shape or tensor.dtype != needed or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name}.{part} must be {needed} of shape {shape}, contiguous, on {device}; found {tensor.dtype} of "
                f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
    return out


def from_fragments(fragments: Fragments) -> Packed:
    """The row-major form of `to_fragments`, bit for bit.

    Raises:
        ValueError: the parts of `fragments` do not fit each other.
    """
    values, metadata, rows, cols, dtype = fragments
    for name, tensor, shape in zip(
        ("values", "metadata"), (values, metadata), fragment_shapes(rows, cols, dtype), strict=True
    ):
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 of shape {shape}; found {tensor.dtype} of {tuple(tensor.shape)}")
    tiles = (rows // 16, cols // 64)
    if dtype in _16_BIT:
        word = values.reshape(*tiles, 2, 8, 4, 2, 2).permute(0, 6, 3, 1, 2, 5, 4).contiguous()
        index = metadata.contiguous().view(torch.int16).reshape(*tiles, 8, 4, 2).permute(0, 4, 2, 1, 3).contiguous()
        return Packed(word.reshape(rows, -1).view(dtype), index.reshape(rows, cols // 16), cols)
    word = values.reshape(*tiles, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3).contiguous().reshape(rows, -1)
    index = metadata.reshape(*tiles, 8, 2, 2).permute(0, 4, 2, 1, 3).contiguous().reshape(rows, -1)
    return Packed(word.view(dtype), index.view(torch.int16), cols)
