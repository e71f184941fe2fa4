"""What each device sends in an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_models import ModelConfig, TransformerConfig
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.planning.memory import FP32, Layout
from sparse_pretrain.planning.network import Network

# When it happens, which decides what it may hide behind.
BACKWARD, PASSES, BETWEEN = "last backward pass", "forward and backward passes", "between steps"
WAITING = "within passes, which wait for it"


@dataclass(frozen=True)
class Traffic:
    """bytes: that each device sends, and receives, in one optimizer step; when: as above; within_node: whether it stays
    in one."""

    name: str
    bytes: int
    when: str
    within_node: bool = False


def traffic(network: Network, cfg: TrainConfig, layout: Layout) -> list[Traffic]:
    """Of a step in the sparse phase (of a dense recipe: of any), by rings: of n devices each sends (n-1)/n of what is
    gathered or scattered, and twice that of what is summed for all.

    DDP sums the gradients once, with the last micro-batch; with `weight_gradient=masked` not those of pruned weights.
    FSDP2 gathers each block's fp32 weights before its forward pass and again before its backward pass, of every
    micro-batch, all other weights once for both, and reduces gradients with every micro-batch. SparseTraining gathers
    every sparse layer's master weight once between two steps; for learned masks twice, and their logits twice. Muon
    gathers every update. With tensor parallelism the devices of a group sum, for every micro-batch, what each FFN gives
    out, the gradient of what it takes in, and those of adapter weights that each of them has.
    """
    if layout.world == 1:
        return []
    sums = _ring_sum(layout.world, _inputs_sum(network, cfg))
    found = [Traffic("sums of inputs, all-reduce", sums, BETWEEN)] if sums else []
    if not layout.sharded:
        gradients = FP32 * (sum(p.numel for p in network.parameters) - _pruned(network, cfg))
        return [Traffic("gradients, all-reduce", _ring_sum(layout.world, gradients), BACKWARD), *found]
    micro_batches = 1
    if cfg.trainer.micro_batch_size is not None:
        micro_batches = cfg.trainer.batch_size // cfg.trainer.data_ranks // cfg.trainer.micro_batch_size
    blocks = FP32 * micro_batches * sum(map(layout.sent, network.blocks))
    root = FP32 * micro_batches * layout.sent(network.root)
    weights = FP32 * layout.sent_for_whole(layer.weight for layer in network.sparse)
    if cfg.recipe.projection == "learned":
        rewarded = cfg.recipe.learned.norm_weight > 0
        weights += FP32 * layout.sent_for_whole(p for p in network.parameters if p.logits)
        weights *= 1 + rewarded
    muon = cfg.optimizer.name == "muon"
    updates = FP32 * layout.sent_for_whole(p for p in network.parameters if muon and p.moments == 1)
    taught = "self" in cfg.recipe.teacher.models
    teacher = FP32 * micro_batches * layout.sent(network.dense_parameters) if taught else 0
    sent = [
        Traffic("weights in forward, all-gather", blocks + root, PASSES),
        Traffic("weights in backward, all-gather", blocks, PASSES),
        Traffic("gradients, reduce-scatter", blocks + root, PASSES),
        Traffic("weights of the teacher self, all-gather", teacher, PASSES),
        *_sums_of_groups(network, cfg, layout, micro_batches),
        Traffic("weights of sparse layers, all-gather", weights, BETWEEN),
        Traffic("updates by Muon, all-gather", updates, BETWEEN),
    ]
    return [one for one in sent if one.bytes] + found


def _ring_sum(devices: int, count: int) -> int:
    """Bytes that each device sends to sum so many."""
    return round(2 * (devices - 1) / devices * count)


def _sums_of_groups(network: Network, cfg: TrainConfig, layout: Layout, micro_batches: int) -> list[Traffic]:
    """Of devices that compute FFNs together. Outputs are in the dtype of products, gradients of inputs in fp32, as the
    residual stream is.

    Activation checkpointing computes a block again up to the last tensor that the backward pass needs: outputs are
    summed again if something comes after them that keeps one, dropout or a norm.
    """
    group = layout.tensor_parallel
    if group == 1:
        return []
    numbers = network.ffn_outputs * (cfg.trainer.batch_size // cfg.trainer.data_ranks)
    passes = 1 + _sums_again(cfg.model) + ("self" in cfg.recipe.teacher.models)
    of_ffns = numbers * (passes * layout.dtype.itemsize + FP32)
    adapters = FP32 * micro_batches * sum(p.numel for p in network.parameters if p.ffn and p.cut is None)
    return [
        Traffic("outputs and input gradients of FFNs, all-reduce", _ring_sum(group, of_ffns), WAITING, True),
        Traffic("gradients of adapters in FFNs, all-reduce", _ring_sum(group, adapters), WAITING, True),
    ]


def _sums_again(model: ModelConfig) -> bool:
    assert isinstance(model, TransformerConfig)
    return model.activation_checkpointing and (model.dropout > 0 or getattr(model, "norm_place", "pre") == "post")


def _pruned(network: Network, cfg: TrainConfig) -> int:
    """How many weights no gradient is sent of."""
    pattern = parse_pattern(cfg.recipe.pattern)
    if cfg.recipe.weight_gradient != "masked" or pattern is None:
        return 0
    return sum(layer.numel for layer in network.sparse) * (pattern[1] - pattern[0]) // pattern[1]


def _inputs_sum(network: Network, cfg: TrainConfig) -> int:
    """Bytes of the sums that metric masks (Wanda) need."""
    if cfg.recipe.projection != "metric":
        return 0
    return FP32 * sum(layer.groups * layer.in_features for layer in network.sparse)
