"""How the parts of recipes go together: dX, patterns, adapters, checkpoints, transposed layers, compilation."""

import copy
import math

import pytest
import torch
from torch import nn

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.config_recipe import AdapterConfig, DecayConfig, RecipeConfig, ScheduleConfig
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.sparsity import SparseTraining, densify, load_recipe, sparsify
from sparse_pretrain.sparsity.adapters import adapters_of
from sparse_pretrain.sparsity.packed import pack_model
from tests.sparsity.by_hand import IN, OUT, STEPS, build, data, double_pruned, keep, near, train_step


@pytest.mark.parametrize("projection", ["magnitude", "transposable", "metric", "static"])
def test_input_gradient_of_the_dense_weight(projection):
    recipe = RecipeConfig("test", projection, input_gradient="dense")
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    for t in range(3):
        weight = layer.weight.detach().double()
        x, y, _ = data(t)
        dy = x.double() @ (weight * layer.mask).T - y.double()
        _, dx = train_step(model, training, optimizer, t, x, y)
        near(dx, dy @ weight, atol=1e-3)
    fp8 = RecipeConfig("test", projection, input_gradient="dense", fp8=True)
    model, training, optimizer = build(fp8)
    weight = model["ffn"].weight.detach().double()
    x, y, _ = data(0)
    dy = x.double() @ (weight * model["ffn"].mask).T - y.double()
    _, dx = train_step(model, training, optimizer, 0, x, y)
    error = (dx.double() - dy @ weight).norm() / (dy @ weight).norm()
    assert error < 0.2
    assert error < 0.5 * (dx.double() - dy @ (weight * model["ffn"].mask)).norm() / (dy @ weight).norm()


N_OF_M = [(1, 4), (2, 8), (4, 8)]


@pytest.mark.parametrize(("n", "m"), N_OF_M)
@pytest.mark.parametrize("projection", ["magnitude", "metric", "static", "static_random", "learned"])
def test_patterns_of_n_in_m(projection, n, m):
    learned = projection == "learned"
    recipe = RecipeConfig(
        "test", projection, pattern=f"{n}:{m}", input_gradient="same" if learned else "double_pruned",
        schedule=ScheduleConfig(refresh_every=2),
    )  # fmt: skip
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    first, squares = layer.mask.clone(), torch.zeros(IN, dtype=torch.float64)
    scores = layer.weight
    for t in range(5):
        weight, mask = layer.weight.detach().double(), layer.mask.clone()
        assert (mask.reshape(-1, m).sum(-1) == n).all()
        if t % 2 == 0:
            expected = {"magnitude": keep(weight, n, m), "metric": keep(scores, n, m)}.get(projection, mask)
            assert torch.equal(mask, expected), t
            squares.zero_()
            again = double_pruned(weight, mask, n, m)
        if projection.startswith("static"):
            assert torch.equal(mask, first)
        x, y, _ = data(t)
        squares += x.double().square().sum(0)
        out, dx = train_step(model, training, optimizer, t, x, y)
        if not learned:
            dy = x.double() @ (weight * mask).T - y.double()
            near(out, dy + y.double(), atol=1e-4)
            assert (
                torch.equal(layer.input_mask & layer.mask, double_pruned(layer.weight, layer.mask, n, m)) or (t + 1) % 2
            )
            near(dx, dy @ (weight * again), atol=1e-3)
        scores = layer.weight.detach().double() * squares.sqrt()
    if projection == "static":
        assert torch.equal(first, keep(build(recipe)[0]["ffn"].weight, n, m))
    model.eval()
    x = data(0)[0]
    held = layer.sparse_weight.detach().clone()
    assert ((held != 0).reshape(-1, m).sum(-1) <= n).all()
    near(layer(x), x.double() @ held.double().T)
    with pytest.raises(ValueError, match=f"ffn is {n}:{m}: only 2:4 can be packed"):
        pack_model(model)
    expected = layer(x)
    densify(model)
    assert type(model["ffn"]) is nn.Linear
    assert torch.equal(model["ffn"](x), expected)


def test_as_many_patterns_as_there_are_ways():
    for n, m in [*N_OF_M, (2, 4), (3, 4)]:
        model, _, _ = build(RecipeConfig("test", "learned", pattern=f"{n}:{m}"))
        patterns = model["ffn"].learned.patterns
        assert len(patterns) == math.comb(m, n) == len(patterns.unique(dim=0))
        assert (patterns.sum(-1) == n).all()
        assert model["ffn"].learned.logits.shape == (OUT, IN // m, math.comb(m, n))


ADAPTERS = [AdapterConfig(kind="lora", rank=3, alpha=6.0), AdapterConfig(kind="slorb", group=4)]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda cfg: cfg.kind)
@pytest.mark.parametrize("name", ["dense", "ste", "fst", "s_ste", "maskllm"])
def test_adapters_beside_every_recipe(name, adapter):
    """They appear when they should, train beside the weight, and what is taken out of sparse training computes the same."""
    recipe = load_recipe(name)
    recipe.adapter = copy.deepcopy(adapter)
    recipe.adapter.start = 0.1
    recipe.schedule.dense_warmup = 0.0
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    before = {key: p.detach().clone() for key, p in layer.adapter.named_parameters()}
    for t in range(8):
        assert layer.adapter.active == (t >= 4)
        if t < 4:
            assert all(torch.equal(p, before[key]) for key, p in layer.adapter.named_parameters())
        train_step(model, training, optimizer, t, *data(t))
    assert all(p.any() and not torch.equal(p, before[key]) for key, p in layer.adapter.named_parameters())
    model.eval()
    x = data(0)[0]
    with torch.no_grad():
        expected = model["ffn"](x)
        sparse = name != "dense"
        delta = layer.adapter.delta()
        used = layer.current_weight() if sparse else layer.weight
        near(expected, x.double() @ (used + delta).double().T, atol=1e-4)
        packed, dense = copy.deepcopy(model), copy.deepcopy(model)
        assert pack_model(packed) == int(sparse)
        torch.testing.assert_close(packed["ffn"](x), expected)
        densify(dense)
        torch.testing.assert_close(dense["ffn"](x), expected, rtol=1e-4, atol=1e-5)
        assert bool(adapters_of(dense)) == (not sparse)  # merged into what was a sparse layer


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(name="tiny", n_layer=2, n_head=2, d_model=16, max_seq_len=8), 32)


EVERY_PART = {
    "learned": RecipeConfig("test", "learned"),
    "metric": RecipeConfig("test", "metric"),
    "double_pruned": RecipeConfig("test", "magnitude", input_gradient="double_pruned"),
    "static": RecipeConfig("test", "static", input_gradient="double_pruned", weight_gradient="masked"),
    "dense_dx": RecipeConfig("test", "magnitude", input_gradient="dense"),
    "lora": RecipeConfig("test", "magnitude", adapter=AdapterConfig(kind="lora")),
    "slorb": RecipeConfig("test", "soft_threshold", adapter=AdapterConfig(kind="slorb", group=4)),
    "4:8": RecipeConfig("test", "magnitude", pattern="4:8", input_gradient="double_pruned"),
}
every_part = pytest.mark.parametrize("recipe", EVERY_PART.values(), ids=EVERY_PART.keys())


@every_part
def test_a_dense_checkpoint_loads_strictly(recipe):
    """Masks, logits and β are then those of a model that had these weights when it was made sparse."""
    dense, sparse = gpt(), gpt()
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_(std=0.05)
    sparsify(sparse, recipe)
    sparse.load_state_dict(dense.state_dict())
    fresh = gpt()
    fresh.load_state_dict(dense.state_dict())
    torch.manual_seed(0)
    sparsify(fresh, recipe)
    found, expected = sparse.state_dict(), fresh.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if ".adapter." not in name:  # which are drawn
            assert torch.equal(found[name], tensor), name
    tokens = torch.randint(32, (2, 8))
    for model in (sparse, fresh):
        model.eval()
        for adapter in adapters_of(model).values():
            adapter.active = False
    assert torch.equal(sparse(tokens), fresh(tokens))


@every_part
def test_a_state_is_restored_as_it_was(recipe):
    model, other = gpt(), gpt()
    sparsify(model, recipe)
    sparsify(other, recipe)
    training = SparseTraining(model, recipe, STEPS, seed=1)
    training.prepare(0)
    for t in range(2):
        model(torch.randint(32, (2, 8))).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        training.prepare(t + 1)
    model(torch.randint(32, (2, 8)))  # half a step more
    other.load_state_dict(model.state_dict())
    resumed = SparseTraining(other, recipe, STEPS, seed=1)
    resumed.load_state_dict(training.state_dict())
    resumed.prepare(2, refresh=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    tokens = torch.randint(32, (2, 8))
    assert torch.equal(model(tokens), other(tokens))
    for name, layer in training.layers.items():
        assert torch.equal(layer.sparse_weight, resumed.layers[name].sparse_weight)
        if layer.input_weight is not None:
            assert torch.equal(layer.input_weight, resumed.layers[name].input_weight)


def conv1d(inputs, out):
    class Conv1D(nn.Module):
        """As Hugging Face's: weight (in, out)."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, out) / inputs**0.5)
            self.bias = nn.Parameter(torch.zeros(out))

        def forward(self, x):
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)

    Conv1D.__module__ = "transformers.pytorch_utils"
    return Conv1D()


@pytest.mark.parametrize("input_gradient", ["same", "double_pruned", "dense"])
@pytest.mark.parametrize("projection", ["magnitude", "transposable", "soft_threshold", "metric", "static", "learned"])
def test_a_transposed_layer_trains_as_its_transpose(projection, input_gradient):
    """Hugging Face's Conv1D against an nn.Linear with the transposed weight, with decay, masked gradients, an adapter."""
    if input_gradient != "same" and projection in ("soft_threshold", "learned"):
        pytest.skip("refused by preflight")
    if input_gradient == "double_pruned" and projection == "transposable":
        pytest.skip("refused by preflight")
    learned = projection == "learned"
    recipe = RecipeConfig(
        "test", projection, input_gradient=input_gradient, weight_gradient="dense" if learned else "masked",
        decay=DecayConfig() if learned else DecayConfig("momentum", 0.1),
        schedule=ScheduleConfig(refresh_every=2), adapter=AdapterConfig(kind="slorb", group=4),
    )  # fmt: skip
    torch.manual_seed(0)
    conv, linear = conv1d(IN, OUT), nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    runs = [build(recipe, layer=layer) for layer in (conv, linear)]
    for t in range(6):
        (a, da), (b, db) = (train_step(*run, t, *data(t)) for run in runs)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(da, db, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(runs[0][0]["ffn"].weight.t(), runs[1][0]["ffn"].weight, rtol=1e-4, atol=1e-4)
        assert torch.equal(runs[0][0]["ffn"].mask.t(), runs[1][0]["ffn"].mask)
    model, x = runs[0][0].eval(), data(0)[0]
    expected = model["ffn"](x)
    densify(model)
    assert model["ffn"] is conv
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)


@every_part
def test_blocks_compile_into_one_graph(recipe):
    """Without a break, and without compiling anew in later steps, whatever masks, noise and norms do."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recipe = copy.deepcopy(recipe)
    recipe.schedule.refresh_every = 2
    models = [gpt(), gpt()]
    trainings = []
    for model in models:
        torch.manual_seed(1)
        sparsify(model, recipe)
        trainings.append(SparseTraining(model, recipe, STEPS, seed=1))
    compiled = [torch.compile(block, fullgraph=True, backend="eager") for block in models[1].blocks]
    graphs = torch._dynamo.utils.counters["stats"]
    for t in range(5):
        x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(t))
        outputs = []
        for model, training, blocks in zip(models, trainings, (models[0].blocks, compiled), strict=True):
            training.prepare(t)
            out = x
            for block in blocks:
                out = block(out)
            out.square().mean().backward()
            training.adjust_gradients()
            outputs.append(out.detach())
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)
                    p.grad = None
        torch.testing.assert_close(*outputs)
        if t == 0:
            first = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == first > 0
    torch._dynamo.reset()
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_that_goes_on_from_a_dense_phase_of_another_chooses_its_masks():
    """A fork whose sparse phase has begun where the other run was dense: static masks and priors are of the weights now."""
    for projection in ("static", "learned"):
        recipe = RecipeConfig("test", projection, schedule=ScheduleConfig(dense_warmup=0.5))
        model, training, _ = build(recipe)
        with torch.no_grad():
            model["ffn"].weight.copy_(torch.randn_like(model["ffn"].weight))
        training.prepare(5)
        recipe = RecipeConfig("test", projection)
        other, fork, _ = build(RecipeConfig("test", projection, schedule=ScheduleConfig(dense_warmup=0.1)))
        other.load_state_dict(model.state_dict())
        fork.load_state_dict(training.state_dict())
        fork.prepare(5, refresh=False)
        agree = (other["ffn"].mask == keep(other["ffn"].weight)).view(-1, 4).all(-1).double().mean()
        assert agree == 1.0 if projection == "static" else agree > 0.8
