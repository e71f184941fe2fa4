"""The packed form of a 2:4 matrix: the kept values, and two bits each for where they were."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes


class Packed(NamedTuple):
    """A 2:4 matrix (rows, cols): 9/16 of the dense bytes in a 16-bit dtype.

    values: (rows, cols/2), the two kept entries of each group of four in increasing column order.
    metadata: (rows, ceil(cols/16)) int16, the position (0..3) of each value within its group in two bits,
        eight per word, the first in the lowest bits; a word that is not filled ends with the positions 0, 1
        of empty groups.
    cols: columns of the dense matrix, a multiple of 4.
    """

    values: Tensor
    metadata: Tensor
    cols: int


def pack(weight: Tensor, mask: Tensor | None = None) -> Packed:
    """Pack a matrix that is 2:4 along its last dimension.

    Args:
        weight: (rows, cols), any dtype and strides.
        mask: (rows, cols) boolean, True = kept, two in each group. Without it the non-zeros are kept, and a
            group with fewer than two of them is filled up with its lowest free positions. With it every kept
            value comes back bit for bit from `unpack`, zeros of either sign and NaN included.

    Raises:
        ValueError: the shape does not fit, or a group does not keep two (without mask: at most two) entries.
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(f"weight must be (rows, cols) with cols a multiple of 4; found {tuple(weight.shape)}")
    if mask is None:
        kept = weight != 0
    elif mask.shape == weight.shape and mask.dtype == torch.bool:
        kept = mask
    else:
        raise ValueError(
            f"mask must be boolean of shape {tuple(weight.shape)}; found {mask.dtype} of {tuple(mask.shape)}"
        )
    rows, cols = weight.shape
    kept = kept.reshape(rows, cols // 4, 4)
    count = kept.sum(dim=2)
    if mask is None and (count > 2).any():
        raise ValueError(f"weight must have at most 2 non-zeros in each group of 4; found {int(count.max())}")
    if mask is not None and (count != 2).any():
        found = int(count[count != 2][0])
        raise ValueError(f"mask must have exactly 2 True in each group of 4; found {found}")

    if mask is None:
        # stable: non-zeros come first, then free positions, each in increasing order
        two = torch.argsort(kept.byte(), dim=2, descending=True, stable=True)[..., :2]
        kept = torch.zeros_like(kept).scatter_(2, two, True)
    # indexing by a mask copies bits; `gather` rewrites the NaNs of bfloat16 on the CPU
    values = weight.reshape(rows, cols // 4, 4)[kept].reshape(rows, cols // 2)
    position = kept.nonzero()[:, 2].reshape(rows, cols // 4, 2)
    position = position.to(torch.int32)
    if missing := -(cols // 4) % 4:
        empty = torch.tensor([0, 1], dtype=torch.int32, device=weight.device).expand(rows, missing, 2)
        position = torch.cat([position, empty], dim=1)
    shift = 2 * torch.arange(8, dtype=torch.int32, device=weight.device)
    word = (position.reshape(rows, -(-cols // 16), 8) << shift).sum(dim=2)
    return Packed(values, (word - ((word & 0x8000) << 1)).to(torch.int16), cols)


def unpack(packed: Packed) -> Tensor:
    """The dense (rows, cols) matrix of `pack`, zero (+0) where nothing was kept.

    Raises:
        ValueError: the three parts do not fit each other.
    """
    values, metadata, cols = packed
    rows, words = values.shape[0], -(-cols // 16)
    if cols % 4 or values.shape != (rows, cols // 2):
        raise ValueError(f"values must be (rows, cols/2) with cols={cols} a multiple of 4; found {tuple(values.shape)}")
    if metadata.shape != (rows, words) or metadata.dtype != torch.int16:
        raise ValueError(
            f"metadata must be int16 of shape {(rows, words)}; found {metadata.dtype} of {tuple(metadata.shape)}"
        )
    shift = 2 * torch.arange(8, dtype=torch.int32, device=values.device)
    position = (metadata.to(torch.int32).unsqueeze(2) >> shift) & 3  # the sign only reaches bits that are masked off
    position = position.reshape(rows, words * 4, 2)[:, : cols // 4].to(torch.int64)
    bits = values.view(INTEGERS[values.element_size()])  # which are copied as they are, NaN included
    dense = bits.new_zeros(rows, cols // 4, 4).scatter_(2, position, bits.reshape(rows, cols // 4, 2))
    return dense.view(values.dtype).reshape(rows, cols)
