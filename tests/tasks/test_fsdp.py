"""DDP and FSDP2: every recipe trains as on one device, and goes on with another number of ranks."""

import json
from pathlib import Path

import pytest
import torch

from sparse_pretrain import crosscheck, runs, train
from sparse_pretrain.checkpoint import files, store
from sparse_pretrain.errors import UserError
from tests.tasks.test_recipe_runs import AST, MASKLLM, METRIC, SLOPE, STEP
from tests.tasks.test_training import assert_same_run, final_state, metrics, phases
from tests.tasks.toy_tasks import TASKS, task_config

pytestmark = pytest.mark.slow

RECIPES = {
    "dense": ("dense", {}),
    "fst": ("fst", phases()),
    "s_ste": ("s_ste", {}),
    "sr_ste": ("sr_ste", phases()),
    "step": ("step", STEP),
    "slope": ("slope", SLOPE),
    "maskllm": ("maskllm", MASKLLM),
    "ast": ("ast", AST),
    "wanda": ("ste", METRIC),
    "muon": ("fst", phases(optimizer__name="muon")),
}
CONTINUED = ["fst", "muon", "ast"]


def assert_trains_alike(one: Path, many: Path, rel: float = 1e-4) -> None:
    """Within rounding: gradients are summed in another order. Masks of nearly equal weights may differ then."""
    for a, b in zip(metrics(one), metrics(many), strict=True):
        assert (a["phase"], a["tokens"]) == (b["phase"], b["tokens"]), one.name
        for column in (name for name in a if name in ("train/loss", "train/grad_norm") or name.startswith("val/")):
            bound = 100 * rel if column == "train/grad_norm" else rel
            same = a[column] == b[column] or float(a[column]) == pytest.approx(float(b[column]), rel=bound)
            assert same, (one.name, column, a[column], b[column])
    whole, sharded = final_state(one), final_state(many)
    assert whole["state_dict"].keys() == sharded["state_dict"].keys()
    for key, tensor in whole["state_dict"].items():
        if key.endswith("mask"):
            assert (tensor == sharded["state_dict"][key]).float().mean() > 0.98, (one.name, key)
    for a, b in zip(whole["optimizer_states"], sharded["optimizer_states"], strict=True):
        assert a["state"].keys() == b["state"].keys()


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_recipe_trains_as_on_one_device(tiny, tmp_path, train_together, ranks):
    """With DDP too."""
    configs = []
    for name, (recipe, changes) in RECIPES.items():
        for strategy in ("fsdp", "ddp"):
            options = {"trainer__devices": ranks, "trainer__strategy": strategy, "trainer__micro_batch_size": 2}
            configs.append(tiny(recipe, f"{name}-{strategy}", **{**changes, **options}))
    train_together(configs, ranks)
    for name, (recipe, changes) in RECIPES.items():
        train.run(tiny(recipe, name, **{**changes, "trainer__micro_batch_size": 2}))
        for strategy in ("fsdp", "ddp"):
            assert_trains_alike(tmp_path / name, tmp_path / f"{name}-{strategy}")


def test_a_run_goes_on_with_other_numbers_of_ranks(tiny, tmp_path, train_together):
    """4 -> 2 -> 1 -> 4 ranks, and from fsdp to ddp: the same data, and the losses of a run that was never stopped."""
    for name in CONTINUED:
        recipe, changes = RECIPES[name]
        train.run(tiny(recipe, name, **changes))
    for devices, strategy, stop in ((4, "fsdp", 3), (2, "fsdp", 5), (1, "fsdp", 7), (4, "fsdp", 9), (2, "ddp", None)):
        options = {"trainer__devices": devices, "trainer__strategy": strategy, "trainer__stop_after": stop}
        recipes = [(name, *RECIPES[name]) for name in CONTINUED]
        train_together(
            [tiny(recipe, f"{name}-moved", **changes, **options) for name, recipe, changes in recipes], devices
        )
    for name in CONTINUED:
        assert_trains_alike(tmp_path / name, tmp_path / f"{name}-moved")


def test_a_resumed_run_is_the_same_bit_for_bit(tiny, tmp_path, train_together):
    """Stopped in the sparse phase: the teacher of `ast` comes out of the checkpoint."""

    def configs(run, **options):
        options = {"trainer__devices": 2, "trainer__strategy": "fsdp", **options}
        recipes = [(name, *RECIPES[name]) for name in CONTINUED]
        return [tiny(recipe, f"{name}-{run}", **changes, **options) for name, recipe, changes in recipes]

    train_together([*configs("whole"), *configs("stopped", trainer__stop_after=6)], 2)
    train_together(configs("stopped"), 2)
    for name in CONTINUED:
        assert_same_run(tmp_path / f"{name}-whole", tmp_path / f"{name}-stopped")


def test_blocks_may_be_compiled_or_recompute_activations(tiny, tmp_path, train_together):
    options = phases(trainer__devices=2, trainer__strategy="fsdp")
    ways = {
        "plain": {},
        "recomputed": {"model__activation_checkpointing": True},
        "compiled": {"trainer__compile": True},
        "recomputed_together": {"model__activation_checkpointing": True, "trainer__tensor_parallel": 2},
        "compiled_together": {"trainer__compile": True, "trainer__tensor_parallel": 2},
    }
    train_together([tiny("fst", name, **options, **changes) for name, changes in ways.items()], 2)
    for name in ways:
        for a, b in zip(metrics(tmp_path / name), metrics(tmp_path / "plain"), strict=True):
            assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-4), name


def test_each_rank_writes_its_part(tiny, tmp_path, train_together):
    train_together([tiny("ast", **AST, trainer__devices=2, trainer__strategy="fsdp")], 2)
    newest, _ = store.newest_valid(tmp_path / "run" / runs.CHECKPOINTS)
    sizes = [(newest / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.3 * max(sizes)
    entries = json.loads((newest / files.METADATA_FILE).read_text())
    for owner in ("state_dict.model", "teacher_copy"):
        assert len(entries[f"{owner}.blocks.0.ffn.up.weight"]["chunks"]) == 2
    (newest / "__1_0.distcp").unlink()
    assert store.damage(newest) == "no __1_0.distcp"


def test_loss_scaling_is_refused(tiny):
    cfg = tiny("dense", trainer__devices=2, trainer__strategy="fsdp", trainer__precision="fp16")
    with pytest.raises(UserError, match="trainer.precision: found fp16 with trainer.strategy=fsdp"):
        crosscheck.check(cfg)


def test_bf16(tiny, tmp_path, train_together):
    cfg = tiny(
        "fst", trainer__devices=2, trainer__strategy="fsdp", trainer__precision="bf16", **phases(trainer__steps=40)
    )
    train_together([cfg], 2)
    rows = metrics(tmp_path / "run")
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"]) - 0.3
    assert all(tensor.dtype != torch.bfloat16 for tensor in final_state(tmp_path / "run")["state_dict"].values())


def test_checkpoints_written_beside_training_are_the_same(tiny, tmp_path, train_together):
    options = phases(trainer__devices=2, trainer__strategy="fsdp", trainer__checkpoint_every=2)
    train_together(
        [tiny("fst", "at_once", **options), tiny("fst", "beside", trainer__async_checkpoints=True, **options)], 2
    )
    assert_same_run(tmp_path / "at_once", tmp_path / "beside")
    assert store.list_steps(tmp_path / "beside" / runs.CHECKPOINTS) == [10, 12]


def test_every_objective_is_learned_as_on_one_device(tmp_path, train_together):
    options = {"trainer__steps": 4, "trainer__eval_every": 2}
    ways = {strategy: {"trainer__devices": 2, "trainer__strategy": strategy, **options} for strategy in ("fsdp", "ddp")}
    train_together([task_config(task, tmp_path, f"{task}-{way}", **ways[way]) for task in TASKS for way in ways], 2)
    for task in TASKS:
        train.run(task_config(task, tmp_path, task, **options))
        for way in ways:
            assert_trains_alike(tmp_path / task, tmp_path / f"{task}-{way}", rel=1e-3)
