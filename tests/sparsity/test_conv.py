"""Sparse convolutions: PyTorch's own with the masked weight, whichever way they are computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sparse24.autograd import MvueKey
from sparse24.dispatch import Plan
from sparse24.reference import mvue24, uniform24
from torch import nn

from sparse_pretrain.config_recipe import LearnedConfig, RecipeConfig
from sparse_pretrain.sparsity.conv import Geometry, SparseConv2d
from tests.sparsity.by_hand import keep

BY_PATCHES = Plan("dense", "dense", "reference")  # what a sparse product of dW would need, without one

# fmt: off
GEOMETRIES = {
    "1x1": {"in_channels": 8, "kernel_size": 1},
    "1x1, stride": {"in_channels": 8, "kernel_size": 1, "stride": 2},
    "1x1, padding": {"in_channels": 8, "kernel_size": 1, "padding": 1},
    "3x3": {"in_channels": 8, "kernel_size": 3},
    "3x3, padding": {"in_channels": 8, "kernel_size": 3, "padding": 1, "bias": False},
    "3x3, stride": {"in_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1},
    "3x3, dilation": {"in_channels": 4, "kernel_size": 3, "dilation": 2, "padding": 2},
    "uneven": {"in_channels": 4, "kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "odd channels, 2x2": {"in_channels": 3, "kernel_size": 2},
    "same": {"in_channels": 4, "kernel_size": (4, 2), "padding": "same"},
    "valid": {"in_channels": 4, "kernel_size": 3, "padding": "valid"},
    "circular": {"in_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"in_channels": 4, "kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "groups": {"in_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise 4x4": {"in_channels": 8, "kernel_size": 4, "stride": 2, "groups": 8},
}  # fmt: skip


def conv(name="3x3, padding", out=8, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return nn.Conv2d(out_channels=out, **{**GEOMETRIES[name], **changes}).to(dtype)


def image(layer, batch=3, height=9, width=10):
    torch.manual_seed(1)
    return torch.randn(batch, layer.in_channels, height, width, dtype=layer.weight.dtype)


def swap(dense, projection="magnitude", plan=None, **changes):
    layer = SparseConv2d(dense, RecipeConfig("test", projection, **changes))
    layer.plan = plan or Plan()
    layer.project()
    return layer


def gradients(output, *inputs):
    torch.manual_seed(2)  # `randn_like` would fill in the order of memory
    return torch.autograd.grad(
        output, [i for i in inputs if i is not None], torch.randn(output.shape, dtype=output.dtype)
    )


def same_convolution(dense, x, weight):
    """PyTorch's, with another weight: padding of every kind is its own."""
    return dense._conv_forward(x, weight, dense.bias)


# a grouped convolution has no patches
WAYS = [
    (name, plan) for name in GEOMETRIES for plan in (Plan(), BY_PATCHES)[: 1 if "groups" in GEOMETRIES[name] else 2]
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("projection", ["magnitude", "transposable"])
@pytest.mark.parametrize(
    ("name", "plan"), WAYS, ids=lambda value: {Plan(): "conv", BY_PATCHES: "patches"}.get(value, value)
)
def test_outputs_and_gradients_are_those_of_the_masked_convolution(name, projection, plan):
    dense = conv(name)
    layer = swap(copy.deepcopy(dense), projection, plan)
    groups = layer.weight.flatten(1).mul(layer.mask.flatten(1)).reshape(-1, 4)
    assert ((groups != 0).sum(-1) == 2).all()
    if projection == "magnitude":
        assert torch.equal(layer.mask.flatten(1), keep(dense.weight.flatten(1)))
    x = image(dense).requires_grad_()
    masked = (dense.weight * layer.mask).detach().requires_grad_()
    expected = same_convolution(dense, x, masked)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    wanted = gradients(expected, x, masked, dense.bias)
    for a, b in zip(gradients(found, x, layer.weight, layer.bias), wanted, strict=True):
        torch.testing.assert_close(a, b)  # straight through: dW is whole


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name not in ("circular", "reflect")])
def test_the_smallest_input_of_an_output(name):
    dense = conv(name)
    height, width = Geometry.of(dense).input_size((5, 7))
    assert dense(image(dense, 1, height, width)).shape[2:] == (5, 7)
    assert dense(image(dense, 1, height - 1, width)).shape[2:] == (4, 7)
    assert dense(image(dense, 1, height, width - 1)).shape[2:] == (5, 6)


@pytest.mark.parametrize("plan", [Plan(), BY_PATCHES], ids=["convolution", "patches"])
def test_in_float32(plan):
    dense = conv(dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), plan=plan)
    x = image(dense)
    torch.testing.assert_close(layer(x), same_convolution(dense, x, dense.weight * layer.mask))


@pytest.mark.parametrize("plan", [Plan(), BY_PATCHES], ids=["convolution", "patches"])
@pytest.mark.parametrize("input_gradient", ["dense", "double_pruned"])
def test_the_input_gradient_may_use_another_weight(input_gradient, plan):
    dense = conv("3x3, stride")
    layer = swap(copy.deepcopy(dense), plan=plan, input_gradient=input_gradient)
    other = dense.weight if input_gradient == "dense" else dense.weight * layer.mask * layer.input_mask
    x = image(dense).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, same_convolution(dense, x, dense.weight * layer.mask))
    (dx,) = gradients(y, x)
    torch.testing.assert_close(dx, gradients(same_convolution(dense, x, other), x)[0])
    if input_gradient == "double_pruned":
        columns = layer.input_mask.flatten(1).t().reshape(-1, 4)
        assert (columns.sum(-1) == 2).all()


MVUE_CASES = [("1x1, stride", Plan()), ("3x3, padding", Plan()), ("groups", Plan())]
MVUE_CASES += [("1x1, stride", BY_PATCHES), ("3x3, padding", BY_PATCHES)]


@pytest.mark.parametrize(("name", "plan"), MVUE_CASES, ids=str)
def test_mvue_prunes_the_gradient_along_positions(name, plan, reference):
    """dW is that of the output gradient as the reference prunes it; dX and db are those of the whole one."""
    dense = conv(name, bias=True)
    layer = swap(copy.deepcopy(dense), plan=plan, weight_gradient="mvue")
    layer.mvue = MvueKey(7, torch.tensor(5), torch.tensor([3, 16]))
    x = image(dense, batch=4).requires_grad_()
    masked = (dense.weight * layer.mask).detach().requires_grad_()
    expected = same_convolution(dense, x, masked)
    dy = torch.randn_like(expected)
    tokens = dy.permute(0, 2, 3, 1).reshape(-1, 8)
    pruned = mvue24(tokens, uniform24(7, 3, 5, len(tokens), 8, first_token=16))
    assert (pruned == 0).float().mean() > 0.4
    pruned = pruned.view(4, *expected.shape[2:], 8).permute(0, 3, 1, 2)
    (dw,) = torch.autograd.grad(expected, masked, pruned, retain_graph=True)
    dx, db = torch.autograd.grad(expected, (x, dense.bias), dy)
    for found, wanted in zip(
        torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy), (dx, dw, db), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # mvue24 computes in fp32


def test_mvue_is_unbiased():
    """The mean of dW over many steps is the dense dW, within five standard errors."""
    dense = conv("3x3, padding", dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), weight_gradient="mvue")
    counter = torch.zeros(2, dtype=torch.int64)
    layer.mvue = MvueKey(11, torch.tensor(0), counter)
    x = image(dense, batch=2, height=5, width=6)
    masked = (dense.weight * layer.mask).detach().requires_grad_()
    expected = same_convolution(dense, x, masked)
    dy = torch.randn_like(expected)
    (exact,) = torch.autograd.grad(expected, masked, dy)
    draws = []
    for step in range(400):
        counter[0] = step
        draws.append(torch.autograd.grad(layer(x), layer.weight, dy)[0])
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert draws.std(0).min() > 0
    assert error.max() < 5
    assert 0.5 < error.square().mean() < 1.5  # as of a standard normal


def test_without_a_sparse_training_mvue_is_refused():
    dense = conv()
    layer = swap(dense, weight_gradient="mvue")
    with pytest.raises(RuntimeError, match="only under a SparseTraining"):
        layer(image(dense))


@pytest.mark.parametrize("name", ["3x3, stride", "uneven", "circular", "groups"])
def test_inputs_are_measured_for_the_metric(name):
    dense = conv(name, dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), "metric")
    x = image(dense)
    layer(x)
    layer.input_square += layer.step_square
    # what each input of the products adds: the gradient of a convolution of the squares, with as many outputs as groups
    groups = dense.groups
    probe = nn.Conv2d(
        dense.in_channels, groups, dense.kernel_size, dense.stride, dense.padding, dense.dilation, groups, False,
        dense.padding_mode,
    )  # fmt: skip
    probe(x.square()).sum().backward()
    square = probe.weight.grad.flatten(1)
    torch.testing.assert_close(layer.input_square.view(groups, -1), square)
    layer.refresh()
    scores = dense.weight.flatten(1) * square.sqrt().repeat_interleave(8 // groups, 0)
    assert torch.equal(layer.mask.flatten(1), keep(scores))
    assert layer.input_square.sum() == 0


def test_learned_masks_reach_their_logits():
    dense = conv("3x3", dtype=torch.float32)
    layer = swap(dense, "learned", learned=LearnedConfig(logit_std=1.0))
    layer.learned.draw(0.5, seed=3)
    x = image(dense)
    y = layer(x)
    soft = layer.learned.soft_mask().view(layer.weight.shape)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight * soft, layer.bias))
    y.square().sum().backward()
    assert layer.learned.logits.grad.abs().sum() > 0
    torch.testing.assert_close(layer.eval()(x), F.conv2d(x, layer.weight * layer.mask, layer.bias))


@pytest.mark.parametrize("plan", [Plan(), BY_PATCHES], ids=["convolution", "patches"])
def test_under_autocast(plan):
    dense = conv(dtype=torch.float32, bias=True)
    layer = swap(copy.deepcopy(dense), plan=plan)
    x = image(dense).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = same_convolution(dense, x, dense.weight * layer.mask)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    found, wanted = gradients(y, x, layer.weight, layer.bias), gradients(expected, x, dense.weight, dense.bias)
    assert [g.dtype for g in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1] * layer.mask, wanted[1], rtol=2e-2, atol=0.2)


def test_in_fp8():
    dense = conv(dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), fp8=True)
    x = image(dense).requires_grad_()
    expected = same_convolution(dense, x, dense.weight * layer.mask)
    found = layer(x)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    (found,), (expected,) = gradients(found, x), gradients(expected, x)
    assert (found - expected).norm() / expected.norm() < 0.2


def test_one_image_and_weights_in_channels_last():
    dense = conv().to(memory_format=torch.channels_last)
    weight = dense.weight
    layer = swap(dense)
    assert layer.weight is weight
    x = image(dense)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert torch.equal(layer.mask.flatten(1), keep(layer.weight.flatten(1)))
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight * layer.mask, layer.bias, padding=1))


def test_as_a_packed_product(reference):
    dense = conv("3x3, stride", in_channels=16, out=16, dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), "transposable", Plan("reference:a", "reference:b", "dense"))
    assert layer.sparse_weight is None
    x = image(dense).requires_grad_()
    expected = same_convolution(dense, x, dense.weight * layer.mask)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, x), gradients(expected, x))
