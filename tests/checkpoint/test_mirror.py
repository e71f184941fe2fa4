"""Copies of checkpoints elsewhere: what is there is whole, and a run goes on from it without its folder."""

import shutil

import fsspec
import pytest
import torch

from sparse_pretrain import runs, train
from sparse_pretrain.checkpoint import mirror, store
from sparse_pretrain.checkpoint.mirror import Mirror
from sparse_pretrain.errors import UserError
from tests.tasks.test_training import assert_equal, final_state, metrics, phases


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "file":
        yield f"file://{tmp_path}/bucket"
        return
    yield "memory://bucket/runs"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def save(run_dir, step) -> None:
    folder = store.checkpoint_folder(run_dir / runs.CHECKPOINTS, step)
    store.save({"steps_done": step, "weights": torch.arange(1000.0) + step}, folder)
    (run_dir / runs.METRICS_FILE).write_text(f"step\n{step}\n")


def test_a_run_goes_on_without_its_folder(tiny, tmp_path, url):
    train.run(tiny("fst", "whole", **phases()))
    options = phases(trainer__checkpoint_mirror=url)
    run_dir = train.run(tiny("fst", "lost", trainer__stop_after=6, **options))
    shutil.rmtree(run_dir)
    train.run(tiny("fst", "lost", **options))
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    assert_equal(final_state(run_dir), final_state(tmp_path / "whole"))


def test_the_newest_are_kept_and_damaged_copies_passed_over(tmp_path, url, capsys):
    there = Mirror(url, "run")
    for step in (1, 2, 3):
        save(tmp_path / "run", step)
        there.upload(store.checkpoint_folder(tmp_path / "run" / runs.CHECKPOINTS, step), kept=2)
    names = {path.rpartition("/")[2] for path in there.fs.ls(f"{there.root}/checkpoints", detail=False)}
    assert names == {"step-00000002", "step-00000003"}
    with there.fs.open(f"{there.root}/checkpoints/step-00000003/__0_0.distcp", "wb") as file:
        file.write(b"short")
    fetched = Mirror(url, "run").fetch(tmp_path / "again")
    assert fetched is not None
    assert store.load(fetched)["steps_done"] == 2
    assert "step-00000003 is damaged" in capsys.readouterr().err


def test_damaged_checkpoints_are_fetched_whole(tiny, tmp_path, url, capsys):
    train.run(tiny("fst", "whole", **phases()))
    options = phases(trainer__checkpoint_mirror=url)
    run_dir = train.run(tiny("fst", "damaged", trainer__stop_after=8, **options))
    for step in (4, 8):
        (store.checkpoint_folder(run_dir / runs.CHECKPOINTS, step) / "__0_0.distcp").write_bytes(b"short")
    train.run(tiny("fst", "damaged", **options))
    assert "step-00000008 fetched from" in capsys.readouterr().out
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    assert_equal(final_state(run_dir), final_state(tmp_path / "whole"))


def test_what_a_killed_copy_left_is_deleted_and_strange_names_are_let_be(tmp_path, url):
    there = Mirror(url, "run")
    for step in (1, 2, 3):
        save(tmp_path / "run", step)
        there.upload(store.checkpoint_folder(tmp_path / "run" / runs.CHECKPOINTS, step), kept=2)
        if step == 1:
            there.fs.rm(f"{there.root}/checkpoints/step-00000001/manifest.json")
            there.fs.makedirs(f"{there.root}/checkpoints/step-by-step")
            there.fs.pipe(f"{there.root}/checkpoints/step-by-step/note", b"")
    names = {path.rpartition("/")[2] for path in there.fs.ls(f"{there.root}/checkpoints", detail=False)}
    assert names == {"step-00000002", "step-00000003", "step-by-step"}


def test_a_copy_without_manifest_is_none(tmp_path, url):
    there = Mirror(url, "run")
    assert there.fetch(tmp_path / "again") is None
    save(tmp_path / "run", 1)
    there.upload(store.checkpoint_folder(tmp_path / "run" / runs.CHECKPOINTS, 1), kept=2)
    there.fs.rm(f"{there.root}/checkpoints/step-00000001/manifest.json")
    assert there.fetch(tmp_path / "again") is None


@pytest.mark.parametrize(("failures", "copied"), [(1, True), (5, False)])
def test_a_file_system_that_fails_is_tried_again_and_does_not_end_the_run(
    tmp_path, url, monkeypatch, capsys, failures, copied
):
    there, left = Mirror(url, "run"), [failures]
    put = type(there.fs).put_file

    def failing(self, *args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("connection reset")
        return put(self, *args, **kwargs)

    monkeypatch.setattr(mirror, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(type(there.fs), "put_file", failing)
    save(tmp_path / "run", 1)
    there.upload(store.checkpoint_folder(tmp_path / "run" / runs.CHECKPOINTS, 1), kept=2)
    monkeypatch.undo()
    assert (there.fetch(tmp_path / "again") is not None) == copied
    assert ("was not copied (connection reset); training goes on" in capsys.readouterr().err) != copied


def test_an_unknown_protocol_is_one_sentence():
    with pytest.raises(UserError, match=r"trainer\.checkpoint_mirror: found nowhere://bucket"):
        Mirror("nowhere://bucket", "run")
