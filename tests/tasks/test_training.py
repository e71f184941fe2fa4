"""Training by training: loss falls, phases switch when they should, a resumed run is the same run."""

import csv
import math
import multiprocessing
import shutil

import pytest
import torch
from sparse24.reference import transposable_mask

from sparse_pretrain import preflight, runs, train, worker
from sparse_pretrain.checkpoint import store
from sparse_pretrain.checkpoint.callback import CheckpointCallback
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import Interrupted
from sparse_pretrain.sparsity.schedule import DENSE_FINETUNE, DENSE_WARMUP, SPARSE
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.metrics import total_scores
from sparse_pretrain.tasks.task import clip_gradients

TIMING = ("seconds", "train/tokens_per_second", "train/mfu", "train/memory_gb")


def metrics(run_dir) -> list[dict]:
    """The logged rows, without what a clock says."""
    with open(run_dir / runs.METRICS_FILE) as file:
        return [{key: value for key, value in row.items() if key not in TIMING} for row in csv.DictReader(file)]


def final_state(run_dir) -> dict:
    newest, notes = store.newest_valid(run_dir / runs.CHECKPOINTS)
    assert not notes
    state = store.load(newest)
    state.pop("callbacks")  # the clock
    return state


def assert_equal(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    assert_equal(final_state(a), final_state(b))


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(5): the next run gets a signal during step 5 (counted from 1); stop_at(None): none any more."""

    def arm(step):
        original = CausalLM.training_step
        callbacks = []
        init = CheckpointCallback.__init__

        def remember(self, *args, **kwargs):
            init(self, *args, **kwargs)
            callbacks.append(self)

        def training_step(self, batch, index):
            original(self, batch, index)
            if self.steps_done == step:
                callbacks[-1].received = 15

        if step is None:
            monkeypatch.undo()
        else:
            monkeypatch.setattr(CheckpointCallback, "__init__", remember)
            monkeypatch.setattr(CausalLM, "training_step", training_step)

    return arm


def phases(**changes):
    """Every phase and several refreshes within 12 steps: dense 0-1, sparse 2-8, dense 9-11."""
    return {
        "recipe__schedule__dense_warmup": 0.17,
        "recipe__schedule__dense_finetune": 0.25,
        "recipe__schedule__refresh_every": 3,
        **changes,
    }


def test_loss_falls_and_the_masks_settle(tiny):
    cfg = tiny(
        "fst",
        trainer__steps=120,
        trainer__eval_every=120,
        recipe__schedule__refresh_every=5,
        trainer__checkpoint_every=200,
    )
    rows = metrics(train.run(cfg))
    losses = [float(row["train/loss"]) for row in rows]
    assert losses[0] == pytest.approx(math.log(320), abs=0.2)
    assert losses[-1] < losses[0] - 1.5
    flips = [float(row["sparsity/flip_rate"]) for row in rows if row["sparsity/flip_rate"]]
    assert 0 < max(flips) < 0.5
    assert flips[-1] < 0.2 * max(flips)


def test_s_ste_settles_without_decay(tiny):
    """The loss falls, and with it the flip rate, though nothing pulls pruned weights to zero."""
    rows = metrics(train.run(tiny("s_ste", trainer__steps=120, trainer__eval_every=120, trainer__checkpoint_every=200)))
    losses = [float(row["train/loss"]) for row in rows]
    assert losses[-1] < losses[0] - 1.5
    flips = [float(row["sparsity/flip_rate"]) for row in rows if row["sparsity/flip_rate"]]
    assert sum(flips[-10:]) < 0.5 * max(sum(flips[i : i + 10]) for i in range(len(flips) - 10))


def test_s_ste_learns_in_fp8(tiny):
    changes = {"trainer__steps": 60, "trainer__eval_every": 60, "trainer__checkpoint_every": 100}
    losses = {
        fp8: [
            float(row["train/loss"]) for row in metrics(train.run(tiny("s_ste", f"{fp8}", recipe__fp8=fp8, **changes)))
        ]
        for fp8 in (False, True)
    }
    assert losses[True][-1] < losses[True][0] - 1
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], abs=0.1)


def test_phases_switch_when_they_should(tiny):
    rows = metrics(train.run(tiny("fst", **phases())))
    assert [row["phase"] for row in rows] == [DENSE_WARMUP] * 2 + [SPARSE] * 7 + [DENSE_FINETUNE] * 3
    # refreshes before steps 2, 5 and 8; the first has nothing to compare with
    flips = [row["sparsity/flip_rate"] for row in rows]
    assert flips[:4] == [""] * 4
    assert len(set(flips[4:7])) == 1
    assert flips[7] != flips[6]
    assert len(set(flips[7:])) == 1


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8, 9, 11])
def test_a_resumed_run_is_bit_identical(tiny, stop_at, tmp_path, stop):
    """Across every phase boundary, with accumulation, MVUE, dropout, and several data workers."""
    changes = phases(
        trainer__micro_batch_size=2, model__dropout=0.1, data__num_workers=2 if stop == 5 else 0, trainer__log_every=2
    )
    train.run(tiny("fst", "whole", **changes))
    stop_at(stop)
    with pytest.raises(Interrupted, match=f"step {stop} of 12"):
        train.run(tiny("fst", "stopped", **changes))
    stop_at(None)
    train.run(tiny("fst", "stopped", **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("recipe", ["dense", "ste", "sr_ste", "s_ste", "step", "ast", "slope", "maskllm"])
def test_other_recipes_resume_too(tiny, stop_at, tmp_path, recipe):
    train.run(tiny(recipe, "whole"))
    stop_at(7)
    with pytest.raises(Interrupted):
        train.run(tiny(recipe, "stopped"))
    stop_at(None)
    train.run(tiny(recipe, "stopped"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_fp8_resumes_too(tiny, stop_at, tmp_path):
    """With accumulation, through a dense phase, in bf16 beside the sparse layers."""
    changes = phases(recipe__fp8=True, trainer__micro_batch_size=2, trainer__precision="bf16")
    train.run(tiny("s_ste", "whole", **changes))
    stop_at(6)
    with pytest.raises(Interrupted):
        train.run(tiny("s_ste", "stopped", **changes))
    stop_at(None)
    train.run(tiny("s_ste", "stopped", **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_resumes_too(tiny, stop_at, tmp_path, monkeypatch, dtype):
    """The loss scale of fp16 is part of the checkpoint: the first steps overflow and lower it."""

    def half(*_):
        return dtype

    with monkeypatch.context() as patch:
        patch.setattr("sparse_pretrain.worker.precision_dtype", half)
        train.run(tiny("fst", "whole", **phases()))
    stop_at(6)
    monkeypatch.setattr("sparse_pretrain.worker.precision_dtype", half)
    with pytest.raises(Interrupted):
        train.run(tiny("fst", "stopped", **phases()))
    stop_at(None)
    monkeypatch.setattr("sparse_pretrain.worker.precision_dtype", half)
    train.run(tiny("fst", "stopped", **phases()))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    state = final_state(tmp_path / "whole")
    assert ("MixedPrecision" in state) == (dtype == torch.float16)


def test_resuming_before_a_damaged_checkpoint_says_so(tiny, stop_at, tmp_path, capsys):
    train.run(tiny("fst", "whole", **phases()))
    stop_at(10)
    with pytest.raises(Interrupted):
        train.run(tiny("fst", "stopped", **phases()))
    stop_at(None)
    newest = store.checkpoint_folder(tmp_path / "stopped" / runs.CHECKPOINTS, 10)
    (newest / "__0_0.distcp").write_bytes(b"")
    train.run(tiny("fst", "stopped", **phases()))
    assert "step-00000010 is damaged" in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_complete_run_is_left_alone(tiny, tmp_path, capsys):
    train.run(tiny())
    before = (tmp_path / "run" / runs.METRICS_FILE).stat().st_mtime_ns
    train.run(tiny())
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "run" / runs.METRICS_FILE).stat().st_mtime_ns == before


def test_a_checkpoint_is_verified_once(tiny, monkeypatch):
    """Not by each rank anew: it may be hundreds of gigabytes."""
    train.run(tiny("fst", trainer__stop_after=6))
    verified, damage = [], store.damage
    monkeypatch.setattr(store, "damage", lambda folder: verified.append(folder.name) or damage(folder))
    train.run(tiny("fst"))
    assert verified == ["step-00000006"]


def test_accumulation_gives_the_same_training(tiny, tmp_path):
    """MVUE's draws go by position in the batch, so cutting it changes rounding only."""
    train.run(tiny("fst", "one", **phases()))
    train.run(tiny("fst", "four", **phases(trainer__micro_batch_size=2)))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-4)


def test_bf16_trains(tiny):
    rows = metrics(train.run(tiny("fst", trainer__precision="bf16", **phases(trainer__steps=40))))
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"]) - 0.3


def test_fp16_overflow_is_dropped_and_the_scale_lowered(tiny, monkeypatch):
    """On the CPU too: loss scaling needs no GPU to be tested."""
    monkeypatch.setattr("sparse_pretrain.worker.precision_dtype", lambda *_: torch.float16)
    rows = metrics(train.run(tiny("dense", trainer__steps=30)))
    assert int(rows[-1]["train/dropped_steps"]) < 10
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"]) - 0.2


def poison(monkeypatch, steps):
    """The gradients of these steps are NaN."""
    original = CausalLM.manual_backward

    def manual_backward(self, loss):
        original(self, loss * torch.nan if self.steps_done in steps else loss)

    monkeypatch.setattr(CausalLM, "manual_backward", manual_backward)


def test_a_nan_step_is_skipped_and_counted(tiny, monkeypatch):
    poison(monkeypatch, {3, 4})
    rows = metrics(train.run(tiny("fst")))
    assert [row["train/dropped_steps"] for row in rows] == ["0"] * 3 + ["1"] + ["2"] * 8
    assert rows[3]["train/loss"] == "nan"
    assert math.isfinite(float(rows[-1]["val/loss"]))


def test_a_nan_step_stops_the_run_if_asked_to(tiny, monkeypatch, tmp_path):
    poison(monkeypatch, {6})
    with pytest.raises(UserError, match=r"trainer.guard.nonfinite: .* at step 6: training stopped"):
        train.run(tiny("fst", trainer__guard__nonfinite="stop"))
    assert store.list_steps(tmp_path / "run" / runs.CHECKPOINTS) == [4]
    assert not (tmp_path / "run" / runs.SUMMARY_FILE).exists()


def test_a_stopped_run_keeps_the_checkpoints_from_before(tiny, monkeypatch, tmp_path):
    """Although it is noticed late, at the next logged step, and checkpoints fall due in between."""
    poison(monkeypatch, {5})
    changes = {"trainer__log_every": 50, "trainer__eval_every": 50, "trainer__checkpoint_every": 1}
    with pytest.raises(UserError, match="at step 5: training stopped"):
        train.run(tiny("fst", trainer__guard__nonfinite="stop", **changes))
    newest, notes = store.newest_valid(tmp_path / "run" / runs.CHECKPOINTS)
    assert newest.name == "step-00000005"
    assert not notes
    assert store.load(newest)["state_dict"]["guard.stopped_at"] == -1


def test_a_corpus_that_changed_is_told(tiny, stop_at, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("some words to begin with, and some more of them. " * 200)
    stop_at(6)
    with pytest.raises(Interrupted):
        train.run(tiny(data__train=[str(text)]))
    stop_at(None)
    text.write_text("other words altogether now, which give other tokens. " * 200)
    with pytest.raises(UserError, match="data: found text or a tokenizer that changed"):
        train.run(tiny(data__train=[str(text)]))


def test_resume_with_another_vocabulary_is_told(tiny, tmp_path):
    train.run(tiny("dense", "first"))
    with pytest.raises(UserError, match="resume: found a checkpoint trained with another tokenizer"):
        train.run(tiny("dense", "second", trainer__steps=20, data__vocab_size=300, resume=str(tmp_path / "first")))


def test_a_fork_computes_its_masks_anew(tiny, tmp_path):
    train.run(tiny("fst", "first", **phases()))
    changes = phases(recipe__schedule__dense_warmup=0.0, recipe__schedule__dense_finetune=0.0, trainer__steps=13)
    run_dir = train.run(tiny("fst", "second", resume=str(tmp_path / "first"), **changes))
    before = store.load(store.checkpoint_folder(tmp_path / "first" / runs.CHECKPOINTS, 12))["state_dict"]
    after = final_state(run_dir)["state_dict"]
    name = "model.blocks.0.ffn.up"
    assert torch.equal(after[f"{name}.mask"], transposable_mask(before[f"{name}.weight"]))
    assert not torch.equal(after[f"{name}.mask"], before[f"{name}.mask"])


@pytest.mark.parametrize("name", [runs.SUMMARY_FILE, runs.RUN_FILE])
def test_an_empty_json_is_written_again(tiny, tmp_path, name):
    run_dir = train.run(tiny())
    summary = runs.read_json(run_dir / runs.SUMMARY_FILE)
    (run_dir / runs.SUMMARY_FILE).write_text("")
    (run_dir / name).write_text("")
    train.run(tiny())
    assert runs.read_json(run_dir / runs.SUMMARY_FILE) == summary
    assert runs.read_json(run_dir / runs.RUN_FILE)["corpus"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << 7  # no UTF-8 any more
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])],
    ids=["flipped", "missing", "truncated"],
)
def test_damaged_files_of_a_run_are_those_of_its_newest_whole_checkpoint(tiny, tmp_path, damage):
    train.run(tiny("fst", "whole"))
    run_dir = train.run(tiny("fst", trainer__stop_after=8))
    facts = runs.read_json(run_dir / runs.RUN_FILE)
    for name in runs.COPIED:
        damage(run_dir / name)
    flip(store.checkpoint_folder(run_dir / runs.CHECKPOINTS, 8) / "__0_0.distcp")
    assert runs.read_rows(run_dir / runs.METRICS_FILE) is not None
    train.run(tiny("fst"))
    assert_same_run(tmp_path / "whole", run_dir)
    assert runs.read_json(run_dir / runs.RUN_FILE)["id"] == facts["id"]


def test_a_config_that_one_bit_has_changed_is_no_other_runs(tiny, tmp_path):
    run_dir = train.run(tiny(trainer__stop_after=4))
    path = run_dir / runs.CONFIG_FILE
    path.write_text(path.read_text().replace("batch_size: 8", "batch_size: 9"))
    train.run(tiny())
    assert runs.read_given_config(run_dir).trainer.batch_size == 8
    with pytest.raises(UserError, match="holding a run with trainer.batch_size=8 where this one has 4"):
        train.run(tiny(trainer__batch_size=4))


def test_a_damaged_config_without_a_copy_is_told(tiny):
    run_dir = train.run(tiny(trainer__stop_after=4))
    (run_dir / runs.CONFIG_FILE).write_text("")
    (store.checkpoint_folder(run_dir / runs.CHECKPOINTS, 4) / runs.CONFIG_FILE).write_text("")
    with pytest.raises(UserError, match=r"config.yaml, which is damaged"):
        train.run(tiny())
    shutil.rmtree(run_dir / runs.CHECKPOINTS)  # nothing to lose
    train.run(tiny(trainer__stop_after=4))


def test_patterns_are_checked_before_any_data(tiny):
    with pytest.raises(UserError, match=r"recipe.include: found nothing.\*, which matches no linear layer"):
        train.run(tiny(recipe__include=["nothing.*"], data__train=["/nowhere.txt"]))


def test_validation_and_checkpoints_are_not_on_the_clock(tiny, monkeypatch):
    """With a clock that a checkpoint and a validation move on by 1000 seconds, and every look at it by 1 ms."""
    now = [1.0]

    def look() -> float:
        now[0] += 1e-3
        return now[0]

    def slow(function):
        def wrapped(*args, **kwargs):
            now[0] += 1000
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr("sparse_pretrain.tasks.metrics.time.perf_counter", look)
    monkeypatch.setattr(store, "save", slow(store.save))
    monkeypatch.setattr("sparse_pretrain.tasks.metrics.total_scores", slow(total_scores))
    run_dir = train.run(tiny("fst", trainer__checkpoint_every=1, trainer__log_every=5))
    rows = runs.read_rows(run_dir / runs.METRICS_FILE)
    assert now[0] > 12_000
    assert 0 < float(rows[-1]["seconds"]) < 1


def test_nothing_but_nan_stops_the_run(tiny, monkeypatch):
    poison(monkeypatch, set(range(100)))
    with pytest.raises(UserError, match="more than 5 steps in a row"):
        train.run(tiny("fst", trainer__guard__max_skipped=5))


def test_resume_from_another_run(tiny, tmp_path):
    train.run(tiny("dense", "first"))
    cfg = tiny("dense", "second", trainer__steps=20, optimizer__lr=1e-3, resume=str(tmp_path / "first"))
    rows = metrics(train.run(cfg))
    assert [int(row["step"]) for row in rows] == list(range(13, 21))
    with pytest.raises(
        UserError, match=r"resume: found a checkpoint of another model: model.d_model=16 there, 32 here"
    ):
        train.run(tiny("dense", "third", trainer__steps=20, model__d_model=32, resume=str(tmp_path / "first")))
    with pytest.raises(UserError, match=r"trainer.steps: found 12, but resume names a checkpoint of step 12"):
        train.run(tiny("dense", "fourth", resume=str(tmp_path / "first")))


def test_a_folder_of_another_run_is_refused(tiny, tmp_path):
    train.run(tiny("dense"))
    with pytest.raises(UserError, match=r"run_dir: .*optimizer.lr=0.003 where this one has 0.001"):
        train.run(tiny("dense", optimizer__lr=1e-3))
    with pytest.raises(UserError, match="resume: found never"):
        train.run(tiny("dense", resume="never"))


def test_sequences_and_embedding_must_fit(tiny):
    with pytest.raises(UserError, match=r"model.vocab_size: found 100; allowed: at least the tokenizer's 320"):
        train.run(tiny(model__vocab_size=100))
    with pytest.raises(UserError, match=r"data.seq_len: found 32; allowed: at most model.max_seq_len=16"):
        train.run(tiny(data__seq_len=32))


def test_too_little_disk_is_told_before_the_start(tiny, tmp_path, monkeypatch):
    usage = preflight.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"run_dir: found 0.0 MB free"):
        train.run(tiny())
    assert not (tmp_path / "run" / runs.METRICS_FILE).exists()


def test_an_unwritable_run_folder(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir: .* cannot be written"):
        train.run(tiny(run_dir="file/run"))


def test_killed_after_the_last_checkpoint_it_only_sums_up(tiny, tmp_path):
    run_dir = train.run(tiny("fst"))
    summary, rows = runs.read_json(run_dir / runs.SUMMARY_FILE), metrics(run_dir)
    (run_dir / runs.SUMMARY_FILE).unlink()
    train.run(tiny("fst"))
    assert runs.read_json(run_dir / runs.SUMMARY_FILE) == summary
    assert metrics(run_dir) == rows


def test_two_processes_do_not_train_one_run(tiny, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with runs.locked(run_dir), pytest.raises(UserError, match="run_dir: .*which another process is training"):
        train.run(tiny())
    train.run(tiny())


def test_a_data_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    started, done = multiprocessing.Event(), multiprocessing.Event()
    with runs.locked(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=lambda: (started.set(), done.wait(60)))
        worker.start()
        assert started.wait(60)
    with runs.locked(tmp_path):
        done.set()
    worker.join()


def test_worker_does_nothing_for_a_complete_run(tiny, tmp_path):
    train.run(tiny())
    (tmp_path / "run" / runs.CONFIG_FILE).unlink()
    worker.run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_as_uncompiled_ones(tiny, tmp_path, checkpointing):
    changes = phases(trainer__steps=24, model__activation_checkpointing=checkpointing)
    train.run(tiny("fst", "eager", **changes))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.run(tiny("fst", "compiled", trainer__compile=True, **changes))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    for a, b in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-3)
    names = final_state(tmp_path / "compiled")["state_dict"].keys()
    assert names == final_state(tmp_path / "eager")["state_dict"].keys()


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_gradients_are_clipped_as_torch_does_it(max_norm):
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model(torch.ones(4, 5)).square().sum().backward()
    norm = clip_gradients(models[0], max_norm)
    expected = torch.nn.utils.clip_grad_norm_(models[1].parameters(), math.inf if max_norm is None else max_norm)
    assert torch.equal(norm, expected)
    assert 0.5 < norm < 100
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_runs_clip(tiny, tmp_path):
    """So much that, beside a large epsilon, hardly anything is learned."""
    for name, clip in (("free", None), ("clipped", 1e-6)):
        train.run(tiny("dense", name, trainer__grad_clip=clip, optimizer__eps=0.01, optimizer__weight_decay=0.0))
    free, clipped = (metrics(tmp_path / name) for name in ("free", "clipped"))
    losses = [[float(row["val/loss"]) for row in rows if row["val/loss"]] for rows in (free, clipped)]
    assert losses[0][-1] < losses[0][0] - 0.02
    assert losses[1][-1] == pytest.approx(losses[1][0], abs=1e-4)
    assert clipped[0]["train/grad_norm"] == free[0]["train/grad_norm"]
