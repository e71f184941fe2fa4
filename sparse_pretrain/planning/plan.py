"""The whole plan of a run: of the recipe asked for, and of the dense one beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from sparse_pretrain.config import PlanConfig
from sparse_pretrain.config_models import TransformerConfig
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.planning import communication, duration, memory
from sparse_pretrain.planning.activations import RULE, count_activations
from sparse_pretrain.planning.communication import BETWEEN, Traffic
from sparse_pretrain.planning.devices import Device, find_device
from sparse_pretrain.planning.duration import Saving, Step, Work
from sparse_pretrain.planning.memory import Layout, Part
from sparse_pretrain.planning.network import Network, read_network, sizes_of
from sparse_pretrain.planning.rates import Measured, read_rates

GAINS = (0.1, 0.2)  # of a step's time, for which the speed-up that they need is told
USUAL_NODE = 8  # devices that NVLink joins in one machine


@dataclass(frozen=True)
class Side:
    """One recipe's numbers.

    memory: of a device, all parts; fitting: the largest micro-batch that fits, by whether activations are checkpointed;
    step: of its sparse phase (of the dense recipe: any).
    """

    network: Network
    memory: list[Part]
    fitting: dict[bool, int | None]
    totals: dict[bool, int]
    traffic: list[Traffic]
    work: Work
    step: Step

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.memory)


@dataclass(frozen=True)
class Plan:
    """What is printed and written.

    budget_bytes: memory of a device, without the overhead; micro_batch: examples of one forward pass on it;
    can_checkpoint: whether the model has activation checkpointing.
    saving: what measured products save; None without measurements. needed: gain of step time -> the speed-up of 2:4
    products that it needs, None = none would do; empty with measurements. sparse_share: of the steps.
    bandwidth_gbs, node_gbs: GB/s of a device in a ring through all, and in one within a node.
    """

    layout: Layout
    device: Device
    memory_bytes: float
    budget_bytes: float
    peak_tflops: float
    bandwidth_gbs: float
    node_gbs: float
    micro_batch: int
    checkpointing: bool
    can_checkpoint: bool
    dense: Side
    recipe: Side
    saving: Saving | None
    needed: dict[float, float | None]
    sparse_share: float
    assumptions: list[str]

    def seconds_of(self, one: Traffic) -> float:
        return one.bytes / 1e9 / (self.node_gbs if one.within_node else self.bandwidth_gbs)

    def seconds(self, cfg: PlanConfig) -> tuple[float, float]:
        """Of the whole run: of the dense recipe, and of the one asked for with its dense phases."""
        dense, sparse = self.dense.step.seconds, self.recipe.step.seconds
        mixed = self.sparse_share * sparse + (1 - self.sparse_share) * dense
        return cfg.trainer.steps * dense, cfg.trainer.steps * mixed


def make_plan(cfg: PlanConfig) -> Plan:
    """From options alone: no data, no weights, no device.

    Raises:
        UserError: naming device, network_gbs or rates, or as `read_network`.
    """
    device = find_device(cfg.device)
    trainer = cfg.trainer
    world = trainer.ranks
    if trainer.precision == "fp32" and trainer.peak_tflops is None:
        raise UserError("trainer.precision", "fp32, for which no peak is known", "bf16, or with trainer.peak_tflops")
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(trainer.precision, torch.bfloat16)
    if cfg.rates is not None and trainer.backend == "dense":
        raise UserError("rates", f"{cfg.rates} with trainer.backend=dense", "null, or another backend")
    measured = read_rates(cfg.rates, device.name) if cfg.rates is not None else None
    asked = trainer.backend not in ("auto", "dense")
    packed = asked or (measured is not None and trainer.backend == "auto")
    sharded = trainer.strategy == "fsdp" and world > 1
    layout = Layout(world, sharded, dtype, packed, trainer.tensor_parallel)
    sizes, assumed = sizes_of(cfg)
    checkpointing = bool(getattr(cfg.model, "activation_checkpointing", False))
    activations = count_activations(cfg, sizes, dtype)
    peak = trainer.peak_tflops or device.tflops
    bandwidth, link = _bandwidth(cfg, device)
    within_node = cfg.bandwidth_gbs or device.link_gbs
    micro_batch = trainer.micro_batch_size or trainer.batch_size // trainer.data_ranks
    micro_batches = trainer.batch_size // trainer.data_ranks // micro_batch
    total = (cfg.memory_gb or device.memory_gb) * 1e9
    budget = total - cfg.overhead_gb * 1e9

    rate = peak * cfg.utilization
    sides: list[Side] = []
    saving: Saving | None = None
    networks = {True: read_network(_dense(cfg), sizes), False: read_network(cfg, sizes)}
    if measured is not None and cfg.recipe.projection != "none":
        saving = _saving(networks[False], cfg, layout, micro_batch, checkpointing, measured)
        if saving.dense_tflops and saving.dense_tflops < rate:
            rate = saving.dense_tflops
            assumed.append(f"the rate of all dense work is that of the measured dense products, {rate:.0f} TFLOP/s")
    for dense in (True, False):
        run, network = (_dense(cfg) if dense else cfg), networks[dense]
        done = duration.work(network, run, layout, checkpointing)
        compute = done.total / (rate * 1e12) - (saving.seconds if saving is not None and not dense else 0.0)
        sent = communication.traffic(network, run, layout)
        step = duration.step_time(compute, micro_batches, sent, bandwidth * 1e9, within_node * 1e9)
        held = memory.training_state(network, run, layout)
        needs = {
            on: held + memory.step_memory(network, run, layout, activations, micro_batch, on) for on in (False, True)
        }
        sides.append(
            Side(
                network=network,
                memory=needs[checkpointing],
                fitting={
                    on: memory.fitting_micro_batch(network, run, layout, activations, budget, on)
                    for on in (False, True)
                },
                totals={on: sum(part.bytes for part in parts) for on, parts in needs.items()},
                traffic=sent,
                work=done,
                step=step,
            )
        )
    needed = {}
    if saving is None and sides[1].work.sparse:
        needed = {gain: duration.needed_speedup(gain, sides[0].step, sides[1].step, sides[1].work) for gain in GAINS}
    return Plan(
        layout=layout,
        device=device,
        memory_bytes=total,
        budget_bytes=budget,
        peak_tflops=peak,
        bandwidth_gbs=bandwidth,
        node_gbs=within_node,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        can_checkpoint=isinstance(cfg.model, TransformerConfig),
        dense=sides[0],
        recipe=sides[1],
        saving=saving,
        needed=needed,
        sparse_share=duration.sparse_share(cfg),
        assumptions=[*assumed, *_assumptions(cfg, device, layout, link, rate, saving)],
    )


def _saving(
    network: Network, cfg: PlanConfig, layout: Layout, micro_batch: int, checkpointing: bool, found: list[Measured]
) -> Saving:
    if not memory.has_kernels(cfg.recipe) or cfg.recipe.fp8:
        what = "fp8" if cfg.recipe.fp8 else cfg.recipe.projection
        raise UserError(
            "rates", f"{cfg.rates}, for recipe={cfg.recipe.name} ({what})", "null: no such product is in it"
        )
    return duration.measured_saving(network, cfg, layout, micro_batch, checkpointing, found)


def _dense(cfg: PlanConfig) -> PlanConfig:
    return dataclasses.replace(cfg, recipe=RecipeConfig(name="dense"))


def _bandwidth(cfg: PlanConfig, device: Device) -> tuple[float, str]:
    """GB/s of a device in a ring through all, and where the figure is from."""
    within = cfg.bandwidth_gbs or device.link_gbs
    source = "bandwidth_gbs" if cfg.bandwidth_gbs else f"half of {device.link}, both directions: data sheet"
    if cfg.trainer.nodes == 1:
        return within, f"{within:g} GB/s a device and direction ({source})"
    network = cfg.network_gbs or device.network_gbs
    if network is None:
        raise UserError(
            "network_gbs", f"null with trainer.nodes={cfg.trainer.nodes}", f"GB/s of a {device.name}'s share"
        )
    text = f"{network:g} GB/s a device ({'network_gbs' if cfg.network_gbs else device.network + ', data sheet'})"
    return min(within, network), f"the slower of {within:g} GB/s within a node ({source}) and {text} between nodes"


def _assumptions(
    cfg: PlanConfig, device: Device, layout: Layout, link: str, rate: float, saving: Saving | None
) -> list[str]:
    trainer, lines = cfg.trainer, [RULE]
    if trainer.precision == "auto":
        lines.append("products in bf16 (trainer.precision=auto), as these devices have it")
    sheet = "trainer.peak_tflops" if trainer.peak_tflops else "data sheet, without sparsity"
    peak = trainer.peak_tflops or device.tflops
    if rate == peak * cfg.utilization:
        lines.append(
            f"dense work at {cfg.utilization:.0%} (utilization) of {peak:g} TFLOP/s ({sheet}); recomputed work counts"
        )
    memory_source = "memory_gb" if cfg.memory_gb else f"data sheet of {device.name}, GB of 1e9 bytes"
    lines.append(
        f"a device has {cfg.memory_gb or device.memory_gb:g} GB ({memory_source}), of which {cfg.overhead_gb:g} GB "
        "(overhead_gb) are for the driver, communication buffers and fragmentation"
    )
    lines.append("memory is the sum of all parts, as if each were largest at the same time")
    if layout.world > 1:
        lines.append(
            f"collectives are rings at {link}, without latency; DDP's hide behind the last backward pass, "
            f"FSDP's behind all compute, what is {BETWEEN} behind nothing"
        )
    if layout.tensor_parallel > 1:
        lines.append(
            f"{layout.tensor_parallel} devices of a node compute each FFN together, and everything else each for "
            "itself, of the same examples (trainer.tensor_parallel); their all-reduces, at "
            f"{cfg.bandwidth_gbs or device.link_gbs:g} GB/s, hide behind nothing, as no device has anything else to "
            "compute meanwhile; products of parts take as long for each FLOP as whole ones"
        )
    if trainer.nodes == 1 and trainer.devices > USUAL_NODE:
        lines.append(
            f"{trainer.devices} devices in one node; for {USUAL_NODE} a node, and the network between nodes, set "
            f"trainer.devices={USUAL_NODE} trainer.nodes=N"
        )
    if cfg.recipe.projection != "none":
        lines += _about_products(cfg, layout, saving)
    if cfg.recipe.teacher.models:
        lines.append("a teacher costs a forward pass of a model of this size; only the memory of `self` is counted")
    lines.append("steps alone: no validation, checkpoints, waiting for data, nor computing masks and 2:4 weights")
    return lines


def _about_products(cfg: PlanConfig, layout: Layout, saving: Saving | None) -> list[str]:
    how = "packed for sparse products" if layout.packed and memory.has_kernels(cfg.recipe) else "dense"
    backend = cfg.trainer.backend
    lines = [f"2:4 weights are held {how} (trainer.backend={backend}; with auto a run measures, and may differ)"]
    if saving is None:
        return [*lines, "2:4 products take as long as dense ones: no rates were given, and none are claimed"]
    return [*lines, "2:4 products differ from dense ones by what was measured, scaled by FLOP:", *saving.pairs]
