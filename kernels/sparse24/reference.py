"""What each 2:4 operator means, in plain PyTorch on any device: the truth every kernel is tested against.

Here are the masks, the soft threshold, the unbiased pruning of gradients (MVUE), the three products of a linear
layer, and the same in fp8; packing and random numbers have files of their own and are found here too.

Shapes: weight (out_features, in_features), activations and their gradients (tokens, features). A *group* is
four consecutive elements along the contraction dimension: in_features for weights, tokens for gradients.
"""

from __future__ import annotations

from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24.packing import Packed, pack, unpack
from sparse24.philox import uniform24

__all__ = [
    "TRANSPOSABLE_PATTERNS",
    "Packed",
    "fp8_dw",
    "fp8_dx",
    "fp8_forward",
    "fp8_matmul",
    "fp8_quantize",
    "linear_dw",
    "linear_dx",
    "linear_forward",
    "magnitude_mask",
    "mvue24",
    "mvue24_fast",
    "pack",
    "soft_threshold",
    "soft_threshold_scale",
    "transposable_mask",
    "uniform24",
    "unpack",
]

# the columns that a row keeps, in the order that ties are broken: 01 02 03 12 13 23
ROW_PATTERNS = tuple(combinations(range(4), 2))


def _transposable_choices() -> list[tuple[int, ...]]:
    """The 90 choices of a row pattern for each of four rows that keep two entries in every column as well."""
    return [
        rows
        for rows in product(range(6), repeat=4)
        if all(sum(column in ROW_PATTERNS[row] for row in rows) == 2 for column in range(4))
    ]


_CHOICES = _transposable_choices()
# (90, 4, 4) boolean, True = kept: all 4x4 blocks that are 2:4 along rows and columns, in lexicographic order
TRANSPOSABLE_PATTERNS = torch.tensor(
    [[[column in ROW_PATTERNS[row] for column in range(4)] for row in rows] for rows in _CHOICES]
)


# --- masks and the soft threshold ---


def _check_weight(weight: Tensor, group: int = 4) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point; found {weight.dtype}")
    if weight.dim() == 0 or weight.shape[-1] % group:
        found = weight.shape[-1] if weight.dim() else "none"
        raise ValueError(f"in_features must be a multiple of {group}; found {found}")


def magnitude_mask(weight: Tensor, kept: int = 2, group: int = 4) -> Tensor:
    """The mask that keeps the `kept` largest |w| of each `group` consecutive ones: 2:4, or N:M in general.

    A tie keeps the lower index. NaN counts as infinite, so NaNs and infinities are kept before anything else:
    a group hides one only if it holds more than `kept`.

    Args:
        weight: (..., in_features), floating point, any strides.
        kept, group: N and M, with 0 < N < M.

    Returns:
        boolean of the same shape, True = kept.

    Raises:
        ValueError: in_features is not a multiple of `group`, or the dtype is not floating point.
    """
    _check_weight(weight, group)
    if (kept, group) != (2, 4):
        magnitude = weight.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf).unflatten(-1, (-1, group))
        largest = magnitude.argsort(dim=-1, descending=True, stable=True)[..., :kept]
        return torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, largest, True).reshape(weight.shape)
    magnitude = weight.detach().unflatten(-1, (-1, 4)).movedim(-1, 0).contiguous().abs()
    a0, a1, a2, a3 = magnitude.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    # b_ij: j > i goes before i. Entry i is kept unless at least two of the others go before it.
    b01, b02, b03, b12, b13, b23 = a1 > a0, a2 > a0, a3 > a0, a2 > a1, a3 > a1, a3 > a2
    dropped = (
        _majority(b01, b02, b03),
        _majority(~b01, b12, b13),
        _majority(~b02, ~b12, b23),
        _majority(~b03, ~b13, ~b23),
    )
    return torch.stack(dropped, dim=-1).logical_not_().reshape(weight.shape)


def _majority(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a & b) | (c & (a | b))


# Entries of a transposable mask's score are capped here, so that a sum of eight stays finite and more NaNs or
# infinities always score higher.
SCORE_CAP = 2.0**123


def transposable_mask(weight: Tensor) -> Tensor:
    """The mask that is 2:4 along rows and along columns and keeps the largest Σ|w| of each 4x4 block.

    The best of the 90 patterns of `TRANSPOSABLE_PATTERNS`, hence optimal (FST, arXiv 2404.01847).

    The order of evaluation is part of the definition, so that backends agree bit for bit: |w| in float32,
    capped at 2¹²³, NaN as 2¹²³; a row scores (first kept + second kept), a pattern (row 0 + row 1) +
    (row 2 + row 3); the first of the patterns with the largest score is taken. Owing to the cap a block keeps
    as many of its NaNs, infinities and values from 2¹²³ on as any pattern can.

    Args:
        weight: (out_features, in_features), floating point, any strides.

    Returns:
        boolean of the same shape, True = kept.

    Raises:
        ValueError: the shape is not two multiples of 4, or the dtype is not floating point.
    """
    _check_weight(weight)
    if weight.dim() != 2 or weight.shape[0] % 4:
        raise ValueError(f"weight must be (out_features, in_features), multiples of 4; found {tuple(weight.shape)}")
    rows, columns = weight.shape[0] // 4, weight.shape[1] // 4
    blocks = weight.detach().reshape(rows, 4, columns, 4).permute(1, 3, 0, 2).float().abs().reshape(4, 4, -1)
    blocks = blocks.nan_to_num_(nan=SCORE_CAP).clamp_(max=SCORE_CAP)
    row_score = [[row[i] + row[j] for i, j in ROW_PATTERNS] for row in blocks]

    best = torch.full_like(blocks[0, 0], -1.0)
    index = torch.zeros_like(best, dtype=torch.uint8)
    score, better = torch.empty_like(best), torch.empty_like(index, dtype=torch.bool)
    for number, (p0, p1, p2, p3) in enumerate(_CHOICES):
        torch.add(row_score[2][p2], row_score[3][p3], out=score)
        score += row_score[0][p0] + row_score[1][p1]
        torch.gt(score, best, out=better)
        torch.maximum(best, score, out=best)
        # numbers grow, so the one to remember is the largest that was better (far faster than a masked write)
        torch.maximum(index, better.view(torch.uint8).mul_(number), out=index)
    mask = TRANSPOSABLE_PATTERNS.to(weight.device)[index.int()]
    return mask.reshape(rows, columns, 4, 4).transpose(1, 2).reshape(weight.shape)


def soft_threshold(weight: Tensor) -> Tensor:
    """S(W)_i = sign(w_i)·max(|w_i| − τ, 0), τ the third largest |w| of the group (S-STE, arXiv 2409.09099).

    Continuous in the weight, with at most two non-zeros in each group. A group that holds a NaN becomes all
    NaN, and so do the infinities of a group that holds three or more.

    Args:
        weight: (..., in_features), floating point, any strides.

    Returns:
        same shape and dtype.

    Raises:
        ValueError: in_features is not a multiple of 4, or the dtype is not floating point.
    """
    _check_weight(weight)
    groups = weight.unflatten(-1, (-1, 4))
    a0, a1, a2, a3 = groups.abs().unbind(-1)
    third = torch.minimum(
        torch.maximum(torch.minimum(a0, a1), torch.minimum(a2, a3)),
        torch.minimum(torch.maximum(a0, a1), torch.maximum(a2, a3)),
    ).unsqueeze(-1)
    return (groups - groups.clamp(-third, third)).reshape(weight.shape)


def soft_threshold_scale(weight: Tensor) -> Tensor:
    """β = ⟨W, S(W)⟩ / ⟨S(W), S(W)⟩, which minimises ‖W − β·S(W)‖² (S-STE, arXiv 2409.09099).

    Meant to be computed once, right after initialisation, and frozen. Gaussian weights give 1.4837.

    Returns:
        0-dim float32; NaN if S(W) is zero everywhere.
    """
    dense, soft = weight.float(), soft_threshold(weight.float())
    return (dense * soft).sum() / (soft * soft).sum()


# --- MVUE: unbiased 2:4 pruning of gradients along tokens ---


def _token_groups(grad: Tensor, *uniforms: Tensor) -> Tensor:
    """`grad` (tokens, features) as (ceil(tokens / 4), 4, features) float32, padded with zero rows."""
    if grad.dim() != 2 or not grad.is_floating_point():
        raise ValueError(f"grad must be floating point (tokens, features); found {grad.dtype} {tuple(grad.shape)}")
    tokens, features = grad.shape
    shape = (-(-tokens // 4), features)
    for uniform in uniforms:
        if uniform.shape != shape or uniform.dtype != torch.float32:
            raise ValueError(
                f"uniform must be float32 of shape {shape}, one for each group of 4 tokens; "
                f"found {uniform.dtype} of {tuple(uniform.shape)}"
            )
    if tokens % 4:
        grad = F.pad(grad, (0, 0, 0, -tokens % 4))
    return grad.float().reshape(shape[0], 4, features)


def mvue24(grad: Tensor, uniform: Tensor) -> Tensor:
    """The minimum-variance unbiased 2:4 estimator of a gradient, along tokens (Chmiel et al. 2022).

    Entry i of a group a is kept with probability p_i = min(1, c·|a_i|), Σp_i = 2, as a_i / p_i. So if the
    largest |a| is at least the sum of the other three, it is kept unchanged, and one of the others as
    sign(a_i)·(their sum) with probability |a_i| / (their sum); otherwise two entries are kept as
    sign(a_i)·Σ|a|/2. They are drawn by systematic sampling: with c_i the cumulative sums of p, those for
    which u or u + 1 lies in [c_{i−1}, c_i).

    A group with fewer than three non-zeros comes back unchanged. What is not finite is never hidden: a single
    infinity is kept, as any largest entry is; a group with a NaN, with several infinities, or whose three
    smallest |a| sum to more than float32 holds becomes four NaNs.

    Args:
        grad: (tokens, features), floating point; padded with zero tokens to a multiple of 4.
        uniform: (ceil(tokens / 4), features) float32 in [0, 1), as from `uniform24`.

    Returns:
        (tokens, features) in grad's dtype, computed in float32.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    groups = _token_groups(grad, uniform)
    kept = groups.abs()
    a0, a1, a2, a3 = kept.unbind(1)
    high01, high23 = torch.maximum(a0, a1), torch.maximum(a2, a3)
    largest = torch.maximum(high01, high23)
    # the other three, added up without the largest: subtracting it from the sum would cancel
    rest = torch.minimum(a0, a1).add_(torch.minimum(a2, a3)).add_(torch.minimum(high01, high23))
    # p_i = min(1, |a_i| / half) in both cases; this order of lerp neither overflows nor loses one infinity
    half = torch.minimum(torch.lerp(largest, rest, 0.5), rest)

    # The points u and u + 1, times half, on the line where the entries lie end to end. The second is given by
    # its distance from the right end, where the sum is 2 by definition: rounding cannot lose the last entry.
    first = uniform * half
    second = half - first
    first_in_0 = first < a0
    first_in_01 = first < a0 + a1
    # whatever the rounding, an entry larger than half holds a point, and the two points are in two entries
    second_in_01 = (second > a2 + a3).logical_or_(a1 > half).logical_and_(first_in_0)
    second_in_012 = (second > a3).logical_or_(a2 > half).logical_or_(second_in_01).logical_and_(first_in_01)

    torch.maximum(kept, half.unsqueeze(1), out=kept).copysign_(groups)
    a0.mul_(first_in_0)
    a1.mul_((first_in_0 ^ first_in_01) | second_in_01)
    a2.mul_(~first_in_01 | (second_in_01 ^ second_in_012))
    a3.mul_(~second_in_012)
    return kept.reshape(-1, grad.shape[1])[: grad.shape[0]].to(grad.dtype)


def mvue24_fast(grad: Tensor, uniform_1: Tensor, uniform_2: Tensor) -> Tensor:
    """The unbiased estimator of FST's training kernel (arXiv 2404.01847); its variance is above `mvue24`'s.

    Two draws without replacement, each with probability proportional to |a|. With t = |a| / Σ|a|, entry i is
    kept with probability p_i = t_i + |a_i|·Σ_{j≠i} t_j / (Σ|a| − |a_j|), as a_i / p_i. A group with fewer
    than three non-zeros comes back unchanged; one that is not finite, or whose sum overflows float32, becomes
    four NaNs.

    Args:
        grad: (tokens, features), floating point; padded with zero tokens to a multiple of 4.
        uniform_1, uniform_2: (ceil(tokens / 4), features) float32 in [0, 1), independent of each other.

    Returns:
        (tokens, features) in grad's dtype, computed in float32.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    groups = _token_groups(grad, uniform_1, uniform_2)
    magnitude = groups.abs()
    total = magnitude.sum(dim=1, keepdim=True)
    share = magnitude / total
    probability = share + magnitude * _sum_of_others(share / _sum_of_others(magnitude))
    first = _draw(magnitude, uniform_1)
    second = _draw(magnitude.masked_fill(first, 0.0), uniform_2)
    kept = torch.where(first | second, groups / probability, 0.0)
    kept = torch.where((groups != 0).sum(dim=1, keepdim=True) < 3, groups, kept)
    kept = torch.where(total.isfinite(), kept, torch.nan)
    return kept.reshape(-1, grad.shape[1])[: grad.shape[0]].to(grad.dtype)


def _sum_of_others(x: Tensor) -> Tensor:
    """For each entry of (groups, 4, features) the sum of the other three of its group, not by subtracting."""
    return torch.stack([x[:, [j for j in range(4) if j != i]].sum(dim=1) for i in range(4)], dim=1)


def _draw(magnitude: Tensor, uniform: Tensor) -> Tensor:
    """One-hot (groups, 4, features): entry i with probability magnitude_i / Σ; all False if all are 0."""
    cumulative = magnitude.cumsum(dim=1)
    point = uniform.unsqueeze(1) * cumulative[:, 3:]
    # uniform·Σ may round up to Σ: the last non-zero entry is the one meant then
    point = torch.minimum(point, torch.nextafter(cumulative[:, 3:], torch.zeros_like(point)))
    passed = (point >= cumulative).sum(dim=1, keepdim=True)
    return torch.arange(4, device=magnitude.device).view(4, 1) == passed


# --- the three products of a sparse linear layer ---


def linear_forward(x: Tensor, sparse_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = X Ŵᵀ + b: x (tokens, in), sparse_weight (out, in), bias (out,) or None."""
    return F.linear(x, sparse_weight, bias)


def linear_dx(dy: Tensor, sparse_weight: Tensor) -> Tensor:
    """dX = dY Ŵ: dy (tokens, out), sparse_weight (out, in)."""
    return dy @ sparse_weight


def linear_dw(dy: Tensor, x: Tensor, uniform: Tensor | None = None) -> Tensor:
    """dW = dYᵀ X: dy (tokens, out), pruned by `mvue24` first if `uniform` is given, x (tokens, in)."""
    if uniform is not None:
        dy = mvue24(dy, uniform)
    return dy.t() @ x


# --- the same in fp8: e4m3 forward, e5m2 for whatever meets a gradient (S-STE, arXiv 2409.09099) ---

SMALLEST_FP8_SCALE = 2.0**-126  # its reciprocal is finite


def fp8_quantize(x: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q and scale with q·scale ≈ x: q = fp8(x·(1/scale)), one scale for the tensor, from its amax as it is now.

    The scale is amax / (largest finite value of the dtype): at least 2⁻¹²⁶, and 1 if amax is 0. Rounded to nearest,
    ties to even. If amax is not finite then the scale is not either, and every product with it is infinite or NaN.

    Args:
        x: floating point, any shape and strides; computed in float32.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        amax: 0-dim float32, of the whole tensor of which x is a part; default: x's.

    Returns:
        q, contiguous, of x's shape; scale, 0-dim float32.
    """
    x = x.detach().float().contiguous()
    largest = torch.finfo(dtype).max
    if amax is None:
        amax = x.abs().amax() if x.numel() else x.new_zeros(())
    scale = amax / torch.full_like(amax, largest)  # by a tensor: CUDA multiplies by the reciprocal of a number
    scale = torch.where(scale < SMALLEST_FP8_SCALE, torch.where(amax == 0, 1.0, SMALLEST_FP8_SCALE), scale)
    return (x * scale.reciprocal()).clamp(-largest, largest).to(dtype), scale


def fp8_matmul(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """scale · a b in float32, whether autocast is on or not: fp8 values, multiplied exactly, added up in float32.

    Args:
        a: (m, k), of either fp8 dtype.
        b: (k, n), of either fp8 dtype.
        scale: 0-dim float32, the product of both scales.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda:  # bf16 holds every fp8 value, and its products are exact in float32
            return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32) * scale
        return a.float() @ b.float() * scale


def fp8_forward(x: Tensor, sparse_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = E4M3(X) E4M3(Ŵ)ᵀ + b in float32; arguments as for `linear_forward`."""
    (x, scale), (weight, weight_scale) = (fp8_quantize(t, torch.float8_e4m3fn) for t in (x, sparse_weight))
    y = fp8_matmul(x, weight.t(), scale * weight_scale)
    return y if bias is None else y + bias


def fp8_dx(dy: Tensor, sparse_weight: Tensor) -> Tensor:
    """dX = E5M2(dY) E5M2(Ŵ) in float32; arguments as for `linear_dx`."""
    (dy, scale), (weight, weight_scale) = (fp8_quantize(t, torch.float8_e5m2) for t in (dy, sparse_weight))
    return fp8_matmul(dy, weight, scale * weight_scale)


def fp8_dw(dy: Tensor, x: Tensor, uniform: Tensor | None = None) -> Tensor:
    """dW = E5M2(dY)ᵀ E5M2(X) in float32, dY pruned before it is quantised; arguments as for `linear_dw`."""
    if uniform is not None:
        dy = mvue24(dy, uniform)
    (dy, scale), (x, x_scale) = (fp8_quantize(t, torch.float8_e5m2) for t in (dy, x))
    return fp8_matmul(dy.t(), x, scale * x_scale)
