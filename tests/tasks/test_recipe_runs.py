"""Whole runs under STEP, AST, SLoPe, MaskLLM and Wanda's metric: what happens at which step, and that a run stopped at
any of a method's special moments goes on bit for bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from sparse24 import backends, dispatch, ops
from sparse24.dispatch import Plan
from torch import distributed, nn

from sparse_pretrain import evaluate, runs, train
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config import EvaluateConfig
from sparse_pretrain.config_recipe import RecipeConfig, ScheduleConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation.perplexity import total_loss
from sparse_pretrain.optim import adamw
from sparse_pretrain.sparsity import SparseLinear, SparseTraining, sparsify
from sparse_pretrain.sparsity.schedule import DENSE_WARMUP, SPARSE
from sparse_pretrain.tasks.build import build_model
from sparse_pretrain.tasks.metrics import total_scores
from sparse_pretrain.tasks.task import Sizes
from sparse_pretrain.tasks.trained import load_trained
from tests.tasks.test_products import Pretend
from tests.tasks.test_training import assert_same_run, final_state, metrics

UP = "model.blocks.0.ffn.up"
EVERY_STEP = {"trainer__checkpoint_every": 1, "trainer__checkpoints_kept": 50}


def states(run_dir) -> dict[int, dict]:
    """Step -> checkpoint."""
    folder = run_dir / runs.CHECKPOINTS
    return {step: store.load(store.checkpoint_folder(folder, step)) for step in store.list_steps(folder)}


def is_2_4(mask) -> bool:
    return bool((mask.view(-1, 4).sum(-1) == 2).all())


def top2(weight):
    """2:4 by magnitude: at least as large as the second largest of each four."""
    groups = weight.reshape(-1, 4).abs()
    return (groups >= groups.sort(dim=1).values[:, 2:3]).view(weight.shape)


# dense until step 4 at least and step 9 at most, with this ε until one in between; the window of the second moment is 1 / (1 - 0.75) = 4 steps
STEP = {
    "optimizer__betas": [0.9, 0.75],
    "optimizer__eps": 1.1e-6,
    "recipe__schedule__dense_warmup": 4 / 12,
    "recipe__schedule__dense_warmup_max": 9 / 12,
}
# sparse, and taught by its dense self, from step 3 on; λ rises until step 7; masks of steps 3, 6, 9
AST = {
    "recipe__schedule__dense_warmup": 0.25,
    "recipe__schedule__refresh_every": 3,
    "recipe__decay__factor": 0.1,
    "recipe__decay__ramp": 4 / 9,
    "recipe__adapter__kind": "slorb",
    "recipe__adapter__init": "sum",
    "recipe__adapter__group": 4,
}
# double pruning of steps 0, 4, 8; adapters from step 6 on
SLOPE = {"recipe__schedule__refresh_every": 4, "recipe__adapter__rank": 2, "recipe__adapter__start": 0.5}
MASKLLM = {"recipe__schedule__dense_warmup": 0.5, "recipe__learned__logit_lr": 0.01}
# masks of steps 2, 5, 8, 11
METRIC = {
    "recipe__projection": "metric",
    "recipe__schedule__dense_warmup": 2 / 12,
    "recipe__schedule__refresh_every": 3,
    "trainer__micro_batch_size": 4,
}


def first_sparse_step(run_dir) -> int:
    return [row["phase"] for row in metrics(run_dir)].index(SPARSE)


@pytest.mark.parametrize(("eps", "switch"), [(1e-30, 9), (1.0, 4), (None, range(5, 9))])
def test_step_switches_when_the_second_moment_has_settled(tiny, eps, switch):
    """At the latest, at the earliest, by itself; metrics.csv says so, and what is evaluated is what was trained."""
    eps = STEP["optimizer__eps"] if eps is None else eps
    run_dir = train.run(tiny("step", **{**STEP, **EVERY_STEP, "optimizer__eps": eps}))
    phases = [row["phase"] for row in metrics(run_dir)]
    first = first_sparse_step(run_dir)
    assert first in (switch if isinstance(switch, range) else [switch])
    assert phases == [DENSE_WARMUP] * first + [SPARSE] * (12 - first)
    saved = states(run_dir)
    names = [name for name in saved[1]["state_dict"] if name.endswith(".mask")]
    assert len(names) == 4
    for step in range(first, 13):
        for name in names:
            weight = saved[step]["state_dict"][name.replace(".mask", ".weight")]
            assert torch.equal(saved[step]["state_dict"][name], top2(weight))
    for step in (first - 1, first, 12):  # between the earliest and the latest step the checkpoint alone knows
        trained = load_trained(str(store.checkpoint_folder(run_dir / runs.CHECKPOINTS, step)), torch.device("cpu"))
        layers = [m for m in trained.model.modules() if isinstance(m, SparseLinear)]
        assert [layer.is_sparse for layer in layers] == [step >= first] * 4


def test_step_keeps_the_second_moment_of_the_switch(tiny):
    run_dir = train.run(tiny("step", **STEP, **EVERY_STEP))
    saved, first = states(run_dir), first_sparse_step(run_dir)
    moments = {step: state["optimizer_states"][0]["state"] for step, state in saved.items()}
    for index, moment in moments[first].items():
        held = moment["exp_avg_sq"] / (1 - 0.75**first)
        for step in range(first + 1, 13):
            assert torch.equal(moments[step][index]["exp_avg_sq"], moments[first + 1][index]["exp_avg_sq"])
            torch.testing.assert_close(moments[step][index]["exp_avg_sq"], held)
            assert not torch.equal(moments[step][index]["exp_avg"], moments[step - 1][index]["exp_avg"])


def test_maskllm_hardens_to_2_4_with_frozen_weights(tiny, monkeypatch):
    """Its validation loss is that of a plain model with the likeliest pattern of each group."""
    losses = []

    def plain_loss(task, batches, autocast):
        batches, model = list(batches), task.model
        plain = build_model(cfg, Sizes(vocab_size=320))
        state = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
        for name, layer in model.named_modules():
            if isinstance(layer, SparseLinear) and layer.is_sparse:
                pattern = layer.learned.patterns[layer.learned.logits.argmax(-1)].flatten(1)
                state[f"{name}.weight"] = layer.weight * pattern
        plain.load_state_dict(state)
        losses.append(float(total_loss(plain, batches, torch.device("cpu"), autocast)[0]))
        return total_scores(task, batches, autocast)

    monkeypatch.setattr("sparse_pretrain.tasks.metrics.total_scores", plain_loss)
    cfg = tiny("maskllm", **MASKLLM, **EVERY_STEP)
    run_dir = train.run(cfg)
    rows, saved = metrics(run_dir), states(run_dir)
    found = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert found == pytest.approx([loss / (2 * 8 * 16) for loss in losses], rel=1e-5)
    assert [row["phase"] for row in rows] == [DENSE_WARMUP] * 6 + [SPARSE] * 6
    at_first, moved = saved[6]["state_dict"], 0
    for step in range(7, 13):
        state = saved[step]["state_dict"]
        for name, value in state.items():
            if name.endswith(".mask"):
                assert is_2_4(value)
            elif name.endswith(".logits"):
                assert not torch.equal(value, at_first[name])
            elif name.startswith("model."):
                assert torch.equal(value, at_first[name]), name
        moved += int((state[f"{UP}.mask"] != at_first[f"{UP}.mask"]).sum())
    assert moved > 0
    model = load_trained(str(run_dir), torch.device("cpu")).model
    soft = torch.stack([m.learned.soft_mask().detach() for m in model.modules() if isinstance(m, SparseLinear)][::2])
    assert ((soft < 0.01) | (soft > 0.99)).float().mean() > 0.9


def test_slopes_masks_never_change_and_its_adapters_appear_on_time(tiny):
    run_dir = train.run(tiny("slope", **SLOPE, **EVERY_STEP))
    saved = states(run_dir)
    first = saved[1]["state_dict"]
    masks = [name for name in first if name.endswith(".mask")]
    adapters = [name for name in first if ".adapter." in name]
    assert len(masks) == 4
    assert len(adapters) == 8
    for step, state in saved.items():
        for name in masks:
            assert torch.equal(state["state_dict"][name], first[name])
        for name in adapters:  # a checkpoint of step 6 is from before optimizer step 6
            assert torch.equal(state["state_dict"][name], first[name]) == (step <= 6), (step, name)
    input_masks = [saved[step]["state_dict"][f"{UP}.input_mask"] for step in range(1, 13)]
    changed = [i + 1 for i in range(1, 12) if not torch.equal(input_masks[i], input_masks[i - 1])]
    assert changed
    assert set(changed) <= {4, 8, 12}
    pruned = ~first[f"{UP}.mask"]
    moments = [
        state for state in saved[12]["optimizer_states"][0]["state"].values() if state["exp_avg"].shape == pruned.shape
    ]
    assert any(not moment["exp_avg_sq"][pruned].any() and moment["exp_avg_sq"].any() for moment in moments)
    written = load_file(run_dir / runs.ADAPTER_FILE)
    assert written.keys() == {name.removeprefix("model.") for name in adapters}
    for name in adapters:
        assert torch.equal(written[name.removeprefix("model.")], saved[12]["state_dict"][name])


def test_adapters_without_sparsity_train_alone(tiny):
    """LoRA: train_weights=false beside dense weights."""
    changes = {"recipe__adapter__kind": "lora", "recipe__adapter__start": 0.25, "recipe__train_weights": False}
    run_dir = train.run(tiny("dense", **changes, **EVERY_STEP))
    saved = states(run_dir)
    at_start, last = saved[3]["state_dict"], saved[12]["state_dict"]
    assert not torch.equal(at_start["model.head.weight"], saved[1]["state_dict"]["model.head.weight"])
    for name in last:
        if name.startswith("model."):
            assert torch.equal(last[name], at_start[name]) == (".adapter." not in name), name
    assert (run_dir / runs.ADAPTER_FILE).is_file()


@pytest.mark.parametrize(("recipe", "changes"), [("maskllm", MASKLLM), ("slope", SLOPE), ("ast", AST), ("ste", METRIC)])
def test_what_was_trained_is_evaluated_however_weights_are_held(tiny, capsys, recipe, changes):
    run_dir = train.run(tiny(recipe, **changes))
    losses = {}
    for weights in ("auto", "dense", "sparse", "packed"):
        capsys.readouterr()
        evaluate.run(EvaluateConfig(str(run_dir), weights=weights, accelerator="cpu"))
        losses[weights] = capsys.readouterr().out.split("loss")[1].split()[0]
    assert len(set(losses.values())) == 1, losses


@pytest.mark.parametrize("recipe", ["ste", "slope", "maskllm"])
def test_4_of_8_trains_and_is_evaluated_but_not_packed(tiny, capsys, recipe):
    cfg = tiny(recipe, recipe__pattern="4:8", **({"recipe__adapter__start": 0.5} if recipe == "slope" else {}))
    run_dir = train.run(cfg)
    losses = [float(row["train/loss"]) for row in metrics(run_dir)]
    assert losses[8] < losses[0]
    mask = final_state(run_dir)["state_dict"][f"{UP}.mask"]
    assert (mask.view(-1, 8).sum(-1) == 4).all()
    evaluate.run(EvaluateConfig(str(run_dir), accelerator="cpu"))
    assert "4:8 sparse in 4 layers" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="weights: found packed, for a checkpoint that is 4:8 sparse; allowed: auto, den"
    ):
        evaluate.run(EvaluateConfig(str(run_dir), weights="packed", accelerator="cpu"))


# --- products and kernels ---


@pytest.fixture
def pretend(monkeypatch):
    known = {**backends.BACKENDS, "gluon": Pretend()}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(dispatch, "BACKENDS", known)


@pytest.mark.parametrize("plan", [("gluon:a", "gluon:b"), ("gluon:a", "dense"), ("dense", "gluon:b")], ids=str)
@pytest.mark.parametrize("input_gradient", ["double_pruned", "dense"])
@pytest.mark.parametrize("projection", ["magnitude", "static", "metric"])
def test_packed_weights_of_two_masks(pretend, plan, input_gradient, projection):
    """A forward operand and one for dX that differ, packed or not: the same numbers, in the same memory from then on."""
    if input_gradient == "dense" and plan[1] != "dense":
        pytest.skip("the dense master weight has a dense product")
    torch.manual_seed(0)
    layer = SparseLinear(nn.Linear(32, 16), RecipeConfig("test", projection, input_gradient=input_gradient))
    layer.plan = Plan(*plan)
    pointers = set()
    for _ in range(3):
        with torch.no_grad():
            layer.weight.add_(torch.randn(16, 32), alpha=0.1)
        layer.refresh()
        layer.project()
        weight = layer.weight.detach()
        x, dy = torch.randn(4, 32, requires_grad=True), torch.randn(4, 16)
        y = layer(x)
        y.backward(dy)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight * layer.mask, layer.bias))
        of_dx = weight if input_gradient == "dense" else weight * layer.mask * layer.input_mask
        torch.testing.assert_close(x.grad, dy @ of_dx)
        held = [*layer.packed.forward.tensors, *layer.packed.input_gradient.tensors]
        pointers.add(tuple(tensor.data_ptr() for tensor in held))
    assert len(pointers) == 1


@pytest.mark.parametrize(("recipe", "changes"), [("slope", SLOPE), ("ast", METRIC)])
def test_packed_weights_train_as_dense_ones(tiny, pretend, recipe, changes):
    expected = metrics(train.run(tiny(recipe, "dense", **changes)))
    run_dir = train.run(tiny(recipe, "packed", trainer__backend="gluon", **changes))
    for a, b in zip(expected, metrics(run_dir), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), abs=2e-3)
    plans = runs.read_json(run_dir / runs.RUN_FILE)["sparse_products"]["plans"].values()
    assert all(plan[0] != "dense" for plan in plans)


@pytest.mark.parametrize(
    ("recipe", "pattern", "what"), [("maskllm", "2:4", "learned masks"), ("ste", "4:8", "recipe.pattern=4:8")]
)
def test_a_backend_that_cannot_serve_is_refused_not_replaced(tiny, pretend, recipe, pattern, what):
    with pytest.raises(UserError, match=f"trainer.backend: found gluon, which serves 2:4 weights, with {what}"):
        train.run(tiny(recipe, trainer__backend="gluon", recipe__pattern=pattern))


@pytest.mark.parametrize(("recipe", "changes"), [("slope", SLOPE), ("ast", {**AST, **METRIC}), ("step", STEP)])
def test_the_gpu_kernels_train_the_same(tiny, monkeypatch, recipe, changes):
    """Masks of transposed views, decay outside the first moment, a frozen second one: in Triton's interpreter."""
    pytest.importorskip("triton")
    changes = {**changes, "trainer__steps": 8, "trainer__eval_every": 8, "model__n_layer": 1}
    expected = train.run(tiny(recipe, "reference", **changes))
    monkeypatch.setattr(ops, "use_kernels", lambda tensor: True)
    monkeypatch.setattr(adamw, "use_kernels", lambda tensor: True)
    found = train.run(tiny(recipe, "kernels", **changes))
    for a, b in zip(metrics(expected), metrics(found), strict=True):
        assert a["phase"] == b["phase"]
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-4)
    a, b = final_state(expected)["state_dict"], final_state(found)["state_dict"]
    for name in a:
        if name.endswith("mask"):
            assert (a[name] == b[name]).float().mean() > 0.97, name


# --- resuming ---


@pytest.mark.parametrize(
    ("recipe", "changes", "stops"),
    [
        ("step", STEP, [2, 5, "before", "at", "after"]),
        ("step", {**STEP, "recipe__schedule__switch_mean": "geometric", "optimizer__eps": 1e-30}, [8, 9, 10]),
        ("ast", AST, [2, 3, 4, 6, 8]),
        ("slope", SLOPE, [1, 3, 4, 5, 6, 7, 10]),
        ("maskllm", MASKLLM, [5, 6, 7, 11]),
        ("maskllm", {**MASKLLM, "recipe__teacher__models": ["self"], "model__dropout": 0.1}, [5, 6, 7]),
        ("ste", METRIC, [1, 2, 3, 4, 5, 7]),
        ("ast", {**METRIC, "recipe__schedule__dense_warmup": 0.5}, [4, 6, 8]),
    ],
    ids=["step", "step-forced", "ast", "slope", "maskllm", "maskllm-taught", "metric", "ast-metric"],
)
def test_resuming_at_every_special_moment_is_bit_identical(tiny, tmp_path, recipe, changes, stops):
    """One run stopped and continued again and again, and one that was not."""
    whole = train.run(tiny(recipe, "whole", **changes))
    first = first_sparse_step(whole)
    for stop in stops:
        stop = {"before": first - 1, "at": first, "after": first + 1}.get(stop, stop)
        train.run(tiny(recipe, "stopped", trainer__stop_after=stop, **changes))
        assert store.list_steps(tmp_path / "stopped" / runs.CHECKPOINTS)[-1] == stop
    train.run(tiny(recipe, "stopped", **changes))
    assert_same_run(whole, tmp_path / "stopped")


# --- init_from ---


@pytest.mark.parametrize("recipe", ["ste", "slope", "maskllm"])
def test_init_from_starts_at_step_0_with_these_weights_and_fresh_masks(tiny, tmp_path, recipe):
    source = train.run(tiny("slope", "first", recipe__projection="static_random", **EVERY_STEP))
    before = final_state(source)["state_dict"]
    changes = {"init_from": str(source), "optimizer__lr": 0.0, "recipe__schedule__dense_warmup": 0.0}
    if recipe == "maskllm":
        changes["recipe__learned__logit_lr"] = 0.0
    run_dir = train.run(tiny(recipe, "second", seed=5, **changes))
    assert [int(row["step"]) for row in metrics(run_dir)] == list(range(1, 13))
    after = final_state(run_dir)["state_dict"]
    for name, value in after.items():
        if name in before and name.startswith("model.") and not name.endswith("mask") and ".adapter." not in name:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(after[f"{UP}.mask"], before[f"{UP}.mask"])
    agree = (after[f"{UP}.mask"] == top2(before[f"{UP}.weight"])).float().mean()
    assert agree > 0.9 if recipe == "maskllm" else agree == 1


def test_a_run_continues_without_the_run_it_was_started_from(tiny, tmp_path):
    for name in ("whole", "stopped"):
        source = train.run(tiny("dense", f"{name}-source"))
        changes = {"init_from": str(source)}
        if name == "stopped":
            train.run(tiny("ast", name, trainer__stop_after=5, **AST, **changes))
            shutil.rmtree(source)
        train.run(tiny("ast", name, **AST, **changes))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


def test_init_from_must_fit(tiny, tmp_path):
    source = str(train.run(tiny("dense", "first")))
    with pytest.raises(UserError, match="init_from: found .*nowhere"):
        train.run(tiny("ste", "second", init_from=str(tmp_path / "nowhere")))
    with pytest.raises(
        UserError, match=r"init_from: found a checkpoint of another model: model.d_model=16 there, 32 here"
    ):
        train.run(tiny("ste", "third", init_from=source, model__d_model=32))
    with pytest.raises(UserError, match="init_from: found a checkpoint trained with another tokenizer"):
        train.run(tiny("ste", "fourth", init_from=source, data__vocab_size=300))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="init_from: found"):
        train.run(tiny("ste", "fifth", init_from=str(empty)))


def test_a_fork_may_be_of_a_recipe_without_an_automatic_switch(tiny, tmp_path):
    """From a dense phase of ste into step: the switch is then this run's."""
    first = train.run(tiny("ste", "first", trainer__stop_after=2, recipe__schedule__dense_warmup=0.5))
    run_dir = train.run(tiny("step", "second", resume=str(first), **{**STEP, "optimizer__eps": 1e-30}))
    assert [row["phase"] for row in metrics(run_dir)] == [DENSE_WARMUP] * 7 + [SPARSE] * 3


# --- two ranks ---


@pytest.mark.slow
def test_two_ranks_resume_in_the_middle_of_measuring_inputs(tiny, tmp_path, train_together):
    """The checkpoint is of rank 0 alone, so what the other has measured must be in it."""
    changes = {**METRIC, "recipe__schedule__refresh_every": 4, "trainer__devices": 2, "trainer__micro_batch_size": 2}
    train_together([tiny("ste", "whole", **changes), tiny("ste", "stopped", trainer__stop_after=8, **changes)], 2)
    train_together([tiny("ste", "stopped", **changes)], 2)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def _rank(rank: int, folder: str) -> None:
    """What one of two ranks does: its half of the inputs, three steps, and its masks to a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(_masks(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _masks(rank: int | None) -> list[torch.Tensor]:
    collected = []
    for projection in ("metric", "learned", "static_random"):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("a", "b")})
        recipe = RecipeConfig("test", projection, schedule=ScheduleConfig(dense_warmup=0.2, refresh_every=2))
        sparsify(model, recipe, include=["*"])
        training = SparseTraining(model, recipe, 10, seed=1)
        for step in range(7):
            training.prepare(step)
            x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step)) * torch.linspace(0.1, 3, 16)
            for part in x if rank is None else x[rank : rank + 1]:
                model["b"](model["a"](part)).sum().backward()
            collected += [layer.mask.clone() for layer in training.layers.values()]
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)), alpha=0.1)
    return collected


@pytest.mark.slow
def test_two_ranks_hold_the_same_masks_as_one(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b, alone in zip(first, second, _masks(None), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, alone)


# --- forks: going on from another run's checkpoint under other options ---


def fork(tiny, recipe, tmp_path, step, source=None, **changes):
    """A run stopped at `step`, and another that goes on from there with `changes`; the latter's folder."""
    train.run(tiny(recipe, "source", trainer__stop_after=step, **(source or {})))
    return train.run(tiny(recipe, "fork", resume=str(tmp_path / "source"), **{**(source or {}), **changes}))


def test_a_fork_needs_the_same_optimizer_state(tiny, tmp_path):
    with pytest.raises(UserError, match=r"resume: found a checkpoint of another model: optimizer\.name=adamw there"):
        fork(tiny, "ste", tmp_path, 6, optimizer__name="muon")


def test_a_second_moment_once_frozen_stays_so_in_a_fork(tiny, tmp_path):
    with pytest.raises(UserError, match=r"recipe\.frozen_preconditioner: found false, for a checkpoint"):
        fork(tiny, "step", tmp_path, 6, recipe__frozen_preconditioner=False)


def test_a_fork_of_step_with_another_beta2_begins_its_window_anew(tiny, tmp_path):
    folder = fork(tiny, "step", tmp_path, 5, STEP, optimizer__betas=[0.9, 0.5])
    assert final_state(folder)["sparse_training"]["changes"].shape == (2,)


def test_a_fork_keeps_wandas_masks_until_inputs_have_been_seen(tiny, tmp_path):
    wanda = {"recipe__projection": "metric", "recipe__schedule__refresh_every": 3}
    folder = fork(tiny, "ste", tmp_path, 6, wanda, recipe__schedule__refresh_every=5, **EVERY_STEP)
    source = final_state(tmp_path / "source")["state_dict"]
    mask = source[f"{UP}.mask"]
    assert not torch.equal(mask, top2(source[f"{UP}.weight"]))
    assert torch.equal(states(folder)[8]["state_dict"][f"{UP}.mask"], mask)


def test_a_fork_past_the_start_of_its_adapters_starts_them(tiny, tmp_path):
    slorb = {"recipe__adapter__kind": "slorb", "recipe__adapter__group": 4, "recipe__adapter__start": 0.9}
    folder = fork(tiny, "ste", tmp_path, 6, slorb, recipe__adapter__start=0.2, optimizer__lr=0.0)
    assert final_state(folder)["state_dict"][f"{UP}.adapter.s"].any()


def test_a_short_run_too_trains_lazy_adapters(tiny):
    folder = train.run(tiny("slope"))  # 12 steps
    assert load_file(folder / runs.ADAPTER_FILE)["blocks.0.ffn.up.adapter.b"].any()


def test_weights_are_frozen_once_there_is_something_else_to_train(tiny):
    folder = train.run(
        tiny("ste", recipe__train_weights=False, recipe__adapter__kind="lora", recipe__adapter__start=0.5, **EVERY_STEP)
    )
    weights = {step: state["state_dict"][f"{UP}.weight"] for step, state in states(folder).items()}
    assert not torch.equal(weights[5], weights[6])
    assert torch.equal(weights[6], weights[12])


def test_a_wrong_adapter_file_is_told_before_there_is_a_run_folder(tiny, tmp_path):
    cfg = tiny("ste", recipe__adapter__kind="lora", recipe__adapter__path=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match=r"recipe\.adapter\.path: found .*none\.safetensors"):
        train.run(cfg)
    assert not (tmp_path / "run").exists()


def test_inputs_that_are_not_finite_do_not_decide_masks():
    """The step that they ruin is dropped by the guard; what its forward pass measured is too."""
    model = nn.ModuleDict({"ffn": nn.Linear(8, 4)})
    recipe = RecipeConfig("test", "metric", schedule=ScheduleConfig(refresh_every=2))
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, 20, seed=1)
    training.prepare(0)
    x = torch.randn(16, 8) * torch.tensor([1.0, 9, 1, 9, 1, 9, 1, 9])
    model["ffn"](x).sum().backward()
    training.prepare(1)
    x[0, 2] = torch.nan
    x[1, 4] = torch.inf
    model["ffn"](x).sum().backward()
    training.prepare(2)
    norms = torch.tensor([1.0, 9, 1, 9, 1, 9, 1, 9])
    assert torch.equal(model["ffn"].mask, top2(model["ffn"].weight.detach() * norms))


def test_s_stes_beta_is_that_of_the_weights_that_become_sparse(tiny):
    folder = train.run(tiny("s_ste", recipe__schedule__dense_warmup=0.5, optimizer__lr=3e-2, **EVERY_STEP))
    there = states(folder)
    weight = there[6]["state_dict"][f"{UP}.weight"]
    groups = weight.reshape(-1, 4)
    soft = (groups.sign() * (groups.abs() - groups.abs().sort(dim=1).values[:, 1:2]).clamp(min=0)).view_as(weight)
    beta = float((weight * soft).sum() / soft.square().sum())
    assert float(there[6]["state_dict"][f"{UP}.scale"]) == pytest.approx(beta, rel=1e-5)
    assert float(there[1]["state_dict"][f"{UP}.scale"]) != pytest.approx(beta, rel=1e-3)
    assert torch.equal(there[12]["state_dict"][f"{UP}.scale"], there[6]["state_dict"][f"{UP}.scale"])
