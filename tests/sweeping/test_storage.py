"""Locks and storages: what is left when a process is killed in the middle of a write."""

import os
import signal
import subprocess
import sys
import time

import optuna
import pytest

from sparse_pretrain.errors import UserError
from sparse_pretrain.sweeping import storage
from sparse_pretrain.sweeping.locks import exclusive, try_lock


def study(folder):
    return optuna.create_study(storage=storage.open_storage(None, folder), study_name="s", load_if_exists=True)


def test_a_lock_is_free_when_its_holder_is_gone_and_its_children(tmp_path):
    path = tmp_path / "lock"
    script = (
        "import subprocess, sys, time; from pathlib import Path; from sparse_pretrain.sweeping.locks import try_lock\n"
        f"lock = try_lock(Path({str(path)!r})); fd = lock.fileno()\n"
        "child = subprocess.Popen(['sleep', '60'], pass_fds=[fd], stdout=subprocess.DEVNULL); print(child.pid, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    assert try_lock(path) is None
    holder.kill()
    holder.communicate()
    assert try_lock(path) is None  # its child is still there
    os.kill(child, signal.SIGKILL)
    for _ in range(100):
        lock = try_lock(path)
        if lock:
            break
        time.sleep(0.05)
    assert lock
    assert try_lock(path) is None  # nor twice in one process
    lock.close()
    with exclusive(path):
        assert try_lock(path) is None
    assert try_lock(path)


def test_a_line_cut_short_is_taken_away(tmp_path):
    first = study(tmp_path)
    first.add_trial(optuna.create_trial(value=1.0))
    with open(tmp_path / storage.JOURNAL_FILE, "a") as file:
        file.write('{"op_code":4,"worker_id":"x","stud')  # killed while writing
    again = study(tmp_path)
    assert [trial.value for trial in again.trials] == [1.0]
    again.add_trial(optuna.create_trial(value=2.0))
    assert [trial.value for trial in first.trials] == [1.0, 2.0]
    assert [trial.value for trial in study(tmp_path).trials] == [1.0, 2.0]


def test_a_damaged_journal_is_one_sentence(tmp_path):
    study(tmp_path)
    path = tmp_path / storage.JOURNAL_FILE
    path.write_bytes(path.read_bytes() + b"garbage\n" * 3)
    with pytest.raises(UserError, match="journal.log, which is damaged"):
        storage.open_storage(None, tmp_path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("study.db", "storage: found study.db; allowed: null for a file in the sweep's folder, or sqlite:///FILE"),
        ("sqlite://", "which ends with this process"),
        ("sqlite:////no/such/folder/study.db", "which cannot be opened (unable to open database file)"),
        ("nosql://host/x", "storage: found nosql://host/x, which"),
        ("postgresql://me:secret@host/x", "storage: found postgresql://me:***@host/x, whose driver is not installed"),
    ],
)  # fmt: skip
def test_bad_urls_are_one_sentence(tmp_path, url, expected):
    with pytest.raises(UserError) as error:
        storage.open_storage(storage.absolute_url(url), tmp_path)
    assert expected in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_sqlite_is_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute_url("sqlite:///study.db") == f"sqlite:///{tmp_path}/study.db"
    assert storage.absolute_url("mysql://me:secret@host/x") == "mysql://me:secret@host/x"
    assert storage.without_password("mysql://me:secret@host/x") == "mysql://me:***@host/x"


def test_a_database_that_fails_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="storage: found a database that does not answer"), storage.storing(tmp_path):
        raise optuna.exceptions.StorageInternalError
    with pytest.raises(UserError, match=r"out: found .*, which cannot be written \(No space left on device\)"):  # noqa: SIM117
        with storage.storing(tmp_path):
            raise OSError(28, os.strerror(28))
