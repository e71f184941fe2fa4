"""OATS (Zhang & Papyan, ICLR 2025, arXiv 2409.13652): a layer as a sparse plus a low-rank matrix, fitted where its
inputs are large."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_pretrain.pruning.patterns import Pattern, keep_largest, keep_number

OVERSAMPLING = 16  # random directions beyond the rank


def compression(pattern: Pattern, rank_ratio: float) -> float:
    """ρ, the share of the layer's weights that is saved, with κ = rank_ratio: N:M fixes the sparse part, so that
    1 − ρ = (N/M) / (1 − κ); a share is ρ itself. It is below 0 where the two parts together are larger than the layer.
    """
    if isinstance(pattern, float):
        return pattern
    return 1 - pattern[0] / pattern[1] / (1 - rank_ratio)


def rank_share(pattern: Pattern, rank_ratio: float) -> float:
    """κ(1 − ρ): the size of the low-rank part, as a share of the layer's weights."""
    return rank_ratio * (1 - compression(pattern, rank_ratio))


def rank(out_features: int, in_features: int, share: float) -> int:
    """The largest rank whose factors, r (out + in) numbers, are at most `share` of a layer's weights; at least 1."""
    return max(1, math.floor(share * out_features * in_features / (out_features + in_features) + 1e-9))


def oats(
    weight: Tensor,
    squares: Tensor,
    pattern: Pattern,
    rank_ratio: float = 0.25,
    iterations: int = 80,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """W ≈ S + U V: alternately the best rank-r matrix beside S, and the largest entries beside the rank-r matrix, of
    W D with D = √diag(XᵀX) (algorithms 1 and 2); D is undone at the end.

    Args:
        weight: (out_features, in_features), fp32.
        squares: (in_features,), fp32: the squares of each input, as a mean or sum over the calibration tokens.
        pattern: of S: N:M; or, for a share ρ of the layer to save, ⌊(1 − κ)(1 − ρ) · in⌋ entries of each row stay.
        rank_ratio: κ, the low-rank part's share of what is left.
        iterations: alternations.
        seed: None = each truncated SVD is cut from a whole one. Else it is a randomised one (Halko et al. 2011, two
            power iterations), its directions drawn from this seed: several times faster, and the larger the layer,
            the more so; the error is up to a percent larger.

    Returns:
        S (out_features, in_features), U (out_features, r) and V (r, in_features), all fp32. Columns of S and V whose
        input was always zero are zero.

    Raises:
        ValueError: in_features is not a multiple of M.
    """
    scale = squares.sqrt()
    undo = torch.where(scale > 0, 1 / scale, 0)
    scaled = weight * scale
    r = rank(weight.shape[0], weight.shape[1], rank_share(pattern, rank_ratio))
    sparse, left, right = torch.zeros_like(scaled), scaled[:, :0], scaled[:0]
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        if seed is not None:
            torch.manual_seed(seed)
        for _ in range(iterations):
            left, right = truncated_svd(scaled - sparse, r, exact=seed is None)
            rest = scaled - left @ right
            sparse = rest.masked_fill(~_mask(rest.abs(), pattern, rank_ratio), 0)
    return sparse * undo, left.contiguous(), (right * undo).contiguous()


def _mask(scores: Tensor, pattern: Pattern, rank_ratio: float) -> Tensor:
    if isinstance(pattern, tuple):
        return keep_largest(scores, pattern)
    return keep_number(scores, math.floor((1 - rank_ratio) * (1 - pattern) * scores.shape[-1] + 1e-9))


def truncated_svd(matrix: Tensor, r: int, exact: bool = True) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r, as U_r Σ_r (rows, r) and V_rᵀ (r, columns); nearly the best where not `exact`,
    with directions drawn from torch's global random numbers."""
    if exact:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(r + OVERSAMPLING, *matrix.shape), niter=2)
        v = v.t()
    return u[:, :r] * s[:r], v[:r]
