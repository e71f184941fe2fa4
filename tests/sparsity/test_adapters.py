"""Adapters: their update is the published equation; merging, saving and loading keep what is computed."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_pretrain.config_recipe import AdapterConfig, RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.count import count_model
from sparse_pretrain.sparsity import SparseLinear
from sparse_pretrain.sparsity.adapters import (
    LoRA,
    SLoRB,
    adapters_of,
    attach,
    make_adapter,
    merge_adapters,
    unmerge_adapters,
)
from sparse_pretrain.sparsity.packed import pack_model

IN, OUT, TOKENS = 8, 6, 5
KINDS = {
    "lora": AdapterConfig(kind="lora", rank=3, alpha=6.0),
    "slope": AdapterConfig(kind="lora", rank=2, alpha=1.0, init="normal"),
    "slorb": AdapterConfig(kind="slorb", group=4, init="mean"),
    "slorb_sums": AdapterConfig(kind="slorb", group=2, init="sum", train_groups=False),
}
every_kind = pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS.keys())


def conv1d(out_features: int, in_features: int) -> nn.Module:
    """What Hugging Face calls Conv1D: Y = X W + b with W (in, out)."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(in_features, out_features))
            self.bias = nn.Parameter(torch.randn(out_features))

        def forward(self, x):
            return x @ self.weight + self.bias

    Conv1D.__module__ = "transformers.pytorch_utils"
    return Conv1D()


def sparse_linear(dense: nn.Module) -> SparseLinear:
    return SparseLinear(dense, RecipeConfig(name="test", projection="magnitude"))


def fill(adapter: LoRA | SLoRB) -> LoRA | SLoRB:
    """Give every parameter a value, as after some training."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return adapter


def trained(cfg: AdapterConfig, layer: nn.Module | None = None) -> nn.Module:
    layer = nn.Linear(IN, OUT) if layer is None else layer
    attach(layer, fill(make_adapter(cfg, IN, OUT)))
    return layer


def two_layers(cfg: AdapterConfig, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(trained(cfg), nn.Linear(OUT, IN), trained(cfg))


class Sgd:
    """W ← W − lr·g."""

    def __call__(self, name, parameter, gradient):
        parameter -= 0.1 * gradient


class Adamw:
    """Loshchilov & Hutter 2019, algorithm 2, with their weight decay coupled to the learning rate."""

    def __init__(self):
        self.moments = {}

    def __call__(self, name, parameter, gradient):
        m, v, t = self.moments.get(name, (0, 0, 0))
        m, v, t = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2, t + 1
        self.moments[name] = m, v, t
        parameter *= 1 - 0.1 * 0.2
        parameter -= 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)


def torch_optimizer(rule, parameters):
    if isinstance(rule, Sgd):
        return torch.optim.SGD(parameters, lr=0.1)
    return torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)


@pytest.mark.parametrize("make_rule", [Sgd, Adamw])
@pytest.mark.parametrize(("init", "alpha"), [("kaiming", 6.0), ("normal", 1.0)])
def test_lora_trains_as_its_equation(make_rule, init, alpha):
    """Y = X Wᵀ + c + (α/r) X Aᵀ Bᵀ with loss Σ(Y − T)²/2 and its derivatives by hand."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).double()
    attach(layer, make_adapter(AdapterConfig(kind="lora", rank=3, alpha=alpha, init=init), IN, OUT))
    w, c = (parameter.detach().clone() for parameter in (layer.weight, layer.bias))
    a, b = layer.adapter.a.detach().clone(), torch.zeros(OUT, 3, dtype=torch.float64)
    rule = make_rule()
    optimizer = torch_optimizer(rule, layer.parameters())
    for _ in range(4):
        x, target = torch.randn(TOKENS, IN).double(), torch.randn(TOKENS, OUT).double()
        optimizer.zero_grad()
        output = layer(x)
        ((output - target) ** 2 / 2).sum().backward()
        optimizer.step()

        y = x @ w.T + c + alpha / 3 * x @ a.T @ b.T
        torch.testing.assert_close(output, y)
        g = y - target
        da, db = alpha / 3 * (g @ b).T @ x, alpha / 3 * g.T @ (x @ a.T)
        for name, value, gradient in (("w", w, g.T @ x), ("c", c, g.sum(0)), ("a", a, da), ("b", b, db)):
            rule(name, value, gradient)
        for parameter, value in zip(
            (layer.weight, layer.bias, layer.adapter.a, layer.adapter.b), (w, c, a, b), strict=True
        ):
            torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize("make_rule", [Sgd, Adamw])
@pytest.mark.parametrize("train_groups", [True, False])
@pytest.mark.parametrize("init", ["mean", "sum"])
def test_slorb_trains_as_its_equation(make_rule, train_groups, init):
    """Y = X (M⊙W)ᵀ + (X Pᵀ) Sᵀ, S from the pruned weights, with loss Σ(Y − T)²/2 and its derivatives by hand."""
    torch.manual_seed(0)
    layer = sparse_linear(nn.Linear(IN, OUT, bias=False).double())
    attach(layer, make_adapter(AdapterConfig(kind="slorb", group=4, init=init, train_groups=train_groups), IN, OUT))
    assert not layer.adapter.s.any()
    layer.adapter.start(layer.weight, layer.mask)
    w, mask = layer.weight.detach().clone(), layer.mask.clone()
    p = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]).double()
    s = (w * ~mask) @ p.T / (4 if init == "mean" else 1)
    torch.testing.assert_close(layer.adapter.s.detach(), s)
    rule = make_rule()
    optimizer = torch_optimizer(rule, layer.parameters())
    for _ in range(4):
        x, target = torch.randn(TOKENS, IN).double(), torch.randn(TOKENS, OUT).double()
        optimizer.zero_grad()
        output = layer(x)
        ((output - target) ** 2 / 2).sum().backward()
        optimizer.step()

        y = x @ (w * mask).T + x @ p.T @ s.T
        torch.testing.assert_close(output, y)
        g = y - target
        ds, dp = g.T @ (x @ p.T), (g @ s).T @ x
        rule("w", w, g.T @ x)
        rule("s", s, ds)
        if train_groups:
            rule("p", p, dp)
            torch.testing.assert_close(layer.adapter.p.detach(), p)
        torch.testing.assert_close(layer.weight.detach(), w)
        torch.testing.assert_close(layer.adapter.s.detach(), s)
        layer.project()


def test_slorb_without_trained_groups_stores_none():
    adapter = make_adapter(KINDS["slorb_sums"], IN, OUT)
    assert [name for name, _ in adapter.named_parameters()] == ["s"]
    assert adapter.state_dict().keys() == {"s"}


def test_slorb_of_a_dense_layer_adds_nothing():
    adapter = fill(make_adapter(KINDS["slorb"], IN, OUT))
    adapter.start(torch.randn(OUT, IN), None)
    assert not adapter.s.any()
    assert not adapter(torch.randn(TOKENS, IN)).any()


def test_slorb_refuses_inputs_that_do_not_divide():
    with pytest.raises(ValueError, match="in_features must be a multiple of group; found in_features=8, group=3"):
        make_adapter(AdapterConfig(kind="slorb", group=3, init="mean"), IN, OUT)


@pytest.mark.parametrize(
    ("kind", "init", "allowed"), [("lora", "mean", "kaiming, normal"), ("slorb", "kaiming", "mean, sum")]
)
def test_an_init_of_the_other_kind_is_refused(kind, init, allowed):
    expected = f"recipe.adapter.init: found {init} with recipe.adapter.kind={kind}; allowed: {allowed}"
    with pytest.raises(UserError, match=expected):
        make_adapter(AdapterConfig(kind=kind, init=init), 16, OUT)


def test_lora_starts_as_nothing_and_is_drawn_from_the_global_seed():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(make_adapter(AdapterConfig(kind="lora", rank=64), 400, OUT))
    assert torch.equal(drawn[0].a, drawn[1].a)
    assert not torch.equal(drawn[0].a, drawn[2].a)
    assert not drawn[0](torch.randn(3, 400)).any()
    bound = 1 / 400**0.5  # of the uniform distribution, whose standard deviation is bound/√3
    assert 0.99 * bound < drawn[0].a.abs().max() <= bound
    normal = make_adapter(AdapterConfig(kind="lora", rank=64, init="normal"), 400, OUT)
    torch.testing.assert_close(normal.a.std(), torch.tensor(1.0), rtol=0.03, atol=0)


@every_kind
@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: sparse_linear(nn.Linear(i, o)),
                                  lambda i, o: conv1d(o, i), lambda i, o: sparse_linear(conv1d(o, i))],
                         ids=["linear", "sparse", "conv1d", "sparse conv1d"])  # fmt: skip
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN)], ids=str)
def test_every_layer_and_shape_gets_the_delta_added(cfg, make, shape):
    torch.manual_seed(0)
    layer, x = make(IN, OUT), torch.randn(shape)
    before = layer(x)
    trained(cfg, layer)
    torch.testing.assert_close(layer(x), before + x @ layer.adapter.delta().T)


@every_kind
def test_inactive_adds_nothing_and_gets_no_gradient(cfg):
    torch.manual_seed(0)
    layer, x = nn.Linear(IN, OUT), torch.randn(TOKENS, IN)
    before = layer(x)
    trained(cfg, layer)
    layer.adapter.active = False
    assert torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert all(parameter.grad is None for parameter in layer.adapter.parameters())
    layer.adapter.active = True
    layer(x).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.adapter.parameters())


@every_kind
def test_autocast(cfg):
    torch.manual_seed(0)
    layer, x = trained(cfg), torch.randn(TOKENS, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@every_kind
def test_a_bf16_layer_makes_its_adapter_bf16(cfg):
    torch.manual_seed(0)
    layer = trained(cfg, nn.Linear(IN, OUT).bfloat16())
    assert layer(torch.randn(TOKENS, IN).bfloat16()).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())


@every_kind
@pytest.mark.parametrize("sparse", [False, True], ids=["linear", "sparse"])
def test_compiles_as_one_graph_and_follows_active(cfg, sparse):
    torch.manual_seed(0)
    layer = trained(cfg, sparse_linear(nn.Linear(IN, OUT)) if sparse else None)
    x = torch.randn(TOKENS, IN)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for active in (True, False, True):
        layer.adapter.active = active
        assert torch.equal(compiled(x), layer(x))
        compiled(x).sum().backward()


@every_kind
def test_a_copy_has_an_adapter_of_its_own(cfg):
    layer, x = two_layers(cfg)[0], torch.randn(TOKENS, IN)
    twin = copy.deepcopy(layer)
    expected = layer(x)
    fill(twin.adapter)
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(twin(x), expected)


@every_kind
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_merge_computes_the_same_and_unmerge_restores_the_bits(cfg, transposed):
    torch.manual_seed(0)
    model = nn.Sequential(trained(cfg, conv1d(OUT, IN) if transposed else None))
    layer, x = model[0], torch.randn(TOKENS, IN)
    weight, expected, state = layer.weight.detach().clone(), model(x), copy.deepcopy(model.state_dict())
    for _ in range(2):  # merging twice changes nothing
        merge_adapters(model)
        torch.testing.assert_close(model(x), expected)
    assert not torch.equal(layer.weight, weight)
    assert model.state_dict().keys() == {"0.weight", "0.bias"}  # a plain layer's
    with pytest.raises(ValueError, match=r"0.adapter is merged: call unmerge_adapters"):
        model.load_state_dict(state)
    for _ in range(2):
        unmerge_adapters(model)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == state.keys()


def test_an_inactive_adapter_is_not_merged():
    model = two_layers(KINDS["lora"])
    model[0].adapter.active = False
    weights, x = [layer.weight.detach().clone() for layer in model], torch.randn(TOKENS, IN)
    expected = model[0](x)
    merge_adapters(model)
    assert [torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True)] == [
        True,
        True,
        False,
    ]
    assert torch.equal(model[0](x), expected)


def test_merging_never_fills_up_a_2_4_weight():
    torch.manual_seed(0)
    sparse = trained(KINDS["lora"], sparse_linear(nn.Linear(IN, OUT)))
    model = nn.Sequential(trained(KINDS["lora"]), nn.Linear(OUT, IN), sparse)
    weights, x = [layer.weight.detach().clone() for layer in model], torch.randn(TOKENS, IN)
    with pytest.raises(ValueError, match="2 computes with a 2:4 weight, .*: keep the adapter apart"):
        merge_adapters(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))
    packed = copy.deepcopy(model)
    pack_model(packed)
    torch.testing.assert_close(packed(x), model(x))
    with pytest.raises(ValueError, match="2 computes with a 2:4 weight"):
        merge_adapters(packed)
    sparse.go_dense()
    expected = model(x)
    merge_adapters(model)
    torch.testing.assert_close(model(x), expected)


def test_merging_never_changes_a_tied_partner():
    embedding = nn.Embedding(OUT, IN)
    head = nn.Linear(IN, OUT)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embed": embedding, "head": trained(KINDS["lora"], head)})
    with pytest.raises(ValueError, match="head shares its weight with another module"):
        merge_adapters(model)


def test_attach_refuses_another_shape_and_a_second_adapter():
    layer = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match="in_features=6, out_features=8; the layer has in_features=8, out_features=6"):
        attach(layer, LoRA(OUT, IN))
    attach(layer, LoRA(IN, OUT))
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(layer, LoRA(IN, OUT))
    with pytest.raises(ValueError, match="kind=none has no adapter"):
        make_adapter(AdapterConfig(), IN, OUT)


@every_kind
def test_flop_count_sees_the_products(cfg):
    """6 FLOP per weight and token; sums over fixed groups are additions, and not counted."""
    model = nn.Sequential(trained(cfg))
    dense = nn.Sequential(nn.Linear(IN, OUT, device="meta"))
    weights = {
        "lora": cfg.rank * (IN + OUT),
        "slorb": IN // cfg.group * (OUT + (IN if cfg.train_groups else 0)),
    }
    assert count_model(model, dense, (torch.zeros(1, 3, IN),), 3).flop_per_token == 6 * (IN * OUT + weights[cfg.kind])


def test_the_hook_adds_in_the_layers_own_precision():
    """Under autocast every product is of bf16 values, as the layer's."""
    torch.manual_seed(0)
    layer, x = trained(KINDS["lora"]), torch.randn(TOKENS, IN)
    a, b, w, c, xb = (t.detach().bfloat16() for t in (layer.adapter.a, layer.adapter.b, layer.weight, layer.bias, x))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, F.linear(xb, w, c) + F.linear(F.linear(xb, a), b) * (6.0 / 3))


def test_the_code_in_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "docs/adapters.md", "exec"), names)
    assert list(adapters_of(names["model"])) == ["0", "2"]
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
