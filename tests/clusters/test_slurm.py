"""SLURM: ranks of srun, jobs that go back to the queue, job scripts, submitit's local executor."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_pretrain import cli, runs
from sparse_pretrain.checkpoint import store
from tests.clusters.conftest import OPTIONS, TIMEOUT, TRAIN, descendants, wait_for_step
from tests.tasks.test_training import assert_same_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"


@pytest.fixture
def slurm(tmp_path):
    """A folder for PATH with srun, scontrol (which notes what it is asked for) and sparse-pretrain."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = Path(__file__).with_name("fake_srun.py")
    for name, line in (
        ("srun", f'exec {sys.executable} {fake} "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt'),
        ("sparse-pretrain", f'exec {sys.executable} -m sparse_pretrain.cli "$@"'),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_goes_back_to_the_queue(begin, tmp_path, slurm, undisturbed):
    job = {
        "PATH": f"{slurm}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS_PER_NODE": "2",
        "ENVIRONMENT": "BATCH", "FAKE_TASKS": "2",
    }  # fmt: skip
    run = begin(tmp_path / "run", launcher=["bash", str(SCRIPT)], **job)
    wait_for_step(tmp_path / "run", 50, run)
    run.send_signal(signal.SIGUSR1)
    output, errors = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 75, errors
    assert errors.count("SIGUSR1: checkpoint saved at step") == 1
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    assert store.newest_valid(tmp_path / "run" / runs.CHECKPOINTS)[0] is not None
    again = begin(tmp_path / "run", launcher=["bash", str(SCRIPT)], SLURM_RESTART_COUNT="1", **job)
    output, errors = again.communicate(timeout=TIMEOUT)
    assert again.returncode == 0, errors
    assert output.count("resuming at step") == 1
    assert_same_run(tmp_path / "run", undisturbed)


def script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (1, 0, False), (75, 9, True), (76, 0, True), (76, 3, False), (137, 0, True)],
)
def test_which_ends_a_job_starts_again_after(tmp_path, slurm, code, restarts, requeued):
    (slurm / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "PATH": f"{slurm}:{os.environ['PATH']}"}
    assert script("trainer.steps=2", **job).returncode == code
    assert (tmp_path / "scontrol.txt").exists() == requeued


def test_a_cancelled_job_does_not_start_again(tmp_path, slurm):
    (slurm / "srun").write_text("#!/bin/bash\ntrap 'exit 75' USR1\ntouch started\nwhile :; do sleep 0.1; done\n")
    job = subprocess.Popen(
        ["bash", str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "SLURM_JOB_ID": "7", "PATH": f"{slurm}:{os.environ['PATH']}"},
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=60) == 75
    assert not (tmp_path / "scontrol.txt").exists()


def test_the_scripts_dry_run(tmp_path, slurm):
    shown = script("--dry-run", "trainer.steps=2", "data.train=[a b]").stdout
    assert shown.startswith("srun ")
    assert r"train trainer.steps=2 data.train=\[a\ b\]" in shown
    each = ["--dry-run", "--each", "recipe=dense", "recipe=ste", "--", "seed=2"]
    assert "train recipe=ste seed=2" in script(*each, SLURM_ARRAY_TASK_ID="1").stdout
    too_many = script(*each, SLURM_ARRAY_TASK_ID="2")
    assert too_many.returncode == 2
    assert too_many.stderr == "error: --array: found task 2; allowed: 0-1, as --each has 2 values\n"


def test_hydras_dry_run_prints_the_job_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["recipe=dense,ste", "trainer.devices=2", "trainer.nodes=2", "hydra.launcher.partition=gpu", "hydra.launcher.setup=[module load cuda]"]  # fmt: skip
    cli.main(["train", "-m", "hydra/launcher=slurm", *options, "--dry-run"])
    shown = capsys.readouterr().out
    for line in (
        "--array=0-1%2",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--partition=gpu",
        "--signal=USR2@180",
        "--time=240",
    ):
        assert f"#SBATCH {line}\n" in shown
    assert "\nmodule load cuda\n" in shown
    assert "# job 1: sparse-pretrain train recipe=ste trainer.devices=2 trainer.nodes=2\n" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["hydra/launcher=slurm"], "hydra/launcher: found slurm, but no srun; allowed: a machine of a SLURM cluster"),
        (["hydra/launcher=slurmm"], "hydra/launcher: found slurmm; allowed: basic, slurm; did you mean slurm?"),
        (["hydra/launcher=slurm", "hydra.launcher.time=3"], "hydra.launcher.time: found no such option"),
        (["hydra/launcher=slurm", "hydra.launcher.cluster=lsf"], "hydra.launcher.cluster: found lsf; allowed: slurm, local"),
        (["hydra/launcher=slurm", "hydra.launcher.cluster=local", "trainer.nodes=2"], "trainer.nodes: found 2 with hydra.launcher.cluster=local"),
        (["--dry-run"], "--dry-run: found without a job to show"),
    ],
)  # fmt: skip
def test_launcher_options_that_cannot_be(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["train", *arguments])
    assert capsys.readouterr().err.startswith(f"error: {expected}")


@pytest.mark.slow
def test_jobs_of_the_local_executor(tmp_path, corpus):
    """One that ends by itself, and one that is interrupted as a job is whose time is up, and then goes on."""
    process = subprocess.Popen(
        [*TRAIN, *OPTIONS, "-m", "hydra/launcher=slurm", "hydra.launcher.cluster=local", "trainer.devices=1", "recipe=ste,dense",
         f"data.train=[{corpus}]", "runs_dir=runs", "trainer.steps=12"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert output.count("job ") == 2
    deadline = time.monotonic() + TIMEOUT
    while len(list(tmp_path.glob("runs/gpt_nano-*/summary.json"))) < 2:
        assert time.monotonic() < deadline, [path.read_text() for path in tmp_path.glob("runs/.submitit/*/*_log.err")]
        time.sleep(0.5)


@pytest.mark.slow
def test_a_job_of_submitits_saves_and_goes_on(tmp_path, corpus, monkeypatch):
    from sparse_pretrain.submit import Job

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    from submitit.local.local import LocalExecutor

    executor = LocalExecutor(tmp_path / "logs")
    executor.update_parameters(timeout_min=10, tasks_per_node=1)
    run = tmp_path / "run"
    arguments = [
        "train",
        *OPTIONS,
        "trainer.devices=1",
        f"data.train=[{corpus}]",
        f"run_dir={run}",
        "trainer.steps=300",
    ]
    job = executor.submit(Job(arguments, str(tmp_path)))
    deadline = time.monotonic() + TIMEOUT
    while len(runs.read_rows(run / runs.METRICS_FILE)) < 4:
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.05)
    for pid in descendants(int(job.job_id)):
        command = (Path("/proc") / str(pid) / "cmdline").read_bytes()
        if b"submitit.core._submit" in command:
            os.kill(pid, signal.SIGUSR2)
    while not runs.is_complete(run):
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.2)
    assert "SIGUSR1: checkpoint saved at step" in job.stderr()
    assert "resuming at step" in job.stdout()
