"""The planner's arithmetic against numbers found otherwise."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from sparse24.packing import pack
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparse_pretrain import cli, schema
from sparse_pretrain import plan as command
from sparse_pretrain.config import PlanConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.hardware import PEAK_TFLOPS
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.paths import config_dir
from sparse_pretrain.planning import duration
from sparse_pretrain.planning.activations import count_activations
from sparse_pretrain.planning.communication import BACKWARD, BETWEEN, PASSES, WAITING, Traffic, traffic
from sparse_pretrain.planning.devices import DEVICES
from sparse_pretrain.planning.memory import Layout, training_state
from sparse_pretrain.planning.network import read_network, sizes_of
from sparse_pretrain.planning.plan import make_plan
from sparse_pretrain.sharding import DATA_PARALLEL, TENSOR_PARALLEL, local
from sparse_pretrain.sparsity import SparseLinear, SparseTraining, sparsify
from sparse_pretrain.tasks.sharding import shard
from sparse_pretrain.tasks.task import Sizes

SMALL = ["model.d_model=64", "model.n_layer=2", "trainer.batch_size=64", "trainer.steps=1000"]


def composed(*overrides) -> PlanConfig:
    """Of a small GPT, or of the model that they name."""
    named = any(override.startswith("model=") for override in overrides)
    small = [option for option in SMALL if not (named and option.startswith("model."))]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return schema.load(PlanConfig, cli._plain(compose("plan", overrides=[*small, *overrides])))


def parts(side):
    return {part.name: part.bytes for part in side.memory}


def test_a_dense_model_on_one_device():
    plan = make_plan(composed("recipe=dense", "trainer.devices=1"))
    with torch.device("meta"):
        cfg = composed().model
        parameters = sum(p.numel() for p in GPT(cfg, 32768).parameters())
    found = parts(plan.recipe)
    assert found["master weights, fp32"] == found["gradients, fp32"] == 4 * parameters
    assert found["optimizer moments, fp32"] == 8 * parameters
    assert plan.recipe.bytes == plan.dense.bytes == sum(found.values())
    assert not plan.recipe.traffic
    assert not plan.needed
    cost = command.costs(dataclasses.replace(composed(), price_per_hour=2.0), plan)
    assert cost[0] == pytest.approx(2 * 1000 * plan.dense.step.compute / 3600)


def test_llama_7b():
    """Its own parameters (Touvron et al. 2023: 6.7B), and 16 bytes for each of them on 64 devices."""
    cfg = composed("model=llama_7b", "model.vocab_size=32000", "trainer.devices=64", "recipe=ste")
    network = read_network(cfg, Sizes())
    assert network.count.parameters == 6_738_415_616
    held = {p.name: p.bytes for p in training_state(network, cfg, Layout(64, sharded=True, dtype=torch.bfloat16))}
    shared = sum(held[name] for name in held if name.endswith("fp32"))
    assert shared == pytest.approx(16 * 6_738_415_616 / 64, rel=1e-3)
    ffn = 32 * 3 * 4096 * 11008
    assert (held["masks"], held["2:4 weights"]) == (ffn, 2 * ffn)
    together = Layout(64, sharded=True, dtype=torch.bfloat16, tensor_parallel=8)
    parts = {p.name: p for p in training_state(network, cfg, together)}
    assert sum(parts[name].bytes for name in parts if name.endswith("fp32")) == shared
    assert (parts["masks"].bytes, parts["2:4 weights"].bytes) == (ffn, 2 * ffn / 8)
    assert parts["2:4 weights"].note == "dense, bfloat16, of FFNs 1/8"


def test_more_devices_hold_less_and_ddp_holds_all():
    one, eight = (make_plan(composed("recipe=fst", f"trainer.devices={n}")) for n in (1, 8))
    ddp = make_plan(composed("recipe=fst", "trainer.devices=8", "trainer.strategy=ddp"))
    name = "optimizer moments, fp32"
    assert parts(eight.recipe)[name] == pytest.approx(parts(one.recipe)[name] / 8, rel=1e-3)
    assert parts(ddp.recipe)[name] == parts(one.recipe)[name]
    assert parts(eight.recipe)["masks"] == parts(one.recipe)["masks"] == parts(ddp.recipe)["masks"]
    assert "gathered weights, fp32" not in parts(ddp.recipe)


def test_packed_weights_are_as_large_as_packed_tensors():
    cfg = composed("recipe=fst", "trainer.backend=triton", "trainer.devices=1")
    network = read_network(cfg, Sizes(512))
    held = training_state(network, cfg, Layout(1, sharded=False, dtype=torch.bfloat16, packed=True))
    weights = [torch.randn(layer.out_features, layer.in_features).bfloat16() for layer in network.sparse]
    expected = 0
    for weight in weights:
        for matrix in (weight, weight.t()):
            mask = torch.zeros(matrix.shape, dtype=torch.bool)
            mask.view(-1, 4)[:, :2] = True
            packed = pack(matrix, mask)
            expected += packed.values.nbytes + packed.metadata.nbytes
    assert next(part.bytes for part in held if part.name == "2:4 weights") == expected


@pytest.fixture
def two_ranks():
    """This process as the first of two, which send nothing: a mesh in which they compute FFNs together."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (1, 2), mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", ["dense", "fst"])
def test_activations_are_what_a_real_forward_pass_keeps(recipe):
    compare_activations(recipe)


@pytest.mark.parametrize("recipe", ["dense", "fst"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_activations_of_ffns_that_two_ranks_compute_together(recipe, two_ranks):
    compare_activations(recipe, two_ranks, "trainer.tensor_parallel=2", "model.activation=swiglu")


def compare_activations(recipe, mesh=None, *options):
    few = ("model.vocab_size=512", "data.seq_len=32", "recipe.schedule.dense_finetune=0")
    cfg = composed(f"recipe={recipe}", *few, *options)
    model = GPT(cfg.model, 512).train()
    sparsify(model, cfg.recipe)
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    for layer in layers:
        layer.product_dtype = torch.bfloat16
    training = SparseTraining(model, cfg.recipe, total_steps=10, seed=1)
    if mesh is not None:
        for layer in layers:
            layer.release()
        shard(model, mesh)
    training.prepare(0)
    known = {local(t.detach()).untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(3, 32, dtype=torch.int64))
    counted = count_activations(cfg, Sizes(512), torch.bfloat16)
    sparse = 2 * sum(math.prod(layer.part_shape) for layer in layers)
    assert counted.plain.of(3) - sparse == pytest.approx(sum(kept.values()), rel=0.01)


def test_activation_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    cfg = composed("model.n_layer=6", "model.vocab_size=512", "data.seq_len=64")
    counted = count_activations(cfg, Sizes(512), torch.bfloat16)
    inputs = 6 * 64 * 64 * 4  # of each block, fp32
    one = (counted.plain.example - counted.checkpointed.example + inputs) / 5  # a block: 5 of 6 are computed again
    assert counted.checkpointed.example == pytest.approx(counted.plain.example - 5 * one + inputs)
    assert inputs < counted.checkpointed.example < counted.plain.example / 2


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    cfg = composed("recipe=ste", "trainer.devices=8", "trainer.batch_size=512", "memory_gb=5", "model=gpt2_124m")
    size = make_plan(cfg).recipe.fitting[False]
    assert 1 <= size < 64
    for micro_batch, fits in ((size, True), (2 * size, False)):
        cfg.trainer.micro_batch_size = micro_batch
        plan = make_plan(cfg)
        assert (plan.recipe.bytes <= plan.budget_bytes) == fits
    assert make_plan(dataclasses.replace(cfg, memory_gb=2.01)).recipe.fitting == {False: None, True: None}


def test_what_communication_hides_behind():
    sent = [Traffic("a", 6, BACKWARD), Traffic("b", 2, PASSES), Traffic("c", 1, BETWEEN)]
    speeds = {"bytes_per_second": 1.0, "within_node": 4.0}
    step = duration.step_time(compute=9.0, micro_batches=1, sent=sent, **speeds)
    assert (step.exposed, step.unhidden) == (1.0, 9.0)
    step = duration.step_time(compute=9.0, micro_batches=3, sent=sent, **speeds)
    assert step.exposed == 6 - 2 + 1  # the last micro-batch's backward pass takes 2
    step = duration.step_time(compute=3.0, micro_batches=1, sent=sent, **speeds)
    assert step.exposed == 8 - 3 + 1
    waited_for = Traffic("d", 8, WAITING, within_node=True)
    assert duration.step_time(compute=9.0, micro_batches=1, sent=[*sent, waited_for], **speeds).exposed == 1 + 8 / 4


FFN = ("model.d_ff=512", "trainer.devices=8")


def test_devices_that_compute_ffns_together_do_the_work_of_narrower_ones():
    """4 of 8 devices: as 2 devices with a quarter of the width."""
    together = make_plan(composed(*FFN, "recipe=ste", "trainer.tensor_parallel=4"))
    narrow = make_plan(composed("model.d_ff=128", "trainer.devices=2", "recipe=ste"))
    assert together.recipe.work == narrow.recipe.work
    assert together.micro_batch == narrow.micro_batch == 32
    for name in ("activations", "copies of dense weights", "loss"):
        assert parts(together.dense)[name] == parts(narrow.dense)[name]
    cut = read_network(composed(*FFN, "recipe=slope", "recipe.adapter.rank=8"), Sizes(512)).cut_flop
    assert cut == 2 * 128 * 2 * 2 * (512 * 64 + 512 * 8)  # of LoRA the matrix with the hidden features


def test_what_devices_that_compute_ffns_together_send():
    """32 sequences of 128 tokens with 64 features, in 2 layers; outputs in bf16, gradients of inputs in fp32."""
    options = (*FFN, "trainer.tensor_parallel=4", "network_gbs=1", "trainer.nodes=2", "trainer.devices=4")
    plain, dropout, kept = (
        next(one for one in make_plan(composed(*options, *more)).dense.traffic if one.when == WAITING)
        for more in ((), ("model.activation_checkpointing=true", "model.dropout=0.1"), ("model.dropout=0.1",))
    )
    numbers = 32 * 128 * 64 * 2 * 2 * 3 / 4
    assert (plain.bytes, dropout.bytes, kept.bytes) == (6 * numbers, 8 * numbers, 6 * numbers)
    plan = make_plan(composed(*options))
    assert plan.seconds_of(plain) == pytest.approx(plain.bytes / 450e9)  # NVLink, not the network


def test_ddp_does_not_send_gradients_that_are_thrown_away():
    cfg = composed("recipe=slope", "trainer.devices=2", "trainer.strategy=ddp")
    network = read_network(cfg, Sizes(512))
    (sent,) = traffic(network, cfg, Layout(2, sharded=False, dtype=torch.bfloat16))
    pruned = sum(layer.numel for layer in network.sparse) / 2
    assert sent.bytes == 4 * (network.count.parameters - pruned)


def test_the_speed_up_that_is_needed_is_enough():
    plan = make_plan(composed("model=gpt2_124m", "recipe=fst", "trainer.devices=8"))
    share = plan.recipe.work.sparse / plan.recipe.work.total
    for gain, speedup in plan.needed.items():
        step = plan.recipe.step.seconds - plan.recipe.step.compute * share * (1 - 1 / speedup)
        assert step == pytest.approx((1 - gain) * plan.dense.step.seconds)
    slow = make_plan(composed("recipe=ste", "trainer.devices=8", "bandwidth_gbs=1e-3"))
    assert slow.needed[0.2] is None
    assert slow.saving is None


@pytest.fixture
def rates(tmp_path):
    """rates(ms of dense, ms of sparse): a file with the products of one layer, times made up."""

    def write(dense=1.0, sparse=0.8, gpu="NVIDIA H100 80GB HBM3", **changes):
        rows = []
        for kind in ("forward", "input_gradient", "weight_gradient"):
            for arm, ms in (("dense", dense), ("gluon:a", sparse), ("triton", 2.0)):
                row = {"part": "products", "case": f"x up (3072x768), 16384 tokens: {kind}", "arm": arm, "ms": ms}
                rows.append({**row, "status": "ok", "mode": "eager", "extra": {"packing_ms": 0.1}})
        path = tmp_path / "rates.json"
        path.write_text(json.dumps({"rehearsal": False, "environment": {"gpu": gpu}, "rows": rows, **changes}))
        return str(path)

    return write


OPTIONS = ("model=gpt2_124m", "recipe=fst", "trainer.devices=8", "trainer.batch_size=128")


def test_measured_products_save_what_was_measured(rates):
    """128 sequences of 1024 tokens: each device has the measured 16384 tokens; 12 blocks of two layers."""
    plan = make_plan(composed(*OPTIONS, f"rates={rates()}"))
    assert plan.saving.seconds == pytest.approx(12 * 2 * 3 * (0.2 - 0.1) / 1e3)
    flop = 2 * 16384 * 3072 * 768
    assert plan.saving.dense_tflops == pytest.approx(flop / 1e-3 / 1e12)
    assert plan.dense.step.compute == pytest.approx(plan.dense.work.total / (flop / 1e-3))  # slower than 40 % of peak
    assert plan.recipe.step.compute == pytest.approx(plan.dense.step.compute - plan.saving.seconds)
    assert not plan.needed
    slower = make_plan(composed(*OPTIONS, f"rates={rates(sparse=1.5)}"))
    assert slower.saving.seconds == pytest.approx(-12 * 2 * 3 * 0.1 / 1e3)  # dense is the fastest arm; it is packed
    together = make_plan(composed(*OPTIONS, f"rates={rates()}", "trainer.tensor_parallel=2"))
    assert together.saving.seconds == pytest.approx(12 * 2 * 3 * (0.2 - 0.05) / 1e3)  # twice the tokens, half a weight
    shapes = {pair.split(",")[0] for pair in together.saving.pairs}
    assert {"forward of 1536x768", "forward of 768x1536"} < shapes


@pytest.mark.parametrize(
    ("options", "changes", "found"),
    [
        ((), {"rehearsal": True}, "a rehearsal, whose numbers mean nothing"),
        ((), {"gpu": "NVIDIA A100-SXM4-80GB"}, "measured on NVIDIA A100-SXM4-80GB; allowed: results of device=H100"),
        ((), {"gpu": "NVIDIA H100 PCIe"}, "measured on NVIDIA H100 PCIe"),
        ((), {"rows": []}, "which has no products that were right and timed"),
        ((), {"rows": [{"part": "products"}]}, "whose rows are not of this version"),
        ((), {"rows": 3}, "which holds no benchmark results"),
        (("model=llama_7b", "model.n_layer=1"), {}, "no forward product near 11008x4096 with 65536 tokens"),
        (("recipe=maskllm",), {}, r"for recipe=maskllm \(learned\)"),
        (("recipe.fp8=true",), {}, r"for recipe=fst \(fp8\)"),
        (("trainer.backend=dense",), {}, "with trainer.backend=dense"),
    ],
)
def test_rates_that_do_not_fit_are_refused(rates, options, changes, found):
    with pytest.raises(UserError, match=found):
        make_plan(composed(*OPTIONS, f"rates={rates(**changes)}", *options))


def test_the_results_of_this_repository_are_of_a_cpu(tmp_path):
    files = sorted((config_dir().parent / "benchmarks" / "results").glob("cpu_*.json"))
    for path in files or pytest.skip("no results here"):
        with pytest.raises(UserError, match="measured on cpu"):
            make_plan(composed(f"rates={path}"))
    (tmp_path / "broken.json").write_text('{"rows": [')
    with pytest.raises(UserError, match="holds no benchmark results"):
        make_plan(composed(f"rates={tmp_path / 'broken.json'}"))


def test_every_device_has_a_peak():
    assert set(DEVICES) == set(PEAK_TFLOPS)


def test_what_is_assumed_of_the_data():
    sizes, assumed = sizes_of(composed())
    assert sizes.vocab_size == 32768
    assert "a vocabulary of 32,768 tokens" in assumed[0]
    assert sizes_of(composed("model.vocab_size=512"))[1] == []
    images = composed("model=vit_nano", "data=cifar10", "model.n_layer=1")
    assert sizes_of(images)[0].num_classes == 1000


def test_the_command(tmp_path, capsys):
    out = tmp_path / "new" / "plan.json"
    options = [*SMALL, "trainer.nodes=2", "trainer.devices=4", "recipe=ste", "price_per_hour=1.5", f"out={out}"]
    options += ["trainer.tensor_parallel=2"]
    cli.main(["plan", *options])
    text = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    for line in (
        "2:4 weights",
        "64 examples of 128 tokens a step, 16 for 2 devices, in 1 x 16",
        "outputs and input gradients of FFNs, all-reduce",
        "at 50 GB/s (450 for all-reduces of FFNs)",
        "2 devices of a node compute each FFN together",
        "weights of sparse layers, all-gather",
        "cost, at 1.5 a device and hour",
        "Assumptions",
    ):
        assert line in text
    assert "2:4 products take as long as dense ones: no rates were given, and none are claimed" in text
    assert "a step 10% shorter than dense needs" in text
    assert "50 GB/s a device (DGX H100: a 400 Gb/s ConnectX-7 for each GPU, data sheet) between nodes" in text
    values = json.loads(out.read_text())
    assert values["devices"] == 8
    assert values["bandwidth_gbs"] == 50
    assert values["recipe"]["memory_bytes"] == sum(part["bytes"] for part in values["recipe"]["memory"])
    assert values["recipe"]["step"]["seconds"] >= values["dense"]["step"]["seconds"]
    assert math.isclose(values["dense"]["cost"], 1.5 * 8 * values["dense"]["seconds"] / 3600)
    assert Path(out).stat().st_size < 100_000
