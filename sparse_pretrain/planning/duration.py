"""How long an optimizer step takes: assumptions, or measured rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse24.backends.base import FORWARD
from sparse24.dispatch import LayerShape

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.models.count import BACKWARD as BACKWARD_FLOP
from sparse_pretrain.planning.communication import BACKWARD, BETWEEN, PASSES, WAITING, Traffic
from sparse_pretrain.planning.memory import Layout, has_kernels
from sparse_pretrain.planning.network import Network
from sparse_pretrain.planning.rates import Measured, nearest
from sparse_pretrain.sparsity.schedule import PhaseSchedule


@dataclass(frozen=True)
class Work:
    """FLOP of one device in an optimizer step, computed as dense ones.

    total: all; sparse: those of products that the recipe makes 2:4.
    """

    total: float
    sparse: float


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step. exposed: of communication that nothing hides; unhidden: if nothing hid any."""

    compute: float
    exposed: float
    unhidden: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def seconds_unhidden(self) -> float:
        return self.compute + self.unhidden


def examples_per_device(cfg: TrainConfig) -> int:
    """In an optimizer step; devices that compute FFNs together have the same."""
    return cfg.trainer.batch_size // cfg.trainer.data_ranks


def work(network: Network, cfg: TrainConfig, layout: Layout, checkpointing: bool) -> Work:
    """Products and attention, forward and twice that backward; blocks once more with activation checkpointing; a
    forward pass for each teacher, as if it were of this size. Of FFNs that devices compute together each has a part."""
    examples, tokens, teachers = examples_per_device(cfg), cfg.data.tokens_per_example, cfg.recipe.teacher.models
    elsewhere = network.cut_flop * (1 - 1 / layout.tensor_parallel)
    forward = network.forward_flop(tokens) - elsewhere
    again = network.block_flop(tokens) - elsewhere if checkpointing else 0
    own = teachers.count("self")  # spread as the model is; every device has all of the others
    total = forward * (1 + BACKWARD_FLOP + own) + again + network.forward_flop(tokens) * (len(teachers) - own)
    sparse, kinds = 0, _kinds(cfg, layout)
    for layer in network.sparse:
        repeated = checkpointing and layer.name in network.block_of and FORWARD in kinds
        sparse += 2 * layer.rows * layout.weights(layer) * (len(kinds) + repeated)
    return Work(total=float(total * examples), sparse=float(sparse * examples))


def _kinds(cfg: TrainConfig, layout: Layout) -> list[str]:
    """The products of a layer that sparse kernels may compute."""
    recipe = cfg.recipe
    if not has_kernels(recipe):
        return []
    mvue, transposable = recipe.weight_gradient == "mvue", recipe.input_is_sparse
    return LayerShape(1, 1, 1, layout.dtype, transposable, mvue, fp8=recipe.fp8).sparse_kinds()


def sparse_share(cfg: TrainConfig) -> float:
    """Of the run's steps, those of the sparse phase."""
    if cfg.recipe.projection == "none":
        return 0.0
    schedule = PhaseSchedule.from_config(cfg.recipe.schedule, cfg.trainer.steps)
    return max(schedule.finetune_start - schedule.warmup_end, 0) / cfg.trainer.steps


def step_time(
    compute: float, micro_batches: int, sent: Sequence[Traffic], bytes_per_second: float, within_node: float
) -> Step:
    """Communication within passes hides behind compute, as far as that lasts: that of the last backward pass behind two
    thirds of the last micro-batch, that of FSDP behind all. What is between steps, and what the passes wait for, hides
    behind nothing.

    Args:
        bytes_per_second, within_node: of the slowest link of all devices, and of devices of one node.
    """
    seconds = dict.fromkeys((BACKWARD, PASSES, BETWEEN, WAITING), 0.0)
    for one in sent:
        seconds[one.when] += one.bytes / (within_node if one.within_node else bytes_per_second)
    last = compute / micro_batches * BACKWARD_FLOP / (1 + BACKWARD_FLOP)
    late = max(seconds[BACKWARD] - last, 0.0)
    exposed = max(late, seconds[BACKWARD] + seconds[PASSES] - compute)
    exposed += seconds[BETWEEN] + seconds[WAITING]
    return Step(compute=compute, exposed=exposed, unhidden=sum(seconds.values()))


@dataclass(frozen=True)
class Saving:
    """What measured products save. seconds: of a step, packing paid for; dense_tflops: of the dense products, measured;
    pairs: for each shape what was taken for it."""

    seconds: float
    dense_tflops: float
    pairs: list[str]


def measured_saving(
    network: Network, cfg: TrainConfig, layout: Layout, micro_batch: int, checkpointing: bool, found: list[Measured]
) -> Saving:
    """Of 2:4 products over dense ones in a step, each by the nearest shape that was measured, in proportion to FLOP.

    Raises:
        UserError: naming `rates`: nothing near was measured.
    """
    micro_batches = examples_per_device(cfg) // micro_batch
    saved = dense_seconds = flop = 0.0
    pairs: dict[str, None] = {}
    for layer in network.sparse:
        tokens = layer.rows * micro_batch
        out_features, in_features = layout.shape(layer)
        for kind in _kinds(cfg, layout):
            one = nearest(found, kind, tokens, out_features, in_features)
            product = 2.0 * tokens * out_features * in_features
            repeats = micro_batches * (1 + (kind == FORWARD and checkpointing and layer.name in network.block_of))
            scale = repeats * product / one.flop / 1e3
            saved += scale * (one.dense_ms - one.sparse_ms)
            saved -= one.packing_ms / 1e3 * layout.weights(layer) / (one.out_features * one.in_features)
            dense_seconds += scale * one.dense_ms
            flop += repeats * product
            pairs[
                f"{kind} of {out_features}x{in_features}, {tokens} tokens: {one.arm} at "
                f"{one.out_features}x{one.in_features}, {one.tokens} tokens, {one.dense_ms / one.sparse_ms:.2f} x dense"
            ] = None
    return Saving(saved, flop / dense_seconds / 1e12 if dense_seconds else 0.0, list(pairs))


def needed_speedup(gain: float, dense: Step, sparse: Step, done: Work) -> float | None:
    """How much faster than dense ones 2:4 products must be for a step that takes `gain` (0 … 1) less time than the
    dense recipe's; None if infinitely fast ones would not do.

    Args:
        sparse: a step of the recipe with products as slow as dense ones.
        done: of a step of the recipe.
    """
    share = done.sparse / done.total
    too_long = sparse.seconds - (1 - gain) * dense.seconds
    left = 1 - too_long / (share * sparse.compute) if share else 0.0
    return 1 / left if left > 0 else None
