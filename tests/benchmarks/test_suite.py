"""The GPU suite and the benchmarks, rehearsed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.__main__ import measure
from benchmarks.report import Writer
from benchmarks.rows import FAILED, OK, WRONG
from benchmarks.run import Results

ROOT = Path(__file__).parent.parent.parent


def test_benchmarks_rehearsed(tmp_path, capsys):
    results = measure(["products", "ffn"], 5, tmp_path, rehearse=True)
    assert not results.faults
    assert {row.part for row in results.rows if row.status == OK} == {"ceilings", "products", "ffn"}
    assert results.environment["device"] == "cpu"
    assert {path.suffix for path in tmp_path.glob("rehearsal_cpu_*")} == {".json", ".md", ".png"}
    assert "the numbers mean nothing" in capsys.readouterr().out


@pytest.fixture
def jobs(monkeypatch):
    """jobs({name: code}) -> what `suite.run_tests` runs in place of the tests."""

    def replace(codes):
        made = [suite.Job(name, [sys.executable, "-c", code], dict(os.environ)) for name, code in codes.items()]
        monkeypatch.setattr(suite, "_jobs", lambda env, rehearse: made)

    return replace


def test_tests_that_crash_or_hang(jobs, tmp_path):
    jobs({"good": "", "bad": "import sys; sys.exit('a reason')", "endless": "import time; time.sleep(600)"})
    results, writer = Results(rehearsal=True), Writer(tmp_path)
    begin = time.time()
    assert not suite.run_tests(results, 4.0, True, writer)
    assert time.time() - begin < 10
    assert results.tests["good"] == "passed"
    assert results.tests["bad"] == "failed with exit code 1"
    assert results.tests["bad: end of output"] == "a reason"
    assert results.tests["endless"] == "stopped: the time was up"
    (log,) = tmp_path.glob("*_tests.txt")
    assert "a reason" in log.read_text()


def test_failed_tests_are_named(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2, 'not equal'\n")
    job = suite.Job("x", [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)], dict(os.environ))
    suite._start(job, tmp_path)
    suite._judge(job, job.process.wait())
    assert job.verdict == "1 passed, 1 failed, 0 skipped"
    assert not job.passed
    assert job.failures[0].startswith("test_b: AssertionError: not equal")


@pytest.mark.parametrize(
    ("status", "ours", "code"), [(OK, True, 0), (WRONG, True, 1), (FAILED, True, 1), (WRONG, False, 0)]
)
def test_exit_code(monkeypatch, tmp_path, status, ours, code):
    from benchmarks.rows import Row

    def run_parts(parts, results, *rest):
        results.rows.append(Row("ffn", "a", "b", ours, status))

    monkeypatch.setattr(suite, "run_parts", run_parts)
    assert suite.main(["--rehearse", "--part", "ffn", "--out", str(tmp_path)]) == code


@pytest.mark.slow
def test_the_whole_suite_rehearsed(tmp_path):
    begin = time.time()
    result = subprocess.run(
        [ROOT / "scripts" / "gpu-suite", "--rehearse", "--minutes", "5", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.time() - begin < 300
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) == 5
    (kept,) = (tmp_path / "out").glob("*.json")
    kept = json.loads(kept.read_text())
    assert {row["part"] for row in kept["rows"]} == {
        "ceilings",
        "products",
        "operators",
        "ffn",
        "step",
        "block",
        "inference",
        "pretrain",
    }
    assert {run["recipe"] for run in kept["pretraining"]["runs"]} >= {"dense", "fst", "ste"}
    assert all(len(run["loss"]) == 20 for run in kept["pretraining"]["runs"])
    summary = result.stdout[result.stdout.index("== a rehearsal") :]
    assert len(summary) <= 8000
