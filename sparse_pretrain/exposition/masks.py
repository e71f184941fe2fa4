"""Masks of many networks by scores: those that pruning before training takes, and the parts of the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from sparse_pretrain.exposition.networks import LAYERS, Shape, backward, forward

ITERATIONS = {"magnitude": 1, "snip": 1, "iter_snip": 10, "force": 10, "grasp": 1, "synflow": 100}
"""Pruning before training: in how many steps, each of which keeps the same share of what the one before left."""
GRASP_TEMPERATURE = 200.0


def keep_largest(scores: Tensor, kept: Tensor) -> Tensor:
    """The mask (N, n) of the kept[i] largest of each row of scores (N, n); a tie keeps the lower index."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks) < kept.unsqueeze(1)


def with_biases(kept: Tensor, shape: Shape) -> Tensor:
    """A mask of weights (N, weights) as one of all parameters (N, parameters) float32, without the biases of neurons
    that lead nowhere."""
    weights, _ = shape.split(pad(kept, (0, shape.parameters - shape.weights)))
    alive = [weight.any(dim=1) for weight in weights[1:]]
    return shape.join(weights, [*alive, torch.ones_like(alive[0][:, :1])]).float()


def before_training(method: str, rows: Tensor, kept: Tensor, shape: Shape, x: Tensor, y: Tensor) -> Tensor:
    """The mask that a method finds in networks that have learned nothing yet.

    Args:
        method: of `ITERATIONS`: |w| (magnitude), SNIP (Lee et al., ICLR 2019), iterative SNIP and FORCE (de Jorge et
            al., ICLR 2021), GraSP (Wang et al., ICLR 2020), SynFlow (Tanaka et al., NeurIPS 2020).
        rows: parameters (N, parameters).
        kept: weights to keep of each network (N,).
        x, y: one batch (2, points), (points,).

    Returns:
        (N, parameters) float32, 0 or 1.
    """
    steps = ITERATIONS[method]
    mask = torch.ones_like(rows)
    for step in range(1, steps + 1):
        left = shape.weights * (kept.double() / shape.weights).pow(step / steps)
        count = kept if step == steps else left.long()
        scores = _scores(method, rows, mask, shape, x, y)[:, : shape.weights]
        if method != "force":  # which lets pruned weights come back
            scores = scores.where(mask[:, : shape.weights] > 0, -torch.inf)
        mask = with_biases(keep_largest(scores, count), shape)
    return mask


def _scores(method: str, rows: Tensor, mask: Tensor, shape: Shape, x: Tensor, y: Tensor) -> Tensor:
    if method == "magnitude":
        return rows.abs()
    if method == "grasp":
        return _grasp(rows, shape, x, y)
    if method == "synflow":
        positive = rows.abs() * mask
        weights, biases = shape.split(positive)
        outputs = forward(weights, biases, torch.ones(2, 1, device=rows.device))
        return positive * backward(weights, outputs, torch.ones_like(outputs[-1]))
    weights, biases = shape.split(rows * mask)
    outputs = forward(weights, biases, x)
    return (rows * backward(weights, outputs, (outputs[-1].sigmoid() - y) / len(y))).abs()


def _grasp(rows: Tensor, shape: Shape, x: Tensor, y: Tensor) -> Tensor:
    """w·Hg: the less of it, the less the gradient's norm shrinks without the weight."""
    rows = rows.detach().requires_grad_()
    with torch.enable_grad():
        z = forward(*shape.split(rows), x)[-1] / GRASP_TEMPERATURE
        loss = binary_cross_entropy_with_logits(z, y.expand_as(z), reduction="none").mean(dim=2).sum()
        (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
        gradient = gradient[:, : shape.weights]
        (product,) = torch.autograd.grad((gradient * gradient.detach()).sum(), rows)
    return (rows * product).detach()


def erdos_renyi(kept: int, shape: Shape) -> list[int]:
    """How many of `kept` weights each layer gets in RigL: a density in proportion to (in + out) / (in · out), at most 1
    (the Erdős–Rényi kernel; Evci et al., ICML 2020). They add up to `kept`."""
    sizes = shape.sizes
    raw = [before + after for before, after in pairwise(shape.units)]
    dense: set[int] = set()
    while True:
        sparse = [layer for layer in range(LAYERS) if layer not in dense]
        if not sparse:
            return sizes
        scale = (kept - sum(sizes[layer] for layer in dense)) / sum(raw[layer] for layer in sparse)
        full = {layer for layer in sparse if scale * raw[layer] >= sizes[layer]}
        if not full:
            break
        dense |= full
    exact = [float(sizes[layer]) if layer in dense else max(scale * raw[layer], 0.0) for layer in range(LAYERS)]
    counts = [int(count) for count in exact]
    for layer in sorted(range(LAYERS), key=lambda layer: counts[layer] - exact[layer])[: kept - sum(counts)]:
        counts[layer] += 1
    return counts


def layerwise(scores: Tensor, counts: Sequence[Tensor], shape: Shape) -> Tensor:
    """The mask (N, weights) of the largest scores (N, weights) of each layer, as many as counts[layer] (N,) says."""
    parts = zip(scores.split(shape.sizes, dim=1), counts, strict=True)
    return torch.cat([keep_largest(part, count) for part, count in parts], dim=1)
