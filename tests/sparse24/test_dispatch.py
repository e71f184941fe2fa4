"""Choosing backends: measured, checked, remembered, forced; on the CPU, with backends made for the purpose."""

import json
import time
from dataclasses import replace

import pytest
import torch
from sparse24 import backends, dispatch, ops
from sparse24.autograd import MvueKey, SparseWeight, fp8_weight, sparse_linear
from sparse24.backends.base import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Operand, Product
from sparse24.dispatch import LayerShape, Plan, UnsupportedError, choose, table
from sparse24.reference import transposable_mask

from tests.sparse24.reference_backend import Reference

CPU, E4M3 = torch.device("cpu"), torch.float8_e4m3fn
SHAPE = LayerShape(64, 32, 48, torch.float32, transposable=True, mvue=True)


class Wrong(Reference):
    """Fast, and wrong in one of its two variants' columns (as a library's tuned algorithm may be)."""

    name = "wrong"

    def linear(self, operand, x, bias, features, variant):
        y = super().linear(operand, x, bias, features, variant)
        if variant == "a":
            y[:, 0] = 0
        return y

    def weight_gradient(self, dy, x, seed, position, variant):
        return super().weight_gradient(dy, x, seed, position, variant) * torch.nan


class Slow(Reference):
    name = "slow"

    def linear(self, *args):
        time.sleep(0.005)
        return super().linear(*args)


class Failing(Reference):
    name = "failing"

    def linear(self, *args):
        raise RuntimeError("no such algorithm\nwith a long explanation")

    def weight_gradient(self, *args):
        raise RuntimeError("no such algorithm")


@pytest.fixture
def use(monkeypatch):
    """use(Reference(), ...): these are the backends now, beside dense."""

    def install(*extra):
        known = {"dense": backends.BACKENDS["dense"], **{b.name: b for b in extra}}
        monkeypatch.setattr(backends, "BACKENDS", known)
        monkeypatch.setattr(dispatch, "BACKENDS", known)

    return install


@pytest.fixture
def as_gpu(monkeypatch):
    """Measure on the CPU as on a GPU."""
    original = dispatch.choose

    def choose_here(shape, backend="auto", cache=None):
        class Device:
            type = "cuda"

        monkeypatch.setattr(dispatch, "measure", lambda s, kind, device, only=None: measure(s, kind, CPU, only))
        monkeypatch.setattr(dispatch, "device_key", lambda device: {"gpu": "pretend"})
        return original(shape, Device(), backend, cache)

    measure = dispatch.measure
    return choose_here


def test_on_a_cpu_everything_is_dense():
    assert choose(SHAPE, CPU) == (Plan("dense", "dense", "dense"), [])


def test_the_three_products():
    product = Product(FORWARD, 7, 5, 3, torch.float32)
    assert (product.m, product.k, product.n) == (5, 3, 7)
    product = Product(INPUT_GRADIENT, 7, 5, 3, torch.float32)
    assert (product.m, product.k, product.n) == (3, 5, 7)
    product = Product(WEIGHT_GRADIENT, 7, 5, 3, torch.float32)
    assert (product.m, product.k, product.n) == (5, 7, 3)


@pytest.mark.parametrize("kind", [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT])
def test_measuring_one_product(use, kind):
    use(Reference(), Failing())
    rows = {row.choice.partition(":")[0]: row for row in dispatch.measure(SHAPE, kind, CPU)}
    assert rows["dense"].choice == "dense"
    assert rows["dense"].product_ms > 0
    assert rows["reference"].choice in ("reference:a", "reference:b")
    assert rows["reference"].product_ms > 0
    assert rows["failing"].product_ms is None
    assert rows["failing"].note == "no such algorithm"


def test_a_wrong_variant_is_told_and_never_chosen(use):
    use(Wrong())
    with pytest.warns(UserWarning, match=r"wrong, forward of 32x48x64, wrong: a is off by 0\.\d"):
        _, row = dispatch.measure(SHAPE, FORWARD, CPU)
    assert row.choice == "wrong:b"
    with pytest.warns(UserWarning, match="a is off by nan, b is off by nan"):
        _, row = dispatch.measure(SHAPE, WEIGHT_GRADIENT, CPU)
    assert row.product_ms is None
    assert "nan" in row.note


def test_whatever_a_kernel_raises_the_run_goes_on(use, as_gpu):
    class CompilationError(Exception):  # of Triton: no RuntimeError
        pass

    class Broken(Reference):
        name = "broken"

        def pack_weight(self, *args):
            raise CompilationError("at 3:4: no")

        def weight_gradient(self, *args):
            raise CompilationError("at 5:6: no")

    use(Broken())
    rows = {kind: dispatch.measure(SHAPE, kind, CPU)[1] for kind in (FORWARD, WEIGHT_GRADIENT)}
    assert rows[FORWARD].note == "packing failed: at 3:4: no"
    assert rows[WEIGHT_GRADIENT].note == "at 5:6: no"
    assert as_gpu(SHAPE)[0] == Plan()


def test_without_memory_to_measure_products_are_dense_and_measured_another_time(use, as_gpu, tmp_path, monkeypatch):
    class NoMemory:
        def __init__(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    use(Reference())
    cache = tmp_path / "cache.json"
    monkeypatch.setattr(dispatch, "_Problem", NoMemory)
    with pytest.warns(UserWarning, match="was not measured: CUDA out of memory"):
        plan, rows = as_gpu(SHAPE, cache=cache)
    assert plan == Plan()
    assert "out of memory" in table(SHAPE, plan, rows)
    assert not cache.exists()


def test_an_error_that_broke_the_device_ends_the_run(use, monkeypatch):
    class Device:
        type = "cuda"

    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    use(Failing())
    product = SHAPE.product(WEIGHT_GRADIENT)
    problem = dispatch._Problem(SHAPE, WEIGHT_GRADIENT, CPU)
    with pytest.raises(RuntimeError, match=r"failing:a broke the CUDA context \(no such algorithm\)"):
        dispatch._best_variant(backends.BACKENDS["failing"], product, problem, Device())


def test_no_tokens(use):
    use(Failing())
    x = torch.empty(2, 0, 48)
    assert ops.linear("failing", [], x, None, 32).shape == (2, 0, 32)
    position = torch.tensor([1, 0, 0, 0])
    dw = ops.weight_gradient("failing", torch.empty(0, 32), torch.empty(0, 48), 0, position)
    assert torch.equal(dw, torch.zeros(32, 48))


def test_the_fastest_is_chosen_and_only_where_the_recipe_is_sparse(use, as_gpu):
    use(Slow())
    plan, rows = as_gpu(SHAPE)
    assert plan.forward == plan.input_gradient == "dense"
    assert [row.kind for row in rows] == [FORWARD] * 2 + [INPUT_GRADIENT] * 2 + [WEIGHT_GRADIENT] * 2
    plain = LayerShape(64, 32, 48, torch.float32, transposable=False, mvue=False)
    plan, rows = as_gpu(plain)
    assert {row.kind for row in rows} == {FORWARD}


def test_in_fp8_the_forward_product_may_be_sparse(use, as_gpu):
    class Unscaled(Reference):
        name = "unscaled"

        def fp8_linear(self, operand, x, scale, *args):
            return super().fp8_linear(operand, x, torch.ones_like(scale), *args)

    use(Reference(), Unscaled())
    shape = replace(SHAPE, dtype=torch.bfloat16, fp8=True)
    assert shape.product(FORWARD).dtype == torch.float8_e4m3fn
    with pytest.warns(UserWarning, match="unscaled, forward of 32x48x64, wrong"):
        plan, rows = as_gpu(shape)
    assert plan.input_gradient == plan.weight_gradient == "dense"
    assert [(row.kind, row.product_ms is None) for row in rows] == [(FORWARD, False)] * 2 + [(FORWARD, True)]
    assert table(shape, plan, rows).splitlines()[0] == "32x48, 64 tokens, bfloat16, fp8"


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_packed_fp8_layer_computes_what_a_dense_one_does(use, compiled):
    use(Reference())
    weight, bias = torch.randn(32, 48), torch.randn(32)
    sparse = weight * transposable_mask(weight)
    torch._dynamo.reset()
    function = torch.compile(sparse_linear, fullgraph=True, backend="aot_eager") if compiled else sparse_linear
    results = []
    for packed in (sparse, fp8_weight(sparse), fp8_weight(sparse, "reference:a")):
        x = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        w = weight.clone().requires_grad_()
        y = function(x, w, packed, bias, MvueKey(1, torch.tensor(2), torch.tensor([3, 0])), fp8=True)
        y.sin().sum().backward()
        results.append((y.detach(), x.grad, w.grad))
    assert all(map(torch.equal, results[0], results[1]))
    torch.testing.assert_close(results[2][0], results[0][0].bfloat16().float())


def test_a_gain_within_the_noise_is_none():
    dense, close, fast = (dispatch.Row(FORWARD, c, ms, 0.0) for c, ms in (("dense", 1.0), ("a", 0.985), ("b", 0.97)))
    assert dispatch._fastest([dense, close], 1) == dense
    assert dispatch._fastest([dense, close, fast], 1) == fast
    assert dispatch._fastest([close], 1) == close  # asked for by name


def test_packing_counts_once_per_step():
    row = dispatch.Row(FORWARD, "x", product_ms=2.0, packing_ms=8.0)
    assert row.step_ms(1) == 10
    assert row.step_ms(4) == 16


def test_a_forced_backend_never_falls_back(use):
    use(Slow(), Failing())
    plan, _ = choose(SHAPE, CPU, "slow")
    assert {choice.partition(":")[0] for choice in plan} == {"slow"}
    with pytest.raises(UnsupportedError, match="forward by failing: no such algorithm"):
        choose(SHAPE, CPU, "failing")
    odd = LayerShape(64, 32, 20, torch.float32, transposable=False, mvue=False)
    with pytest.raises(UnsupportedError, match="needs k in multiples of 16, found 20"):
        choose(odd, CPU, "slow")
    with pytest.raises(ValueError, match="backend must be one of .*found 'fast'"):
        choose(SHAPE, CPU, "fast")
    assert choose(SHAPE, CPU, "dense") == (Plan(), [])


def test_measurements_are_remembered(use, as_gpu, tmp_path, monkeypatch):
    use(Reference())
    cache = tmp_path / "new" / "cache.json"
    first = as_gpu(SHAPE, cache=cache)
    (entry,) = json.loads(cache.read_text()).values()
    assert tuple(entry["plan"]) == first[0]
    other = LayerShape(128, 32, 48, torch.float32, transposable=True, mvue=True)
    as_gpu(other, cache=cache)
    assert len(json.loads(cache.read_text())) == 2
    monkeypatch.setattr(dispatch, "measure", None)

    class Device:
        type = "cuda"

    assert dispatch.choose(SHAPE, Device(), "auto", cache) == first


def test_a_damaged_cache_is_measured_again(use, as_gpu, tmp_path):
    use(Reference())
    cache = tmp_path / "cache.json"
    cache.write_text("{")
    with pytest.warns(UserWarning, match="not readable; measuring again"):
        as_gpu(SHAPE, cache=cache)
    assert json.loads(cache.read_text())


def test_the_table(use, as_gpu):
    use(Slow(), Failing())
    plan, rows = as_gpu(SHAPE)
    text = table(SHAPE, plan, rows)
    assert text.splitlines()[0] == "32x48, 64 tokens, float32"
    assert "* forward         dense" in text
    assert "no such algorithm" in text
    assert "x dense" in text


@pytest.mark.parametrize("leading", [(64,), (4, 16)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_packed_layer_computes_what_a_dense_one_does(use, leading, compiled):
    """Values and gradients, eager and compiled without a graph break, in each mixture of backends."""
    use(Reference())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 48, generator=generator)
    mask = transposable_mask(weight)
    bias = torch.randn(32, generator=generator)
    dense = weight * mask
    (operand, operand_t) = backends.BACKENDS["reference"].pack_weight(weight, mask, None, torch.float32, True, True)
    key = MvueKey(1, torch.tensor(2), torch.tensor([3, 0]))
    mixtures = [
        dense,
        SparseWeight(Operand("reference:a", operand), Operand("reference:b", operand_t), "reference:a"),
        SparseWeight(Operand("dense", [dense]), Operand("reference", operand_t), "dense"),
        SparseWeight(Operand("reference", operand), Operand("dense", [dense.t()]), "reference"),
    ]
    torch._dynamo.reset()
    function = torch.compile(sparse_linear, fullgraph=True, backend="aot_eager") if compiled else sparse_linear
    results = []
    for sparse in mixtures:
        x = torch.randn(*leading, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        y = function(x, w, sparse, b, key)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, w.grad, b.grad))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_operands_are_saved_for_backward(use):
    use(Reference())
    weight = torch.randn(32, 48).requires_grad_()
    mask = transposable_mask(weight)
    operand, operand_t = backends.BACKENDS["reference"].pack_weight(
        weight.detach(), mask, None, torch.float32, True, True
    )
    sparse = SparseWeight(Operand("reference", operand), Operand("reference", operand_t), "dense")
    x, saved = torch.randn(64, 48).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sparse_linear(x, weight, sparse)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), *(t.data_ptr() for t in operand_t)}


@pytest.mark.parametrize("name", ["cusparselt", "cutlass", "gluon", "triton"])
def test_backends_say_why_they_cannot(name):
    able, reason = backends.BACKENDS[name].supports(SHAPE.product(FORWARD), CPU)
    assert not able
    assert reason == "needs a CUDA device"


def test_the_operators_are_well_formed(use):
    """Schemas, fake implementations and aliasing, as PyTorch's own checker sees them."""
    use(Reference())
    weight = torch.randn(32, 48)
    operand, _ = backends.BACKENDS["reference"].pack_weight(
        weight, transposable_mask(weight), None, torch.float32, True, False
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops._linear, ("reference", operand, torch.randn(64, 48), torch.randn(32), 32), test_utils=tests
    )
    position = torch.tensor([1, 0, 0, 0])
    args = ("reference", torch.randn(64, 32), torch.randn(64, 48), 0, position)
    torch.library.opcheck(ops._weight_gradient, args, test_utils=tests)
    # opcheck's schema test knows no fp8
    operand, (x, scale) = fp8_weight(weight, "dense").forward.tensors, ops.fp8_quantize(torch.randn(64, 48), E4M3)
    args = ("dense", operand[:1], x, scale, torch.randn(32), 32, torch.bfloat16)
    torch.library.opcheck(ops._fp8_linear, args, test_utils="test_faketensor")
    pytest.importorskip("triton")
    torch.library.opcheck(ops._fp8_quantize_kernel, (torch.randn(5, 7).t(), E4M3, None), test_utils="test_faketensor")
