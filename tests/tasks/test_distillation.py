"""Distillation: the losses against formulas written out, teachers in training, their logits on disk, bit-exact resume."""

import importlib.util
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from torch import nn

from sparse_pretrain import crosscheck, runs, train
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config_recipe import TeacherConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.tasks import teacher_logits
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.distillation import Targets, divergences, furthest_behind, make_targets
from sparse_pretrain.tasks.teacher import Teacher, find_teacher, load_teacher
from sparse_pretrain.tasks.teacher_logits import TeacherLogits
from sparse_pretrain.tasks.trained import load_trained
from tests.cli.test_commands import start, wait_for_step
from tests.tasks.test_training import assert_equal, assert_same_run, final_state, metrics

CPU = torch.device("cpu")


def softmax(logits: torch.Tensor, temperature: float) -> np.ndarray:
    """In fp64, by its definition."""
    powers = np.exp(logits.detach().double().numpy() / temperature)
    return powers / powers.sum(-1, keepdims=True)


def draw(*shape, seed=0, scale=2.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_is_the_formula(temperature):
    teacher, student = draw(7, 11, seed=1), draw(7, 11, seed=2)
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1)
    found = divergences(make_targets(teacher, temperature, None), student, temperature)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_lumps_the_rest_together(temperature):
    teacher, student = draw(7, 11, seed=1), draw(7, 11, seed=2)
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    expected = []
    for a, b in zip(p, q, strict=True):
        top = sorted(range(11), key=lambda x: -a[x])[:3]
        rest = [x for x in range(11) if x not in top]
        outcomes = [(a[x], b[x]) for x in top] + [(a[rest].sum(), b[rest].sum())]
        expected.append(temperature**2 * sum(u * math.log(u / v) for u, v in outcomes))
    targets = make_targets(teacher, temperature, 3)
    assert targets.log_probs.shape == (7, 4)
    found = divergences(targets, student, temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    whole = divergences(make_targets(teacher, temperature, None), student, temperature)
    assert (found < whole).all()
    for k in (11, 64):  # all there are
        assert torch.equal(divergences(make_targets(teacher, temperature, k), student, temperature), whole)


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_gradient_is_the_formula(top_k):
    """T·(q − p) for an outcome of its own; for the others together, what they lack is shared as q shares it."""
    temperature = 2.0
    teacher, student = draw(5, 9, seed=1), draw(5, 9, seed=2).requires_grad_()
    targets = make_targets(teacher, temperature, top_k)
    divergences(targets, student, temperature).sum().backward()
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if top_k is not None:
        for row, top in enumerate(targets.indices.tolist()):
            rest = [x for x in range(9) if x not in top]
            p[row, rest] = p[row, rest].sum() * q[row, rest] / q[row, rest].sum()
    np.testing.assert_allclose(student.grad.numpy(), temperature * (q - p), atol=1e-6)


def test_extreme_logits_stay_finite():
    teacher = torch.tensor([[200.0, 0, 0, -200], [0.0, 0, 0, 0]])
    student = torch.tensor([[-200.0, 0, 0, 200], [300.0, 0, 0, 0]]).requires_grad_()
    for top_k in (None, 1):
        loss = divergences(make_targets(teacher, 1.0, top_k), student, 1.0)
        assert torch.isfinite(loss).all()
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert torch.isfinite(gradient).all()


def test_tokens_furthest_behind_the_reference():
    student, reference = torch.tensor([5.0, 1, 4, 2, 3]), torch.tensor([4.0, 0, 0, 2, 4])
    # behind by 1, 1, 4, 0, -1: the first of equal ones
    assert furthest_behind(student, reference, 0.4).tolist() == [2, 0]
    assert furthest_behind(student, reference, 1.0).tolist() == [2, 0, 1, 3, 4]
    assert furthest_behind(student, reference, 1e-6).tolist() == [2]


class Fixed(nn.Module):
    """A model that says the same whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.fixed = logits

    def forward(self, tokens):
        assert not torch.is_grad_enabled()
        return self.fixed


def test_an_ensemble_is_the_mean_of_its_logits_without_padding():
    """Embeddings padded to 12 and to 16 rows, of a vocabulary of 10; the student's to 14."""
    a, b, c, student = draw(2, 3, 12, seed=1), draw(2, 3, 16, seed=2), draw(2, 3, 10, seed=3), draw(2, 3, 14, seed=4)
    student.requires_grad_()
    cfg = TeacherConfig(models=["a", "b", "c"], temperature=2.0)
    teacher = Teacher(cfg, [Fixed(a), Fixed(b), Fixed(c)], None, vocab_size=10)
    sequences = torch.zeros(2, 4, dtype=torch.int64)
    mean = (a[..., :10] + b[..., :10] + c) / 3
    torch.testing.assert_close(teacher.logits(sequences[:, :-1]), mean)
    p, q = softmax(mean, 2.0), softmax(student[..., :10], 2.0)
    loss = teacher.loss(student, sequences, step=0, first_row=0)
    assert loss.item() == pytest.approx((4 * (p * np.log(p / q)).sum(-1)).mean(), rel=1e-5)
    loss.backward()
    assert student.grad[..., 10:].count_nonzero() == 0
    assert student.grad[..., :10].count_nonzero() > 0


def test_adaspec_trains_the_share_of_tokens_furthest_behind():
    teach, refer, student = draw(2, 5, 8, seed=1), draw(2, 5, 8, seed=2), draw(2, 5, 8, seed=3).requires_grad_()
    cfg = TeacherConfig(models=["a"], temperature=2.0, reference="b", token_share=0.4)
    teacher = Teacher(cfg, [Fixed(teach)], Fixed(refer), vocab_size=8)
    p, q, r = (softmax(logits, 2.0).reshape(10, 8) for logits in (teach, student, refer))
    own, reference = (4 * (p * np.log(p / other)).sum(-1) for other in (q, r))
    kept = sorted(range(10), key=lambda i: -(own[i] - reference[i]))[:4]
    loss = teacher.loss(student, torch.zeros(2, 6, dtype=torch.int64), step=0, first_row=0)
    assert loss.item() == pytest.approx(own[kept].mean(), rel=1e-5)
    loss.backward()
    touched = student.grad.reshape(10, 8).abs().sum(-1).nonzero().flatten().tolist()
    assert touched == sorted(kept)


# --- in training


@pytest.fixture
def teacher_run(tiny):
    return train.run(tiny("dense", "teacher", seed=5))


@pytest.fixture
def student(tiny, teacher_run):
    """student("ste", "run", …) -> a config that learns from the teacher's run."""

    def make(recipe="ste", run_dir="run", **changes):
        return tiny(recipe, run_dir, **{"recipe__teacher__models": [str(teacher_run)], **changes})

    return make


def known(values) -> list[float]:
    return [value for value in values if value is not None]


def column(run_dir, name) -> list[float | None]:
    return [float(row[name]) if row[name] else None for row in metrics(run_dir)]


def test_the_objective_is_the_formula(student, teacher_run, monkeypatch):
    """Of the first step, with a padded embedding and two micro-batches, from models loaded by hand."""
    objectives, batches = [], []
    backward, step = CausalLM.manual_backward, CausalLM.training_step

    def manual_backward(self, loss):
        objectives.append(loss.item())
        backward(self, loss)

    def training_step(self, batch, index):
        if not batches:
            batches.extend((batch, self.model.state_dict()))
            model = self.model.eval()
            with torch.no_grad():
                batches.append(model(batch[:, :-1]))
            model.train()
        step(self, batch, index)

    monkeypatch.setattr(CausalLM, "manual_backward", manual_backward)
    monkeypatch.setattr(CausalLM, "training_step", training_step)
    run_dir = train.run(student(model__vocab_size=384, trainer__micro_batch_size=4, recipe__teacher__weight=0.3))
    sequences, _, logits = batches
    with torch.no_grad():
        teacher = load_trained(str(teacher_run), CPU).model(sequences[:, :-1])
    p, q, everything = softmax(teacher, 2.0), softmax(logits[..., :320], 2.0), softmax(logits, 1.0)
    kl = (4 * (p * np.log(p / q)).sum(-1)).mean(-1)
    targets = sequences[:, 1:].numpy()
    task = -np.log(np.take_along_axis(everything, targets[..., None], -1))[..., 0].mean(-1)
    for objective, rows in zip(objectives[:2], (slice(0, 4), slice(4, 8)), strict=True):
        assert 2 * objective == pytest.approx((0.7 * task + 0.3 * kl)[rows].mean(), rel=1e-5)
    assert column(run_dir, "train/loss")[0] == pytest.approx(task.mean(), rel=1e-5)
    assert column(run_dir, "train/distillation_loss")[0] == pytest.approx(kl.mean(), rel=1e-5)


def test_a_student_comes_closer_to_its_teacher(student):
    run_dir = train.run(student(trainer__steps=60, trainer__eval_every=20, recipe__teacher__weight=1.0))
    losses = column(run_dir, "train/distillation_loss")
    assert losses[-1] < 0.3 * losses[0]
    rates = known(column(run_dir, "val/acceptance"))
    assert len(rates) == 3
    assert 0 < rates[0] < rates[-1] < 1


def test_a_sparse_teacher_teaches_sparse(tiny, tmp_path):
    """In the phase that its checkpoint was in."""
    sparse = train.run(tiny("ste", "sparse", seed=5))
    train.run(tiny("ste", "run", recipe__teacher__models=[str(sparse)]))
    folder = store.resolve(sparse, "teacher")
    teacher = load_teacher(folder, CPU, "teacher")
    assert sum(getattr(module, "is_sparse", False) for module in teacher.modules()) == 4
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    tokens = torch.arange(16)[None]
    assert torch.equal(teacher(tokens), load_trained(str(sparse), CPU).model(tokens))


def test_no_teacher_leaves_its_columns_empty(teacher_run):
    assert set(column(teacher_run, "train/distillation_loss")) == set(column(teacher_run, "val/acceptance")) == {None}


def test_the_teacher_is_no_part_of_the_student(student, tiny):
    """Its weights are not in the checkpoint, and a teacher of no weight changes nothing."""
    taught = train.run(student("fst", "taught", recipe__teacher__weight=0.0))
    alone = train.run(tiny("fst", "alone"))
    a, b = final_state(taught), final_state(alone)
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert_equal(a["state_dict"], b["state_dict"])
    assert column(taught, "train/loss") == column(alone, "train/loss")
    assert column(taught, "train/distillation_loss")[0] > 0


def own_teacher(tiny, run_dir="run", **changes):
    """Dense in steps 0-3, sparse from step 4 on; it teaches itself."""
    return tiny(
        "ste", run_dir,
        **{
            "recipe__teacher__models": ["self"], "recipe__schedule__dense_warmup": 1 / 3, "model__dropout": 0.1,
            "trainer__micro_batch_size": 4, "trainer__eval_every": 2, **changes,
        },
    )  # fmt: skip


def test_self_appears_with_the_first_sparse_step_and_stays(tiny):
    run_dir = train.run(own_teacher(tiny, trainer__checkpoint_every=1, trainer__checkpoints_kept=20))
    states = {step: store.load(store.checkpoint_folder(run_dir / runs.CHECKPOINTS, step)) for step in range(1, 13)}
    assert all(states[step]["teacher_copy"] is None for step in range(1, 4))
    for step in range(4, 13):
        for name, weight in states[step]["teacher_copy"].items():
            assert torch.equal(weight, states[4]["state_dict"][f"model.{name}"]), (step, name)
    assert not torch.equal(
        states[12]["state_dict"]["model.head.weight"], states[12]["teacher_copy"]["head.weight"]
    )  # which the student has left behind
    losses = column(run_dir, "train/distillation_loss")
    assert losses[:4] == [None] * 4
    assert all(loss > 0 for loss in losses[4:])
    rates = column(run_dir, "val/acceptance")
    assert rates[1] is None
    assert rates[3] is not None


def test_self_may_be_what_the_run_starts_from(tiny, teacher_run):
    """AST as published: sparse from the first step on, with the dense model it starts from as its teacher."""
    run_dir = train.run(tiny("ast", init_from=str(teacher_run), recipe__schedule__dense_warmup=0.0))
    dense = final_state(teacher_run)["state_dict"]
    for name, weight in final_state(run_dir)["teacher_copy"].items():
        assert torch.equal(weight, dense[f"model.{name}"]), name
    assert None not in column(run_dir, "train/distillation_loss")


def test_before_self_appears_the_loss_is_the_tasks(tiny):
    taught, alone = (
        train.run(own_teacher(tiny, "taught")),
        train.run(own_teacher(tiny, "alone", recipe__teacher__models=[])),
    )
    a, b = column(taught, "train/loss"), column(alone, "train/loss")
    assert a[:5] == b[:5]
    assert a[5] != b[5]


@pytest.mark.parametrize("stop", [3, 4, 5, 9])
def test_a_run_that_teaches_itself_resumes_bit_for_bit(tiny, tmp_path, stop):
    """Before the teacher appears, with the checkpoint in which it does, and after."""
    train.run(own_teacher(tiny, "whole"))
    train.run(own_teacher(tiny, "stopped", trainer__stop_after=stop))
    assert store.list_steps(tmp_path / "stopped" / runs.CHECKPOINTS)[-1] == stop
    train.run(own_teacher(tiny, "stopped"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert final_state(tmp_path / "whole")["teacher_copy"] is not None


@pytest.mark.parametrize("recipe", ["ast", "fst"])
def test_recipes_with_teachers_resume_bit_for_bit(student, teacher_run, tmp_path, recipe):
    """AST with itself and another run; FST with AdaSPEC."""
    changes = {"recipe__teacher__models": ["self", str(teacher_run)], "recipe__schedule__dense_warmup": 0.5}
    if recipe == "fst":
        changes = {"recipe__teacher__reference": str(teacher_run), "recipe__teacher__token_share": 0.4}
    train.run(student(recipe, "whole", **changes))
    train.run(student(recipe, "stopped", trainer__stop_after=7, **changes))
    train.run(student(recipe, "stopped", **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_resumed_run_keeps_the_teacher_it_began_with(student, tiny, teacher_run, tmp_path):
    """Though the teacher's run has gone on since; and it says when that teacher is no longer there."""
    changes = {"trainer__steps": 20, "trainer__checkpoints_kept": 1}
    on = tiny("dense", "on", seed=5, resume=str(teacher_run), **changes)
    going = train.run(tiny("dense", "on", seed=5, resume=str(teacher_run), trainer__stop_after=14, **changes))
    train.run(student(run_dir="whole", recipe__teacher__models=[str(going)]))
    train.run(student(run_dir="stopped", recipe__teacher__models=[str(going)], trainer__stop_after=6))
    kept = store.resolve(going, "teacher")
    shutil.copytree(kept, tmp_path / "kept")
    train.run(on)
    assert store.resolve(going, "teacher").name == "step-00000020"
    with pytest.raises(UserError, match=r"recipe.teacher.models: found .*step-00000014 \(no such folder\)"):
        train.run(student(run_dir="stopped", recipe__teacher__models=[str(going)]))
    shutil.copytree(tmp_path / "kept", kept)
    train.run(student(run_dir="stopped", recipe__teacher__models=[str(going)]))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_bf16_teaches_too(student):
    """Teacher and student round their products; the losses are still fp32."""
    rounded, exact = (
        column(train.run(student("ste", precision, trainer__precision=precision)), "train/distillation_loss")
        for precision in ("bf16", "fp32")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.slow
def test_two_ranks_learn_as_one(student, tmp_path, train_together):
    """Also where both write the teacher's logits."""
    train.run(student(run_dir="one", trainer__micro_batch_size=4))
    logits = {"recipe__teacher__logits": str(tmp_path / "logits"), "recipe__teacher__top_k": None}
    ways = {"two": {}, "kept": logits}
    options = {"trainer__micro_batch_size": 4, "trainer__devices": 2}
    train_together([student(run_dir=name, **options, **changes) for name, changes in ways.items()], 2)
    for name in ways:
        for key in ("train/loss", "train/distillation_loss", "val/acceptance"):
            one = known(column(tmp_path / "one", key))
            assert known(column(tmp_path / name, key)) == pytest.approx(one, rel=1e-4)


# --- logits on disk


@pytest.fixture
def keeping(student, tmp_path):
    """As `student`, with the teacher's logits kept in tmp_path/logits."""

    def make(recipe="ste", run_dir="run", **changes):
        return student(
            recipe,
            run_dir,
            **{"recipe__teacher__logits": str(tmp_path / "logits"), "recipe__teacher__top_k": 5, **changes},
        )

    return make


@pytest.mark.parametrize("top_k", [5, None])
def test_a_second_run_reads_the_logits(keeping, tmp_path, monkeypatch, top_k):
    changes = {"recipe__teacher__top_k": top_k, "trainer__micro_batch_size": 4}
    train.run(keeping("ste", "first", **changes))

    def never(*_):
        raise AssertionError("the teacher is asked")

    monkeypatch.setattr("sparse_pretrain.tasks.teacher.make_targets", never)
    train.run(keeping("ste", "second", **changes))
    assert_same_run(tmp_path / "first", tmp_path / "second")
    train.run(keeping("fst", "other", **changes))  # another student, of the same teacher
    train.run(
        keeping(
            "fst",
            "batches",
            **{**changes, "trainer__batch_size": 4, "trainer__steps": 24, "trainer__micro_batch_size": 1},
        )
    )
    with pytest.raises(AssertionError, match="the teacher is asked"):
        train.run(keeping("ste", "seed", seed=2, **changes))  # other sequences


def test_all_logits_give_what_the_teacher_itself_does(student, keeping):
    itself = train.run(student("ste", "itself"))
    kept = train.run(keeping("ste", "kept", recipe__teacher__top_k=None))
    assert metrics(kept) == metrics(itself)
    some = train.run(keeping("ste", "some", recipe__teacher__logits=str(kept / "five")))
    assert column(some, "train/distillation_loss")[0] < column(itself, "train/distillation_loss")[0]


def test_records_that_a_kill_or_a_disk_damaged_are_written_again(keeping, tmp_path):
    train.run(keeping("ste", "first"))
    path = tmp_path / "logits" / teacher_logits.RECORDS
    whole = path.read_bytes()
    size = teacher_logits.record_type(json.loads((tmp_path / "logits" / teacher_logits.MANIFEST).read_text())).itemsize
    last = (len(whole) - 1) // size * size
    there = next(start for start in range(0, len(whole), size) if any(whole[start : start + size]))
    damaged = bytearray(whole[: last + size // 2])  # the last record is cut short
    damaged[there + 7] ^= 1
    path.write_bytes(damaged)
    train.run(keeping("ste", "second"))
    assert_same_run(tmp_path / "first", tmp_path / "second")
    assert path.read_bytes() == whole


def test_stopped_in_between_it_goes_on_bit_for_bit(keeping, tmp_path):
    train.run(keeping("ste", "stopped", trainer__stop_after=6))
    train.run(keeping("ste", "whole"))
    train.run(keeping("ste", "stopped"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_sigkill_while_logits_are_written_never_changes_the_result(tmp_path, corpus):
    options = [
        "trainer.steps=300",
        "trainer.checkpoint_every=7",
        "trainer.eval_every=50",
        "trainer.log_every=3",
        "data.seq_len=16",
    ]
    teacher = start(tmp_path / "teacher", corpus, "recipe=dense")
    assert teacher.wait(timeout=120) == 0
    options += ["recipe=ste", f"recipe.teacher.models=[{tmp_path}/teacher]"]
    kills = 0
    for step in (20, 90, 180):
        process = start(tmp_path / "killed", corpus, *options, f"recipe.teacher.logits={tmp_path}/logits")
        wait_for_step(tmp_path / "killed", step, process)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    for name in ("killed", "whole"):
        process = start(tmp_path / name, corpus, *options, f"recipe.teacher.logits={tmp_path}/logits")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_first_to_write_a_record_is_right(tmp_path):
    """Two processes compute the same sequence; what is there is what both use, and it never changes."""
    settings = {"teachers": ["a"], "seq_len": 2, "vocab_size": 70_000, "top_k": 1}
    teacher_logits.prepare(tmp_path / "logits", settings, sequences=10)
    one, other = TeacherLogits(tmp_path / "logits"), TeacherLogits(tmp_path / "logits")
    ids = torch.tensor([[69_999], [3]])
    first = Targets(torch.tensor([[-0.1, -2.0], [-0.2, -3.0]]), ids)
    second = Targets(first.log_probs - 1, ids + 1 - 2 * (ids > 10))
    assert one.read([7]) == other.read([7]) == [None]
    one.add([7], first)
    records = other.add([7, 8], Targets(torch.cat((second.log_probs,) * 2), torch.cat((second.indices,) * 2)))
    for store_, numbers in ((one, [7, 8]), (other, [7, 8])):
        targets = store_.targets(store_.read(numbers), CPU)
        assert torch.equal(targets.log_probs, torch.cat((first.log_probs, second.log_probs)))
        assert torch.equal(targets.indices, torch.cat((first.indices, second.indices)))
    assert torch.equal(one.targets(records, CPU).log_probs, targets.log_probs)
    assert one.read([6, 9]) == [None, None]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("temperature", {"recipe__teacher__temperature": 1.0}),
        ("top_k", {"recipe__teacher__top_k": 6}),
        ("seq_len", {"data__seq_len": 8}),
        ("precision", {"trainer__precision": "bf16"}),
        ("corpus", {"data__validation_share": 0.2, "data__tokenizer": "the teacher's"}),
    ],
)
def test_logits_of_something_else_are_refused(keeping, teacher_run, key, changes):
    train.run(keeping("ste", "first"))
    if "data__tokenizer" in changes:
        changes = {**changes, "data__tokenizer": str(teacher_run / runs.TOKENIZER_FILE)}
    with pytest.raises(
        UserError, match=rf"recipe.teacher.logits: found .*logits, which holds logits of another {key}: .*; allowed: "
    ):
        train.run(keeping("ste", "second", **changes))


def test_logits_of_another_teacher_are_refused(keeping, tiny):
    train.run(keeping("ste", "first"))
    other = train.run(tiny("dense", "other", seed=6))
    with pytest.raises(UserError, match="which holds logits of another teachers: "):
        train.run(keeping("ste", "second", recipe__teacher__models=[str(other)]))


def test_logits_need_room(keeping, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(teacher_logits.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="recipe.teacher.logits: found 0.00 GB free"):
        train.run(keeping("ste", "first"))


def test_logits_that_cannot_be_written(keeping, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="recipe.teacher.logits: .* cannot be used"):
        train.run(keeping("ste", recipe__teacher__logits=str(tmp_path / "file" / "logits")))


# --- errors


@pytest.mark.parametrize(
    ("recipe", "changes", "expected"),
    [
        ("ste", {"reference": "x", "token_share": 0.4}, "recipe.teacher.models: found none, with recipe.teacher.reference set"),
        ("ste", {"logits": "x"}, "recipe.teacher.models: found none, with recipe.teacher.logits set"),
        ("ste", {"weight": 1.0}, "recipe.teacher.models: found none, with recipe.teacher.weight set"),
        ("ste", {"models": ["x"], "token_share": 0.4}, "recipe.teacher.reference: found null with recipe.teacher.token_share=0.4"),
        ("ste", {"models": ["x"], "reference": "y"}, "recipe.teacher.token_share: found 1 with a recipe.teacher.reference"),
        ("ste", {"models": ["x"], "reference": "self", "token_share": 0.4}, "recipe.teacher.reference: found self"),
        ("ast", {"models": ["self", "x"], "logits": "y"}, "recipe.teacher.logits: found set for the teacher self"),
        ("dense", {"models": ["self"]}, "recipe.teacher.models: found self, for a recipe that never becomes sparse"),
        ("ste", {"models": ["self"]}, "recipe.teacher.models: found self, for a run that is sparse from its first step on"),
    ],
    ids=str,
)  # fmt: skip
def test_combinations_that_cannot_work(tiny, recipe, changes, expected):
    cfg = tiny(recipe, **{f"recipe__teacher__{name}": value for name, value in changes.items()})
    with pytest.raises(UserError) as error:
        crosscheck.check(cfg)
    assert expected in str(error.value)


def test_teachers_that_do_not_fit(student, tiny, teacher_run, tmp_path):
    def refuses(expected, **changes):
        with pytest.raises(UserError, match=expected):
            train.run(student(run_dir="refused", **changes))
        assert not (tmp_path / "refused").exists()

    refuses(
        "recipe.teacher.models: found /nowhere, which holds no whole checkpoint", recipe__teacher__models=["/nowhere"]
    )
    refuses(
        "recipe.teacher.reference: found /nowhere",
        recipe__teacher__reference="/nowhere",
        recipe__teacher__token_share=0.4,
    )
    fix = f"allowed: data.tokenizer={teacher_run}/tokenizer.json, which is the teacher's"
    refuses(f"data.tokenizer: found another tokenizer than that of {teacher_run}.*; {fix}", data__vocab_size=300)
    other = train.run(tiny("dense", "other", data__vocab_size=300))
    refuses(
        f"data.tokenizer: .*; {fix}", data__tokenizer=str(other / runs.TOKENIZER_FILE), data__train=["/nowhere.txt"]
    )
    short = train.run(tiny("dense", "short", model__max_seq_len=8, data__seq_len=8))
    refuses(f"data.seq_len: found 16, but {short} is made for 8", recipe__teacher__models=[str(short)])
    newest = store.resolve(teacher_run, "teacher")
    (newest / "__0_0.distcp").write_bytes(b"")
    refuses("recipe.teacher.models: .*a wrong|of 0 bytes", recipe__teacher__models=[str(newest)])
    train.run(student("ste", "fits", data__vocab_size=300, data__tokenizer=str(teacher_run / runs.TOKENIZER_FILE)))


# --- Hugging Face


@pytest.fixture
def hugging_face(teacher_run, tmp_path):
    """A folder with a GPT-2 of a few thousand random weights and the teacher's tokenizer, written another way."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face teachers need the [hf] extra")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=384, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    folder = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer = json.loads((teacher_run / runs.TOKENIZER_FILE).read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=8))
    return folder


def test_a_hugging_face_model_teaches(student, hugging_face, teacher_run):
    from transformers import GPT2LMHeadModel

    found = find_teacher(str(hugging_face), "teacher")
    assert found.hugging_face
    teacher = load_teacher(found.folder, CPU, "teacher")
    tokens = torch.arange(16)[None]
    expected = GPT2LMHeadModel.from_pretrained(hugging_face)(tokens).logits
    torch.testing.assert_close(teacher(tokens), expected)
    run_dir = train.run(student(recipe__teacher__models=[str(hugging_face), str(teacher_run)]))
    assert column(run_dir, "train/distillation_loss")[0] > 0
    facts = runs.read_json(run_dir / runs.RUN_FILE)["teachers"]
    assert facts[str(hugging_face)] == {"folder": str(hugging_face), "sha256": found.sha256}


def test_hugging_face_folders_that_do_not_fit(student, hugging_face, monkeypatch):
    def refuses(expected, **changes):
        with pytest.raises(UserError, match=expected):
            train.run(student(**{"recipe__teacher__models": [str(hugging_face)], **changes}))

    refuses("data.tokenizer: found another tokenizer than that of .*gpt2", data__vocab_size=300)
    config = json.loads((hugging_face / "config.json").read_text())
    (hugging_face / "config.json").write_text(json.dumps(config | {"n_positions": 8}))
    refuses("data.seq_len: found 16, but .*gpt2 is made for 8")
    (hugging_face / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    refuses("recipe.teacher.models: found .*gpt2, whose tokenizer has ids up to 319 and its model 300 rows")
    (hugging_face / "config.json").write_text(
        json.dumps(config | {"model_type": "of my own", "auto_map": {"AutoModelForCausalLM": "own.Model"}})
    )
    refuses("recipe.teacher.models: found .*gpt2 .*; allowed: a causal language model that transformers has")
    (hugging_face / "model.safetensors").rename(hugging_face / "pytorch_model.bin")
    refuses(r"recipe.teacher.models: found .*gpt2 without \*.safetensors")


def test_without_transformers_a_hugging_face_folder_is_told(student, tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else find_spec(name))
    with pytest.raises(UserError, match=r"transformers is not installed; .* pip install 'sparse-pretrain\[hf\]'"):
        train.run(student(recipe__teacher__models=[str(tmp_path / "gpt2")]))
