"""Checkpoints on disk: whole or not there, and what happens when a disk damages them."""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sparse_pretrain import launch
from sparse_pretrain.checkpoint import files, store
from sparse_pretrain.checkpoint.saver import Saver
from sparse_pretrain.errors import UserError

DATA = "__0_0.distcp"


def state(step: int) -> dict:
    return {"steps_done": step, "weights": torch.arange(1000.0) + step, "nested": [{"none": None}]}


def save_steps(folder, *steps):
    for step in steps:
        store.save(state(step), store.checkpoint_folder(folder, step))


def test_round_trip(tmp_path):
    save_steps(tmp_path, 7)
    loaded = store.load(store.checkpoint_folder(tmp_path, 7))
    assert loaded["steps_done"] == 7
    assert torch.equal(loaded["weights"], state(7)["weights"])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda folder: (folder / DATA).write_bytes(b"short"), "bytes where the manifest says"),
        (lambda folder: flip_bit(folder / DATA), "wrong checksum"),
        (lambda folder: (folder / DATA).unlink(), "no __0_0.distcp"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "unreadable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "unreadable manifest.json"),
    ],
    ids=["truncated", "bit-flip", "no-state", "no-manifest", "half-manifest", "wrong-manifest"],
)
def test_a_damaged_newest_is_told_and_the_one_before_used(tmp_path, damage, found):
    save_steps(tmp_path, 10, 20)
    damage(store.checkpoint_folder(tmp_path, 20))
    newest, notes = store.newest_valid(tmp_path)
    assert newest == store.checkpoint_folder(tmp_path, 10)
    assert len(notes) == 1
    assert "step-00000020" in notes[0]
    assert found in notes[0]
    with pytest.raises(UserError, match=found):
        store.load(store.checkpoint_folder(tmp_path, 20))


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_nothing_valid(tmp_path):
    assert store.newest_valid(tmp_path / "absent") == (None, [])
    save_steps(tmp_path, 1)
    flip_bit(store.checkpoint_folder(tmp_path, 1) / DATA)
    newest, notes = store.newest_valid(tmp_path)
    assert newest is None
    assert len(notes) == 1


def test_a_damaged_one_can_be_written_again(tmp_path):
    save_steps(tmp_path, 5)
    flip_bit(store.checkpoint_folder(tmp_path, 5) / DATA)
    save_steps(tmp_path, 5)
    assert store.damage(store.checkpoint_folder(tmp_path, 5)) is None


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / ".step-00000004.partial").mkdir()
    store.prune(tmp_path, kept=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]


def test_pickled_code_is_not_run(tmp_path):
    folder = store.checkpoint_folder(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    store.save({"steps_done": Evil()}, folder)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(Exception, match="weights_only|Unsupported|WeightsUnpickler"):
        store.load(folder)
    assert not (tmp_path / "pwned").exists()


def test_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files._HashingStream, "write", full)
    with pytest.raises(UserError, match="no space left"):
        save_steps(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert store.damage(store.checkpoint_folder(tmp_path, 1)) is None


def test_a_disk_that_is_full_at_any_byte_is_one_sentence(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    write = files._HashingStream.write
    size = (store.checkpoint_folder(tmp_path, 1) / DATA).stat().st_size
    for room in range(0, size, 97):

        def full(self, data, room=room):
            if self.bytes + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, data)

        monkeypatch.setattr(files._HashingStream, "write", full)
        with pytest.raises(UserError, match="no space left"):
            save_steps(tmp_path, 2)
        assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_disk_that_is_full_on_one_rank(tmp_path):
    """Each of two ranks at a time, in the foreground and beside: both say so, and then there is room again."""
    program = Path(__file__).with_name("full_disk.py")
    assert launch.run_ranks([sys.executable, str(program), str(tmp_path)], 2) == 0


def _save_for_ever(folder):
    step = 0
    while True:
        step += 1
        save_steps(folder, step)


def test_sigkill_while_writing_never_leaves_a_damaged_checkpoint(tmp_path):
    for round_ in range(5):
        folder = tmp_path / str(round_)
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(folder,))
        process.start()
        while len(store.list_steps(folder)) < 3:
            time.sleep(0.001)
        time.sleep(0.0007 * round_)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for step in store.list_steps(folder):
            assert store.damage(store.checkpoint_folder(folder, step)) is None


@pytest.mark.parametrize("name", ["nothing", "step-00000009"])
def test_resolve_names_the_option(tmp_path, name):
    with pytest.raises(UserError, match="checkpoint: found"):
        store.resolve(tmp_path / name, option="checkpoint")


def test_resolve_takes_run_folders_and_checkpoints(tmp_path):
    save_steps(tmp_path / "checkpoints", 3, 4)
    newest = store.checkpoint_folder(tmp_path / "checkpoints", 4)
    assert store.resolve(tmp_path, option="checkpoint") == newest
    assert store.resolve(newest, option="checkpoint") == newest


def test_damaged_ones_are_set_aside_and_do_not_outlive_new_ones(tmp_path):
    save_steps(tmp_path, 10, 20, 30)
    for step in (20, 30):
        flip_bit(store.checkpoint_folder(tmp_path, step) / DATA)
    notes = store.set_aside_damaged(tmp_path)
    assert len(notes) == 2
    assert store.list_steps(tmp_path) == [10]
    save_steps(tmp_path, 15)
    store.prune(tmp_path, kept=1)
    assert store.list_steps(tmp_path) == [15]
    assert {path.name for path in tmp_path.glob("damaged-*")} == {"damaged-step-00000020", "damaged-step-00000030"}


@pytest.mark.parametrize("there", ["file", "link", "folder"])
def test_anything_may_be_in_the_place_of_a_checkpoint(tmp_path, there):
    """And has been before."""
    for _ in range(2):
        save_steps(tmp_path, 10, 20)
        shutil.rmtree(store.checkpoint_folder(tmp_path, 20))
        for path in (store.checkpoint_folder(tmp_path, 20), store.checkpoint_folder(tmp_path, 5)):
            {
                "file": lambda: path.write_text("?"),  # noqa: B023
                "link": lambda: path.symlink_to("/nowhere/at/all"),  # noqa: B023
                "folder": lambda: path.mkdir(),  # noqa: B023
            }[there]()
        assert len(store.set_aside_damaged(tmp_path)) == 1
        assert store.list_steps(tmp_path) == [5, 10]
        store.prune(tmp_path, kept=1)
        assert store.list_steps(tmp_path) == [10]
        there = {"file": "folder", "link": "folder", "folder": "link"}[there]


def test_what_is_saved_in_the_background_is_the_state_at_that_time(tmp_path, monkeypatch):
    """And one is written after the other."""
    write, going = files.write, threading.Event()

    def slow(*args):
        assert going.wait(timeout=20)
        write(*args)

    monkeypatch.setattr(files, "write", slow)
    saver, live = Saver(kept=2, background=True), state(1)
    saver.save(live, store.checkpoint_folder(tmp_path, 1))
    live["weights"].zero_()
    live["nested"][0]["none"] = "changed"
    assert store.list_steps(tmp_path) == []
    going.set()
    for step in (2, 3):
        saver.save(state(step), store.checkpoint_folder(tmp_path, step))
    assert 1 in store.list_steps(tmp_path)
    saved = store.load(store.checkpoint_folder(tmp_path, 1))
    assert torch.equal(saved["weights"], state(1)["weights"])
    assert saved["nested"] == [{"none": None}]
    saver.wait()
    assert store.list_steps(tmp_path) == [2, 3]


def test_what_goes_wrong_in_the_background_is_told(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparse_pretrain.checkpoint.saver.RETRY_SECONDS", 0)
    saver = Saver(kept=2, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(files._HashingStream, "write", full)
        saver.save(state(1), store.checkpoint_folder(tmp_path, 1))
        with pytest.raises(UserError, match="no space left"):
            saver.wait()
    saver.save(state(2), store.checkpoint_folder(tmp_path, 2))
    saver.wait()
    assert store.list_steps(tmp_path) == [2]
