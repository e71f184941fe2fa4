"""Starting runs as launchers do, and finding their processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_pretrain import runs

OPTIONS = [
    "data=text", "data.vocab_size=300", "data.num_workers=0", "model.max_seq_len=16", "model.d_model=16", "model.n_layer=2",
    "trainer.accelerator=cpu", "trainer.peak_tflops=1", "trainer.steps=200", "trainer.batch_size=4", "trainer.eval_every=50",
    "trainer.eval_batches=2", "trainer.checkpoint_every=20", "trainer.log_every=5", "scheduler.warmup_steps=2", "trainer.devices=2",
]  # fmt: skip
TRAIN = [sys.executable, "-m", "sparse_pretrain.cli", "train"]
TIMEOUT = 240  # seconds, for a whole run on a busy machine


@pytest.fixture
def begin(corpus, tmp_path):
    """begin(run_dir, *options, launcher=[...], **environment): a run of two ranks, as a process; all end with the test."""
    processes = []

    def start(run_dir, *options, launcher=TRAIN, **environment):
        command = [*launcher, *OPTIONS, f"data.train=[{corpus}]", f"run_dir={run_dir}", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:  # a test failed
            for pid in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, corpus):
    """The folder of a run of the same options that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(
        [*TRAIN, *OPTIONS, f"data.train=[{corpus}]", f"run_dir={folder}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    return folder


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + TIMEOUT
    while not any(int(row["step"]) >= step for row in runs.read_rows(run_dir / runs.METRICS_FILE)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(pid):
    """Of a process: all that it and its children started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            child, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(int(rest[1]), []).append(child)
    found = list(parents.get(pid, []))
    for child in found:
        found += parents.get(child, [])
    return found


def rank_process(process, number, variable="RANK"):
    """The id of the process that is this rank, among those that `process` started."""
    for pid in descendants(process.pid):
        environment = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
        if f"{variable}={number}".encode() in environment:
            return pid
    raise AssertionError(f"no process with {variable}={number}")
