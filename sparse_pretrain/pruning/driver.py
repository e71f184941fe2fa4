"""Prunes a model block by block: each with the inputs that the already pruned ones before it give it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.pruning.blocks import Forward, Stack, find_blocks, find_stacks, record
from sparse_pretrain.pruning.layers import gathering, is_prunable, matrix, obstacle, set_matrix
from sparse_pretrain.pruning.oats import oats
from sparse_pretrain.pruning.patterns import Pattern
from sparse_pretrain.pruning.sparsegpt import sparsegpt
from sparse_pretrain.pruning.wanda import magnitude, wanda


@dataclass(frozen=True)
class Method:
    """How to prune. name: `magnitude`, `wanda`, `sparsegpt` or `oats`; the rest is of OATS alone, as in `oats`."""

    name: str
    pattern: Pattern
    rank_ratio: float = 0.25
    iterations: int = 80
    seed: int | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer. sparsity: share of its weights that are zero; error: ‖X(W − Ŵ)ᵀ‖ / ‖X Wᵀ‖ over the calibration tokens,
    with the low-rank part in Ŵ; seconds: for this layer alone; skipped: why it stays as it was."""

    name: str
    out_features: int
    in_features: int
    sparsity: float = 0.0
    error: float = 0.0
    rank: int = 0
    seconds: float = 0.0
    skipped: str = ""


@dataclass(frozen=True)
class PrunedLayer:
    """weight: (out_features, in_features) with zeros, in the dtype of the layer's, None where it was skipped; left
    (out_features, rank) and right (rank, in_features), fp32: what OATS adds to it."""

    report: LayerReport
    weight: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


def select_layers(
    model: nn.Module, method: Method, include: Sequence[str] | None, exclude: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The layers to prune: block -> layer -> why it is skipped after all, or nothing.

    Args:
        include: shell-style patterns over whole layer names; None = all layers in the blocks of the model.
        exclude: patterns of layers to leave as they are.

    Raises:
        UserError: a pattern matches no layer, a layer named without wildcard cannot be pruned, or none is left.
    """
    blocks = {
        block: {
            ".".join(filter(None, (block, part))): layer
            for part, layer in model.get_submodule(block).named_modules()
            if is_prunable(layer)
        }
        for block in find_blocks(model)
    }
    names = [name for layers in blocks.values() for name in layers]
    shown = f"Layers in blocks: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
    for option, patterns in (("include", include or []), ("exclude", exclude)):
        for text in patterns:
            if not any(fnmatchcase(name, text) for name in names):
                raise UserError(option, f"{text}, which matches no layer in a block", "patterns of layer names", shown)
    group = method.pattern[1] if isinstance(method.pattern, tuple) else 1
    chosen: dict[str, dict[str, str]] = {}
    for block, layers in blocks.items():
        for name, layer in layers.items():
            included = include is None or any(fnmatchcase(name, text) for text in include)
            if not included or any(fnmatchcase(name, text) for text in exclude):
                continue
            reason = obstacle(layer, group, low_rank=method.name == "oats")
            if reason and include is not None and name in include:
                raise UserError("include", f"{name}: {reason}", "layers that can be pruned so")
            chosen.setdefault(block, {})[name] = reason
    reasons = [reason for layers in chosen.values() for reason in layers.values()]
    if all(reasons):
        found = f"no layer that can be pruned{f': {reasons[0]}' if reasons else ''}"
        raise UserError("include", found, "at least one", shown)
    return chosen


@torch.no_grad()
def prune_blocks(
    model: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    layers: Mapping[str, Mapping[str, str]],
    method: Method,
    finished: Callable[[str], dict[str, PrunedLayer] | None] = lambda block: None,
    progress: Callable[[LayerReport], None] = lambda report: None,
) -> Iterator[tuple[str, dict[str, PrunedLayer]]]:
    """Prune the layers of `model` in place, one block after another; yields each block's name and layers as they are
    done. At the end every layer has its sparse weight; the low-rank parts are in what was yielded alone.

    Within a block all layers are pruned with the inputs that they have before any of them is, as the published
    implementations do.

    Args:
        forward: runs the model on one of `batches`, without gradients and caches.
        batches: the calibration data.
        layers: as `select_layers` gives them.
        finished: the layers of a block as they came out before, if they did: it is not pruned again then.
        progress: called for each layer that has been pruned.

    Raises:
        UserError: a layer has weights or inputs that are not finite.
    """
    training = model.training
    model.eval()
    sparse: dict[str, Tensor] = {}  # of layers that compute with a low-rank part meanwhile
    stacks = find_stacks(model, forward, batches[0], find_blocks(model))
    for plan in stacks:
        if not any(block in layers for block in plan.names):
            continue
        stack = record(model, forward, batches, plan)
        for number, block in enumerate(plan.names):
            if block in layers:
                pruned = finished(block)
                if pruned is None:
                    pruned = _prune_block(model, stack, number, layers[block], method, progress)
                for name, layer in pruned.items():
                    _set(model.get_submodule(name), layer)
                    if layer.weight is not None and layer.left is not None:
                        sparse[name] = layer.weight
                yield block, pruned
            if number + 1 < len(plan.names):
                stack.advance(number)
    run = {block for plan in stacks for block in plan.names}
    for block in [block for block in layers if block not in run]:
        reasons = {name: reason or "the model never runs it" for name, reason in layers[block].items()}
        yield block, {name: _skipped(name, model, reason) for name, reason in reasons.items()}
    for name, weight in sparse.items():
        set_matrix(model.get_submodule(name), weight)
    model.train(training)


def _prune_block(
    model: nn.Module,
    stack: Stack,
    number: int,
    layers: Mapping[str, str],
    method: Method,
    progress: Callable[[LayerReport], None],
) -> dict[str, PrunedLayer]:
    with gathering({name: model.get_submodule(name) for name, reason in layers.items() if not reason}) as grams:
        for _ in stack.run(number):
            pass
    pruned = {}
    for name, reason in layers.items():
        gram = grams.pop(name, None)
        if gram is None:
            pruned[name] = _skipped(name, model, reason or "it was never called with a calibration token")
        else:
            pruned[name] = _prune(name, model.get_submodule(name), gram, method)
        progress(pruned[name].report)
    return pruned


def _skipped(name: str, model: nn.Module, reason: str) -> PrunedLayer:
    out_features, in_features = matrix(model.get_submodule(name)).shape
    return PrunedLayer(LayerReport(name, out_features, in_features, skipped=reason))


def _prune(name: str, layer: nn.Module, gram: Tensor, method: Method) -> PrunedLayer:
    weight = matrix(layer).float()
    for what, tensor in (("weights", weight), ("calibration inputs", gram)):
        if not tensor.isfinite().all():
            raise UserError(name, f"{what} that are not finite", "a model whose activations are, in this precision")
    start = time.perf_counter()
    left = right = None
    squares = gram.diagonal()
    if method.name == "magnitude":
        result = magnitude(weight, method.pattern)
    elif method.name == "wanda":
        result = wanda(weight, squares, method.pattern)
    elif method.name == "sparsegpt":
        result = sparsegpt(weight, gram, method.pattern)
    else:
        result, left, right = oats(weight, squares, method.pattern, method.rank_ratio, method.iterations, method.seed)
    if weight.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    result = result.to(matrix(layer).dtype)
    difference = weight - (result if left is None or right is None else result + left @ right)
    error, size = (((product @ gram) * product).sum(dtype=torch.float64) for product in (difference, weight))
    report = LayerReport(
        name,
        weight.shape[0],
        weight.shape[1],
        sparsity=float((result == 0).double().mean()),
        error=float((error.clamp(min=0) / size).sqrt()) if size > 0 else 0.0,
        rank=0 if right is None else len(right),
        seconds=seconds,
    )
    return PrunedLayer(report, result, left, right)


def _set(layer: nn.Module, pruned: PrunedLayer) -> None:
    """Let the layer compute with its pruned weight, and with the low-rank part added where there is one."""
    if pruned.weight is not None:
        low_rank = 0.0 if pruned.left is None or pruned.right is None else pruned.left @ pruned.right
        set_matrix(layer, pruned.weight + low_rank)
