"""The benchmark of generating text, rehearsed: rows as they should be, and nothing timed that is wrong."""

import pytest
import torch
from sparse24.backends import BACKENDS

from benchmarks import inference, shapes, worker
from benchmarks.report import EXPLANATIONS, TITLES, markdown, summary
from benchmarks.rows import OK, UNAVAILABLE, WRONG
from benchmarks.run import PARTS, Results
from sparse_pretrain.sparsity.packed import ROW_MAJOR
from tests.sparse24.reference_backend import Reference

CPU = torch.device("cpu")


class Crooked(Reference):
    name = "crooked"

    def variants(self, product, device):
        return [""]

    def linear(self, operand, x, bias, features, variant):
        y = super().linear(operand, x, bias, features, variant)
        return y if len(x) in (8, 32) else 1.5 * y  # right where it is measured


@pytest.fixture
def backends(monkeypatch):
    monkeypatch.setitem(BACKENDS, "reference", Reference())
    monkeypatch.setitem(BACKENDS, "crooked", Crooked())


def test_rehearsal(bench, rows, backends):
    prefill, decode = inference.cases(CPU, rehearse=True)
    for case in (prefill, decode):
        case.run(bench)
    # of two layers: FFN of three and of two matrices, 64 x 128
    for case, tokens, floor, ffn in (
        (prefill, 32, "matmul rate", 2 * 3 * 8192),
        (decode, 3, "copy bandwidth", 2 * 2 * 8192),
    ):
        found = {row.arm: row for row in rows if row.case == case.name}
        assert set(found) == {"dense", ROW_MAJOR, *(name for name in BACKENDS if name not in ("dense", "triton"))}
        assert {row.part for row in rows} == {"inference"}
        for name in ("dense", ROW_MAJOR, "reference"):
            row = found[name]
            assert row.status == OK, row.note
            assert row.ms > 0
            assert row.extra["tokens"] == tokens
            assert row.floor == floor
        assert found["dense"].ratio == 1
        assert not found["dense"].ours
        assert found[ROW_MAJOR].error < 1e-5
        assert found[ROW_MAJOR].extra["products"] == ROW_MAJOR
        assert found["reference"].extra["products"].startswith("reference")
        for name in ("cusparselt", "cutlass", "gluon"):
            assert (found[name].status, found[name].note) == (UNAVAILABLE, "needs a CUDA device")
        # half of the values in float32, and two bits for where each was
        saved = found["dense"].extra["weights_mb"] - found[ROW_MAJOR].extra["weights_mb"]
        assert saved * 1e6 == pytest.approx(ffn * (4 - 2 - 1 / 8))
    crooked = {row.case: row for row in rows if row.arm == "crooked"}[decode.name]
    assert crooked.status == WRONG  # with 3 rows, which are not those that it was measured with
    assert crooked.ms is None
    results = Results(rehearsal=False, rows=rows)
    text = markdown(results)
    assert "## Generating text: prefill and decode" in text
    assert " tokens/s; weights 0.3 MB |" in text
    assert "gpt_tiny, 2 layers: decode, 3 x 16: dense" in summary(results, 5000)


def test_on_a_gpu_few_models_and_all_sizes():
    names = [case.name for case in inference.cases(torch.device("cuda"), rehearse=False)]
    assert len(set(names)) == len(names)
    for model in (shapes.GPT2_124M, shapes.LLAMA_1B, shapes.LLAMA_7B):
        own = [name for name in names if name.startswith(f"{model.name},")]
        for size in (
            f"decode, 1 x {model.seq_len}",
            f"decode, 64 x {model.seq_len}",
            "decode, 1 x 512",
            "prefill, 8 x 512",
        ):
            assert any(name.endswith(size) for name in own), (model.name, size)


def test_the_part_is_known_everywhere():
    assert list(worker.PARTS) == PARTS
    assert "inference" in TITLES.keys() & EXPLANATIONS.keys() & set(PARTS)
