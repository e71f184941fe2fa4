"""Which weights stay: N of each M consecutive inputs, or all but a share, by the size of a score."""

from __future__ import annotations

from sparse24.reference import magnitude_mask
from torch import Tensor

from sparse_pretrain.errors import UserError
from sparse_pretrain.limits import parse_pattern

# (N, M): at most N of each M consecutive inputs stay; a number: the share of the weights that is pruned.
Pattern = tuple[int, int] | float


def parse(text: str) -> Pattern:
    """`2:4` -> (2, 4); `0.5` -> 0.5.

    Raises:
        UserError: it is neither N:M with 0 < N < M nor a share above 0 and below 1.
    """
    groups = parse_pattern(text)
    if groups is not None:
        return groups
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError("pattern", text, "N:M with 0 < N < M, as 2:4, or the share to prune, as 0.5")
    return share


def share_pruned(pattern: Pattern) -> float:
    return pattern if isinstance(pattern, float) else 1 - pattern[0] / pattern[1]


def keep_largest(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the largest scores: along the last dimension, in each group of N:M or in each row.

    Args:
        scores: (..., in_features), not negative, finite. A share s prunes ⌊s · in_features⌋ of each row.

    Returns:
        boolean of the same shape, True = kept. A tie keeps the lower index.

    Raises:
        ValueError: in_features is not a multiple of M.
    """
    if isinstance(pattern, tuple):
        return magnitude_mask(scores, *pattern)
    return keep_number(scores, scores.shape[-1] - pruned_number(pattern, scores.shape[-1]))


def pruned_number(share: float, size: int) -> int:
    return int(share * size + 1e-6)  # 0.29 · 100 is 28.999…


def keep_number(scores: Tensor, kept: int) -> Tensor:
    """The mask of the `kept` largest scores of each row; a tie keeps the lower index."""
    size = scores.shape[-1]
    if kept == 0:
        return scores != scores
    threshold = scores.kthvalue(size - kept + 1, dim=-1, keepdim=True).values
    above = scores > threshold
    at = scores == threshold
    room = kept - above.sum(-1, keepdim=True)
    return above | (at & (at.cumsum(-1) <= room))
