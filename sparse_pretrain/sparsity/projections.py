"""How a dense (master) weight becomes the 2:4 weight of this step."""

from __future__ import annotations

from collections.abc import Callable

from sparse24 import reference
from torch import Tensor

# recipe.projection -> the mask of a weight (out_features, in_features), True = kept
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "magnitude": reference.magnitude_mask,
    "transposable": reference.transposable_mask,
}


def shape_obstacle(projection: str, out_features: int, in_features: int) -> str | None:
    """Why a weight of this shape cannot be projected, or None if it can."""
    if in_features % 4:
        return f"in_features={in_features} is not a multiple of 4"
    if projection == "transposable" and out_features % 4:
        return f"out_features={out_features} is not a multiple of 4, as transposable masks need"
    return None
