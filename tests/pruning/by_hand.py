"""The methods once more, in numpy and fp64, column by column and entry by entry as the papers' equations have them."""

import numpy as np


def smallest(scores: np.ndarray, number: int) -> list[int]:
    """Indices of the `number` smallest; of equal ones the higher index goes first."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:number]


def wanda(weight: np.ndarray, x: np.ndarray, pattern) -> np.ndarray:
    """Equation 1: S_ij = |W_ij| · ‖X_j‖₂; per group of an output, or per output."""
    result = weight.copy()
    for row in range(weight.shape[0]):
        scores = np.array([abs(weight[row, j]) * np.sqrt(sum(x[:, j] ** 2)) for j in range(weight.shape[1])])
        if isinstance(pattern, float):
            groups, pruned = [range(weight.shape[1])], int(pattern * weight.shape[1])
        else:
            kept, size = pattern
            groups = [range(start, start + size) for start in range(0, weight.shape[1], size)]
            pruned = size - kept
        for group in groups:
            for i in smallest(scores[list(group)], pruned):
                result[row, group[i]] = 0
    return result


def obs_sparsegpt(weight: np.ndarray, x: np.ndarray, pattern, damping: float, block: int) -> np.ndarray:
    """SparseGPT without its factorisation: for every column the inverse of the Hessian of the columns that are left is
    computed anew, and the optimal update of Optimal Brain Surgeon (equations 2 and 3) applied to them."""
    hessian = 2 * x.T @ x
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    weight = weight.copy()
    rows, columns = weight.shape
    pruned = np.zeros(weight.shape, bool)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]  # of the columns j, j + 1, ...
    diagonal = np.array([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        if isinstance(pattern, float):
            if j % block == 0:
                end = min(j + block, columns)
                scores = weight[:, j:end] ** 2 / diagonal[j:end]
                for flat in smallest(scores.flatten(), int(pattern * scores.size)):
                    pruned[flat // (end - j), j + flat % (end - j)] = True
        elif j % pattern[1] == 0:
            kept, size = pattern
            for row in range(rows):
                scores = weight[row, j : j + size] ** 2 / diagonal[j : j + size]
                for i in smallest(scores, size - kept):
                    pruned[row, j + i] = True
        for row in range(rows):
            if pruned[row, j]:
                weight[row, j:] -= weight[row, j] / diagonal[j] * inverses[j][0]
                weight[row, j] = 0
    return weight


def oats(weight: np.ndarray, x: np.ndarray, rank: int, kept_per_row: int | tuple, iterations: int):
    """Algorithm 2 on W D, D = diag(XᵀX)^½; returns S D⁻¹, U Σ and V D⁻¹."""
    scale = np.sqrt(np.diag(x.T @ x))
    a = weight @ np.diag(scale)
    sparse = np.zeros_like(a)
    for _ in range(iterations):
        u, s, v = np.linalg.svd(a - sparse, full_matrices=False)
        low = u[:, :rank] @ np.diag(s[:rank]) @ v[:rank]
        rest = a - low
        sparse = rest.copy()
        for row in sparse:
            if isinstance(kept_per_row, int):
                row[smallest(np.abs(row), len(row) - kept_per_row)] = 0
            else:
                kept, size = kept_per_row
                for start in range(0, len(row), size):
                    group = row[start : start + size]
                    group[smallest(np.abs(group), size - kept)] = 0
    return sparse @ np.diag(1 / scale), u[:, :rank] * s[:rank], v[:rank] @ np.diag(1 / scale)
