"""A run whose sparse layers multiply with a backend: chosen at the start, recorded, kept on resume."""

import pytest
import torch
from sparse24 import backends, dispatch, ops
from sparse24.dispatch import Plan

from sparse_pretrain import runs, train
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.optim import adamw
from sparse_pretrain.sparsity import SparseLinear, SparseTraining, sparsify
from sparse_pretrain.tasks import products
from tests.sparse24.reference_backend import Reference


class Pretend(Reference):
    """Stands in for a GPU backend: packed operands, the same numbers."""

    name = "gluon"

    def supports(self, product, device):
        return (True, "") if product.k % 16 == 0 else (False, f"needs k in multiples of 16, found {product.k}")


@pytest.fixture
def pretend(monkeypatch):
    known = {**backends.BACKENDS, "gluon": Pretend()}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(dispatch, "BACKENDS", known)


def losses(run_dir):
    return [float(row["train/loss"]) for row in runs.read_rows(run_dir / runs.METRICS_FILE)]


def facts(run_dir):
    return runs.read_json(run_dir / runs.RUN_FILE)["sparse_products"]


def test_on_a_cpu_products_are_dense_and_the_run_says_so(tiny):
    run_dir = train.run(tiny("fst"))
    plans = facts(run_dir)["plans"]
    assert set(plans) == {f"blocks.{i}.ffn.{part}" for i in range(2) for part in ("up", "down")}
    assert all(plan == ["dense"] * 3 for plan in plans.values())
    assert "sparse_products" not in runs.read_json(train.run(tiny("dense", "dense")) / runs.RUN_FILE)


@pytest.mark.parametrize("changes", [{}, {"trainer__micro_batch_size": 2}, {"trainer__compile": True}], ids=str)
def test_training_on_packed_weights_is_training(tiny, pretend, changes, capsys):
    """The same losses as with dense products, up to rounding, with phases and accumulation, eager and compiled."""
    changes = {"recipe__schedule__refresh_every": 3, "recipe__schedule__dense_warmup": 0.17, **changes}
    expected = losses(train.run(tiny("fst", "dense", **changes)))
    capsys.readouterr()
    run_dir = train.run(tiny("fst", "packed", trainer__backend="gluon", **changes))
    assert losses(run_dir) == pytest.approx(expected, abs=2e-3)
    assert all(choice.startswith("gluon:") for plan in facts(run_dir)["plans"].values() for choice in plan)
    assert "* forward         gluon:" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"trainer__compile": True}], ids=str)
def test_training_in_fp8_on_packed_weights(tiny, pretend, changes):
    """Its sparse products round to bf16 first. Only the forward product is sparse."""
    changes = {"recipe__fp8": True, "trainer__precision": "bf16", **changes}
    expected = losses(train.run(tiny("s_ste", "dense", **changes)))
    run_dir = train.run(tiny("s_ste", "packed", trainer__backend="gluon", **changes))
    assert losses(run_dir) == pytest.approx(expected, abs=1e-2)
    for forward, *others in facts(run_dir)["plans"].values():
        assert forward.startswith("gluon:")
        assert others == ["dense", "dense"]


def test_a_resumed_run_keeps_its_plans(tiny, pretend, monkeypatch):
    whole = train.run(tiny("fst", "whole", trainer__backend="gluon"))

    def stop(self, *args):
        if self.steps_done == 6:
            raise RuntimeError("stop")
        return original(self, *args)

    original = products.Task.training_step
    with monkeypatch.context() as patch:
        patch.setattr(products.Task, "training_step", stop)
        with pytest.raises(RuntimeError, match="stop"):
            train.run(tiny("fst", "stopped", trainer__backend="gluon"))
    folder = whole.parent / "stopped"
    before = facts(folder)
    monkeypatch.setattr(products, "choose_plans", None)  # not measured again
    train.run(tiny("fst", "stopped", trainer__backend="gluon"))
    assert facts(folder) == before


def test_a_backend_that_cannot_serve_a_layer_is_refused(tiny, pretend):
    with pytest.raises(
        UserError, match=r"trainer\.backend: found cutlass, which cannot serve blocks\.0\.ffn\.up: .*CUDA"
    ):
        train.run(tiny("fst", trainer__backend="cutlass"))


def test_weights_in_the_dtype_of_the_products():
    """Ŵ is rounded once, when it is projected; the master weight stays as it is."""
    layer = SparseLinear(torch.nn.Linear(32, 16), RecipeConfig("test", "transposable"))
    layer.product_dtype = torch.bfloat16
    layer.project()
    assert layer.sparse_weight.dtype == torch.bfloat16
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = torch.nn.functional.linear(x.bfloat16(), (layer.weight * layer.mask).bfloat16(), layer.bias.bfloat16())
    assert torch.equal(y, expected)


def test_a_packed_layer_projects_into_the_same_memory(pretend):
    layer = SparseLinear(torch.nn.Linear(32, 16), RecipeConfig("test", "transposable"))
    layer.plan = Plan("gluon:a", "gluon:b", "gluon:a")
    layer.project()
    tensors = [*layer.packed.forward.tensors, *layer.packed.input_gradient.tensors]
    pointers = [t.data_ptr() for t in tensors]
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.project()
    assert layer.sparse_weight is None
    assert [t.data_ptr() for t in (*layer.packed.forward.tensors, *layer.packed.input_gradient.tensors)] == pointers
    x = torch.randn(4, 32)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight * layer.mask, layer.bias))
    with pytest.raises(ValueError, match=r"x must be torch.float32, as the packed weight, .*found torch.float16"):
        layer(x.half())
    assert torch.equal(layer.dense_layer().weight, layer.weight * layer.mask)
    layer.go_dense()
    assert not layer.is_sparse


def test_a_plan_may_be_sparse_for_the_weight_gradient_alone(pretend, monkeypatch):
    asked = []
    known = Pretend.weight_gradient
    monkeypatch.setattr(Pretend, "weight_gradient", lambda *args: asked.append(args[-1]) or known(*args))
    model = torch.nn.ModuleDict({"ffn": torch.nn.Linear(32, 16)})
    recipe = RecipeConfig("test", "magnitude", weight_gradient="mvue")
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, 10, seed=1)
    model["ffn"].plan = Plan("dense", "dense", "gluon:b")
    training.prepare(0)
    model["ffn"](torch.randn(32, 32)).sum().backward()
    assert asked == ["b"]


def test_training_with_the_gpu_kernels_is_the_same_training(tiny, monkeypatch):
    """Masks, MVUE and AdamW by the Triton kernels, in the interpreter, through a whole run."""
    pytest.importorskip("triton")
    changes = {"trainer__steps": 6, "recipe__schedule__refresh_every": 2}
    expected = train.run(tiny("fst", "reference", **changes))
    monkeypatch.setattr(ops, "use_kernels", lambda tensor: True)
    monkeypatch.setattr(adamw, "use_kernels", lambda tensor: True)
    found = train.run(tiny("fst", "kernels", **changes))
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    a, b = (runs.read_rows(run_dir / runs.METRICS_FILE) for run_dir in (expected, found))
    assert [row["sparsity/flip_rate"] for row in a] == [row["sparsity/flip_rate"] for row in b]
