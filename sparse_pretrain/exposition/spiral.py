"""The Cubist Spiral: two interleaved spirals of straight strokes, a task that very few weights can solve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STROKES = 16  # two turns of an octagon
HALF_GAP = 15.0  # between a class's curve and the centre line, along the ray from the origin


def corners() -> tuple[Tensor, Tensor]:
    """The corners of the centre line, and the unit vectors from the origin to them.

    The angles are π … 5π in 17 steps, turned by 0.4π; the radius is 10·angle + π.

    Returns:
        (17, 2), (17, 2) float64.
    """
    angle = torch.linspace(math.pi, 5 * math.pi, STROKES + 1, dtype=torch.float64) + 0.4 * math.pi
    ray = torch.stack([angle.cos(), angle.sin()], dim=1)
    return (10 * angle + math.pi).unsqueeze(1) * ray, ray


def cubist_spiral(points: int) -> tuple[Tensor, Tensor]:
    """The points of both classes, class 0 first, without noise; each coordinate has mean 0 and standard deviation 1.

    A class's curve goes through the centre line's corners, moved outwards (class 0) or inwards (class 1); its points
    are spread over its strokes by their length, both ends of a stroke included (Sparsest Models Elude Pruning,
    ICML 2024).

    Args:
        points: of both classes together; up to one per stroke fewer come back, by rounding.

    Returns:
        (n, 2) float32, and the classes (n,) float32, 0 or 1.
    """
    centre, ray = corners()
    curves = [_along(centre + side * HALF_GAP * ray, points / 2) for side in (1, -1)]
    x = torch.cat(curves)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    y = torch.cat([torch.full((len(curve),), float(label)) for label, curve in enumerate(curves)])
    return x.float(), y


def _along(vertices: Tensor, points: float) -> Tensor:
    """About `points` points on the line through the vertices (n, 2), evenly spaced within each stroke."""
    starts, ends = vertices[:-1], vertices[1:]
    lengths = (ends - starts).norm(dim=1)
    counts = (lengths / lengths.sum() * points).long().tolist()
    strokes = []
    for start, end, count in zip(starts, ends, counts, strict=True):
        share = torch.linspace(0, 1, count, dtype=torch.float64).unsqueeze(1)
        strokes.append(start + share * (end - start))
    return torch.cat(strokes)
