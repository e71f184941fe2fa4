"""Nothing is timed that is wrong, and nothing that fails stops the rest."""

import itertools
import math
import time

import pytest
import torch

from benchmarks import gemms, layers, operators, products
from benchmarks.bench import Arm, Bench, Unavailable, exact, relative_error
from benchmarks.rows import FAILED, OK, UNAVAILABLE, WRONG
from benchmarks.timing import Timed, Timing, interleaved
from tests.sparse24.reference_backend import Reference

CPU = torch.device("cpu")


def arm(name, error=0.0, calls=None, **more):
    def run(i):
        if calls is not None:
            calls.append(name)
        time.sleep(1e-3)

    return Arm(name, lambda: run, lambda call: error, 1e-2, **more)


def failing(name, error, **more):
    def make():
        raise error

    return Arm(name, make, **more)


def by_arm(rows):
    return {row.arm: row for row in rows}


@pytest.mark.parametrize("error", [0.5, math.nan, math.inf])
def test_a_wrong_result_is_recorded_and_never_timed(bench, rows, error):
    calls = []
    bench.compare("p", "c", [arm("dense"), arm("ours", error, calls)], "dense")
    found = by_arm(rows)
    assert found["ours"].status == WRONG
    assert found["ours"].ms is None
    assert "not timed" in found["ours"].note
    assert calls == []
    assert found["dense"].status == OK


def test_an_exception_in_one_arm_leaves_the_others(bench, rows):
    def breaks_when_timed(i):
        raise RuntimeError("second line follows\nhere")

    arms = [
        arm("dense"),
        failing("ours", RuntimeError("broken")),
        failing("library", RuntimeError("no such GPU"), ours=False),
        failing("not here", Unavailable("needs sm_90")),
        Arm("late", lambda: breaks_when_timed),
    ]
    bench.compare("p", "c", arms, "dense")
    found = by_arm(rows)
    assert (found["ours"].status, found["ours"].note) == (FAILED, "RuntimeError: broken")
    assert (found["library"].status, found["library"].note) == (UNAVAILABLE, "RuntimeError: no such GPU")
    assert (found["not here"].status, found["not here"].note) == (UNAVAILABLE, "needs sm_90")
    assert (found["late"].status, found["late"].note) == (FAILED, "RuntimeError: second line follows")
    assert found["dense"].ratio == 1


def test_a_baseline_that_fails_leaves_no_ratios(bench, rows):
    bench.compare("p", "c", [failing("dense", RuntimeError("x"), ours=False), arm("ours")], "dense")
    assert by_arm(rows)["ours"].ms > 0
    assert by_arm(rows)["ours"].ratio is None


def test_floor_and_ratio(bench, rows):
    arms = [arm("dense"), arm("ours", bytes=1e6, flop=5e9, added_ms=100.0)]
    bench.compare("p", "c", arms, "dense")
    ours = by_arm(rows)["ours"]
    assert (ours.floor_ms, ours.floor) == (pytest.approx(5.0), "matmul rate")
    assert ours.floor_share == pytest.approx(5.0 / ours.ms)
    assert ours.ms > 100
    assert ours.ratio == pytest.approx(by_arm(rows)["dense"].ms / ours.ms)
    arms[1].bytes = 1e7
    bench.compare("p", "d", arms, "dense")
    assert (rows[-1].floor_ms, rows[-1].floor) == (pytest.approx(10.0), "copy bandwidth")


def test_arms_take_turns():
    order = []
    arms = {name: Timed(lambda i, name=name: order.append((name, i)), sets=2) for name in "ab"}
    timings = interleaved(arms, CPU)
    assert set(timings) == {"a", "b"}
    assert {i for _, i in order} == {0, 1}
    runs = [name for name, _ in order]
    changes = sum(x != y for x, y in itertools.pairwise(runs))
    assert changes >= 5


def test_median_and_spread():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.5, 2.0, 5.0)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0)


def test_relative_error():
    a = torch.randn(10_000, 4)
    assert relative_error(a, a) == 0
    assert relative_error(1.01 * a, a) == pytest.approx(0.01, rel=1e-3)
    assert math.isnan(relative_error(torch.full_like(a, math.nan), a))
    assert math.isnan(relative_error(a, torch.zeros_like(a)))
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    with pytest.raises(ValueError, match="result must be"):
        relative_error(a[:1], a)


def test_exact():
    a = torch.tensor([1.0, math.nan, 2.0, 0.0])
    assert exact(a, a.clone()) == 0
    assert exact(a, torch.tensor([1.0, math.nan, 2.0, 1.0])) == 0.25


class Crooked(Reference):
    """Its dX is wrong."""

    name = "crooked"

    def variants(self, product, device):
        return [""]

    def linear(self, operand, x, bias, features, variant):
        y = super().linear(operand, x, bias, features, variant)
        return y if features == 64 else y.roll(1, 1)


@pytest.fixture
def backends(monkeypatch):
    monkeypatch.setitem(products.BACKENDS, "reference", Reference())
    monkeypatch.setitem(products.BACKENDS, "crooked", Crooked())


def run_cases(cases, bench: Bench):
    for case in cases:
        case.run(bench)


def test_products_of_every_backend(bench, rows, backends):
    run_cases(products.cases(CPU, rehearse=True), bench)
    for row in rows:
        row.arm = row.arm.partition(":")[0]  # which of the variants is the fastest is chance
    for kind in ("forward", "input_gradient", "weight_gradient"):
        found = {row.arm: row for row in rows if row.case == f"64x128, 64 tokens: {kind}"}
        assert found["dense"].ratio == 1
        assert found["reference"].status == OK, found["reference"].note
        assert found["reference"].floor_ms < found["dense"].floor_ms
        assert found["reference"].extra["packing_ms"] is not None
        assert found["gluon"].status == UNAVAILABLE
        assert found["gluon"].note == "needs a CUDA device"
        assert found["crooked"].status == (WRONG if kind == "input_gradient" else OK)


def test_layers_with_another_backend(bench, rows, backends, monkeypatch):
    """fst computes what it does with dense products, whatever multiplies; a wrong backend is caught here too."""
    from sparse24.dispatch import Plan

    from benchmarks.bench import Case

    def with_plan(choice):
        monkeypatch.setattr(
            layers,
            "choose_plans",
            lambda net, *_: (
                {n: Plan(choice, choice, choice) for n, m in net.named_modules() if isinstance(m, layers.SparseLinear)},
                "",
            ),
        )

    case: Case = layers.ffn_cases(CPU, rehearse=True)[0]
    with_plan("reference")
    case.run(bench)
    assert by_arm(rows)["fst"].status == OK, by_arm(rows)["fst"].note
    assert by_arm(rows)["fst"].extra["products"] == "reference / reference / reference"
    rows.clear()
    with_plan("crooked")
    case.run(bench)
    assert by_arm(rows)["fst"].status == WRONG
    assert by_arm(rows)["dense"].status == OK


def test_a_broken_operator_is_caught(bench, rows, monkeypatch):
    from sparse24 import transposable

    right = transposable.pack_both

    def wrong(*arguments, **options):
        straight, transpose = right(*arguments, **options)
        straight.values.view(torch.int32)[0] ^= 1
        return straight, transpose

    (case,) = [case for case in operators.cases(CPU, True) if case.name.startswith("packing both ways")]
    case.run(bench)
    assert by_arm(rows)["fragment order"].status == OK
    rows.clear()
    monkeypatch.setattr(transposable, "pack_both", wrong)
    case.run(bench)
    assert by_arm(rows)["fragment order"].status == WRONG


@pytest.fixture
def matmul_on_cpu(monkeypatch):
    """`sparse24.matmul` as its definition says, on the CPU: two kernels, the second of which is wrong."""
    from sparse24 import matmul
    from sparse24.fragments import from_fragments
    from sparse24.packing import unpack

    def dense(a):
        packed = from_fragments(a)
        bits = {1: torch.uint8, 2: torch.int16}[packed.values.element_size()]
        return unpack(packed._replace(values=packed.values.view(bits))).view(a.dtype).float()

    def linear(a, x, bias=None, out=None, variant=None, scale=None):
        y = x.float() @ dense(a).t()
        return (y if variant == "good" else y.roll(1, 0)).to(torch.bfloat16 if scale is not None else x.dtype)

    def outer(a, x, out=None, variant=None):
        y = dense(a)[:, : x.shape[0]] @ x.float()
        return y if variant == "good" else y.roll(1, 0)

    monkeypatch.setattr(matmul, "linear", linear)
    monkeypatch.setattr(matmul, "outer", outer)
    monkeypatch.setattr(products.BACKENDS["gluon"], "variants", lambda product, device: ["good", "bad"], raising=False)
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda x, w, a, b, out_dtype: (x.float() @ w.float()).to(out_dtype), raising=False
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_sparse_gemms_one_by_one(bench, rows, matmul_on_cpu, dtype):
    gemms._linear(bench, "case", 128, 128, 64, dtype)
    assert [by_arm(rows)[name].status for name in ("dense", "good", "bad")] == [OK, OK, WRONG], rows


def test_outer_gemms_one_by_one(bench, rows, matmul_on_cpu):
    gemms._outer(bench, "case", 128, 128, 64)
    assert [by_arm(rows)[name].status for name in ("dense", "good", "bad")] == [OK, OK, WRONG], rows


@pytest.mark.slow
def test_every_operator_is_right(bench, rows):
    """In Triton's interpreter: what the smoke test of the GPU suite runs there."""
    run_cases(operators.cases(CPU, rehearse=True) + gemms.cases(CPU, rehearse=True), bench)
    assert [row for row in rows if row.ours and row.status in (WRONG, FAILED)] == []
    assert len([row for row in rows if row.ours and row.status == OK]) >= 20
