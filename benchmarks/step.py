"""Whole training steps: forward, backward, clipping, AdamW, masks and packing; tokens per second and peak memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sparse24.dispatch import Plan
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.bench import Arm, Bench, Case, free, relative_error
from benchmarks.layers import autocast, held_gb, make_sparse, memory, plans_of, recipes, refresh_ms
from benchmarks.shapes import Model
from benchmarks.timing import Call
from sparse_pretrain.evaluation.perplexity import token_losses
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.optim.adamw import AdamW, parameter_groups
from sparse_pretrain.sparsity import SparseLinear, SparseTraining

PART = "step"
# gradients at the far end of a deep model, through products that round differently
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.05, torch.float32: 1e-2}
BYTES_A_WEIGHT = 20  # weight, gradient and two moments in fp32; masks and the products' copies
MEMORY_SHARE = 0.8  # of the device, that arms may hold together


def cases(device: torch.device, rehearse: bool) -> list[Case]:
    if rehearse:
        return [_case(shapes.TINY, shapes.TINY_TOKENS), _case(shapes.TINY_GATED, shapes.TINY_TOKENS)]
    if device.type != "cuda":
        return [_case(shapes.CPU_10M, shapes.CPU_TOKENS, 60), _case(shapes.CPU_30M, shapes.CPU_TOKENS, 150)]
    return [
        _case(shapes.LLAMA_7B, shapes.TOKENS, 45, n_layer=4),  # as many layers as fit beside a dense copy, with room
        _case(shapes.GPT2_1558M, shapes.TOKENS, 60),
        _case(shapes.GPT2_124M, shapes.TOKENS, 40),
        _case(shapes.LLAMA_1B, shapes.TOKENS, 45),
        _case(shapes.GPT2_774M, shapes.TOKENS, 50),
    ]


def _case(model: Model, tokens: int, seconds: float = 5, n_layer: int | None = None) -> Case:
    layers = f"{n_layer} of {model.n_layer} layers" if n_layer else f"{model.n_layer} layers"
    name = f"{model.name}, {layers}, {tokens} tokens"
    return Case(PART, name, partial(_run, model, tokens, n_layer, name), seconds)


class Trainee:
    """A model in training under a recipe. Calling it is one step; before `compile` it may be checked."""

    def __init__(self, bench: Bench, model: Model, n_layer: int | None, recipe: str, tokens: int, vocab: int) -> None:
        self.bench, self.steps = bench, 0
        torch.manual_seed(0)
        with torch.device(bench.device):
            self.model = GPT(model.config(n_layer), vocab)
        self.training: SparseTraining | None = None
        if recipe != "dense":
            self.training = make_sparse(bench, self.model, recipe, tokens)
        groups = parameter_groups(self.model, 0.1, lr=1e-4)
        settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
        self.optimizer: torch.optim.Optimizer
        if self.training is None:
            self.optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        else:
            self.optimizer = AdamW(groups, decay=self.training.decay, **settings)

    def loss(self, sequences: Tensor) -> Tensor:
        with autocast(self.bench):
            return token_losses(self.model, sequences).mean()

    def step(self, sequences: Tensor) -> Tensor:
        """One optimizer step, without a refresh of the masks; returns the loss."""
        loss = self.loss(sequences)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.training:
            self.training.prepare(self.steps, refresh=False)
        return loss.detach()

    def compile(self) -> None:
        for block in self.model.blocks:
            block.compile()

    def error(self, sequences: Tensor) -> float:
        """How far loss and the first block's gradient are from those with dense products on the same masks."""
        layers = [m for m in self.model.modules() if isinstance(m, SparseLinear)]
        plans = [layer.plan for layer in layers]
        if all(plan == Plan() for plan in plans):
            return 0.0
        result = self._gradient(sequences)
        for layer in layers:
            layer.plan = Plan()
            layer.project()
        expected = self._gradient(sequences)
        for layer, plan in zip(layers, plans, strict=True):
            layer.plan = plan
            layer.project()
        return max(relative_error(a, b) for a, b in zip(result, expected, strict=True))

    def _gradient(self, sequences: Tensor) -> list[Tensor]:
        loss = self.loss(sequences)
        loss.backward()
        gradient = self.model.get_parameter("blocks.0.attn.qkv.weight").grad
        assert gradient is not None
        self.optimizer.zero_grad(set_to_none=True)
        return [loss.detach().reshape(1), gradient]


def _run(model: Model, tokens: int, n_layer: int | None, case: str, bench: Bench) -> None:
    batch = max(1, tokens // model.seq_len)
    data = torch.randint(model.vocab_size, (batch, model.seq_len + 1), generator=bench.generator(), device=bench.device)
    names = [*recipes(), "sr_ste"]
    with torch.device("meta"):
        weights = sum(p.numel() for p in GPT(model.config(n_layer), model.vocab_size).parameters())
    together = _fit_together(bench, weights)
    for first in range(0, len(names), together):
        group = names[first : first + together]
        suffix = "" if len(names) <= together else f": {', '.join(group)}"
        arms = [_arm(bench, model, n_layer, recipe, tokens, data) for recipe in ("dense", *group)]
        bench.compare(PART, case + suffix, arms, "dense", graph=False)
        free(bench.device)


def _fit_together(bench: Bench, weights: int) -> int:
    """How many recipes fit into memory beside dense, with the activations of one."""
    if bench.device.type != "cuda":
        return 4
    total = torch.cuda.get_device_properties(bench.device).total_memory
    return max(1, int(MEMORY_SHARE * total / 2 / (BYTES_A_WEIGHT * weights)) - 1)


def _arm(bench: Bench, model: Model, n_layer: int | None, recipe: str, tokens: int, data: Tensor) -> Arm:
    """Under torch.compile, block by block, on a GPU: dense as well as sparse."""

    def make() -> Call:
        before = held_gb(bench)
        trainee = Trainee(bench, model, n_layer, recipe, tokens, model.vocab_size)
        errors.append(trainee.error(data))
        if trainee.training:
            made.added_ms = refresh_ms(bench, trainee.training)
            made.extra |= {"products": plans_of(trainee.model), "refresh_ms": made.added_ms}
        made.extra["parameters"] = sum(p.numel() for p in trainee.model.parameters())
        if bench.device.type == "cuda":
            trainee.compile()
        trainee.step(data)  # allocates the optimizer's moments
        made.extra["held_gb"] = held_gb(bench) - before
        return lambda _: trainee.step(data)

    def check(call: Call) -> float:
        with memory(bench, made.extra):
            loss: Tensor = call(0)
        return errors[0] if loss.isfinite().item() else float("nan")

    errors: list[float] = []
    made = Arm(recipe, make, check, TOLERANCE[bench.dtype], ours=recipe != "dense")
    made.extra["tokens"] = data[:, 1:].numel()
    return made
