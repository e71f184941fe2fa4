"""The time is kept and what there is gets written, whatever happens to the process that measures."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.rows import FAILED, OK, SKIPPED
from benchmarks.run import PARTS, Results, run_parts
from sparse_pretrain.limits import CHOICES

FAKE = Path(__file__).with_name("fake_worker.py")


@pytest.fixture
def go(monkeypatch):
    """go([[case, what], …], seconds) -> (results, how often they were saved)."""
    monkeypatch.setattr(run, "WORKER", [sys.executable, str(FAKE)])
    monkeypatch.setattr(run, "SHORTEST_PATIENCE", 1.0)
    monkeypatch.setattr(run, "MARGIN", 0.0)

    def start(cases, seconds=20.0, parts=("products", "ffn")):
        monkeypatch.setenv("CASES", json.dumps(cases))
        results, saved = Results(rehearsal=False), []
        run_parts(parts, results, seconds, lambda r: saved.append(len(r.rows)), say=lambda line: None)
        return results, saved

    return start


def status(results):
    return [(row.case, row.status) for row in results.rows]


def test_all_is_well(go):
    results, saved = go([["products/a", "ok"], ["ffn/b", "ok"]])
    assert status(results) == [("a", OK), ("b", OK)]
    assert results.environment["gpu"] == "Fake GPU"
    assert saved[-1] == 2
    assert set(results.seconds) == {"products", "ffn"}
    assert not results.faults


def test_a_crash_costs_one_case(go):
    results, _ = go([["products/a", "ok"], ["products/b", "die"], ["ffn/c", "ok"]])
    assert status(results) == [("a", OK), ("b", FAILED), ("c", OK)]
    assert "died with exit code 7 at: a kernel. Segmentation fault" in results.rows[1].note
    assert len(results.faults) == 1


def test_what_is_to_blame_is_left_out_and_the_case_tried_again(go):
    results, _ = go([["products/a", "blame"], ["products/b", "blame"]])
    assert status(results) == [("a", FAILED), ("a", OK), ("b", OK)]
    assert results.notes == ["gluon/forward was left out after products/a"]


def test_a_model_that_crashes_goes_on_without_our_gemms(go):
    results, _ = go([["ffn/a", "die"], ["ffn/b", "ok"]])
    assert status(results) == [("a", FAILED), ("b", OK)]
    assert results.notes == ["gluon was left out after ffn/a, as the likeliest cause"]


def test_a_hang_is_ended(go):
    begin = time.time()
    results, _ = go([["products/a", "hang"], ["products/b", "ok"]])
    assert status(results) == [("a", FAILED), ("b", OK)]
    assert "no end after 1 s" in results.rows[0].note
    assert time.time() - begin < 10


def test_the_time_is_kept(go, monkeypatch):
    monkeypatch.setattr(run, "SHORTEST_PATIENCE", 100.0)
    begin = time.time()
    results, saved = go([["products/a", "ok"], ["products/b", "hang"], ["ffn/c", "ok"]], seconds=2.0)
    assert time.time() - begin < 6
    assert status(results) == [("a", OK), ("b", SKIPPED)]
    assert "the time is up" in results.rows[1].note
    assert saved[-1] == 2


def test_a_worker_that_cannot_start(go, monkeypatch):
    monkeypatch.setattr(run, "WORKER", [sys.executable, "-c", "raise SystemExit('no torch here')"])
    results, saved = go([])
    assert results.rows == []
    assert "no torch here" in results.notes[0]
    assert saved


def test_parts_share_the_time():
    assert sum(run.SHARES.values()) == pytest.approx(1.0)


def test_the_command_knows_the_parts():
    assert set(CHOICES["part"]) == set(PARTS)


def test_a_budget_that_is_spent_skips_cases(tmp_path):
    """By the real worker: cases that need more than is left are said to be skipped."""
    task = {
        "parts": ["ffn"], "ends": {"ffn": time.time() + 1}, "rehearse": False, "accelerator": "cpu", "done": [],
        "without": ["gluon//x", "gluon/forward/"], "rows": [], "cache": str(tmp_path / "cache.json"),
    }  # fmt: skip
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "events").touch()
    from benchmarks import worker

    worker.main(str(tmp_path / "task.json"), str(tmp_path / "events"))
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    rows = [event["value"] for event in events if event["kind"] == "row"]
    assert len(rows) == 2
    assert all(row["status"] == SKIPPED and "are needed" in row["note"] for row in rows)
    assert events[-1]["kind"] == "finished"
