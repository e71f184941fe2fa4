"""What the combinatorial search goes through: structures by size, and the masks within one, each once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations_with_replacement, permutations, product
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_pretrain.exposition.networks import INPUTS, Shape

Structure = tuple[int, int, int]
Rows = tuple[int, ...]
Neuron = tuple[int, int]  # of the first layer: what leads into it, and what out of it
TRIES = 50  # of a random mask, for each one wanted
MOST_ORDERED = 6  # neurons of a second layer whose every order is looked at: 720


class Mask(NamedTuple):
    """What is kept of three weights, without a dead neuron or input; the output's weight is whole.

    The rows of a weight are integers, a bit for each of its inputs, the first input the highest bit.
    """

    first: Rows
    second: Rows
    third: Rows

    @property
    def weights(self) -> int:
        return sum(row.bit_count() for rows in self for row in rows) + len(self.third)

    @property
    def structure(self) -> Structure:
        return len(self.first), len(self.second), len(self.third)

    def text(self) -> str:
        """As `11 01 10/110 111 001/010 111 100`."""
        inputs = (INPUTS, *self.structure)
        return "/".join(
            " ".join(f"{row:0{bits}b}" for row in rows) for rows, bits in zip(self, inputs[:3], strict=True)
        )

    @classmethod
    def parse(cls, text: str) -> Mask:
        return cls(*(tuple(int(row, 2) for row in rows.split()) for rows in text.split("/")))

    def tensor(self, shape: Shape) -> Tensor:
        """(parameters,) boolean, padded to the shape."""
        there = torch.zeros(1, shape.parameters, dtype=torch.bool)
        weights, biases = shape.split(there)
        inputs = (INPUTS, *self.structure)
        for layer, rows in enumerate(self):
            for i, row in enumerate(rows):
                for j in range(inputs[layer]):
                    weights[layer][0, i, j] = bool(row >> (inputs[layer] - 1 - j) & 1)
            biases[layer][0, : len(rows)] = True
        weights[3][0, 0, : len(self.third)] = True
        biases[3][:] = True
        return there[0]


def name(structure: Structure) -> str:
    """As `3-3-3`."""
    return "-".join(map(str, structure))


def structure_weights(structure: Structure) -> int:
    """Weights of a dense 2-d1-d2-d3-1."""
    d1, d2, d3 = structure
    return INPUTS * d1 + d1 * d2 + d2 * d3 + d3


def fewest_weights(structure: Structure) -> int:
    """Of a mask without a dead neuron or input."""
    d1, d2, d3 = structure
    return max(INPUTS, d1) + max(d1, d2) + max(d2, d3) + d3


def structures(most: int) -> list[list[Structure]]:
    """All (d1, d2, d3) of 1 to `most`, those of equal size together, smallest first."""
    by_size: dict[int, list[Structure]] = {}
    for d1, d2, d3 in product(range(1, most + 1), repeat=3):
        by_size.setdefault(structure_weights((d1, d2, d3)), []).append((d1, d2, d3))
    return [by_size[size] for size in sorted(by_size)]


def canonical(mask: Mask) -> Mask:
    """The one mask that stands for all that differ from this in the order of neurons within layers.

    For each order of the second layer, the first layer's neurons are sorted by what leads into and out of them, the
    third's by what leads into them; the smallest of these is taken.
    """
    neurons = list(zip(mask.first, _transposed(mask.second, len(mask.first)), strict=True))
    return _mask(*min((_moved(neurons, move), _sorted(mask.third, move)) for move in _moves(len(mask.second))))


def candidates(structure: Structure) -> int:
    """How many masks `all_masks` looks at, dead neurons and second-layer orders included."""
    d1, d2, d3 = structure
    choices = 2**d2 - 1
    return comb(3 * choices + d1 - 1, d1) * comb(choices + d3 - 1, d3)


def all_masks(structure: Structure) -> Iterator[Mask]:
    """Every canonical mask of a structure, once."""
    d1, d2, d3 = structure
    choices = list(product(range(1, 2**INPUTS), range(1, 2**d2)))  # of a first neuron: what leads into it, and out
    thirds = [rows for rows in combinations_with_replacement(range(1, 2**d2), d3) if _covers(rows, d2)]
    for neurons in combinations_with_replacement(choices, d1):
        if not (_covers([row for row, _ in neurons], INPUTS) and _covers([column for _, column in neurons], d2)):
            continue
        images = [(_moved(neurons, move), move) for move in _moves(d2)]
        if any(image < neurons for image, _ in images):
            continue
        symmetries = [move for image, move in images if image == neurons]
        for third in thirds:
            if all(third <= _sorted(third, move) for move in symmetries):
                yield _mask(neurons, third)


def some_masks(structure: Structure, weights: int, most: int, draw: random.Random) -> list[Mask]:
    """Up to `most` canonical masks with that many weights, drawn at random; fewer where there are not many.

    With more than six neurons in the second layer, whose orders are too many, they are as drawn.
    """
    d1, d2, d3 = structure
    inputs = (INPUTS, d1, d2)
    places = [(layer, i, j) for layer, out in enumerate(structure) for i in range(out) for j in range(inputs[layer])]
    found: dict[Mask, None] = {}
    for _ in range(TRIES * most):
        if len(found) == most or not 0 <= weights - d3 <= len(places):
            break
        rows = [[0] * out for out in structure]
        for layer, i, j in draw.sample(places, weights - d3):
            rows[layer][i] |= 1 << j
        if all(all(layer) and _covers(layer, bits) for layer, bits in zip(rows, inputs, strict=True)):
            mask = Mask(*map(tuple, rows))
            found[canonical(mask) if d2 <= MOST_ORDERED else mask] = None
    return list(found)


def _covers(rows: Sequence[int], bits: int) -> bool:
    """Whether every input has a weight in some row."""
    union = 0
    for row in rows:
        union |= row
    return union == 2**bits - 1


def _transposed(rows: Sequence[int], bits: int) -> Rows:
    """The columns of a matrix of `bits` columns as integers, as rows are."""
    return tuple(
        sum((row >> (bits - 1 - j) & 1) << (len(rows) - 1 - i) for i, row in enumerate(rows)) for j in range(bits)
    )


@lru_cache
def _moves(neurons: int) -> list[Rows]:
    """For each order of a layer's neurons, what becomes of every row of the layer after it."""
    return [
        tuple(
            sum((row >> (neurons - 1 - source) & 1) << (neurons - 1 - place) for place, source in enumerate(order))
            for row in range(2**neurons)
        )
        for order in permutations(range(neurons))
    ]


def _moved(neurons: Sequence[Neuron], move: Rows) -> tuple[Neuron, ...]:
    return tuple(sorted((row, move[column]) for row, column in neurons))


def _sorted(third: Rows, move: Rows) -> Rows:
    return tuple(sorted(move[row] for row in third))


def _mask(neurons: Sequence[Neuron], third: Rows) -> Mask:
    d2 = max(third).bit_length()  # some third neuron reads the first second one, whose bit is the highest
    return Mask(tuple(row for row, _ in neurons), _transposed([column for _, column in neurons], d2), third)
