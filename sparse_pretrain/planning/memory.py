"""Memory of one device, by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparse_pretrain.config import RecipeConfig, TrainConfig
from sparse_pretrain.planning.activations import Activations
from sparse_pretrain.planning.network import Network, Parameter

FP32 = 4
PACKED = 1 / 2, 1 / 8  # of a weight: values in its dtype, and bytes of metadata (2 bits for each kept one)


@dataclass(frozen=True)
class Part:
    """What of a device's memory is for what. held: whether it stays from step to step."""

    name: str
    bytes: int
    note: str = ""
    held: bool = False


@dataclass(frozen=True)
class Layout:
    """How a run is spread.

    world: devices in all; sharded: whether each holds a part of every weight (FSDP2); dtype: of products; packed:
    whether the 2:4 weights are held as sparse products want them.
    """

    world: int
    sharded: bool
    dtype: torch.dtype
    packed: bool = False

    def local(self, parameter: Parameter, rank: int = 0) -> int:
        """How many of a parameter's numbers a device holds: of rank 0, which has the most, unless another is asked for.
        FSDP2 cuts the first dimension into equal parts, the last ones shorter or empty."""
        if not self.sharded:
            return parameter.numel
        first = parameter.shape[0]
        part = -(-first // self.world)
        return parameter.numel // first * max(min(part, first - rank * part), 0)

    def padded(self, parameters: Iterable[Parameter]) -> int:
        """Numbers that collectives of these parameters move: every part is as long as the first."""
        return sum(-(-p.shape[0] // self.world) * self.world * (p.numel // p.shape[0]) for p in parameters)


def training_state(network: Network, cfg: TrainConfig, layout: Layout, rank: int = 0) -> list[Part]:
    """What stays from step to step."""
    parameters, recipe = network.parameters, cfg.recipe
    sparse = sum(layer.numel for layer in network.sparse)
    whole = ", whole on every device" if layout.sharded else ""
    masks = 2 if recipe.input_gradient == "double_pruned" else 1
    per_weight, form = _sparse_weight(recipe, layout)
    parts = [
        Part("master weights, fp32", FP32 * sum(layout.local(p, rank) for p in parameters)),
        Part("gradients, fp32", FP32 * sum(layout.local(p, rank) for p in parameters)),
        Part("optimizer moments, fp32", FP32 * sum(p.moments * layout.local(p, rank) for p in parameters)),
        Part("masks", masks * sparse, f"1 byte a weight{', two masks' if masks == 2 else ''}{whole}"),
        Part("2:4 weights", round(per_weight * sparse), f"{form}{whole}"),
        Part("other buffers", network.buffers + _recipe_buffers(network, recipe), "positions, noise, sums of inputs"),
    ]
    if "self" in recipe.teacher.models:
        parts.append(Part("the teacher self", FP32 * sum(p.numel for p in parameters), "a copy in fp32"))
    return [Part(part.name, part.bytes, part.note, held=True) for part in parts if part.bytes]


def has_kernels(recipe: RecipeConfig) -> bool:
    """Whether its weights are such that sparse kernels multiply with them."""
    return recipe.projection not in ("none", "learned") and recipe.pattern == "2:4"


def _sparse_weight(recipe: RecipeConfig, layout: Layout) -> tuple[float, str]:
    """Bytes for each weight of a sparse layer, and how they are held."""
    size, name = layout.dtype.itemsize, str(layout.dtype).removeprefix("torch.")
    if recipe.fp8:
        return 2.0, "dense, e4m3 and e5m2"
    if not layout.packed or not has_kernels(recipe):
        if recipe.input_gradient == "same":
            return float(size), f"dense, {name}"
        return 2.0 * size, f"dense, {name}, another for the input's gradient"
    packed = PACKED[0] * size + PACKED[1]
    if recipe.input_is_sparse:
        return 2 * packed, f"values and metadata, {name}, forward and transposed"
    return packed + size, f"values and metadata, {name}; dense for the input's gradient"


def _recipe_buffers(network: Network, recipe: RecipeConfig) -> int:
    if recipe.projection == "learned":
        return FP32 * sum(p.numel for p in network.parameters if p.logits)  # the step's noise
    if recipe.projection == "metric":
        return 2 * FP32 * sum(layer.groups * layer.in_features for layer in network.sparse)
    return FP32 * len(network.sparse) if recipe.projection == "soft_threshold" else 0


def step_memory(
    network: Network, cfg: TrainConfig, layout: Layout, activations: Activations, micro_batch: int, checkpointing: bool
) -> list[Part]:
    """What a step needs beside, at its worst: as if all of it were needed at once.

    Args:
        micro_batch: examples on one device.
        checkpointing: of activations.
    """
    kept = activations.kept(checkpointing)
    parts = []
    if layout.world > 1 and not layout.sharded:
        trained = FP32 * sum(p.numel for p in network.parameters)
        parts.append(Part("DDP's buckets", trained, "gradients as they are sent, fp32"))
    if layout.sharded:
        largest = max((layout.padded(block) for block in network.blocks), default=0)
        root = layout.padded(network.root)
        gathered = FP32 * (2 * largest + root)
        parts.append(Part("gathered weights, fp32", gathered, "the largest block twice, and what is in no block"))
        parts.append(Part("gathered gradients, fp32", gathered, "the same, before they are reduced"))
    sparse = _sparse_weights(network, checkpointing)
    name, size = str(layout.dtype).removeprefix("torch."), layout.dtype.itemsize
    copies = round(kept.copies) - (size * sparse if layout.dtype != torch.float32 else 0)  # a sparse layer has its Ŵ
    parts.append(Part("copies of dense weights", max(copies, 0), f"{name}, kept for the backward pass"))
    if cfg.recipe.projection == "learned":
        shares = sum(p.numel for p in network.parameters if p.logits) / sum(layer.numel for layer in network.sparse)
        soft = round((FP32 * (shares + 1) + size) * sparse)
        parts.append(Part("soft masks", soft, f"shares of patterns and mask in fp32, masked weights in {name}"))
    how = "with activation checkpointing" if checkpointing else "no activation checkpointing"
    parts.append(Part("activations", round(kept.example * micro_batch), f"{micro_batch} examples, {how}"))
    per_logit = FP32 + FP32 + size
    loss = per_logit * activations.logits * micro_batch
    parts.append(Part("loss", loss, f"log-probabilities and gradients, {per_logit} B a logit"))
    return [part for part in parts if part.bytes]


def _sparse_weights(network: Network, checkpointing: bool) -> int:
    """Of all sparse layers, or of those of the block that has most of them: the one that is computed again."""
    if not checkpointing:
        return sum(layer.numel for layer in network.sparse)
    blocks: dict[int, int] = {}
    for layer in network.sparse:
        if layer.name in network.block_of:
            number = network.block_of[layer.name]
            blocks[number] = blocks.get(number, 0) + layer.numel
    return max(blocks.values(), default=0)


def fitting_micro_batch(
    network: Network,
    cfg: TrainConfig,
    layout: Layout,
    activations: Activations,
    budget: float,
    checkpointing: bool,
) -> int | None:
    """The largest divisor of the examples of each device whose step needs at most `budget` bytes; None = not even 1."""
    per_device = cfg.trainer.batch_size // layout.world
    held = sum(part.bytes for part in training_state(network, cfg, layout))
    for size in range(per_device, 0, -1):
        if per_device % size == 0:
            step = step_memory(network, cfg, layout, activations, size, checkpointing)
            if held + sum(part.bytes for part in step) <= budget:
                return size
    return None
