"""Runs cases one after another and writes what happens to a file, line by line. `run.py` watches it from outside.

A kernel that writes where it should not, or never ends, takes the whole process with it; so the one that runs cases is
not the one that keeps the results and the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sparse24.backends import BACKENDS
from sparse24.backends.base import Product

from benchmarks import ceilings, gemms, inference, layers, machine, operators, pretrain, products, step
from benchmarks.bench import Bench, Case, DeviceLost, Unavailable, first_line, free
from benchmarks.rows import FAILED, SKIPPED, UNAVAILABLE, WRONG, Row

# in the order in which they are worth having, as far as the time allows
PARTS = {
    "ceilings": ceilings.cases,
    "products": products.cases,
    "operators": lambda device, rehearse: operators.cases(device, rehearse) + gemms.cases(device, rehearse),
    "ffn": layers.ffn_cases,
    "step": step.cases,
    "block": layers.block_cases,
    "inference": inference.cases,
    "pretrain": pretrain.cases,
}


@dataclass(frozen=True)
class Task:
    """What a worker is to do.

    parts: names of `PARTS`.
    ends: part -> when it must be over (`time.time()`).
    done: ids of cases that are not to be run again.
    without: what brought a worker down: BACKEND/PRODUCT/VARIANT, the last two empty for all of them.
    rows: those measured so far; the ceilings are read from them.
    cache: where dispatch keeps its measurements.
    """

    parts: list[str]
    ends: dict[str, float]
    rehearse: bool
    accelerator: str
    done: list[str]
    without: list[str]
    rows: list[dict[str, Any]]
    cache: str


class Events:
    """A file of JSON lines, each on disk before the next thing happens."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, kind: str, value: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "value": value, "time": time.time()}) + "\n")
        self._file.flush()


def main(task_path: str, events_path: str) -> None:
    task = Task(**json.loads(Path(task_path).read_text()))
    events = Events(Path(events_path))
    device = _device(task.accelerator)
    for blamed in task.without:
        _leave_out(*blamed.split("/"))
    # beyond the limit functions run uncompiled without a word; a recipe and a shape each are a recompilation
    torch._dynamo.config.recompile_limit = 64
    events.write("environment", machine.facts(device))
    rows = [Row(**row) for row in task.rows]

    def emit(row: Row) -> None:
        rows.append(row)
        events.write("row", row.to_dict())

    bench = Bench(
        device,
        task.rehearse,
        emit,
        lambda what, blame: events.write("at", [what, blame]),
        Path(task.cache),
        events.write,
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for part in task.parts:
        pace = 1.0  # time that the part's last case took / the guess
        for case in PARTS[part](device, task.rehearse):
            if case.id in task.done:
                continue
            left = task.ends[part] - time.time()
            needed = 0.0 if task.rehearse else pace * case.seconds
            if left < needed:
                note = f"{max(0.0, left):.0f} s were left, about {needed:.0f} s are needed"
                emit(Row(case.part, case.name, "all", status=SKIPPED, note=note))
                continue
            bench.ceilings = ceilings.from_rows(rows)
            bench.end = task.ends[part]
            events.write("begin", {"id": case.id, "seconds": case.seconds})
            begin = time.time()
            if not _run(bench, case):
                events.write("lost", case.id)
                return
            events.write("end", case.id)
            pace = (time.time() - begin) / case.seconds
        events.write("part", part)
    events.write("finished", None)


def end_with_parent() -> None:
    """Watch whether the process that reads the events is there: without it this one only keeps the GPU busy."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(bench: Bench, case: Case) -> bool:
    """Whether the device still works afterwards."""
    try:
        case.run(bench)
        free(bench.device)
        bench.still_there()
        return True
    except Unavailable as error:
        bench.emit(Row(case.part, case.name, "all", status=UNAVAILABLE, note=first_line(error)))
        return True
    except Exception as error:
        traceback.print_exc()
        note = f"{type(error).__name__}: {first_line(error)}"
        bench.emit(Row(case.part, case.name, "all", status=FAILED, note=note))
        if isinstance(error, DeviceLost):
            return False
    with contextlib.suppress(RuntimeError):
        free(bench.device)
    try:
        bench.still_there()
    except DeviceLost:
        return False
    return True


def _leave_out(name: str, kind: str, variant: str) -> None:
    """From here on the backend says that it cannot serve this product, or does not offer this variant."""
    backend = BACKENDS[name]
    supports, variants = backend.supports, backend.variants

    def fewer(product: Product, device: torch.device) -> tuple[bool, str]:
        if not variant and kind in ("", product.kind):
            return False, "left out: it brought a process down before"
        return supports(product, device)

    backend.supports = fewer  # type: ignore[method-assign]
    backend.variants = lambda product, device: [v for v in variants(product, device) if v != variant]  # type: ignore[method-assign]


def smoke() -> int:
    """Every operator once at a tiny shape, checked: the exit code says whether all of ours are right."""
    device = _device("auto")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, True, rows.append, lambda what, blame: None, Path(folder) / "products.json")
        for case in operators.cases(device, rehearse=True) + gemms.cases(device, rehearse=True):
            if not _run(bench, case):
                break
    for row in rows:
        if row.status in (WRONG, FAILED) and row.ours:
            print(f"{row.status}: {row.case}: {row.arm}: {row.note}")
    return int(any(row.ours and row.status in (WRONG, FAILED) for row in rows))


def _device(accelerator: str) -> torch.device:
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if accelerator == "gpu":
        raise SystemExit("error: accelerator: found gpu, but PyTorch sees no GPU here; allowed: auto, cpu")
    return torch.device("cpu")
