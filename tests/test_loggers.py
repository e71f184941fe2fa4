"""Where metrics go, also after a kill and a resume."""

import time

import pytest

from sparse_pretrain import runs, train
from sparse_pretrain.config import LoggerConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.loggers import CsvLogger


def log_steps(folder, steps, resumed_at=0):
    logger = CsvLogger(folder, resumed_at)
    for step in steps:
        logger.log_metrics({"tokens": step * 10, "train/loss": 1 / step}, step=step)


def steps_in(folder):
    return [int(row["step"]) for row in runs.read_rows(folder / runs.METRICS_FILE)]


def test_a_resumed_file_goes_on_after_its_checkpoint(tmp_path):
    log_steps(tmp_path, range(1, 8))
    log_steps(tmp_path, range(5, 9), resumed_at=4)
    assert steps_in(tmp_path) == list(range(1, 9))


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    log_steps(tmp_path, range(1, 4))
    path = tmp_path / runs.METRICS_FILE
    path.write_text(path.read_text()[:-15])
    log_steps(tmp_path, [3], resumed_at=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_a_new_run_begins_a_new_file(tmp_path):
    log_steps(tmp_path, range(1, 4))
    log_steps(tmp_path, [1])
    assert steps_in(tmp_path) == [1]


def test_numbers_survive_being_written(tmp_path):
    CsvLogger(tmp_path, 0).log_metrics({"train/loss": 1.23456789012}, step=1)
    assert float(runs.read_rows(tmp_path / runs.METRICS_FILE)[0]["train/loss"]) == pytest.approx(
        1.23456789012, rel=1e-8
    )


def test_tensorboard_gets_the_same_numbers(tiny, tmp_path):
    train.run(tiny("fst", logger=LoggerConfig(tensorboard=True)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    rows = runs.read_rows(tmp_path / "run" / runs.METRICS_FILE)
    assert logged == pytest.approx({int(row["step"]): float(row["train/loss"]) for row in rows}, rel=1e-6)
    assert [event.step for event in events.Scalars("val/loss")] == [4, 8, 12]


@pytest.mark.slow
def test_wandb_records_offline_without_an_account(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    train.run(tiny("dense", logger=LoggerConfig(wandb=True, wandb_artifact=True)))
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(runs.read_json(tmp_path / "run" / runs.RUN_FILE)["id"])
    (records,) = folder.glob("run-*.wandb")
    deadline = time.monotonic() + 30  # W&B's own process writes them, on a busy machine after `finish` has returned
    of_the_artifact = (b"checkpoints/step-00000012/manifest.json", b"config.yaml", b"tokenizer.json")
    while not all(name in records.read_bytes() for name in of_the_artifact) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(name in records.read_bytes() for name in of_the_artifact)


def test_wandb_online_without_a_login_is_told_before_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="logger.wandb_mode: found online, but no login; allowed: offline"):
        train.run(tiny(logger=LoggerConfig(wandb=True, wandb_mode="online")))
    assert not (tmp_path / "run").exists()


def test_the_run_id_is_kept(tiny, tmp_path):
    train.run(tiny())
    identifier = runs.read_json(tmp_path / "run" / runs.RUN_FILE)["id"]
    assert runs.run_id(tmp_path / "run") == identifier
    assert runs.run_id(tmp_path / "another") != identifier
