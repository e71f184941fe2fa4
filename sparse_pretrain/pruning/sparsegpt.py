"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv 2301.00774): what a pruned weight contributed to the layer's output
is taken over, as well as it can be, by the weights of the columns to its right."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_pretrain.pruning.patterns import Pattern, keep_largest


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern, damping: float = 0.01, block_size: int = 128) -> Tensor:
    """Algorithm 1 of the paper.

    Columns go from left to right. One with weight w and error e = w / [H⁻¹]_jj, where w is pruned, changes the later
    columns of its row by −e · [H⁻¹]_j,: with H⁻¹ of the columns that are left; the rows of the upper Cholesky factor of
    H⁻¹ hold all of these inverses. The mask is chosen by w² / [H⁻¹]_jj, as the weights are by then: of each N:M group
    when its first column comes, for a share of each block of columns, over all rows, when the block begins.

    Args:
        weight: (out_features, in_features), fp32.
        gram: (in_features, in_features), fp32: XᵀX over the calibration tokens; its scale is of no importance.
        damping: share of the mean diagonal of H = 2XᵀX that is added to the diagonal.
        block_size: columns whose updates reach the columns right of the block at once. For N:M it is rounded down to a
            multiple of M.

    Returns:
        The pruned and updated weight. Columns whose input was always zero are pruned and count as chosen first.

    Raises:
        ValueError: in_features is not a multiple of M.
    """
    columns = weight.shape[1]
    group = pattern[1] if isinstance(pattern, tuple) else 1
    if columns % group:
        raise ValueError(f"in_features must be a multiple of {group}; found {columns}")
    block_size = max(block_size // group, 1) * group
    dead = gram.diagonal() == 0
    weight = weight.masked_fill(dead, 0)
    factor = inverse_factor(gram, dead, damping)

    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, inverse = weight[:, start:end].clone(), factor[start:end, start:end]
        diagonal = inverse.diagonal()
        errors = torch.empty_like(block)
        if isinstance(pattern, tuple):
            kept = torch.empty_like(block, dtype=torch.bool)
        else:
            scores = (block / diagonal).square()
            kept = keep_largest(scores.flatten(), pattern).reshape(block.shape)
        for i in range(end - start):
            if isinstance(pattern, tuple) and i % group == 0:
                columns_of_group = slice(i, i + group)
                scores = (block[:, columns_of_group] / diagonal[columns_of_group]).square()
                kept[:, columns_of_group] = keep_largest(scores, pattern)
            error = block[:, i].masked_fill(kept[:, i], 0) / diagonal[i]
            block[:, i:] -= torch.outer(error, inverse[i, i:])
            errors[:, i] = error
        weight[:, start:end] = block.masked_fill(~kept, 0)
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def inverse_factor(gram: Tensor, dead: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped H⁻¹ = UᵀU, (in_features, in_features) fp32.

    Factored in fp64: H may be as good as singular, and the inverse is what everything depends on.
    """
    hessian = 2 * gram.double()
    diagonal = hessian.diagonal()
    added = damping * diagonal[~dead].mean() if not dead.all() else 1.0
    diagonal += added
    diagonal[dead] = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).to(gram.dtype)
