"""A sweep that is killed goes on: every trial is run once, with settings of its own."""

import os
import random
import signal
import subprocess
import sys
import time

import optuna
import pytest
from optuna.trial import TrialState

from sparse_pretrain import runs
from sparse_pretrain.sweeping.storage import open_storage

pytestmark = pytest.mark.slow

STEPS, CHECKPOINT_EVERY = 6, 2
SPACE = """
optimizer.lr: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}
optimizer.weight_decay: {type: float, low: 0.0, high: 0.3, step: 0.1}
recipe: {type: categorical, choices: [ste, fst, s_ste]}
"""


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def under_way(fake):
    """Whether some run has begun and is far from its end."""
    steps = {run: int(step) for run, step in fake.events("step")}
    return any(step <= STEPS // 2 for step in steps.values())


def settings(trial):
    return tuple(sorted(trial.params.items()))


@pytest.mark.skipif(sys.platform != "linux", reason="runs end with the sweep on Linux alone")
@pytest.mark.parametrize(
    ("count", "kills", "storage", "sampler"), [(20, (2, 8, 14), None, "tpe"), (6, (2,), "sqlite", "random")]
)
def test_twenty_trials_killed_three_times(fake, spaces, tmp_path, count, kills, storage, sampler):
    options = [*spaces(mine=SPACE), f"trials={count}", "workers=3", f"sampler={sampler}", "pruner=none"]
    url = None
    if storage:
        url = f"sqlite:///{tmp_path}/study.db"
        options.append(f"storage={url}")
    draw = random.Random(5)
    for ended in kills:
        process = fake.start(*options, step_seconds=0.15)
        wait_until(lambda: (len(fake.events("done")) >= ended and under_way(fake)) or process.poll() is not None)  # noqa: B023
        time.sleep(draw.random() * 0.05)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        wait_until(lambda: not any(alive(pid) for _, pid, _ in fake.events("start")), 5)
    output, _ = fake.run(*options)

    trials = fake.trials(url)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * count
    assert len({settings(trial) for trial in trials}) == count
    folders = [trial.user_attrs["run_dir"] for trial in trials]
    assert len(set(folders)) == count
    # every run came to its end once, and where it was started again it went on from its checkpoint
    names = sorted(os.path.basename(folder) for folder in folders)
    assert sorted(name for (name,) in fake.events("done")) == names
    assert not fake.events("refused")
    again = 0
    for name in names:
        starts = [int(done) for run, _, done in fake.events("start") if run == name]
        steps = [int(step) for run, step in fake.events("step") if run == name]
        assert starts[0] == 0
        assert starts == sorted(starts)
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        assert len(steps) - STEPS <= (len(starts) - 1) * CHECKPOINT_EVERY
        again += len(starts) - 1
    assert 1 <= again <= len(kills) * 3
    assert output.count("(goes on)") <= 3
    losses = {trial.number: trial.value for trial in trials}
    assert f"Best: trial {min(losses, key=losses.get)}, validation loss {min(losses.values()):.4f}" in output
    assert f"{count} trials" in output

    # and again: nothing is left to do
    before = fake.events()
    fake.run(*options)
    assert fake.events() == before


@pytest.mark.skipif(sys.platform != "linux", reason="runs end with the sweep on Linux alone")
def test_settings_do_not_depend_on_interruptions(fake, spaces, tmp_path, corpus, monkeypatch, capsys):
    options = [*spaces(mine=SPACE), "trials=4", "pruner=none", "workers=1"]
    process = fake.start(*options)
    wait_until(lambda: len(fake.events("done")) >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    fake.run(*options)
    whole = type(fake)(tmp_path / "whole", corpus, monkeypatch, capsys)
    (tmp_path / "whole").mkdir()
    whole.run(*options)
    assert [settings(trial) for trial in fake.trials()] == [settings(trial) for trial in whole.trials()]


@pytest.mark.skipif(sys.platform != "linux", reason="runs end with the sweep on Linux alone")
def test_real_runs_killed_once(tmp_path, corpus):
    out = tmp_path / "out"
    options = [
        "hparams_search=lr", "trials=3", "workers=2", "pruner=none", "sampler=random", f"out={out}", "recipe=ste", "model.n_layer=1",
        "data=text", "data.vocab_size=300", "data.seq_len=16", "data.num_workers=0", "model.max_seq_len=16", "model.d_model=16",
        "trainer.accelerator=cpu", "trainer.peak_tflops=1", "trainer.batch_size=4", "trainer.eval_batches=1", "scheduler.warmup_steps=2",
        "trainer.steps=100", "trainer.eval_every=50", "trainer.checkpoint_every=10", "trainer.log_every=5",
        f"data.train=[{corpus}]", f"runs_dir={tmp_path}/runs",
    ]  # fmt: skip
    command = [sys.executable, "-m", "sparse_pretrain.cli", "sweep", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(
            lambda: (
                any(len(runs.read_rows(path)) > 6 for path in (tmp_path / "runs").glob(f"*/{runs.METRICS_FILE}"))
                or process.poll() is not None
            ),
            120,
        )
        assert process.poll() is None, process.communicate()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr
    assert "(goes on)" in finished.stdout
    trials = optuna.load_study(study_name="out", storage=open_storage(None, out)).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert len({settings(trial) for trial in trials}) == 3
    assert len(list((tmp_path / "runs").iterdir())) == 3
    for trial in trials:
        run_dir = tmp_path / "runs" / os.path.basename(trial.user_attrs["run_dir"])
        rows = [int(row["step"]) for row in runs.read_rows(run_dir / runs.METRICS_FILE)]
        assert rows == list(range(5, 101, 5))
        assert trial.value == runs.read_json(run_dir / runs.SUMMARY_FILE)["val_loss"]
        assert sorted(trial.intermediate_values) == [50, 100]
        assert trial.intermediate_values[100] == trial.value
    logs = "".join(path.read_text() for path in (out / "trials").glob("*.log"))
    assert "resuming at step" in logs
