"""What is written: JSON, Markdown, a picture; and a summary that fits."""

import json

import pytest

from benchmarks.report import Writer, markdown, picture, summary
from benchmarks.rows import EAGER, FAILED, GRAPH, SKIPPED, UNAVAILABLE, WRONG, Row
from benchmarks.run import Results


@pytest.fixture
def results() -> Results:
    """As from a GPU, with every kind of row; the numbers are made up and go nowhere."""
    made = Results(rehearsal=False, environment={"gpu": "NVIDIA Test 1", "torch": "2.11", "date": "2030-01-01T00:00"})
    made.rows.append(Row("ceilings", "copy", "torch", False, mode=EAGER, ms=1.0, extra={"gb_per_s": 4000.0}))
    for part, names in (("products", ["gluon:k|1", "cusparselt:7"]), ("ffn", ["fst, compiled"]), ("step", ["fst"])):
        for number in range(12):
            for mode in (EAGER, GRAPH):
                case = f"{part} {number}"
                made.rows.append(Row(part, case, "dense", False, mode=mode, ms=2.0, ratio=1.0, floor_ms=1.8))
                for i, name in enumerate(names):
                    extra = {"packing_ms": 0.5, "tokens": 100, "peak_memory_gb": 1.5}
                    made.rows.append(
                        Row(part, case, name, mode=mode, ms=1.6 + i, low=1.5, high=2.0, ratio=2 / (1.6 + i),
                            floor_ms=1.0, floor="matmul rate", extra=extra)
                    )  # fmt: skip
        made.rows.append(Row(part, "a", "gluon", True, WRONG, "off by 0.5, allowed 0.01; not timed"))
        made.rows.append(Row(part, "a", "gluon", True, FAILED, "RuntimeError: x"))
        made.rows += [Row(part, f"{i}", "cutlass", False, UNAVAILABLE, "needs sm_8x") for i in range(9)]
        made.rows.append(Row(part, "b", "all", True, SKIPPED, "3 s were left, about 9 s are needed"))
    made.rows.append(Row("operators", "prune", "row-major", mode=GRAPH, ms=1.0, floor_ms=0.85, floor="copy bandwidth"))
    run = {"recipe": "dense", "products": "dense", "tokens": [10, 20], "seconds": [1.0, 2.0], "loss": [3.0, 2.0]}
    made.pretraining = {"setting": "a model", "runs": [{**run, "validation": [(2, 2.1)], "note": ""}]}
    made.notes.append("gluon was left out")
    made.tests["test_prune"] = "10 passed, 0 failed, 0 skipped"
    return made


def test_files(results, tmp_path):
    writer = Writer(tmp_path)
    writer.write(results)
    writer.write(results)
    stems = {path.name.removeprefix("nvidia-test-1_2")[:14] for path in tmp_path.iterdir()}
    assert len(stems) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png", ".png"]
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [Row(**row) for row in kept["rows"]] == results.rows
    assert {"environment", "rows", "clocks", "smi", "notes", "tests", "pretraining", "seconds", "rehearsal"} <= set(
        kept
    )
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_table(results):
    text = markdown(results)
    assert "| products 0 | dense | eager | 2.000 |" in text
    assert "| 1.25 | 1.000 (matmul rate) | 62 % | packing 0.500 ms: with it 0.95x" in text
    assert "gluon:k\\|1" in text
    assert "62,500 tokens/s" in text
    assert "- gluon, wrong: off by 0.5, allowed 0.01; not timed (a)" in text
    assert "- cutlass, unavailable: needs sm_8x (9 cases, the first 0)" in text
    assert "- all, skipped: 3 s were left, about 9 s are needed (b)" in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| products")}
    assert widths == {10}
    assert "rehearsal" not in text


def test_a_rehearsal_says_so(results):
    results.rehearsal = True
    assert "The numbers mean nothing" in markdown(results)
    assert "the numbers mean nothing" in summary(results, 5000)


def test_summary_fits_and_begins_with_faults(results):
    text = summary(results, 3000)
    assert len(text) <= 3000
    assert text.index("WRONG: products") < text.index("-- ")
    assert "skipped for lack of time: products/b" in text
    assert "fst, compiled 1.25x" in summary(results, 10_000)


def test_nothing_measured():
    results = Results(rehearsal=False)
    assert picture(results) is None
    assert "unknown device" in markdown(results)
    assert summary(results, 100) == ""
