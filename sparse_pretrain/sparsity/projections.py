"""Which weights a projection can make 2:4."""

from __future__ import annotations


def shape_obstacle(projection: str, out_features: int, in_features: int) -> str | None:
    """Why a weight of this shape cannot be projected, or None if it can."""
    if in_features % 4:
        return f"in_features={in_features} is not a multiple of 4"
    if projection == "transposable" and out_features % 4:
        return f"out_features={out_features} is not a multiple of 4, as transposable masks need"
    return None
