"""`sparse-pretrain plan`: what a training run needs of a cluster, from its options alone."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from sparse_pretrain import crosscheck, runs
from sparse_pretrain.config import PlanConfig
from sparse_pretrain.planning.plan import Plan, make_plan
from sparse_pretrain.reporting.table import duration
from sparse_pretrain.schema import to_dict

GB, WIDTH = 1e9, 120
HARDWARE_LIMIT = 2.0  # how much faster 2:4 products are at most: half of the multiplications


def run(cfg: PlanConfig) -> None:
    """Print the plan, and write it to `out`.

    Raises:
        UserError: options that do not fit together, a device that is not known, rates that are not there or do not fit.
    """
    crosscheck.check(cfg)
    out = None if cfg.out is None else Path(cfg.out).expanduser().absolute()
    if out is not None:
        with runs.writing(out, "out"):
            out.parent.mkdir(parents=True, exist_ok=True)
    plan = make_plan(cfg)
    print("\n".join([*_head(cfg, plan), "", *_memory(plan), "", *_traffic(plan), "", *_time(cfg, plan), ""]))
    print("Assumptions")
    for line in plan.assumptions:
        print(textwrap.fill(line, WIDTH, initial_indent="  - ", subsequent_indent="    "))
    if out is not None:
        runs.write_json(out, as_dict(cfg, plan))
        print(f"\nwritten: {out}")


def _head(cfg: PlanConfig, plan: Plan) -> list[str]:
    network, trainer = plan.recipe.network, cfg.trainer
    sparse = sum(layer.numel for layer in network.sparse)
    model = f"{cfg.model.name}, {network.count.parameters / 1e6:,.1f}M parameters"
    if sparse:
        model += f", {sparse / 1e6:,.1f}M of them in {len(network.sparse)} {cfg.recipe.pattern} sparse layers"
    spread = f"{plan.layout.world} x {plan.device.name}"
    if plan.layout.world > 1:
        spread += f" ({trainer.nodes} x {trainer.devices}), trainer.strategy={trainer.strategy}"
    if trainer.tensor_parallel > 1:
        spread += f" trainer.tensor_parallel={trainer.tensor_parallel}"
    per_device = trainer.batch_size // trainer.data_ranks
    batch = f"{trainer.batch_size} examples of {cfg.data.tokens_per_example} tokens a step"
    whose = "a device" if trainer.tensor_parallel == 1 else f"for {trainer.tensor_parallel} devices"
    return [
        f"{model}; recipe {cfg.recipe.name}",
        f"{spread}; {batch}, {per_device} {whose}, in {per_device // plan.micro_batch} x {plan.micro_batch}",
    ]


def _memory(plan: Plan) -> list[str]:
    dense = {part.name: part.bytes for part in plan.dense.memory}
    own = {part.name: part for part in plan.recipe.memory}
    rows = [["memory of a device, GB", "dense", "recipe", ""]]
    for name in dict.fromkeys([*own, *dense]):
        part = own.get(name)
        here = [dense.get(name, 0), part.bytes if part is not None else 0]
        rows.append([name, *map(_gb, here), part.note if part is not None else ""])
    rows.append(["together", _gb(plan.dense.bytes), _gb(plan.recipe.bytes), ""])
    overhead = plan.memory_bytes - plan.budget_bytes
    room = plan.budget_bytes - plan.recipe.bytes
    verdict = f"fits, with {_gb(room)} GB to spare" if room >= 0 else f"does not fit: {_gb(-room)} GB too many"
    lines = _table(rows)
    lines.append(f"of {_gb(plan.memory_bytes)} GB, {_gb(overhead)} of them overhead: {verdict}")
    for on in dict.fromkeys((plan.checkpointing, False, True)) if plan.can_checkpoint else (False,):
        size = plan.recipe.fitting[on]
        how = "with" if on else "without"
        largest = f"the largest micro-batch that fits is {size}" if size else "not even a micro-batch of 1 fits"
        lines.append(f"{how} activation checkpointing: {_gb(plan.recipe.totals[on])} GB; {largest}")
    return lines


def _traffic(plan: Plan) -> list[str]:
    dense = {one.name: one.bytes for one in plan.dense.traffic}
    rows = [["sent by a device in a step, GB", "dense", "recipe", ""]]
    for one in plan.recipe.traffic:
        rows.append([one.name, _gb(dense.get(one.name, 0)), _gb(one.bytes), one.when])
    if len(rows) == 1:
        return ["one device: nothing is sent"]
    totals = [sum(one.bytes for one in side.traffic) for side in (plan.dense, plan.recipe)]
    rows.append(["together", *map(_gb, totals), ""])
    seconds = " and ".join(f"{sum(map(plan.seconds_of, side.traffic)):.3g} s" for side in (plan.dense, plan.recipe))
    speeds = f"{plan.bandwidth_gbs:g} GB/s"
    if any(one.within_node for one in plan.recipe.traffic):
        speeds += f" ({plan.node_gbs:g} for all-reduces of FFNs)"
    return [*_table(rows), f"at {speeds}: {seconds}"]


def _time(cfg: PlanConfig, plan: Plan) -> list[str]:
    tokens = cfg.trainer.batch_size * cfg.data.tokens_per_example
    sides = plan.dense, plan.recipe
    rows = [
        ["time", "dense", "recipe"],
        ["FLOP of a step and device, T", *(f"{side.work.total / 1e12:,.4g}" for side in sides)],
        ["compute of a step, s", *(f"{side.step.compute:.3g}" for side in sides)],
        ["communication not hidden, s", *(f"{side.step.exposed:.3g}" for side in sides)],
        ["a step, s", *(f"{side.step.seconds:.3g}" for side in sides)],
        ["a step if nothing is hidden, s", *(f"{side.step.seconds_unhidden:.3g}" for side in sides)],
        ["tokens/s", *(f"{tokens / side.step.seconds:,.0f}" for side in sides)],
        [f"{cfg.trainer.steps:,} steps", *map(duration, plan.seconds(cfg))],
    ]
    if cfg.price_per_hour is not None:
        rows.append([f"cost, at {cfg.price_per_hour:g} a device and hour", *(f"{x:,.2f}" for x in costs(cfg, plan))])
    lines = _table(rows)
    if 0 < plan.sparse_share < 1:
        lines.append(
            f"the recipe's step is that of its sparse phase, {plan.sparse_share:.0%} of the steps; others are dense"
        )
    share = plan.recipe.work.sparse / plan.recipe.work.total
    for gain, speedup in plan.needed.items():
        needs = f"2:4 products {speedup:.2f} x as fast as dense ones" if speedup else "more than 2:4 products can give"
        beyond = f", beyond the hardware's {HARDWARE_LIMIT:g}" if speedup and speedup > HARDWARE_LIMIT else ""
        lines.append(
            f"a step {gain:.0%} shorter than dense needs {needs}{beyond} ({share:.0%} of the FLOP are in them)"
        )
    if plan.saving is not None:
        lines.append(f"measured products save {plan.saving.seconds:.3g} s a step, packing paid for")
    return lines


def costs(cfg: PlanConfig, plan: Plan) -> list[float]:
    """Of the whole run, dense and with the recipe, in the currency of `price_per_hour`; empty without one."""
    if cfg.price_per_hour is None:
        return []
    return [seconds / 3600 * plan.layout.world * cfg.price_per_hour for seconds in plan.seconds(cfg)]


def as_dict(cfg: PlanConfig, plan: Plan) -> dict[str, Any]:
    """What `out` holds: bytes, seconds, FLOP."""
    tokens = cfg.trainer.batch_size * cfg.data.tokens_per_example
    sides = {}
    for name, side, seconds, cost in zip(
        ("dense", "recipe"), (plan.dense, plan.recipe), plan.seconds(cfg), costs(cfg, plan) or (None, None), strict=True
    ):
        sides[name] = {
            "memory": [dataclasses.asdict(part) for part in side.memory],
            "memory_bytes": side.bytes,
            "fits": side.bytes <= plan.budget_bytes,
            "memory_bytes_by_checkpointing": {str(on).lower(): total for on, total in side.totals.items()},
            "largest_micro_batch_by_checkpointing": {str(on).lower(): size for on, size in side.fitting.items()},
            "communication": [dataclasses.asdict(one) for one in side.traffic],
            "flop_per_step_and_device": side.work.total,
            "sparse_flop_per_step_and_device": side.work.sparse,
            "step": {**dataclasses.asdict(side.step), "seconds": side.step.seconds},
            "tokens_per_second": tokens / side.step.seconds,
            "seconds": seconds,
            "cost": cost,
        }
    return {
        "config": to_dict(cfg),
        "device": dataclasses.asdict(plan.device),
        "devices": plan.layout.world,
        "memory_bytes_of_device": plan.memory_bytes,
        "peak_tflops": plan.peak_tflops,
        "bandwidth_gbs": plan.bandwidth_gbs,
        "node_gbs": plan.node_gbs,
        "micro_batch_size": plan.micro_batch,
        "parameters": plan.recipe.network.count.parameters,
        "sparse_share_of_steps": plan.sparse_share,
        **sides,
        "saving": None if plan.saving is None else dataclasses.asdict(plan.saving),
        "needed_speedup": {f"{gain:g}": speedup for gain, speedup in plan.needed.items()},
        "assumptions": plan.assumptions,
    }


def _gb(count: float) -> str:
    return f"{count / GB:,.3g}" if abs(count) < 10 * GB else f"{count / GB:,.1f}"


def _table(rows: list[list[str]]) -> list[str]:
    """Names to the left, the two figures to the right, then remarks."""
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for name, dense, own, *remark in rows:
        cells = [name.ljust(widths[0]), dense.rjust(widths[1]), own.rjust(widths[2]), *remark]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 4))
    return lines
