"""The self-test of the GEMMs: what hangs, crashes or is wrong there is left out, and only that."""

import sys

import pytest
import torch
from sparse24 import cubin, dispatch, matmul, selftest
from sparse24.backends import BACKENDS
from sparse24.backends.base import FORWARD

# stands in for the process that runs the kernels: `fate` of each name
CHILD = """
import sys, time
fates = {"a": "right", "b": "wrong", "c": "hang", "d": "crash", "e": "right"}
for name, fate in fates.items():
    if name in sys.argv[1:]:
        continue
    print("try", name, flush=True)
    if fate == "hang":
        time.sleep(60)
    if fate == "crash":
        sys.exit("CUDA error: an illegal memory access was encountered")
    print(*((fate, name) if fate == "right" else (fate, name, "off by 0.5")), flush=True)
"""


@pytest.fixture
def child(monkeypatch):
    def use(code):
        monkeypatch.setattr(selftest, "_command", lambda device, skipped: [sys.executable, "-c", code, *skipped])
        monkeypatch.setattr(selftest, "SECONDS", 2.0)
        selftest.broken.cache_clear()

    yield use
    selftest.broken.cache_clear()


def test_only_what_fails_is_left_out(child):
    child(CHILD)
    with pytest.warns(UserWarning, match="c is not used: it hung: no result in 2 s"):
        found = selftest.broken(0)
    assert found == {
        "b": "off by 0.5",
        "c": "it hung: no result in 2 s",
        "d": "it ended the process: CUDA error: an illegal memory access was encountered",
    }


def test_without_a_process_to_test_in_none_is_used(child):
    child("import sys; sys.exit('no driver')")
    with pytest.warns(UserWarning, match="could not be tested"):
        found = selftest.broken(0)
    assert set(found) == set(cubin.manifest())
    assert set(found.values()) == {"could not be tested: it ended the process: no driver"}


def test_dispatch_leaves_them_out(monkeypatch):
    """Of gluon's kernels only those are tried that the self-test passed."""
    shape = dispatch.LayerShape(64, 128, 128, torch.bfloat16, transposable=True, mvue=False)
    gluon, cpu = BACKENDS["gluon"], torch.device("cpu")
    monkeypatch.setattr(gluon, "supports", lambda product, device: (True, ""))
    monkeypatch.setattr(gluon, "variants", lambda product, device: ["good", "bad"])
    monkeypatch.setattr(gluon, "broken", lambda device: {"bad": "it hung"})
    monkeypatch.setattr(gluon, "pack_weight", BACKENDS["dense"].pack_weight)
    tried = []

    def linear(operand, x, bias, features, variant):
        tried.append(variant)
        return x @ operand[0].t()

    monkeypatch.setattr(gluon, "linear", linear)
    (row,) = dispatch.measure(shape, FORWARD, cpu, "gluon")
    assert set(tried) == {"good"}
    assert row.choice == "gluon:good"
    assert "bad: it hung" in row.note


@pytest.mark.parametrize("name", sorted(cubin.manifest()))
def test_every_kernel_is_tested_on_operands_of_its_own(name, monkeypatch):
    """The right result passes and a wrong one does not, for every kernel that is shipped."""
    entry = cubin.manifest()[name]

    def product(fragments, x, bias=None, variant=None, scale=None):
        from sparse24.fragments import from_fragments
        from sparse24.packing import unpack

        packed = from_fragments(fragments)
        dense = unpack(packed._replace(values=packed.values.float()))
        if entry.form == "outer":
            return dense[:, : x.shape[0]] @ x.float()
        return x.float() @ dense.t() * (1.0 if scale is None else scale) + bias.float()

    form = "outer" if entry.form == "outer" else "linear"
    monkeypatch.setattr(matmul, form, product)
    assert selftest._error(entry, torch.device("cpu")) < 1e-5
    monkeypatch.setattr(matmul, form, lambda *args, **options: product(*args, **options).roll(1, 0))
    assert selftest._error(entry, torch.device("cpu")) > selftest.TOLERANCE
    monkeypatch.setattr(matmul, form, lambda *args, **options: product(*args, **options) * torch.nan)
    assert not selftest._error(entry, torch.device("cpu")) <= selftest.TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_passes_on_this_gpu():
    assert selftest.broken(torch.cuda.current_device()) == {}
