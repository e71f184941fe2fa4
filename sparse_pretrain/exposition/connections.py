"""Which weights of a masked network lie on a path from its inputs to its output, and the network without the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_pretrain.exposition.networks import INPUTS, LAYERS, Shape


@dataclass(frozen=True)
class Connections:
    """What a network's non-zeros connect.

    Attributes:
        kept: non-zero weights.
        weights: those of them on a path from an input to the output.
        parameters: these, with the biases of the neurons on such paths and of the output.
        disconnected: hidden neurons that have a non-zero weight, into or out of them, but are on no path.
    """

    kept: int
    weights: int
    parameters: int
    disconnected: int


def reached(weights: Sequence[Tensor]) -> list[Tensor]:
    """The inputs, and the units of each layer that a path of non-zeros leads to from an input: (N, units) boolean."""
    units = [torch.ones(len(weights[0]), INPUTS, dtype=torch.bool, device=weights[0].device)]
    for weight in weights:
        units.append(((weight != 0) & units[-1].unsqueeze(1)).any(dim=2))
    return units


def on_paths(weights: Sequence[Tensor]) -> list[Tensor]:
    """The non-zeros of each layer's weight (N, out, in) that lie on a path from an input to the output: boolean."""
    sources = reached(weights)
    useful = torch.ones_like(sources[-1])
    paths = []
    for layer in reversed(range(LAYERS)):
        outgoing = (weights[layer] != 0) & useful.unsqueeze(2)
        paths.append(outgoing & sources[layer].unsqueeze(1))
        useful = outgoing.any(dim=1)
    return paths[::-1]


def connections(rows: Tensor, shape: Shape) -> list[Connections]:
    """Of each network, from its parameters (N, parameters), zero where pruned."""
    weights, _ = shape.split(rows)
    paths = on_paths(weights)
    kept = torch.stack([(weight != 0).sum(dim=(1, 2)) for weight in weights]).sum(dim=0)
    used = torch.stack([path.sum(dim=(1, 2)) for path in paths]).sum(dim=0)
    neurons, disconnected = torch.zeros_like(kept), torch.zeros_like(kept)
    for layer in range(LAYERS - 1):
        connected = paths[layer].any(dim=2)  # a neuron on a path has a weight of it on either side
        touched = (weights[layer] != 0).any(dim=2) | (weights[layer + 1] != 0).any(dim=1)
        neurons += connected.sum(dim=1)
        disconnected += (touched & ~connected).sum(dim=1)
    counts = torch.stack([kept, used, used + neurons + 1, disconnected], dim=1)
    return [Connections(*row) for row in counts.tolist()]


def without_disconnected(rows: Tensor, shape: Shape) -> Tensor:
    """The same functions with the weights on paths alone: (N, parameters).

    A neuron that no input reaches is a constant; what it gives the next layer goes into biases. One from which nothing
    reaches the output is taken away.
    """
    weights, biases = shape.split(rows)
    paths, units = on_paths(weights), reached(weights)
    new_biases = []
    constants = torch.zeros(len(rows), INPUTS, 1, device=rows.device)  # of units that no input reaches; others: 0
    for layer in range(LAYERS):
        bias = torch.baddbmm(biases[layer], weights[layer], constants)
        constants = bias.relu() * ~units[layer + 1].unsqueeze(2)
        connected = paths[layer].any(dim=2, keepdim=True)
        new_biases.append(bias * connected if layer < LAYERS - 1 else bias)
    return shape.join([weight * path for weight, path in zip(weights, paths, strict=True)], new_biases)
