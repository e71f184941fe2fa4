"""Gradients of pruned weights that are not sent: the run is the same, and sends less."""

import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from sparse_pretrain import launch, train, worker
from sparse_pretrain.sparsity.schedule import SPARSE
from sparse_pretrain.tasks.task import Task
from tests.planning.measure_ranks import Sent
from tests.ranks import run_ranks
from tests.tasks.test_recipe_runs import METRIC, SLOPE
from tests.tasks.test_training import assert_same_run, final_state, metrics, phases

pytestmark = pytest.mark.slow

# dense 0-1, sparse 2-8, dense 9-11; of `slope` with lazy adapters and two micro-batches, of Wanda with masks that change
RUNS = {
    "slope": ("slope", phases(**{**SLOPE, "trainer__micro_batch_size": 1}), 2 / 4),
    "wanda": (
        "ste",
        {**METRIC, **phases(recipe__weight_gradient="masked", recipe__pattern="1:4", trainer__micro_batch_size=2)},
        3 / 4,
    ),
}


def train_measured(folders: list[Path]) -> None:
    """A rank's runs; what each of their steps sent goes to sent.json. Those whose name ends with `plain` are
    without the hook."""
    step, masked = Task.training_step, worker.MaskedDDPStrategy
    for folder in folders:
        sent = []

        def measured_step(module, batch, index, sent=sent):
            with Sent() as one:
                step(module, batch, index)
            sent.append(one.bytes["all_reduce"])

        Task.training_step = measured_step
        plain = folder.name.endswith("plain")
        worker.MaskedDDPStrategy = (lambda training, **options: DDPStrategy(**options)) if plain else masked
        worker.run(folder)
        if os.environ["RANK"] == "0":
            (folder / "sent.json").write_text(json.dumps(sent))


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_run_is_the_same_and_sends_less(tiny, tmp_path, monkeypatch, ranks):
    """Bit for bit with two ranks. With four, sums are in the order in which a ring meets an element, which depends on
    its place in the message."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", lambda cfg, run_dir: None)
        for name, (recipe, changes, _) in RUNS.items():
            for way in ("masked", "plain"):
                train.run(tiny(recipe, f"{name}-{way}", **{**changes, "trainer__devices": ranks}))
    run_ranks(ranks, train_measured, [tmp_path / f"{name}-{way}" for name in RUNS for way in ("masked", "plain")])

    for name, (_, _, pruned) in RUNS.items():
        masked, plain = tmp_path / f"{name}-masked", tmp_path / f"{name}-plain"
        if ranks == 2:
            assert_same_run(masked, plain)
        one, other = final_state(masked)["state_dict"], final_state(plain)["state_dict"]
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key])
        for a, b in zip(metrics(masked), metrics(plain), strict=True):
            assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-6)
        weights = sum(tensor.numel() for key, tensor in one.items() if key.endswith(".mask"))
        saved = 2 * (ranks - 1) / ranks * 4 * pruned * weights
        bytes_of = [json.loads((folder / "sent.json").read_text()) for folder in (masked, plain)]
        assert [row["phase"] for row in metrics(masked)].count(SPARSE) == 7
        for row, less, all_of_it in zip(metrics(masked), *bytes_of, strict=True):
            assert all_of_it - less == pytest.approx(saved if row["phase"] == SPARSE else 0), (name, row["step"])
            assert less > 0
    assert any(float(row["sparsity/flip_rate"] or 0) for row in metrics(tmp_path / "wanda-masked"))
