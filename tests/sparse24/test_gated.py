"""Activations: the kernels and the operator against PyTorch's formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from sparse24 import ops
from sparse24.activations import GATED, KINDS, gated_activation, pruned_relu2
from sparse24.fragments import from_fragments
from sparse24.gated import gated_backward, gated_forward, relu2_prune, relu2_prune_backward, relu2_prune_pack
from sparse24.reference import magnitude_mask, pack, unpack

# one rounding to the dtype, after a few in float32
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 1e-6}, torch.float16: {"rtol": 2.0**-10, "atol": 1e-6}}


def formula(kind, up, gate):
    if kind == "relu2":
        return F.relu(up).square()
    if kind == "gelu":
        return F.gelu(up, approximate="tanh")
    return (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up


def inputs(kind, shape, device, dtype=torch.float32, layout="plain"):
    """dy, up, gate; the halves of one tensor if layout is "fused"."""
    generator = torch.Generator().manual_seed(1)
    both = (3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)).to(device, dtype)
    dy = torch.randn(shape, generator=generator).to(device, dtype)
    gate, up = both.chunk(2, dim=-1)
    if layout == "plain":
        gate, up = gate.contiguous(), up.contiguous()
    elif layout == "transposed":
        gate, up, dy = (x.t().contiguous().t() for x in (gate, up, dy))
    return dy, up, gate if kind in GATED else None


def expected(kind, dy, up, gate):
    """Value and gradients in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (up, gate) if x is not None]
    y = formula(kind, leaves[0], leaves[-1])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


@pytest.mark.parametrize("layout", ["plain", "fused", "transposed"])
@pytest.mark.parametrize("shape", [(3, 8), (5, 1030), (1, 1), (0, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels(kind, shape, layout, device):
    for dtype, tolerance in TOLERANCE.items():
        dy, up, gate = inputs(kind, shape, device, dtype, layout)
        found = [gated_forward(kind, up, gate), *(x for x in gated_backward(kind, dy, up, gate) if x is not None)]
        for x, value in zip(found, expected(kind, dy, up, gate), strict=True):
            assert x.dtype == dtype
            assert x.is_contiguous()
            torch.testing.assert_close(x.double(), value, **tolerance)


def test_gradients_into_one_buffer(device):
    dy, up, gate = inputs("swiglu", (6, 40), device)
    buffer = torch.full((6, 80), torch.nan, device=device)
    out = (buffer[:, 40:], buffer[:, :40])
    gated_backward("swiglu", dy, up, gate, out)
    assert torch.equal(buffer, torch.cat(gated_backward("swiglu", dy, up, gate)[::-1], dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden_and_large_inputs_stay_finite(kind, device):
    x = torch.tensor([[math.nan, 1e4, -1e4, 1e-30, 0.0]], device=device)
    one = torch.ones_like(x)
    up, gate = (one, x) if kind in GATED else (x, None)
    for result in (gated_forward(kind, up, gate), gated_backward(kind, one, up, gate)[1 if kind in GATED else 0]):
        assert result.isnan().tolist() == [[True, False, False, False, False]]


# --- the operator ---


@pytest.mark.parametrize("kind", KINDS)
def test_operator_outside_of_kernels(kind):
    dy, up, gate = inputs(kind, (2, 3, 16), "cpu", layout="fused")
    leaves = [x.clone().requires_grad_() for x in (up, gate) if x is not None]
    y = gated_activation(kind, *leaves)
    y.backward(dy)
    assert y.is_contiguous()
    for x, value in zip([y.detach(), *(leaf.grad for leaf in leaves)], expected(kind, dy, up, gate), strict=True):
        # PyTorch's own GELU cancels at large negative x
        torch.testing.assert_close(x.double(), value, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True], ids=["formula", "kernels"])
@pytest.mark.parametrize("kind", KINDS)
def test_operator_compiles_without_a_graph_break(kind, kernels, device, monkeypatch):
    if kernels:
        monkeypatch.setattr("sparse24.activations.use_kernels", lambda tensor: True)

    def layer(x, weight):
        product = x @ weight.t()
        parts = product.chunk(2, dim=-1)
        return gated_activation(kind, *parts[: 2 if kind in GATED else 1]).sum(-1)

    x, weight = torch.randn(3, 5, 8, device=device), torch.randn(32, 8, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x, weight).square().sum(), weight)
    (wanted,) = torch.autograd.grad(layer(x, weight).square().sum(), weight)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_registration(kind):
    _, up, gate = inputs(kind, (4, 6), "cpu", layout="fused")
    leaves = (up.requires_grad_(), None if gate is None else gate.requires_grad_())
    torch.library.opcheck(torch.ops.sparse24.gated_activation, (*leaves, kind))


def test_only_inputs_are_saved():
    saved = []
    up, gate = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        gated_activation("geglu", up, gate)
    assert sorted(saved) == sorted([up.data_ptr(), gate.data_ptr()])


def test_kernels_serve_tensors_on_a_gpu():
    assert not ops.use_kernels(torch.zeros(1))


# --- squared ReLU, pruned ---


def relu2(x):
    return F.relu(x.float()).square().to(x.dtype)


def awkward(shape, device, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x = (x * 4).round() / 4  # many ties
    x[torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.2] = -0.0
    return x.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4), (5, 20), (33, 260)])
@pytest.mark.parametrize("transposed", [False, True])
def test_relu2_prune_pack_is_pack_of_the_pruned_activation(transposed, shape, dtype, device):
    x = awkward(shape, device, dtype)
    x = x.t().contiguous().t() if transposed else x
    h = relu2(x)
    wanted = pack(h, magnitude_mask(h))
    found = relu2_prune_pack(x)
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.metadata, wanted.metadata)
    again = type(found)(torch.full_like(found.values, torch.nan), torch.full_like(found.metadata, 0x7F7F), found.cols)
    relu2_prune_pack(x, out=again)
    assert torch.equal(again.values, wanted.values)
    assert torch.equal(again.metadata, wanted.metadata)


def test_relu2_prune_pack_in_fragment_order(device):
    x = awkward((48, 192), device, torch.float16)
    found, wanted = from_fragments(relu2_prune_pack(x, fragments=True)), relu2_prune_pack(x)
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.metadata, wanted.metadata)


@pytest.mark.parametrize("group", [[math.nan, 1, 2, 3], [1, math.inf, math.nan, 3], [-math.inf, 2, math.nan, 1]])
def test_relu2_prune_keeps_what_is_not_finite(group, device):
    x = torch.tensor([group], dtype=torch.float32, device=device)
    dense = unpack(relu2_prune_pack(x))
    assert dense.isnan().tolist() == x.isnan().tolist()
    assert dense.isposinf().tolist() == x.isposinf().tolist()
    assert torch.equal(relu2_prune_backward(torch.ones_like(x), x).isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4), (33, 260)])
@pytest.mark.parametrize("transposed", [False, True])
def test_relu2_prune_backward(transposed, shape, dtype, device):
    x, dy = (
        awkward(shape, device, dtype),
        torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device, dtype),
    )
    if transposed:
        x, dy = x.t().contiguous().t(), dy.t().contiguous().t()
    h = relu2(x)
    wanted = (2 * F.relu(x.float()) * dy.float() * magnitude_mask(h)).to(dtype)
    assert torch.equal(relu2_prune_backward(dy, x), wanted)
    assert torch.equal(relu2_prune(x), h * magnitude_mask(h))


def kept_by_hand(h):
    """The two largest of each four, one group at a time; the lower feature goes first among equals."""
    out = torch.zeros_like(h)
    for row, values in enumerate(h.tolist()):
        for start in range(0, len(values), 4):
            order = sorted(range(start, start + 4), key=lambda i: (-values[i], i))
            for i in order[:2]:
                out[row, i] = values[i]
    return out


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pruned_relu2_operator(kernels, dtype, device, monkeypatch):
    monkeypatch.setattr("sparse24.activations.use_kernels", lambda tensor: kernels)
    x = awkward((2, 3, 20), device, dtype).transpose(0, 1).detach().requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    y = pruned_relu2(x)
    wanted = kept_by_hand(relu2(x.detach()).reshape(6, 20)).reshape(x.shape)
    assert torch.equal(y, wanted)
    assert y.is_contiguous()
    assert ((y != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    assert (y != 0).sum() < (relu2(x.detach()) != 0).sum()
    y.backward(dy)
    # 2·relu(x)·dy is zero, too, where a kept entry is
    assert torch.equal(x.grad, torch.where(wanted != 0, 2 * F.relu(x.detach().float()) * dy.float(), 0.0).to(dtype))
    torch.library.opcheck(torch.ops.sparse24.pruned_relu2.default, (x.detach().reshape(-1, 20).requires_grad_(),))


def test_pruned_relu2_compiles_without_a_graph_break(device):
    layer = torch.nn.Linear(8, 16, device=device)
    x = torch.randn(5, 8, device=device)

    def loss(x):
        return pruned_relu2(layer(x)).square().sum()

    (expected,) = torch.autograd.grad(loss(x), layer.weight)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), layer.weight)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


# --- errors ---


def test_bad_arguments_are_named(device):
    x = torch.zeros(4, 8, device=device)
    with pytest.raises(ValueError, match="kind must be one of gelu, relu2, geglu, swiglu; found 'silu'"):
        gated_activation("silu", x)
    with pytest.raises(ValueError, match="gate must be a tensor with kind='geglu'; found None"):
        gated_activation("geglu", x)
    with pytest.raises(ValueError, match="gate must be None with kind='gelu'; found a tensor"):
        gated_activation("gelu", x, x)
    with pytest.raises(ValueError, match=r"gate must be like up.*found torch.float32 of \(4, 4\)"):
        gated_activation("swiglu", x, x[:, :4])
    with pytest.raises(ValueError, match="up must be float32, bfloat16 or float16"):
        gated_activation("gelu", x.int())
    with pytest.raises(ValueError, match="dy must be like up"):
        gated_backward("gelu", x.half(), x)
    with pytest.raises(ValueError, match=r"out\[1\] must be like up.*found None"):
        gated_backward("swiglu", x, x, x, (x, None))
    with pytest.raises(ValueError, match="features a multiple of 4"):
        relu2_prune_pack(x[:, :6])
    with pytest.raises(ValueError, match=r"features a multiple of 4; found torch.float32 of \(4, 6\)"):
        pruned_relu2(x[:, :6])
    with pytest.raises(ValueError, match="dy must be torch.float32"):
        relu2_prune_backward(x.half(), x)
