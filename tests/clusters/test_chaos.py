"""Kills at random moments, damaged checkpoints and changing numbers of ranks, all at once: the run comes to its end, with
the losses of a run that nothing happened to, and loses at most what was done since a checkpoint."""

import random
import re
import signal
import time

import pytest

from sparse_pretrain import runs
from sparse_pretrain.checkpoint import store
from tests.clusters.conftest import TIMEOUT

KILLS = 5


def damage(folder, draw) -> None:
    """Cut off or change what one of its files holds."""
    path = draw.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.5:
        path.write_bytes(content[:at])
    else:
        content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def wait_for_checkpoint(run_dir, step, process) -> None:
    """A whole one: rows and damaged ones of before are there until the process has begun."""
    deadline = time.monotonic() + TIMEOUT
    while (newest := store.newest_valid(run_dir / runs.CHECKPOINTS)[0]) is None or store.step_of(newest) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_survives(begin, undisturbed, tmp_path):
    draw = random.Random(0)
    run_dir, done = tmp_path / "run", 0
    for kill in range(KILLS):
        beside = draw.choice(("false", "true"))
        options = ["trainer.checkpoint_every=10", "trainer.checkpoints_kept=3", f"trainer.async_checkpoints={beside}"]
        devices = draw.choice((1, 2))
        strategy = draw.choice(("fsdp", "fsdp", "ddp"))
        together = draw.choice((1, devices)) if strategy == "fsdp" else 1
        options += [f"trainer.devices={devices}", f"trainer.strategy={strategy}", f"trainer.tensor_parallel={together}"]
        process = begin(run_dir, *options)
        wait_for_checkpoint(run_dir, done + draw.randint(1, 25), process)
        if draw.random() < 0.5:  # the moment at which a checkpoint is written
            writing = run_dir / runs.CHECKPOINTS
            while process.poll() is None and not list(writing.glob(".step-*.partial")):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = store.list_steps(run_dir / runs.CHECKPOINTS)
        assert steps, kill
        if kill % 2 and len(steps) > 1:
            damage(store.checkpoint_folder(run_dir / runs.CHECKPOINTS, steps[-1]), draw)
        newest, _ = store.newest_valid(run_dir / runs.CHECKPOINTS)
        logged = int(runs.read_rows(run_dir / runs.METRICS_FILE)[-1]["step"])
        done = store.step_of(newest)
        assert done >= logged - 10 * (2 if kill % 2 else 1) - (10 if beside == "true" else 0)
    process = begin(run_dir, "trainer.checkpoint_every=10")
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert not re.search("Traceback", errors)
    rows, expected = runs.read_rows(run_dir / runs.METRICS_FILE), runs.read_rows(undisturbed / runs.METRICS_FILE)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for a, b in zip(rows, expected, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=2e-3), a["step"]
        assert a["tokens"] == b["tokens"]
