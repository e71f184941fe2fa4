"""A checkpoint as one file: what is in it, what goes on from it, and what happens when it is damaged."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparse_pretrain import cli, consolidate, runs, train
from sparse_pretrain.checkpoint import single_file, store
from sparse_pretrain.config import ConsolidateConfig
from sparse_pretrain.errors import UserError
from tests.cli.test_errors import error_of
from tests.tasks.test_recipe_runs import SLOPE, STEP
from tests.tasks.test_training import assert_equal, assert_same_run, final_state, phases

RECIPES = {"dense": {}, "fst": phases(), "step": STEP, "slope": SLOPE}
UP = "state_dict.model.blocks.0.ffn.up"


@pytest.fixture
def file(tiny, tmp_path):
    """file("fst", trainer__steps=…) -> the file of a run that stopped at step 6, whose folder is tmp_path/source."""

    def make(recipe="fst", **changes):
        train.run(tiny(recipe, "source", trainer__stop_after=6, **changes))
        return consolidated(tmp_path / "source")

    return make


def consolidated(run_dir) -> Path:
    out = run_dir.with_name(f"{run_dir.name}.safetensors")
    consolidate.run(ConsolidateConfig(str(run_dir), str(out)))
    return out


def checkpoint_of(run_dir) -> Path:
    newest, _ = store.newest_valid(run_dir / runs.CHECKPOINTS)
    assert newest is not None
    return newest


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_is_in_it_and_comes_back(file, tmp_path, recipe):
    path = file(recipe, **RECIPES[recipe])
    assert single_file.damage(path) is None
    state = store.load(checkpoint_of(tmp_path / "source"))
    assert_equal(store.load(path), state)
    assert store.step_of(path) == state["steps_done"] == 6
    tensors = load_file(path)  # as other programs find it
    assert torch.equal(tensors[f"{UP}.weight"], state["state_dict"]["model.blocks.0.ffn.up.weight"])
    for index, moments in state["optimizer_states"][0]["state"].items():
        assert torch.equal(tensors[f"optimizer_states.0.state.{index}.exp_avg"], moments["exp_avg"])
    if recipe != "dense":
        assert torch.equal(tensors[f"{UP}.mask"], state["state_dict"]["model.blocks.0.ffn.up.mask"])
        assert tensors[f"{UP}.mask"].dtype == torch.bool
    with safe_open(path, framework="numpy") as opened:
        assert set(opened.metadata()) == {"step", "config", "tokenizer_sha256", "sha256"}
    assert sorted(os.listdir(tmp_path)) == ["source", path.name]


@pytest.mark.parametrize("recipe", ["dense", "fst", "slope"])
def test_a_run_goes_on_from_it_bit_for_bit(file, tiny, tmp_path, recipe, monkeypatch):
    changes = RECIPES[recipe]
    path = file(recipe, **changes)
    train.run(tiny(recipe, "folder", resume=str(tmp_path / "source"), **changes))
    shutil.rmtree(tmp_path / "source")
    verified, damage = [], store.damage
    monkeypatch.setattr(store, "damage", lambda checkpoint: verified.append(checkpoint) or damage(checkpoint))
    train.run(tiny(recipe, "file", resume=str(path), trainer__stop_after=7, **changes))
    assert verified == [path]
    path.unlink()
    train.run(tiny(recipe, "file", resume=str(path), **changes))  # from its own checkpoint now
    assert_same_run(tmp_path / "folder", tmp_path / "file")


@pytest.mark.parametrize("recipe", ["ste", "dense"])
def test_a_run_starts_with_its_weights(file, tiny, tmp_path, recipe, monkeypatch):
    path = file("slope", **SLOPE)
    train.run(tiny(recipe, "folder", init_from=str(tmp_path / "source")))
    shutil.rmtree(tmp_path / "source")
    verified, damage = [], store.damage
    monkeypatch.setattr(store, "damage", lambda checkpoint: verified.append(checkpoint) or damage(checkpoint))
    train.run(tiny(recipe, "file", init_from=str(path)))
    assert verified == [path]
    assert_same_run(tmp_path / "folder", tmp_path / "file")


def test_a_run_whose_checkpoints_are_all_damaged_starts_from_it_again(file, tiny, tmp_path):
    path = file()
    train.run(tiny("fst", "whole", resume=str(path)))
    train.run(tiny("fst", "damaged", resume=str(path), trainer__stop_after=7))
    (checkpoint_of(tmp_path / "damaged") / "__0_0.distcp").write_bytes(b"")
    train.run(tiny("fst", "damaged", resume=str(path)))
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


def test_it_must_fit(file, tiny):
    path = str(file())
    for option in ("resume", "init_from"):
        with pytest.raises(UserError, match=f"{option}: found a checkpoint of another model: model.d_model=16 there"):
            train.run(tiny("fst", "other", model__d_model=32, **{option: path}))
        with pytest.raises(
            UserError, match=f"{option}: found a checkpoint trained with another tokenizer; allowed: data"
        ):
            train.run(tiny("fst", f"tokens-{option}", data__vocab_size=300, **{option: path}))
    with pytest.raises(UserError, match="resume: found a checkpoint of another model: recipe.projection=transposable"):
        train.run(tiny("ste", "other", resume=path))
    with pytest.raises(UserError, match="trainer.steps: found 6, but resume names a checkpoint of step 6"):
        train.run(tiny("fst", "other", trainer__steps=6, resume=path))


def test_damage_is_one_sentence(file, tiny, tmp_path):
    path = file()
    content = path.read_bytes()
    step = content.index(b'"step": "6"') + len('"step": "')
    digest = content.index(b'"sha256": "') + len('"sha256": "')
    for at in (3, 8, step, digest, len(content) // 3, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        assert_told(tiny, path)
    for damaged in (b"", content[:5], content[:100], content[: len(content) // 2], content[:-1], content + b"\0"):
        path.write_bytes(damaged)
        assert_told(tiny, path)
    path.write_bytes(content)
    assert single_file.damage(path) is None
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, foreign)
    assert_told(tiny, foreign, "a safetensors file that `consolidate` did not write")
    assert_told(tiny, tmp_path / "no.safetensors", "holds no whole checkpoint")
    assert not (tmp_path / "run").exists()


def assert_told(tiny, path, what="no whole safetensors file|a wrong checksum"):
    for option in ("resume", "init_from"):
        with pytest.raises(UserError, match=f"^{option}: found {path}.*({what})") as error:
            train.run(tiny("fst", **{option: str(path)}))
        assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_makes_no_file(file, tmp_path):
    file()
    (tmp_path / "source.safetensors").unlink()
    newest = checkpoint_of(tmp_path / "source")
    (newest / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(UserError, match="checkpoint: found .*bytes where the manifest says"):
        consolidate.run(ConsolidateConfig(str(newest), str(tmp_path / "out.safetensors")))
    assert os.listdir(tmp_path) == ["source"]


def test_commands_that_need_a_run_folder_say_so(file, capsys):
    path = file()
    capsys.readouterr()
    for arguments in (
        ["evaluate", f"checkpoint={path}"],
        ["generate", f"checkpoint={path}"],
        ["export", f"checkpoint={path}", "out=x"],
        ["prune", f"checkpoint={path}"],
        ["consolidate", f"checkpoint={path}", "out=x.safetensors"],
        ["finetune", f"checkpoint={path}", "data=glue_sst2"],
        ["inspect", f"checkpoints=[{path}]"],
    ):
        text = error_of(capsys, *arguments)
        assert f"{path}, a file; allowed: a run folder or a checkpoint folder. What `consolidate` writes is" in text


def test_the_command(file, tmp_path, capsys):
    file()
    out = tmp_path / "new folder" / "small.safetensors"
    cli.main(["consolidate", f"checkpoint={tmp_path / 'source'}", f"out='{out}'"])
    text = capsys.readouterr().out
    assert f"{tmp_path}/source/checkpoints/step-00000006" in text
    assert f"{out.stat().st_size:,} bytes" in text
    assert out.read_bytes() == (tmp_path / "source.safetensors").read_bytes()
    assert "small.safetensors, which exists; allowed: a new file" in error_of(
        capsys, "consolidate", f"checkpoint={tmp_path / 'source'}", f"out='{out}'"
    )
    assert "out: found /proc/x.safetensors, which cannot be written" in error_of(
        capsys, "consolidate", f"checkpoint={tmp_path / 'source'}", "out=/proc/x.safetensors"
    )


def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(file, tmp_path):
    file()
    out = tmp_path / "out" / "new.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"^out: found .*new.safetensors, which cannot be written \(File too large\)"
        ):
            consolidate.run(ConsolidateConfig(str(tmp_path / "source"), str(out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_reads_its_part(tmp_path, rank, dim):
    """Of 5 x 3 values on 4 ranks, where some have one row, or none."""
    path = tmp_path / "state.safetensors"
    state = {"steps_done": 3, "weights": torch.arange(15.0).reshape(5, 3), "count": torch.tensor(7), "pair": (1, None)}
    single_file.write(state, 3, path, {})
    parts = state["weights"].chunk(4, dim)
    expected = parts[rank] if rank < len(parts) else state["weights"].narrow(dim, 0, 0)
    torch.distributed.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))

        def place(name, size, dtype):
            if name != "weights":
                return torch.empty(size, dtype=dtype)
            local = torch.zeros_like(expected, dtype=dtype)
            return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=size, stride=(3, 1))

        loaded = single_file.read(path, place)
        assert torch.equal(loaded["weights"].to_local(), expected)
        assert torch.equal(loaded["count"], state["count"])
        assert loaded["pair"] == (1, None)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_what_two_ranks_wrote_and_read(tiny, tmp_path, train_together):
    """A checkpoint of two FSDP ranks is the same in one file, from which one device and two ranks go on."""

    two = {"trainer__devices": 2, "trainer__strategy": "fsdp"}
    train_together([tiny("fst", "source", **phases(trainer__stop_after=6, **two))], 2)
    newest = checkpoint_of(tmp_path / "source")
    assert (newest / "__1_0.distcp").stat().st_size > 0
    path = consolidated(tmp_path / "source")
    assert_equal(store.load(path), store.load(newest))
    ways = {"folder": newest, "file": path}
    train_together([tiny("fst", f"{name}-two", **phases(resume=str(there), **two)) for name, there in ways.items()], 2)
    assert_same_run(tmp_path / "folder-two", tmp_path / "file-two")
    for name, there in ways.items():
        train.run(tiny("fst", f"{name}-one", **phases(resume=str(there))))
    assert_same_run(tmp_path / "folder-one", tmp_path / "file-one")
    assert final_state(tmp_path / "file-one")["steps_done"] == 12
