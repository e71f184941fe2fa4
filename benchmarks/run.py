"""Runs parts in a worker process within a time limit, and writes results as they come, whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.rows import FAILED, SKIPPED, WRONG, Row

# shares of the time; what a part leaves over goes to those after it
SHARES = {
    "ceilings": 0.04, "products": 0.22, "operators": 0.14, "ffn": 0.20, "step": 0.16, "block": 0.06, "inference": 0.10,
    "pretrain": 0.08,
}  # fmt: skip
PARTS = list(SHARES)
PATIENCE = 4.0  # times the guess of a case's time, after which it is taken to hang
SHORTEST_PATIENCE = 30.0
MARGIN = 8.0  # seconds at the end, for writing
STARTS = 16  # workers at most
WORKER = [sys.executable, "-m", "benchmarks", "worker"]
SUSPECT = "gluon//"  # what is given up when a worker dies in a model and nobody can say why


@dataclass
class Results:
    """Everything that is kept. rows and facts are added to while the parts run."""

    rehearsal: bool
    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    clocks: dict[str, dict[str, float]] = field(default_factory=dict)  # case id -> clocks and power during it
    smi: dict[str, dict[str, str]] = field(default_factory=dict)  # before and after
    notes: list[str] = field(default_factory=list)
    tests: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # part -> time taken

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": [row.to_dict() for row in self.rows]}

    @property
    def faults(self) -> list[Row]:
        """Our own results that are wrong or did not come."""
        return [row for row in self.rows if row.ours and row.status in (WRONG, FAILED)]


def run_parts(
    parts: Sequence[str],
    results: Results,
    seconds: float,
    save: Callable[[Results], None],
    accelerator: str = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Run parts in their order, adding to `results`; returns in time.

    Args:
        parts: of `PARTS`.
        results: what to add to.
        seconds: the time there is.
        save: called after every part, and at the end.
        accelerator: auto, cpu or gpu.
        say: told of progress, a line at a time.
    """
    begin = time.time()
    end = begin + seconds - MARGIN * (not results.rehearsal)
    ends, share = {}, 0.0
    total = sum(SHARES[part] for part in parts)
    for part in parts:
        share += SHARES[part]
        ends[part] = begin + (end - begin) * share / total
    results.smi["before"] = machine.smi()
    log = machine.SmiLog()
    with tempfile.TemporaryDirectory() as folder:
        watch = _Watch(results, log, save, say, Path(folder))
        for number in range(STARTS):
            if watch.run(list(parts), ends, accelerator, end, number):
                break
        else:
            results.notes.append(f"gave up after {STARTS} workers died")
    log.close()
    results.smi["after"] = machine.smi()
    save(results)


class _Watch:
    """Follows one worker after another."""

    def __init__(
        self,
        results: Results,
        log: machine.SmiLog,
        save: Callable[[Results], None],
        say: Callable[[str], None],
        folder: Path,
    ) -> None:
        self.results, self.log, self.save, self.say, self.folder = results, log, save, say, folder
        self.done: list[str] = []
        self.without: list[str] = []
        self.case: dict[str, Any] | None = None  # that runs now
        self.case_begin = 0.0
        self.at = ["", ""]
        self.part_begin = time.time()

    def run(self, parts: list[str], ends: dict[str, float], accelerator: str, end: float, number: int) -> bool:
        """One worker, to its end; returns whether there is nothing left to do."""
        if time.time() >= end:
            return True
        task = {
            "parts": parts, "ends": ends, "rehearse": self.results.rehearsal, "accelerator": accelerator,
            "done": self.done, "without": self.without, "rows": [row.to_dict() for row in self.results.rows],
            "cache": str(self.folder / "products.json"),
        }  # fmt: skip
        task_file, events_file = self.folder / f"task{number}.json", self.folder / f"events{number}.jsonl"
        errors = self.folder / f"errors{number}.txt"
        task_file.write_text(json.dumps(task))
        events_file.touch()
        self.case, self.at = None, ["starting", ""]
        self.finished, self.partial = False, ""
        with errors.open("w") as stderr, events_file.open() as events:
            process = subprocess.Popen(
                [*WORKER, str(task_file), str(events_file)],
                cwd=machine.ROOT,
                env=environment(self.results.rehearsal),
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
            why = ""
            try:
                while not why:
                    ended = process.poll() is not None
                    self._read(events)
                    if ended:
                        break
                    why = self._too_long(end)
                    time.sleep(0.1)
            finally:
                kill(process)
            self._read(events)
        if self.finished:
            return True
        if not why and process.returncode == 0:
            why = "lost the device"
        why = why or f"died with exit code {process.returncode}"
        return self._after_death(why, errors.read_text()[-2000:], out_of_time=time.time() >= end)

    def _read(self, events: Any) -> None:
        *lines, self.partial = (self.partial + events.read()).split("\n")
        for event in map(json.loads, lines):
            kind, value = event["kind"], event["value"]
            if kind == "environment":
                self.results.environment = value
            elif kind == "row":
                self.results.rows.append(Row(**value))
            elif kind == "at":
                self.at = value
            elif kind == "pretraining":
                self.results.pretraining = value
            elif kind == "begin":
                self.case, self.case_begin, self.at = value, event["time"], ["", ""]
                self.done.append(value["id"])
            elif kind in ("end", "lost"):
                if clocks := self.log.between(self.case_begin, event["time"]):
                    self.results.clocks[value] = clocks
                if kind == "end":
                    self.say(f"{value}  {event['time'] - self.case_begin:.1f} s")
                    self.case = None
            elif kind == "part":
                self.results.seconds[value] = time.time() - self.part_begin
                self.part_begin = time.time()
                self.save(self.results)
            elif kind == "finished":
                self.finished = True

    def _too_long(self, end: float) -> str:
        if time.time() > end:
            return "stopped: the time is up"
        if self.case is not None:
            limit = max(SHORTEST_PATIENCE, PATIENCE * self.case["seconds"])
            if self.case["id"].startswith("pretrain"):  # keeps its own time
                limit = end - self.case_begin + 1
            if time.time() - self.case_begin > limit:
                return f"stopped: no end after {limit:.0f} s"
        return ""

    def _after_death(self, why: str, errors: str, out_of_time: bool) -> bool:
        """Put the blame where it belongs; returns whether to stop."""
        what, blame = self.at
        last = errors.strip().splitlines()[-1][:200] if errors.strip() else ""
        if self.case is None:
            self.results.notes.append(f"a worker {why} while {what or 'between cases'}. {last}")
            self.say(self.results.notes[-1])
            # one that cannot even start will not start the next time
            return out_of_time or what == "starting"
        part, _, name = self.case["id"].partition("/")
        if out_of_time:
            self.results.rows.append(Row(part, name, what or "all", status=SKIPPED, note=why))
            return True
        note = f"the process {why} at: {what or 'its beginning'}. {last}"
        self.results.rows.append(Row(part, name, "all", status=FAILED, note=note))
        self.say(f"{self.case['id']}: {note}")
        guilty = blame or ("" if part in ("products", "operators") else SUSPECT)
        if guilty and guilty not in self.without and not guilty.startswith("dense"):
            self.without.append(guilty)
            reason = "" if blame else ", as the likeliest cause"
            self.results.notes.append(f"{guilty.strip('/')} was left out after {self.case['id']}{reason}")
            if blame:
                self.done.remove(self.case["id"])  # what is left of it may still do
        return False


def environment(rehearse: bool) -> dict[str, str]:
    """Of a process that runs our code from this checkout."""
    paths = os.pathsep.join((str(machine.ROOT), str(machine.ROOT / "kernels")))
    here = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return {**here, "TRITON_INTERPRET": "1"} if rehearse else here


def kill(process: subprocess.Popen[Any]) -> None:
    """The worker and whatever it started (compilers)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
