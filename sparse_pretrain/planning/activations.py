"""What a forward pass keeps for the backward pass: counted on fake tensors, which have shapes and no memory."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_models import TransformerConfig
from sparse_pretrain.tasks.build import build_model, task_class
from sparse_pretrain.tasks.sharding import blocks_of
from sparse_pretrain.tasks.task import Sizes

RULE = (
    "activations: every tensor that autograd keeps in one forward pass of a micro-batch, each memory once, as PyTorch "
    "runs the model without torch.compile; attention keeps queries, keys, values, output and a number per query (flash "
    "attention); with activation checkpointing the inputs of the blocks, and all of one block"
)


@dataclass(frozen=True)
class Kept:
    """Bytes: `copies` whatever the number of examples (weights in the dtype of products), `example` for each."""

    copies: float
    example: float

    def of(self, examples: int) -> float:
        return self.copies + self.example * examples


@dataclass(frozen=True)
class Activations:
    """What is kept without activation checkpointing, with it (the same where a model has none), and the logits of one
    example."""

    plain: Kept
    checkpointed: Kept
    logits: int

    def kept(self, checkpointing: bool) -> Kept:
        return self.checkpointed if checkpointing else self.plain


def count_activations(cfg: TrainConfig, sizes: Sizes, dtype: torch.dtype) -> Activations:
    """Of the dense model; a sparse layer keeps the same, but no copy of its weight (`copies`). Of FFNs that devices
    compute together what one of them keeps: as of FFNs of a part of their width.

    Passes of one and two examples tell what grows with them.
    """
    if isinstance(cfg.model, TransformerConfig):
        width = cfg.model.ffn_width // cfg.trainer.tensor_parallel
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, d_ff=width))
    plain, block, logits = _kept(_with_checkpointing(cfg, False), sizes, dtype)
    if not isinstance(cfg.model, TransformerConfig):
        return Activations(plain, plain, logits)
    inputs, _, _ = _kept(_with_checkpointing(cfg, True), sizes, dtype)
    return Activations(plain, Kept(inputs.copies + block.copies, inputs.example + block.example), logits)


def _with_checkpointing(cfg: TrainConfig, on: bool) -> TrainConfig:
    if not isinstance(cfg.model, TransformerConfig):
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, activation_checkpointing=on))


def _kept(cfg: TrainConfig, sizes: Sizes, dtype: torch.dtype) -> tuple[Kept, Kept, int]:
    """All of it, that of the block that keeps most, and the logits of one example."""
    with torch.device("meta"):
        model = build_model(cfg, sizes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        example = task_class(cfg).example(cfg)
        counts = [_one_pass(model, tuple(torch.cat([x] * n) for x in example), dtype) for n in (1, 2)]
    (all1, block1, logits), (all2, block2, _) = counts
    return _line(all1, all2), _line(block1, block2), logits


def _line(one: int, two: int) -> Kept:
    return Kept(copies=2 * one - two, example=two - one)


def _one_pass(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[int, int, int]:
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no memory is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    before: list[int] = []
    blocks: list[int] = []

    def enter(_: nn.Module, args: Any) -> None:
        before.append(sum(kept.values()))

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        blocks.append(sum(kept.values()) - before.pop())

    hooks = [block.register_forward_pre_hook(enter) for block in blocks_of(model)]
    hooks += [block.register_forward_hook(leave) for block in blocks_of(model)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _autocast(dtype):
        output = model(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(kept.values()), max(blocks, default=0), output.numel() if isinstance(output, Tensor) else 0


def _autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
