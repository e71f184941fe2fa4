"""What lies on a path, against every path; and networks without the rest."""

from itertools import product

import pytest
import torch

from sparse_pretrain.exposition.connections import connections, on_paths, without_disconnected
from sparse_pretrain.exposition.networks import Shape, logits


def sparse_stack(width: int, networks: int, density: float) -> tuple[torch.Tensor, Shape]:
    generator, shape = torch.Generator().manual_seed(1), Shape(width)
    rows = torch.randn(networks, shape.parameters, generator=generator)
    keep = torch.rand(networks, shape.weights, generator=generator) < density
    rows[:, : shape.weights] *= keep
    return rows, shape


def row_of(
    shape: Shape, weights: dict[int, list[tuple[int, int, float]]], biases: dict[int, list[float]]
) -> torch.Tensor:
    rows = torch.zeros(1, shape.parameters)
    ws, bs = shape.split(rows)
    for layer, entries in weights.items():
        for i, j, value in entries:
            ws[layer][0, i, j] = value
    for layer, values in biases.items():
        bs[layer][0, :, 0] = torch.tensor(values)
    return rows


@pytest.mark.parametrize("density", [0.15, 0.3, 0.6])
def test_paths_are_those_of_brute_force(density):
    rows, shape = sparse_stack(3, 30, density)
    weights, _ = shape.split(rows)
    found = on_paths(weights)
    counts = connections(rows, shape)
    for n in range(len(rows)):
        used = set()
        for path in product(range(2), range(3), range(3), range(3), range(1)):
            edges = [(layer, path[layer + 1], path[layer]) for layer in range(4)]
            if all(weights[layer][n, i, j] != 0 for layer, i, j in edges):
                used |= set(edges)
        assert {(layer, *place) for layer in range(4) for place in torch.nonzero(found[layer][n]).tolist()} == used
        connected = {(layer, i) for layer, i, _ in used if layer < 3}
        touched = {
            (layer, i)
            for layer in range(3)
            for i in range(3)
            if weights[layer][n, i].any() or weights[layer + 1][n, :, i].any()
        }
        assert counts[n].weights == len(used)
        assert counts[n].kept == int((rows[n, :27] != 0).sum())
        assert counts[n].parameters == len(used) + len(connected) + 1
        assert counts[n].disconnected == len(touched - connected)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.4, 0.9])
def test_the_function_stays_without_what_is_disconnected(density):
    rows, shape = sparse_stack(5, 50, density)
    clean = without_disconnected(rows, shape)
    x = torch.randn(200, 2)
    torch.testing.assert_close(logits(clean, shape, x), logits(rows, shape, x), rtol=1e-4, atol=1e-5)
    for before, after in zip(connections(rows, shape), connections(clean, shape), strict=True):
        assert (after.kept, after.weights, after.disconnected) == (before.weights, before.weights, 0)
        assert after.parameters == before.parameters
    assert torch.equal(without_disconnected(clean, shape), clean)
    _, biases = shape.split(clean)
    nonzero = torch.stack([(bias != 0).sum(dim=(1, 2)) for bias in biases]).sum(dim=0)
    assert (nonzero <= torch.tensor([c.parameters - c.weights for c in connections(clean, shape)])).all()


def test_a_case_by_hand():
    """Neuron 0 of each layer makes the path. Neuron 1 of the first layer reads an input and leads nowhere; neuron 1 of
    the second reads nothing, is a constant, and leads to the third's neuron 0."""
    shape = Shape(2)
    row = row_of(
        shape,
        {0: [(0, 0, 1.0), (1, 1, 2.0)], 1: [(0, 0, 1.0)], 2: [(0, 0, 1.0), (0, 1, 3.0)], 3: [(0, 0, -1.0)]},
        {0: [0.5, 0.5], 1: [0.0, 2.0], 2: [1.0, 7.0], 3: [0.25]},
    )
    (found,) = connections(row, shape)
    assert (found.kept, found.weights, found.parameters, found.disconnected) == (6, 4, 8, 2)
    weights, biases = shape.split(without_disconnected(row, shape))
    assert weights[0][0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert weights[2][0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert [bias[0, :, 0].tolist() for bias in biases] == [[0.5, 0.0], [0.0, 0.0], [1.0 + 3 * 2.0, 0.0], [0.25]]


def test_a_network_without_any_path_is_a_constant():
    shape = Shape(2)
    row = row_of(shape, {1: [(0, 0, 1.0)], 2: [(0, 0, 1.0)], 3: [(0, 0, 2.0)]}, {0: [1.0, -1.0], 3: [0.5]})
    (found,) = connections(row, shape)
    assert (found.kept, found.weights, found.parameters, found.disconnected) == (3, 0, 1, 3)
    clean = without_disconnected(row, shape)
    assert (clean[0, :-1] == 0).all()
    assert clean[0, -1] == 2.5
