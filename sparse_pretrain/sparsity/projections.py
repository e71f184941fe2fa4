"""Which weights a recipe can serve."""

from __future__ import annotations

from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.limits import parse_pattern


def shape_obstacle(recipe: RecipeConfig, out_features: int, in_features: int, linear: bool = True) -> str | None:
    """Why a recipe cannot serve a weight of this shape, or None if it can. Only linear layers have adapters."""
    parsed = parse_pattern(recipe.pattern)
    assert parsed is not None  # checked before
    group = parsed[1]
    if recipe.projection != "none":
        if in_features % group:
            return f"in_features={in_features} is not a multiple of {group}"
        if recipe.projection == "transposable" and out_features % 4:
            return f"out_features={out_features} is not a multiple of 4, as transposable masks need"
        if recipe.input_gradient == "double_pruned" and out_features % group:
            return f"out_features={out_features} is not a multiple of {group}, as input_gradient=double_pruned needs"
    if linear and recipe.adapter.kind == "slorb" and in_features % recipe.adapter.group:
        return f"in_features={in_features} is not a multiple of recipe.adapter.group={recipe.adapter.group}"
    return None
