"""The plan of tiny runs against what one, two and four processes hold and send."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sparse_pretrain import launch, train
from sparse_pretrain.config import PlanConfig
from sparse_pretrain.planning.communication import traffic
from sparse_pretrain.planning.memory import Layout, training_state
from sparse_pretrain.planning.network import read_network
from sparse_pretrain.tasks.task import Sizes
from tests.planning import measure_ranks
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

# More weights than scalars, so that a few per cent mean something; parts of d_ff and of the vocabulary for 4 ranks are no
# multiples of 4.
SIZES = {"model__d_model": 48, "model__d_ff": 136, "model__n_layer": 3, "trainer__steps": 3, "trainer__eval_every": 3}
SPARSE = {"recipe__schedule__dense_finetune": 0.0}
RUNS = {
    "dense": ("dense", {}),
    "fst": ("fst", SPARSE),
    "micro": ("fst", {**SPARSE, "trainer__micro_batch_size": 1, "model__activation_checkpointing": True}),
    "s_ste": ("s_ste", {}),
    "slope": ("slope", {"recipe__adapter__start": 0.0}),
    "maskllm": ("maskllm", {"recipe__schedule__dense_warmup": 0.0, "recipe__train_weights": True}),
    "again": ("fst", {**SPARSE, "model__activation_checkpointing": True, "model__dropout": 0.1}),
    "muon_bf16": ("fst", {**SPARSE, "optimizer__name": "muon", "trainer__precision": "bf16"}),
    "ast": (
        "ast",
        {
            "recipe__schedule__dense_warmup": 0.3,
            "recipe__adapter__kind": "slorb",
            "recipe__adapter__init": "sum",
            "recipe__adapter__group": 8,
        },
    ),
}
APART = {2: ["dense", "fst", "micro", "s_ste", "slope", "maskllm"], 4: ["fst", "micro"]}
TOGETHER = {2: ["dense", "fst", "again", "muon_bf16", "slope", "maskllm", "ast"], 4: ["fst", "micro"]}
KINDS = {"all-gather": "all_gather", "reduce-scatter": "reduce_scatter", "all-reduce": "all_reduce"}


def planned(cfg, ranks, rank):
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    plan = PlanConfig(**values)
    dtype = torch.bfloat16 if cfg.trainer.precision == "bf16" else torch.float32
    sharded = ranks > 1 and cfg.trainer.strategy == "fsdp"
    layout = Layout(ranks, sharded, dtype, tensor_parallel=cfg.trainer.tensor_parallel)
    network = read_network(plan, Sizes(vocab_size=vocabulary(cfg)))
    held = {part.name: part.bytes for part in training_state(network, plan, layout, rank)}
    sent = dict.fromkeys(KINDS.values(), 0)
    for one in traffic(network, plan, layout):
        sent[KINDS[one.name.rpartition(", ")[2]]] += one.bytes
    return held, sent


def vocabulary(cfg):
    return json.loads((Path(cfg.run_dir) / "run.json").read_text())["corpus"]["vocab_size"]


def compare(cfg, ranks):
    for rank in range(ranks):
        measured = json.loads((Path(cfg.run_dir) / f"measured-{rank}.json").read_text())
        held, sent = planned(cfg, ranks, rank)
        for name, count in measured["held"].items():
            assert held.get(name, 0) == pytest.approx(count, rel=0.02, abs=256), (cfg.run_dir, rank, name)
        for kind, count in measured["sent"].items():
            assert sent[kind] == pytest.approx(count, rel=0.03, abs=2048), (cfg.run_dir, rank, kind)


@pytest.fixture
def prepare(tiny, monkeypatch):
    """prepare(name, ranks, strategy, together) -> the config of a run whose folder is made, and nothing trained yet."""

    def make(name, ranks=1, strategy="ddp", together=1):
        recipe, changes = RUNS[name]
        spread = {"devices": ranks, "strategy": strategy, "tensor_parallel": together}
        options = {**SIZES, **{f"trainer__{name}": value for name, value in spread.items()}, **changes}
        cfg = tiny(recipe, f"{name}-{strategy}-{ranks}-{together}", **options)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "launch", lambda cfg, run_dir: None)
            train.run(cfg)
        return cfg

    return make


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_ranks_hold_and_send(prepare, ranks):
    runs = [prepare(name, ranks, strategy) for name in APART[ranks] for strategy in ("fsdp", "ddp")]
    runs += [prepare(name, ranks, "fsdp", together=2) for name in TOGETHER[ranks]]
    run_ranks(ranks, measure_ranks.measure, [Path(cfg.run_dir) for cfg in runs])
    for cfg in runs:
        compare(cfg, ranks)


@pytest.mark.parametrize("name", ["dense", "fst", "slope"])
def test_what_one_device_holds(prepare, name):
    cfg = prepare(name)
    measure_ranks.measure([Path(cfg.run_dir)])
    compare(cfg, 1)
