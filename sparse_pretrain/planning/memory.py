"""Memory of one device, by part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.planning.activations import Activations
from sparse_pretrain.planning.network import Network, Parameter, SparseLayer

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
    whether the 2:4 weights are held as sparse products want them; tensor_parallel: how many consecutive devices compute
    each FFN together, each with a part of it, which is sharded over as many devices as there are such groups.
    """

    world: int
    sharded: bool
    dtype: torch.dtype
    packed: bool = False
    tensor_parallel: int = 1

    def part(self, parameter: Parameter) -> tuple[int, ...]:
        """The shape of what a device computes with."""
        cut = parameter.cut
        return tuple(n // self.tensor_parallel if i == cut else n for i, n in enumerate(parameter.shape))

    def weights(self, layer: SparseLayer) -> int:
        """How many of a layer's weights a device computes with."""
        return math.prod(self.part(layer.weight))

    def shape(self, layer: SparseLayer) -> tuple[int, int]:
        """(out_features, in_features) of a layer as a device computes it."""
        sizes = [layer.out_features, layer.in_features]
        if layer.weight.cut is not None:
            sizes[layer.weight.cut] //= self.tensor_parallel
        return sizes[0], sizes[1]

    def devices(self, parameter: Parameter) -> int:
        """Over how many it is sharded."""
        return self.world // self.tensor_parallel if parameter.ffn else self.world

    def local(self, parameter: Parameter, rank: int = 0) -> int:
        """How many of a parameter's numbers a device holds: of rank 0, which has the most, unless another is asked for.
        FSDP2 cuts the first dimension into equal parts, the last ones shorter or empty."""
        if not self.sharded:
            return parameter.numel
        shape = self.part(parameter)
        length = -(-shape[0] // self.devices(parameter))
        number = rank // self.tensor_parallel if parameter.ffn else rank
        return math.prod(shape[1:]) * max(min(length, shape[0] - number * length), 0)

    def gathered(self, parameters: Iterable[Parameter]) -> int:
        """Numbers that a device has of these, whole or its part of an FFN, while it computes with them: every shard is
        as long as the first."""
        return sum(self.devices(p) * self.local(p) for p in parameters)

    def sent(self, parameters: Iterable[Parameter]) -> int:
        """Numbers that it sends for that, or to reduce gradients of as many."""
        return sum((self.devices(p) - 1) * self.local(p) for p in parameters)

    def sent_for_whole(self, parameters: Iterable[Parameter]) -> int:
        """Numbers that it sends so that every device has all of these: parts of FFNs are gathered in two rings, one
        after the other, which together send what one ring of all would."""
        return sum((self.world - 1) * self.local(p) for p in parameters)


def training_state(network: Network, cfg: TrainConfig, layout: Layout, rank: int = 0) -> list[Part]:
    """What stays from step to step."""
    parameters, recipe = network.parameters, cfg.recipe
    sparse = sum(layer.numel for layer in network.sparse)
    own = sum(map(layout.weights, network.sparse))
    whole = ", whole on every device" if layout.sharded else ""
    of_ffns = f", of FFNs 1/{layout.tensor_parallel}" if own < sparse else whole
    masks = 2 if recipe.input_gradient == "double_pruned" else 1
    per_weight, form = _sparse_weight(recipe, layout)
    parts = [
        Part("master weights, fp32", FP32 * sum(layout.local(p, rank) for p in parameters)),
        Part("gradients, fp32", FP32 * sum(layout.local(p, rank) for p in parameters)),
        Part("optimizer moments, fp32", FP32 * sum(p.moments * layout.local(p, rank) for p in parameters)),
        Part("masks", masks * sparse, f"1 byte a weight{', two masks' if masks == 2 else ''}{whole}"),
        Part("2:4 weights", round(per_weight * own), f"{form}{of_ffns}"),
        Part("other buffers", network.buffers + _recipe_buffers(network, recipe), "positions, noise, sums of inputs"),
    ]
    if "self" in recipe.teacher.models:
        copy = FP32 * sum(layout.local(p, rank) for p in network.dense_parameters)
        parts.append(Part("the teacher self", copy, "a copy in fp32"))
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
        largest = max((layout.gathered(block) for block in network.blocks), default=0)
        root = layout.gathered(network.root)
        gathered = FP32 * (2 * largest + root)
        parts.append(Part("gathered weights, fp32", gathered, "the largest block twice, and what is in no block"))
        parts.append(Part("gathered gradients, fp32", gathered, "the same, before they are reduced"))
    sparse = _sparse_weights(network, layout, checkpointing)
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


def _sparse_weights(network: Network, layout: Layout, checkpointing: bool) -> int:
    """Of all sparse layers, or of those of the block that has most of them: the one that is computed again."""
    if not checkpointing:
        return sum(map(layout.weights, network.sparse))
    blocks: dict[int, int] = {}
    for layer in network.sparse:
        if layer.name in network.block_of:
            number = network.block_of[layer.name]
            blocks[number] = blocks.get(number, 0) + layout.weights(layer)
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
    per_device = cfg.trainer.batch_size // cfg.trainer.data_ranks
    held = sum(part.bytes for part in training_state(network, cfg, layout))
    for size in range(per_device, 0, -1):
        if per_device % size == 0:
            step = step_memory(network, cfg, layout, activations, size, checkpointing)
            if held + sum(part.bytes for part in step) <= budget:
                return size
    return None
