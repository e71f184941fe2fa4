"""The 2:4 linear layer: gradients against independent formulas, dtypes, memory, compile, checkpointing."""

import shutil

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from sparse24 import ops
from sparse24.autograd import MvueKey, sparse_linear
from sparse24.reference import (
    fp8_dw,
    fp8_dx,
    fp8_forward,
    linear_dw,
    linear_dx,
    linear_forward,
    magnitude_mask,
    mvue24,
    transposable_mask,
    uniform24,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

OUT, IN = 24, 16


def key(step=3, first_token=8):
    return MvueKey(seed=1, layer=2, counter=torch.tensor([step, first_token]))


def layer(leading=(5, 7), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, IN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(OUT, IN, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(OUT, generator=generator, dtype=dtype).requires_grad_()
    dy = torch.randn(*leading, OUT, generator=generator, dtype=dtype)
    return x, weight, (weight * transposable_mask(weight)).detach(), bias, dy


@pytest.mark.parametrize("leading", [(35,), (5, 7), (2, 3, 4), ()])
@pytest.mark.parametrize("mvue", [None, key()])
def test_values_and_gradients(leading, mvue):
    x, weight, sparse, bias, dy = layer(leading)
    y = sparse_linear(x, weight, sparse, bias, mvue)
    y.backward(dy)
    torch.testing.assert_close(y, torch.einsum("...i,oi->...o", x, sparse) + bias)
    torch.testing.assert_close(x.grad, torch.einsum("...o,oi->...i", dy, sparse))
    rows_dy, rows_x = dy.reshape(-1, OUT), x.detach().reshape(-1, IN)
    torch.testing.assert_close(bias.grad, rows_dy.sum(0))  # unpruned
    if mvue is not None:
        rows_dy = mvue24(rows_dy, uniform24(1, 3, 2, rows_dy.shape[0], OUT, first_token=8))
    torch.testing.assert_close(weight.grad, torch.einsum("to,ti->oi", rows_dy, rows_x))
    assert sparse.grad is None


def test_the_three_products_are_those_of_a_dense_layer():
    x, weight, _, bias, dy = layer((12,))
    F.linear(x, weight, bias).backward(dy)
    with torch.no_grad():
        torch.testing.assert_close(linear_forward(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(linear_dx(dy, weight), x.grad)
        torch.testing.assert_close(linear_dw(dy, x), weight.grad)
        uniform = uniform24(0, 0, 0, 12, OUT)
        torch.testing.assert_close(linear_dw(dy, x, uniform), mvue24(dy, uniform).t() @ x)


def test_the_weight_gradient_with_mvue_is_unbiased():
    x, weight, sparse, _, dy = layer((16,))
    dense = dy.t() @ x.detach()
    draws = []
    for step in range(500):
        weight.grad = None
        sparse_linear(x, weight, sparse, None, key(step)).backward(dy)
        draws.append(weight.grad)
    draws = torch.stack(draws)
    z = (draws.mean(0) - dense) / (draws.std(0) / 500**0.5)
    assert z.abs().max() < 4.5  # the largest of 384


def test_the_draws_do_not_depend_on_micro_batches():
    x, weight, sparse, bias, dy = layer((32,))
    sparse_linear(x, weight, sparse, bias, key(first_token=0)).backward(dy)
    whole, weight.grad = weight.grad, None
    counter = torch.tensor([3, 0])
    outputs = []
    for first in (0, 12, 20):  # forward passes first, the counter moving on in place: each keeps its own
        counter[1] = first
        last = {0: 12, 12: 20, 20: 32}[first]
        y = sparse_linear(x[first:last], weight, sparse, bias, MvueKey(1, 2, counter))
        outputs.append((y, dy[first:last]))
    for y, gradient in outputs:
        y.backward(gradient)
    torch.testing.assert_close(weight.grad, whole)


def test_only_what_is_needed_is_saved_and_computed():
    x, weight, sparse, bias, dy = layer((35,))
    saved = []

    def total(x, weight, bias):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            return sparse_linear(x, weight, sparse, bias, key())

    total(x, weight, bias)
    assert sorted(t.data_ptr() for t in saved if t.dim() == 2) == sorted([x.data_ptr(), sparse.data_ptr()])
    assert [t.tolist() for t in saved if t.dim() == 1] == [[3, 8, 2, 0]]
    y = total(x.detach(), weight, None)
    assert [t.data_ptr() for t in saved if t.dim() == 2] == [x.data_ptr()]
    y.backward(dy)
    assert weight.grad is not None
    y = total(x, weight.detach(), None)
    assert [t.data_ptr() for t in saved] == [sparse.data_ptr()]
    y.backward(dy)
    assert x.grad is not None
    assert not total(x.detach(), weight.detach(), None).requires_grad


@pytest.mark.parametrize("mvue", [None, key()])
def test_autocast(mvue):
    x, weight, sparse, bias, dy = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(x, weight, sparse, bias, mvue)
        expected = F.linear(x, sparse, bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.backward(dy.bfloat16())
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    low, rows_dy = x.detach().bfloat16().reshape(-1, IN), dy.bfloat16().reshape(-1, OUT)
    if mvue is not None:
        rows_dy = mvue24(rows_dy, uniform24(1, 3, 2, 35, OUT, first_token=8))
    torch.testing.assert_close(weight.grad, (rows_dy.t() @ low).float())
    torch.testing.assert_close(x.grad, (dy.bfloat16() @ sparse.bfloat16()).float())


def test_a_weight_stored_transposed():
    x, weight, sparse, bias, dy = layer((8,))
    stored = weight.detach().t().contiguous().requires_grad_()
    sparse_linear(x, stored.t(), sparse, bias).backward(dy)
    torch.testing.assert_close(stored.grad, x.detach().t() @ dy)


def test_gradcheck_of_the_input():
    x, weight, sparse, bias, _ = layer((3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda x, b: sparse_linear(x, weight.detach(), sparse, b), (x, bias))


def test_activation_checkpointing():
    grads = []
    for use in (False, True):
        x, weight, sparse, bias, dy = layer()

        def block(x, weight=weight, sparse=sparse, bias=bias):
            return F.gelu(sparse_linear(x, weight, sparse, bias, key()))

        y = checkpoint(block, x, use_reentrant=False) if use else block(x)
        y.backward(dy)
        grads.append((x.grad, weight.grad, bias.grad))
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def rounded(x, dtype):
    """x as fp8 values with one scale see it, in float64: the published formula."""
    factor = torch.finfo(dtype).max / x.abs().max().float()
    return (x.float() * factor).to(dtype).double() / factor.double()


@pytest.mark.parametrize("leading", [(35,), (5, 7), ()])
@pytest.mark.parametrize("mvue", [None, key()])
@pytest.mark.parametrize("autocast", [False, True])
def test_fp8_values_and_gradients(leading, mvue, autocast):
    x, weight, sparse, bias, dy = layer(leading)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = sparse_linear(x, weight, sparse, bias, mvue, fp8=True)
    assert y.dtype == dtype
    dy = dy.to(dtype)
    y.backward(dy)
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    near = {"rtol": 1e-2, "atol": 1e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    rows_x, rows_dy = x.detach().to(dtype).reshape(-1, IN), dy.reshape(-1, OUT)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    expected = rounded(rows_x, e4m3) @ rounded(sparse, e4m3).t() + bias.detach().to(dtype)
    torch.testing.assert_close(y.reshape(-1, OUT).double(), expected, **near)
    expected = rounded(rows_dy, e5m2) @ rounded(sparse, e5m2)
    torch.testing.assert_close(x.grad.reshape(-1, IN).double(), expected, **near)
    if mvue is not None:
        rows_dy = mvue24(rows_dy, uniform24(1, 3, 2, rows_dy.shape[0], OUT, first_token=8))
    expected = rounded(rows_dy, e5m2).t() @ rounded(rows_x, e5m2)
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-5)  # float32 under autocast too
    torch.testing.assert_close(bias.grad, dy.reshape(-1, OUT).sum(0).float(), **near)


def test_fp8_products_are_those_of_the_reference():
    x, weight, sparse, bias, dy = layer((36,))
    y = sparse_linear(x, weight, sparse, bias, key(), fp8=True)
    y.backward(dy)
    x = x.detach()
    assert torch.equal(y, fp8_forward(x, sparse, bias))
    assert torch.equal(weight.grad, fp8_dw(dy, x, uniform24(1, 3, 2, 36, OUT, first_token=8)))
    y = sparse_linear(leaf := x.clone().requires_grad_(), weight, sparse, None, fp8=True)
    y.backward(dy)
    assert torch.equal(leaf.grad, fp8_dx(dy, sparse))


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter beside a GPU")
def test_fp8_by_the_kernels_gives_the_same_bits(monkeypatch):
    """Quantisation and MVUE as on a GPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(ops, "use_kernels", lambda tensor, kernels=kernels: kernels)
        x, weight, sparse, bias, dy = layer((36,))
        y = sparse_linear(x, weight, sparse, bias, key(), fp8=True)
        y.backward(dy)
        results.append((y, x.grad, weight.grad, bias.grad))
    assert all(map(torch.equal, *results))


def test_the_error_of_fp8_is_within_its_bound():
    """Half a unit in the last of 3 mantissa bits, or half the spacing of the subnormals, for either factor."""
    x, weight, sparse, _, _ = layer((64,))

    def bound(t):
        return t.abs() * 2.0**-4 + t.abs().max() / 448 * 2.0**-10

    y = sparse_linear(x, weight, sparse, fp8=True)
    x = x.detach()
    off = bound(x) @ sparse.abs().t() + x.abs() @ bound(sparse).t() + bound(x) @ bound(sparse).t()
    assert ((y - x @ sparse.t()).abs() <= off).all()
    assert (y - x @ sparse.t()).norm() < 0.05 * (x @ sparse.t()).norm()


def test_fp8_saves_a_byte_an_entry():
    x, weight, sparse, bias, _ = layer((35,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sparse_linear(x, weight, sparse, bias, key(), fp8=True)
    assert [(t.dtype, t.shape) for t in saved if t.dim() == 2] == [
        (torch.float8_e5m2, (35, IN)),
        (torch.float8_e5m2, (IN, OUT)),
    ]


def test_fp8_without_tokens():
    x, weight, sparse, bias, dy = layer((0,))
    sparse_linear(x, weight, sparse, bias, key(), fp8=True).backward(dy)
    assert x.grad.shape == (0, IN)
    assert torch.equal(weight.grad, torch.zeros(OUT, IN))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
# without it a rounding to bf16 may be left out, and the next one, to fp8, is to another value
@torch._inductor.config.patch(emulate_precision_casts=True)
def test_compiled_whole_and_once(fp8, autocast):
    torch._dynamo.reset()
    counts = CompileCounterWithBackend("inductor")
    compiled = torch.compile(sparse_linear, fullgraph=True, backend=counts)
    for step, first_token in [(3, 8), (4, 8), (5, 12)]:
        results = []
        for function in (sparse_linear, compiled):
            x, weight, sparse, bias, dy = layer((36,))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                y = function(x, weight, sparse, bias, key(step, first_token), fp8)
            y.backward(dy.to(y.dtype))
            results.append((y.detach(), x.grad, weight.grad, bias.grad))
        near = 2e-2 if autocast else 1e-4
        for plain, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, plain, rtol=near, atol=near)
    assert counts.frame_count == 1


@pytest.mark.slow
def test_layers_share_compiled_code():
    class Layer(torch.nn.Module):
        def __init__(self, index):
            super().__init__()
            _, self.weight, self.sparse, _, _ = layer()
            self.mvue = MvueKey(1, torch.tensor(index), torch.tensor([3, 8]))

        def forward(self, x):
            return sparse_linear(x, self.weight, self.sparse, None, self.mvue)

    counts = CompileCounterWithBackend("aot_eager")
    x, *_, dy = layer((36,))
    for index in range(12):  # more than the limit of recompilations
        module, grads = Layer(index), []
        for function in (module, torch.compile(module, fullgraph=True, backend=counts)):
            module.weight.grad = None
            function(x).backward(dy)
            grads.append(module.weight.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    assert counts.frame_count <= 2


def test_wrong_shapes_are_refused():
    x, weight, sparse, bias, _ = layer()
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., in_features=16\); found \(5, 7, 12\)"):
        sparse_linear(x[..., :12], weight, sparse, bias)
    with pytest.raises(ValueError, match=r"found \(24, 16\) and \(24, 12\)"):
        sparse_linear(x, weight, sparse[:, :12], bias)
    with pytest.raises(ValueError, match=r"bias must be \(out_features=24,\); found \(4,\)"):
        sparse_linear(x, weight, sparse, bias[:4])


def test_a_step_of_gradient_descent_revives_pruned_weights():
    x, weight, _, _, dy = layer((64,))
    mask = magnitude_mask(weight)
    sparse_linear(x, weight, (weight * mask).detach()).backward(dy)
    assert (weight.grad[~mask] != 0).all()
