"""Tensor parallelism of FFNs, alone and with FSDP2: every recipe trains as on one device."""

import pytest
import torch

from sparse_pretrain import crosscheck, runs, train
from sparse_pretrain.checkpoint import store
from sparse_pretrain.errors import UserError
from tests.tasks.test_fsdp import RECIPES, assert_trains_alike
from tests.tasks.test_recipe_runs import AST
from tests.tasks.test_training import assert_same_run, final_state, metrics, phases
from tests.tasks.toy_tasks import TASKS, task_config

pytestmark = pytest.mark.slow

# What may be spread in another way than the recipes' own layers.
WAYS = {
    "fp8": ("fst", phases(recipe__fp8=True)),
    "gated": ("fst", phases(model__activation="swiglu", model__d_ff=48)),
    "clipped": ("fst", phases(trainer__grad_clip=0.05, optimizer__eps=0.01)),  # of which AdamW sees the scale
    "bias": ("fst", phases(model__bias=True)),
    "sparse_activations": ("fst", phases(model__activation="relu2", model__activation_sparsity="2:4")),
    "double_pruned": ("ste", {"recipe__input_gradient": "double_pruned"}),
    "attention": ("ste", {"recipe__include": ["*.attn.*", "*.ffn.up"]}),  # and `down` stays dense
    "lora": ("dense", {"recipe__adapter__kind": "lora", "recipe__adapter__rank": 2}),
    "fixed_groups": (
        "ast",
        {**AST, "recipe__teacher__models": [], "recipe__adapter__train_groups": False, "recipe__adapter__group": 4},
    ),
}


def spread(tiny, name, ranks, **changes):
    """The run NAME-spread, of which pairs of ranks compute FFNs together."""
    recipe, own = {**RECIPES, **WAYS}[name]
    options = {**own, "trainer__devices": ranks, "trainer__strategy": "fsdp", "trainer__tensor_parallel": 2, **changes}
    return tiny(recipe, f"{name}-spread", **options)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_recipe_trains_as_on_one_device(tiny, tmp_path, train_together, ranks):
    names = {2: [*RECIPES, *WAYS], 4: ["fst", "slope", "maskllm", "ast", "wanda"]}[ranks]
    train_together([spread(tiny, name, ranks, trainer__micro_batch_size=2) for name in names], ranks)
    for name in names:
        recipe, changes = {**RECIPES, **WAYS}[name]
        train.run(tiny(recipe, name, **{**changes, "trainer__micro_batch_size": 2}))
        assert_trains_alike(tmp_path / name, tmp_path / f"{name}-spread")


def test_dropout_is_the_same_in_a_group(tiny, tmp_path, train_together):
    """Else the ranks of a group would go on with different activations."""
    train_together([spread(tiny, "fst", 2, model__dropout=0.2)], 2)
    train.run(tiny("fst", "one", model__dropout=0.2, **phases()))
    assert_trains_alike(tmp_path / "one", tmp_path / "fst-spread")


def test_each_rank_has_its_part_of_the_products(tiny, tmp_path, train_together):
    """Of the 2:4 weights, and of what is trained and stored."""
    train_together([spread(tiny, "fst", 2)], 2)
    newest, _ = store.newest_valid(tmp_path / "fst-spread" / runs.CHECKPOINTS)
    chunks = runs.read_json(newest / "metadata.json")
    up, down = (chunks[f"state_dict.model.blocks.0.ffn.{name}.weight"]["chunks"] for name in ("up", "down"))
    assert [chunk["sizes"] for chunk in up] == [[32, 16]] * 2
    assert [chunk["sizes"] for chunk in down] == [[16, 32]] * 2
    assert {chunk["place"][0] for chunk in (*up, *down)} == {"__0_0.distcp", "__1_0.distcp"}


def test_a_run_goes_on_with_other_meshes(tiny, tmp_path, train_together):
    """4 ranks in pairs -> 4 ranks together -> 2 -> 1 -> 4: the losses of a run that was never stopped."""
    train.run(tiny("fst", "whole", **phases()))
    for devices, together, stop in ((4, 2, 3), (4, 4, 5), (2, 2, 7), (1, 1, 9), (4, 2, None)):
        options = {
            "trainer__devices": devices,
            "trainer__strategy": "fsdp",
            "trainer__tensor_parallel": together,
            "trainer__stop_after": stop,
        }
        cfg = tiny("fst", "moved", **phases(**options))
        train_together([cfg], devices) if devices > 1 else train.run(cfg)
    assert_trains_alike(tmp_path / "whole", tmp_path / "moved")


def test_a_resumed_run_is_the_same_bit_for_bit(tiny, tmp_path, train_together):
    names = ("fst", "ast")
    for options in ({"trainer__stop_after": 6}, {}):
        train_together([spread(tiny, name, 2, **options) for name in names], 2)
    for name in names:
        (tmp_path / f"{name}-spread").rename(tmp_path / f"{name}-stopped")
    train_together([spread(tiny, name, 2) for name in names], 2)
    for name in names:
        assert_same_run(tmp_path / f"{name}-spread", tmp_path / f"{name}-stopped")


def test_bf16(tiny, tmp_path, train_together):
    train_together([spread(tiny, "fst", 2, trainer__precision="bf16", trainer__steps=40)], 2)
    rows = metrics(tmp_path / "fst-spread")
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"]) - 0.3
    assert all(t.dtype != torch.bfloat16 for t in final_state(tmp_path / "fst-spread")["state_dict"].values())


def test_every_objective_is_learned_as_on_one_device(tmp_path, train_together):
    options = {"trainer__steps": 4, "trainer__eval_every": 2}
    mesh = {"trainer__devices": 2, "trainer__strategy": "fsdp", "trainer__tensor_parallel": 2}
    train_together([task_config(task, tmp_path, f"{task}-spread", **options, **mesh) for task in TASKS], 2)
    for task in TASKS:
        train.run(task_config(task, tmp_path, task, **options))
        assert_trains_alike(tmp_path / task, tmp_path / f"{task}-spread", rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"trainer__strategy": "ddp"}, "trainer.tensor_parallel: found 2 with trainer.strategy=ddp"),
        ({"trainer__devices": 3}, "trainer.tensor_parallel: found 2; allowed: a divisor of trainer.devices=3"),
        ({"model__d_ff": 36}, "model.d_ff: found 36; allowed: a multiple of 8 with trainer.tensor_parallel=2"),
        (
            {"model__activation": "relu2", "model__activation_sparsity": "2:4", "model__d_ff": 12, "recipe__pattern": "1:2"},
            "model.d_ff: found 12; allowed: a multiple of 8 with",
        ),
        ({"recipe__pattern": "4:8", "recipe__projection": "magnitude", "model__d_ff": 24}, "model.d_ff: found 24; .* of 16"),
        (
            {"trainer__devices": 4, "trainer__batch_size": 9},
            r"trainer.batch_size: found 9; allowed: a multiple of trainer.devices=4 / trainer.tensor_parallel=2",
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(tiny, changes, found):
    options = {"trainer__devices": 2, "trainer__strategy": "fsdp", "trainer__tensor_parallel": 2, **changes}
    with pytest.raises(UserError, match=found):
        crosscheck.check(tiny("ste", **options))
