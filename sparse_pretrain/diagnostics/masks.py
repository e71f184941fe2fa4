"""Masks of trained models: which weights they keep, and how far two of them agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from sparse24 import ops
from torch import Tensor, nn

from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.swap import select_layers


@dataclass(frozen=True)
class PrunedLayer:
    """A layer that is sparse, or would be.

    weight: the master weight; kept and mask (True = kept): Ŵ and its mask, or, where it computes with all of `weight`
    (`is_sparse` False), what one-shot magnitude pruning would leave; all (out_features, in_features). A plain layer
    whose weight has the pattern's zeros is sparse. pattern: N and M.
    """

    layer: nn.Module
    is_sparse: bool
    weight: Tensor
    kept: Tensor
    mask: Tensor
    pattern: tuple[int, int]


def pruned_layers(model: nn.Module, recipe: RecipeConfig) -> dict[str, PrunedLayer]:
    """By name, in order.

    Args:
        recipe: says which layers, for a model that has no sparse ones.

    Raises:
        UserError: the recipe's patterns do not fit the model.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    if not names:
        names = [row.name for row in select_layers(model, recipe) if row.sparse]
    pattern = parse_pattern(recipe.pattern)
    assert pattern is not None
    return {name: _pruned_layer(model.get_submodule(name), pattern) for name in names}


def _pruned_layer(layer: nn.Module, pattern: tuple[int, int]) -> PrunedLayer:
    if isinstance(layer, SparseLinear):
        weight, pattern = layer.out_by_in(layer.weight.detach()), layer.pattern
        if layer.is_sparse:
            return PrunedLayer(layer, True, weight, layer.current_weight(), layer.out_by_in(layer.mask), pattern)
    else:
        weight = cast(nn.Linear, layer).weight.detach()
    mask = magnitude_mask(weight, pattern)
    return PrunedLayer(layer, torch.equal(weight * mask, weight), weight, weight * mask, mask, pattern)


def magnitude_mask(weight: Tensor, pattern: tuple[int, int]) -> Tensor:
    """The N largest magnitudes of each M consecutive inputs; weight (out_features, in_features)."""
    mask = torch.empty_like(weight, dtype=torch.bool)
    ops.refresh_mask_(weight, mask, "magnitude", pattern)
    return mask


@dataclass(frozen=True)
class Agreement:
    """equal: share of the entries that two masks have in common; overlap: |A ∩ B| / min(|A|, |B|), of those they keep.
    Each with what independent masks of these densities would have on average."""

    equal: float
    equal_by_chance: float
    overlap: float
    overlap_by_chance: float


def agreement(a: Tensor, b: Tensor) -> Agreement:
    """Of two masks of one shape."""
    kept_a, kept_b, both = int(a.sum()), int(b.sum()), int((a & b).sum())
    density_a, density_b = kept_a / a.numel(), kept_b / b.numel()
    return Agreement(
        equal=int((a == b).sum()) / a.numel(),
        equal_by_chance=density_a * density_b + (1 - density_a) * (1 - density_b),
        overlap=both / max(min(kept_a, kept_b), 1),
        overlap_by_chance=max(density_a, density_b),
    )


def pruned_mass(weight: Tensor, mask: Tensor, second_moment: Tensor, share: float) -> tuple[float, float]:
    """How much of the pruned |W| lies in the columns with the largest inputs.

    Args:
        weight, mask: (out_features, in_features).
        second_moment: of each input, (in_features,).
        share: of the columns, at least one.

    Returns:
        Their share of the pruned mass Σ|W|, and of the columns. 0 if nothing is pruned.
    """
    columns = max(math.ceil(share * weight.shape[1]), 1)
    by_column = weight.abs().double().masked_fill(mask, 0).sum(0)
    top = second_moment.to(by_column.device).topk(columns).indices
    total = float(by_column.sum())
    return (float(by_column[top].sum()) / total if total else 0.0), columns / weight.shape[1]
