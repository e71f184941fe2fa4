"""Structures and masks against brute force."""

import random
from collections import Counter
from itertools import permutations, product

import pytest
import torch

from sparse_pretrain.exposition.connections import connections
from sparse_pretrain.exposition.networks import Shape, structure_mask
from sparse_pretrain.exposition.search import (
    Mask,
    all_masks,
    candidates,
    canonical,
    fewest_weights,
    some_masks,
    structure_weights,
    structures,
)


def matrices(rows: int, columns: int) -> list[tuple[tuple[int, ...], ...]]:
    """All 0/1 matrices without a row or column of zeros."""
    every = product(product((0, 1), repeat=columns), repeat=rows)
    return [m for m in every if all(any(row) for row in m) and all(any(column) for column in zip(*m, strict=True))]


def orbits(structure) -> dict:
    """By brute force: masks that differ by the order of neurons, represented by the smallest; how many are in each."""
    d1, d2, d3 = structure
    found = Counter()
    orders = list(product(permutations(range(d1)), permutations(range(d2)), permutations(range(d3))))
    for w1, w2, w3 in product(matrices(d1, 2), matrices(d2, d1), matrices(d3, d2)):
        found[
            min(
                (
                    tuple(w1[i] for i in p1),
                    tuple(tuple(w2[i][j] for j in p1) for i in p2),
                    tuple(tuple(w3[i][j] for j in p2) for i in p3),
                )
                for p1, p2, p3 in orders
            )
        ] += 1
    return found


def as_mask(matrices) -> Mask:
    return Mask(*(tuple(int("".join(map(str, row)), 2) for row in matrix) for matrix in matrices))


@pytest.mark.parametrize(
    "structure", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 3), (1, 3, 2), (2, 2, 2), (3, 2, 1), (1, 2, 3)], ids=str
)
def test_every_mask_comes_once(structure):
    expected = orbits(structure)
    found = list(all_masks(structure))
    assert len(found) == len(set(found)) == len(expected) <= candidates(structure)
    assert {canonical(as_mask(orbit)) for orbit in expected} == set(found)  # each orbit has its own
    assert Counter(mask.weights for mask in found) == Counter(
        sum(map(sum, (*w1, *w2, *w3))) + structure[2] for w1, w2, w3 in expected
    )
    assert min(mask.weights for mask in found) == fewest_weights(structure)
    assert max(mask.weights for mask in found) == structure_weights(structure)


def test_the_paper_s_structure_by_burnside():
    """Orbits under S3³: the mean number of masks that an order of the neurons leaves as they are."""
    first, square = matrices(3, 2), matrices(3, 3)
    orders = list(permutations(range(3)))
    rows_fixed = {p: sum(tuple(m[i] for i in p) == m for m in first) for p in orders}
    both_fixed = {
        (q, p): sum(tuple(tuple(m[i][j] for j in p) for i in q) == m for m in square) for q in orders for p in orders
    }
    fixed = sum(rows_fixed[p] * both_fixed[q, p] * both_fixed[r, q] for p, q, r in product(orders, repeat=3))
    assert fixed % 216 == 0
    assert sum(1 for _ in all_masks((3, 3, 3))) == fixed // 216 == 12_400


def test_order_of_neurons_does_not_matter():
    draw = random.Random(0)
    for mask in draw.sample(list(all_masks((3, 3, 2))), 30):
        w1, w2, w3 = ([[int(bit) for bit in row] for row in part.split()] for part in mask.text().split("/"))
        p1, p2, p3 = (draw.sample(range(n), n) for n in (3, 3, 2))
        moved = (
            [w1[i] for i in p1],
            [[w2[i][j] for j in p1] for i in p2],
            [[w3[i][j] for j in p2] for i in p3],
        )
        assert canonical(as_mask(moved)) == mask


def test_text_and_tensor():
    mask = Mask.parse("01 10 11/001 110/01 11")
    assert mask.structure == (3, 2, 2)
    assert mask.text() == "01 10 11/001 110/01 11"
    assert mask.weights == 4 + 3 + 3 + 2
    shape = Shape(3)
    weights, biases = shape.split(mask.tensor(shape).unsqueeze(0))
    assert weights[0][0].int().tolist() == [[0, 1], [1, 0], [1, 1]]
    assert weights[1][0].int().tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert weights[2][0].int().tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert weights[3][0].int().tolist() == [[1, 1, 0]]
    assert [int(bias.sum()) for bias in biases] == [3, 2, 2, 1]


def test_all_of_a_mask_is_on_paths():
    shape = Shape(3)
    masks = list(all_masks((3, 2, 3)))
    rows = torch.stack([mask.tensor(shape) for mask in masks]).float()
    for mask, found in zip(masks, connections(rows, shape), strict=True):
        assert (found.kept, found.weights, found.disconnected) == (mask.weights, mask.weights, 0)
        assert found.parameters == mask.weights + 3 + 2 + 3 + 1
    dense = max(masks, key=lambda mask: mask.weights)
    assert torch.equal(dense.tensor(shape), structure_mask([(3, 2, 3)], shape)[0])


def test_drawn_masks():
    every = Counter(mask.weights for mask in all_masks((3, 3, 2)))
    for weights in range(30):
        drawn = some_masks((3, 3, 2), weights, 40, random.Random(5))
        assert len(drawn) == len(set(drawn))
        assert all(mask.weights == weights and canonical(mask) == mask for mask in drawn)
        assert len(drawn) <= min(40, every[weights])
        if every[weights] > 400:
            assert len(drawn) == 40
        assert drawn == some_masks((3, 3, 2), weights, 40, random.Random(5))
    assert len(some_masks((9, 8, 7), 90, 3, random.Random(1))) == 3  # whose orders are too many


def test_structures_come_smallest_first():
    groups = structures(4)
    assert [structure for group in groups for structure in group] != sorted(product(range(1, 5), repeat=3))
    assert sorted(structure for group in groups for structure in group) == sorted(product(range(1, 5), repeat=3))
    sizes = [{structure_weights(structure) for structure in group} for group in groups]
    assert all(len(size) == 1 for size in sizes)
    assert [min(size) for size in sizes] == sorted(min(size) for size in sizes)
    assert structure_weights((3, 3, 3)) == 27
    assert structure_weights((7, 3, 3)) == 47
