"""What each device sends in an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.planning.memory import FP32, Layout
from sparse_pretrain.planning.network import Network, Parameter, SparseLayer

# When it happens, which decides what it may hide behind.
BACKWARD, PASSES, BETWEEN = "last backward pass", "forward and backward passes", "between steps"


@dataclass(frozen=True)
class Traffic:
    """bytes: that each device sends, and receives, in one optimizer step; when: as above."""

    name: str
    bytes: int
    when: str


def traffic(network: Network, cfg: TrainConfig, layout: Layout) -> list[Traffic]:
    """Of a step in the sparse phase (of a dense recipe: of any), by rings: of n devices each sends (n-1)/n of what is
    gathered or scattered, and twice that of what is summed for all.

    DDP sums the gradients once, with the last micro-batch. FSDP2 gathers each block's fp32 weights before its forward
    pass and again before its backward pass, of every micro-batch, all other weights once for both, and reduces
    gradients with every micro-batch. SparseTraining gathers every sparse layer's master weight once between two
    steps; for learned masks twice, and their logits twice.
    """
    world = layout.world
    if world == 1:
        return []
    share = (world - 1) / world
    sums = _inputs_sum(network, cfg)
    found = [Traffic("sums of inputs, all-reduce", round(2 * share * sums), BETWEEN)] if sums else []
    if not layout.sharded:
        gradients = FP32 * sum(p.numel for p in network.parameters)
        return [Traffic("gradients, all-reduce", round(2 * share * gradients), BACKWARD), *found]
    micro_batches = cfg.trainer.batch_size // world // (cfg.trainer.micro_batch_size or cfg.trainer.batch_size // world)
    blocks = FP32 * sum(layout.padded(block) for block in network.blocks)
    root = FP32 * layout.padded(network.root)
    between = FP32 * layout.padded(map(_weight, network.sparse))
    if cfg.recipe.projection == "learned":
        rewarded = cfg.recipe.learned.norm_weight > 0
        logits = FP32 * layout.padded(p for p in network.parameters if p.logits)
        between = (1 + rewarded) * (between + logits)
    sparse = [Traffic("weights of sparse layers, all-gather", round(share * between), BETWEEN)] if between else []
    return [
        Traffic("weights in forward, all-gather", round(share * micro_batches * (blocks + root)), PASSES),
        Traffic("weights in backward, all-gather", round(share * micro_batches * blocks), PASSES),
        Traffic("gradients, reduce-scatter", round(share * micro_batches * (blocks + root)), PASSES),
        *sparse,
        *found,
    ]


def _weight(layer: SparseLayer) -> Parameter:
    return Parameter(layer.shape, moments=0)


def _inputs_sum(network: Network, cfg: TrainConfig) -> int:
    """Bytes of the sums that metric masks (Wanda) need."""
    if cfg.recipe.projection != "metric":
        return 0
    return FP32 * sum(layer.groups * layer.in_features for layer in network.sparse)
