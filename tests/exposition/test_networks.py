"""Stacks of networks against torch.nn, one network at a time."""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from sparse_pretrain.exposition.networks import (
    Shape,
    accuracy,
    backward,
    forward,
    initial,
    logits,
    loss_gradients,
    structure_mask,
)


def single(row: torch.Tensor, width: int) -> nn.Sequential:
    """One of a stack as torch has it."""
    layers = [nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)]
    at = 0
    for kind in ("weight", "bias"):
        for layer in layers:
            parameter = getattr(layer, kind)
            parameter.data = row[at : at + parameter.numel()].reshape(parameter.shape).clone()
            at += parameter.numel()
    assert at == len(row)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])


@pytest.fixture(params=[1, 3, 5])
def stack(request):
    shape = Shape(request.param)
    return initial(range(6), [shape.units[:4]] * 6, shape) * 2, shape


def test_outputs_and_accuracy_are_those_of_torch(stack):
    rows, shape = stack
    x, y = torch.randn(5000, 2), (torch.rand(5000) > 0.5).float()
    found, shares = logits(rows, shape, x), accuracy(rows, shape, x, y)
    for i, row in enumerate(rows):
        expected = single(row, shape.width)(x)[:, 0]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)
        assert shares[i] == pytest.approx(float(((found[i] > 0) == y.bool()).double().mean()))


def test_gradients_are_those_of_autograd(stack):
    rows, shape = stack
    x, y = torch.randn(2, 40), (torch.rand(40) > 0.5).float()
    found = loss_gradients(*shape.split(rows), x, y)
    leaf = rows.clone().requires_grad_()
    z = forward(*shape.split(leaf), x)[-1][:, 0]
    binary_cross_entropy_with_logits(z, y.expand_as(z), reduction="none").mean(dim=1).sum().backward()
    torch.testing.assert_close(found, leaf.grad)
    outputs = forward(*shape.split(rows), x)
    torch.testing.assert_close(backward(shape.split(rows)[0], outputs, (outputs[-1].sigmoid() - y) / 40), found)


def test_split_and_join():
    shape = Shape(3)
    assert (shape.weights, shape.parameters) == (27, 37)
    rows = torch.arange(74.0).view(2, 37)
    weights, biases = shape.split(rows)
    assert [tuple(w.shape) for w in weights] == [(2, 3, 2), (2, 3, 3), (2, 3, 3), (2, 1, 3)]
    assert torch.equal(shape.join(weights, biases), rows)
    weights[1][0, 2, 1] = -1  # views
    assert rows[0, 6 + 2 * 3 + 1] == -1


def test_initial_weights_are_a_function_of_seed_and_fan_in():
    shape = Shape(4)
    fan_in = [(2, 4, 3, 16), (2, 16, 16, 16)]
    rows = initial([5, 6], fan_in, shape)
    assert torch.equal(initial([6], fan_in[1:], shape)[0], rows[1])
    assert not torch.equal(initial([6, 7], fan_in, shape)[1], rows[1])
    many = initial(range(400), [(2, 4, 3, 16)] * 400, shape)
    for parts in shape.split(many):
        for part, fan in zip(parts, (2, 4, 3, 16), strict=True):
            assert part.abs().max() <= fan**-0.5
            assert part.std() == pytest.approx((3 * fan) ** -0.5, rel=0.1)  # of a uniform distribution
    torch.manual_seed(0)
    assert nn.Linear(16, 4).weight.abs().max() <= 16**-0.5  # as torch's own


def test_structure_masks():
    shape = Shape(3)
    mask = structure_mask([(1, 2, 3), (3, 3, 3)], shape)
    weights, biases = shape.split(mask)
    assert mask[1].all()
    assert [int(w[0].sum()) for w in weights] == [2, 2, 6, 3]
    assert [int(b[0].sum()) for b in biases] == [1, 2, 3, 1]
    assert weights[1][0].tolist() == [[True, False, False], [True, False, False], [False, False, False]]
