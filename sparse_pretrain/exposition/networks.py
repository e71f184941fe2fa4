"""Many small perceptrons at once: N networks 2-w-w-w-1 with ReLU, their parameters side by side in one matrix.

All of them see the same points, and each is computed apart from the others, so what a network learns does not depend on
which ones are trained beside it. Networks of different widths share a matrix by padding: a mask says what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

INPUTS, LAYERS = 2, 4
POINTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Shape:
    """How a row of parameters is divided: the four weights (out, in), then the four biases."""

    width: int

    @property
    def units(self) -> tuple[int, ...]:
        return (INPUTS, self.width, self.width, self.width, 1)

    @property
    def sizes(self) -> list[int]:
        """Entries of each weight."""
        return [before * after for before, after in pairwise(self.units)]

    @property
    def weights(self) -> int:
        return sum(self.sizes)

    @property
    def parameters(self) -> int:
        return self.weights + sum(self.units[1:])

    def split(self, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of rows (N, parameters): weights (N, out, in), biases (N, out, 1)."""
        pieces = rows.split([*self.sizes, *self.units[1:]], dim=1)
        weights = [
            piece.unflatten(1, (after, before))
            for piece, before, after in zip(pieces, self.units, self.units[1:], strict=False)
        ]
        return weights, [piece.unsqueeze(2) for piece in pieces[LAYERS:]]

    def join(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """The rows (N, parameters) of weights (N, out, in) and biases (N, out) or (N, out, 1)."""
        return torch.cat([part.flatten(1) for part in (*weights, *biases)], dim=1)


def structure_mask(structures: Sequence[tuple[int, int, int]], shape: Shape) -> Tensor:
    """What is there of networks with the first (d1, d2, d3) hidden neurons of each layer: (N, parameters) boolean."""
    units = torch.tensor([(INPUTS, *structure, 1) for structure in structures])
    there = [torch.arange(most) < units[:, layer : layer + 1] for layer, most in enumerate(shape.units)]
    weights = [after.unsqueeze(2) & before.unsqueeze(1) for before, after in pairwise(there)]
    return shape.join(weights, there[1:])


def initial(seeds: Sequence[int], fan_in: Sequence[tuple[int, int, int, int]], shape: Shape) -> Tensor:
    """PyTorch's initialisation of linear layers, uniform in ±1/√fan_in: (N, parameters) float32.

    Args:
        seeds: one for each network.
        fan_in: of each network's layers.
    """
    draws = [torch.rand(shape.parameters, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    rows = torch.stack(draws).mul_(2).sub_(1)
    bounds = torch.tensor(fan_in, dtype=torch.float32).rsqrt()
    weights, biases = shape.split(rows)
    for layer in range(LAYERS):
        bound = bounds[:, layer].view(-1, 1, 1)
        weights[layer].mul_(bound)
        biases[layer].mul_(bound)
    return rows


def forward(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """The input and each layer's output, the last one without ReLU.

    Args:
        weights, biases: as `Shape.split` gives them.
        x: (2, points).

    Returns:
        (N, units, points) for each of the five.
    """
    outputs = [x.expand(len(weights[0]), *x.shape)]
    for layer in range(LAYERS):
        output = torch.baddbmm(biases[layer], weights[layer], outputs[-1])
        outputs.append(output.relu() if layer < LAYERS - 1 else output)
    return outputs


def backward(weights: Sequence[Tensor], outputs: Sequence[Tensor], delta: Tensor) -> Tensor:
    """Gradients of all parameters, for what `forward` gave and the loss's gradient with respect to the last output.

    Written out, as it takes a third of autograd's time for networks this small.

    Args:
        delta: (N, 1, points).

    Returns:
        (N, parameters), for pruned entries too.
    """
    weight_grads, bias_grads = [], []
    for layer in reversed(range(LAYERS)):
        weight_grads.append(torch.bmm(delta, outputs[layer].mT))
        bias_grads.append(delta.sum(dim=2))
        if layer:
            delta = torch.ops.aten.threshold_backward(torch.bmm(weights[layer].mT, delta), outputs[layer], 0)
    return torch.cat([part.flatten(1) for part in (*weight_grads[::-1], *bias_grads[::-1])], dim=1)


def loss_gradients(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Gradients (N, parameters) of each network's mean binary cross-entropy on x (2, points), y (points,) in {0, 1}."""
    outputs = forward(weights, biases, x)
    return backward(weights, outputs, (outputs[-1].sigmoid() - y).div_(len(y)))


def logits(rows: Tensor, shape: Shape, x: Tensor) -> Tensor:
    """Each network's (N, points) at x (points, 2)."""
    weights, biases = shape.split(rows)
    return torch.cat([forward(weights, biases, part.T)[-1][:, 0] for part in x.split(POINTS_AT_ONCE)], dim=1)


def accuracy(rows: Tensor, shape: Shape, x: Tensor, y: Tensor) -> Tensor:
    """The share (N,) of the points (points, 2) that each network puts into their class (points,)."""
    weights, biases = shape.split(rows)
    right = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for part, labels in zip(x.split(POINTS_AT_ONCE), y.split(POINTS_AT_ONCE), strict=True):
        right += ((forward(weights, biases, part.T)[-1][:, 0] > 0) == labels.bool()).sum(dim=1)
    return right.double() / len(y)
