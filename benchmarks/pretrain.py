"""A short real pre-training: dense and each recipe on the same data, in turns; loss by tokens and by time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bench import Bench, Case, first_line
from benchmarks.layers import autocast, make_sparse, plans_of, recipes
from benchmarks.rows import FAILED, OK, Row
from benchmarks.shapes import Model
from sparse_pretrain.config import SchedulerConfig
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.evaluation.perplexity import token_losses
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.optim.adamw import AdamW, parameter_groups
from sparse_pretrain.optim.schedules import lr_share
from sparse_pretrain.sparsity import SparseTraining, load_recipe

PART = "pretrain"
# Wide and shallow: much of its time is in the products that a recipe makes sparse, as in a large model.
WIDE = Model("gpt, 6 layers, d=2048", 2048, 8192, 6, 16, vocab_size=8192, seq_len=1024)
SMALL = Model("gpt, 2 layers, d=64", 64, 256, 2, 2, vocab_size=512, seq_len=64)
TURN = 10  # steps of each arm before the next one's
VALIDATIONS = 8
MARGIN = 0.85  # of the time that is left is planned for


def cases(device: torch.device, rehearse: bool) -> list[Case]:
    if device.type == "cuda":
        return [Case(PART, "stdlib", partial(_run, WIDE, 16), 60)]
    return [Case(PART, "stdlib", partial(_run, SMALL, 2 if rehearse else 16), 5 if rehearse else 60)]


@dataclass
class Curve:
    """What one recipe did. tokens, seconds, loss: after each step; validation: (step, loss)."""

    recipe: str
    products: str = "dense"
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    note: str = ""


class _Run:
    """One recipe's training, a turn at a time."""

    def __init__(self, bench: Bench, model: Model, batch: int, recipe: str, sequences: Callable[[int], Tensor]) -> None:
        self.bench, self.sequences = bench, sequences
        self.curve = Curve(recipe)
        torch.manual_seed(1)
        with torch.device(bench.device):
            self.model = GPT(model.config(), model.vocab_size)
        self.tokens = batch * model.seq_len
        self.training: SparseTraining | None = None
        if recipe != "dense":
            self.training = make_sparse(bench, self.model, recipe, self.tokens)
            self.curve.products = plans_of(self.model)
        self.lr = 3e-4
        groups = parameter_groups(self.model, 0.1, lr=self.lr)
        settings: dict[str, Any] = {"lr": self.lr, "betas": (0.9, 0.95), "eps": 1e-8}
        self.optimizer: torch.optim.Optimizer
        if self.training is None:
            self.optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        else:
            self.optimizer = AdamW(groups, decay=self.training.decay, **settings)
        if bench.device.type == "cuda":
            for block in self.model.blocks:
                block.compile()

    def warm_up(self) -> float:
        """Compile and allocate without training, for the dense phase of a recipe too: seconds of a step."""
        layers = self.training.layers.values() if self.training else []
        if self.training and self.training.recipe.schedule.dense_finetune:
            for layer in layers:
                layer.go_dense()
            self._gradients(0)
        for layer in layers:
            layer.project()
        for _ in range(2):
            begin = time.perf_counter()
            self._gradients(0)
            self.optimizer.zero_grad(set_to_none=True)
            self.bench.synchronize()
        return time.perf_counter() - begin

    def begin(self, steps: int) -> None:
        """Now that the number of steps is known, phases are."""
        self.steps = steps
        self.scheduler = SchedulerConfig(warmup_steps=max(1, steps // 20))
        if self.training:
            recipe = load_recipe(self.curve.recipe)
            self.training = SparseTraining(self.model, recipe, steps, seed=1)
            assert isinstance(self.optimizer, AdamW)
            self.optimizer.decay = self.training.decay
            self.training.prepare(0)

    def turn(self, steps: range) -> None:
        losses = []
        self.bench.synchronize()
        begin = time.perf_counter()
        for step in steps:
            losses.append(self._gradients(step))
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * lr_share(step, self.steps, self.scheduler)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.training:
                self.training.prepare(step + 1)
        self.bench.synchronize()
        each = (time.perf_counter() - begin) / len(steps)
        for loss in losses:
            self.curve.loss.append(loss.item())
            self.curve.tokens.append(len(self.curve.loss) * self.tokens)
            self.curve.seconds.append((self.curve.seconds[-1] if self.curve.seconds else 0.0) + each)

    def _gradients(self, step: int) -> Tensor:
        with autocast(self.bench):
            loss = token_losses(self.model, self.sequences(step)).mean()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def validate(self, batches: list[Tensor]) -> None:
        with autocast(self.bench):
            losses = [token_losses(self.model, batch).mean().item() for batch in batches]
        self.curve.validation.append((len(self.curve.loss), sum(losses) / len(losses)))


def _run(model: Model, batch: int, bench: Bench) -> None:
    with TemporaryDirectory() as cache:
        train, validation = _tokens(model, cache, bench)
    length = model.seq_len + 1
    order = np.random.default_rng(1).permutation(len(train) // length)
    resident = torch.from_numpy(train.astype(np.int32)).to(bench.device)

    def sequences(step: int) -> Tensor:
        rows = order[np.arange(step * batch, (step + 1) * batch) % len(order)]
        index = torch.from_numpy(rows * length).to(bench.device)[:, None] + torch.arange(length, device=bench.device)
        return resident[index].long()

    count = min(4 * batch, len(validation) // length)
    held_out = torch.from_numpy(validation[: count * length].astype(np.int64)).to(bench.device).view(-1, length)
    batches = list(held_out.split(batch))
    names = ["dense", *recipes()]
    runs, step_seconds = [], 0.0
    for name in names:
        bench.at(f"building {name}")
        try:
            run = _Run(bench, model, batch, name, sequences)
            step_seconds += run.warm_up()
            runs.append(run)
        except Exception as error:
            bench.still_there()
            note = f"{type(error).__name__}: {first_line(error)}"
            bench.emit(Row(PART, name, name, name != "dense", FAILED, note))
    left = max(0.0, bench.end - time.time()) * MARGIN
    steps = 2 * TURN if bench.rehearse else max(2 * TURN, int(left / max(step_seconds, 1e-6) / 1.1) // TURN * TURN)
    steps = min(steps, 4 * len(order) // batch)  # no more than four times through the data
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    setting = (
        f"{model.name}, {parameters / 1e6:.1f} M parameters, {batch * model.seq_len} tokens a step, {steps} steps, "
        f"text of Python's standard library ({len(train) / 1e6:.1f} M tokens)"
    )
    for run in runs:
        run.begin(steps)
    for first in range(0, steps, TURN):
        for run in list(runs):
            bench.at(f"training {run.curve.recipe}, step {first}")
            run.turn(range(first, min(first + TURN, steps)))
            if first % max(TURN, steps // VALIDATIONS // TURN * TURN) == 0 or first + TURN >= steps:
                run.validate(batches)
        bench.keep("pretraining", {"setting": setting, "runs": [run.curve.__dict__ for run in runs]})
        if time.time() > bench.end:
            break
    for run in runs:
        finite = bool(np.isfinite(run.curve.loss).all())
        row = Row(
            PART, "stdlib", run.curve.recipe, run.curve.recipe != "dense", OK if finite else FAILED,
            "" if finite else "the loss is not finite",
            ms=1e3 * run.curve.seconds[-1] / len(run.curve.seconds),
            extra={"loss": run.curve.loss[-1], "tokens": run.tokens, "steps": len(run.curve.loss)},
        )  # fmt: skip
        bench.emit(row)


def _tokens(model: Model, cache: str, bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """The standard library's text as token ids, in memory."""
    from sparse_pretrain.data.token_store import prepare

    previous = os.environ.get("SPARSE_PRETRAIN_CACHE")
    os.environ["SPARSE_PRETRAIN_CACHE"] = cache if not bench.rehearse else previous or cache
    cfg = TextConfig(
        name="stdlib", source="stdlib", vocab_size=model.vocab_size, seq_len=model.seq_len,
        max_documents=None,
    )  # fmt: skip
    try:
        store = prepare(cfg)
        return np.array(store.split("train")), np.array(store.split("validation"))
    finally:
        del os.environ["SPARSE_PRETRAIN_CACHE"]
        if previous is not None:
            os.environ["SPARSE_PRETRAIN_CACHE"] = previous
