"""Pruning by a mask alone: magnitude, and Wanda (Sun et al., ICLR 2024, arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from sparse_pretrain.pruning.patterns import Pattern, keep_largest


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |w|: of each group, or, for a share, of the whole layer.

    weight: (out_features, in_features), floating point; returns the same with zeros.
    """
    scores = weight.abs()
    mask = keep_largest(scores if isinstance(pattern, tuple) else scores.flatten(), pattern)
    return weight.masked_fill(~mask.reshape(weight.shape), 0)


def wanda(weight: Tensor, squares: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |w_ij| · ‖X_j‖₂ (equation 1): of each group, or, for a share, of each output's row.

    Args:
        weight: (out_features, in_features), fp32.
        squares: (in_features,), fp32: ‖X_j‖₂², the squares of each input summed over the calibration tokens.

    Returns:
        The weight with zeros; what is kept is unchanged.
    """
    mask = keep_largest(weight.abs() * squares.sqrt(), pattern)
    return weight.masked_fill(~mask, 0)
