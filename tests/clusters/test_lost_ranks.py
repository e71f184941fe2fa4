"""Ranks that are killed or hang: one sentence that names them, and nothing is lost but the steps since the last
checkpoint."""

import os
import signal
import sys
import time

import pytest

from sparse_pretrain import cluster, runs
from tests.clusters.conftest import TIMEOUT, rank_process, wait_for_step
from tests.tasks.test_training import assert_same_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLI = ["-m", "sparse_pretrain.cli", "train"]


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_same_command_continues(begin, tmp_path, undisturbed):
    run = begin(tmp_path / "run", "trainer.steps=200")
    wait_for_step(tmp_path / "run", 50, run)
    start = time.monotonic()
    os.kill(rank_process(run, 1), signal.SIGKILL)
    _, errors = run.communicate(timeout=TIMEOUT)
    assert run.returncode == cluster.LOST
    assert time.monotonic() - start < 60
    assert errors.count("rank 1 was killed by SIGKILL") == 1
    assert "Traceback" not in errors
    again = begin(tmp_path / "run")
    output, errors = again.communicate(timeout=TIMEOUT)
    assert again.returncode == 0, errors
    assert "resuming at step" in output
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_hung_rank_is_named(begin, tmp_path, number):
    run = begin(tmp_path / "run", "trainer.timeout=5", "trainer.steps=20000")
    wait_for_step(tmp_path / "run", 20, run)
    os.kill(rank_process(run, number), signal.SIGSTOP)
    _, errors = run.communicate(timeout=TIMEOUT)
    assert run.returncode == cluster.LOST
    assert errors.count(f"rank {number} did not answer for 5 s (trainer.timeout); the same command continues") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_torchrun_restarts_what_a_killed_rank_ended(begin, tmp_path, undisturbed):
    run = begin(tmp_path / "run", launcher=[*TORCHRUN, "--max-restarts", "1", *CLI])
    wait_for_step(tmp_path / "run", 50, run)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    _, errors = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 0, errors
    assert errors.count("rank 1 was lost: killed, or the machine is gone; the same command continues") == 1
    assert runs.is_complete(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_hung_rank_of_torchrun_is_named(begin, tmp_path):
    run = begin(tmp_path / "run", "trainer.timeout=5", "trainer.steps=20000", launcher=[*TORCHRUN, *CLI])
    wait_for_step(tmp_path / "run", 20, run)
    os.kill(rank_process(run, 1), signal.SIGSTOP)
    _, errors = run.communicate(timeout=TIMEOUT)
    assert run.returncode != 0
    assert errors.count("rank 1 did not answer for 5 s (trainer.timeout)") == 1


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(begin, tmp_path):
    run = begin(tmp_path / "run", "trainer.steps=20000", "trainer.checkpoint_every=20000", launcher=[*TORCHRUN, *CLI])
    wait_for_step(tmp_path / "run", 20, run)
    run.terminate()
    _, errors = run.communicate(timeout=TIMEOUT)
    assert run.returncode != 0
    assert errors.count("SIGTERM: checkpoint saved at step") == 1
    assert len(list((tmp_path / "run" / runs.CHECKPOINTS).glob("step-*"))) == 1
