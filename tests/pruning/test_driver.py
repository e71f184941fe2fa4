"""Pruning whole models block by block, against running the whole model anew for every block."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.pruning.blocks import find_blocks, find_stacks
from sparse_pretrain.pruning.driver import Method, prune_blocks, select_layers
from sparse_pretrain.pruning.oats import oats
from sparse_pretrain.pruning.sparsegpt import sparsegpt
from sparse_pretrain.pruning.wanda import magnitude, wanda
from tests.pruning.small_models import MODELS, bart, build, convolutions, gemma, gpt, llama, mlp, our_seq2seq

transformers = pytest.importorskip("transformers")

METHODS = {
    "magnitude": lambda w, x: (magnitude(w, (2, 4)),),
    "wanda": lambda w, x: (wanda(w, x.square().sum(0), (2, 4)),),
    "sparsegpt": lambda w, x: (sparsegpt(w, x.T @ x, (2, 4)),),
    "oats": lambda w, x: oats(w, x.square().sum(0), (2, 4), iterations=3),
}

WANDA = Method("wanda", (2, 4))


def inputs_of(model: nn.Module, forward: Callable, batches: list[Any], name: str) -> Tensor:
    """Everything one layer is multiplied with, (rows, in_features), when the whole model runs."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
        seen.append(x.reshape(-1, x.shape[-1]).clone())  # a block may write into it

    handle = layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            forward(batch)
    handle.remove()
    return torch.cat(seen)


def as_matrix(layer: nn.Module) -> Tensor:
    weight = layer.weight.detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight.reshape(len(weight), -1)


def set_matrix(layer: nn.Module, values: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(values.T if type(layer).__name__ == "Conv1D" else values.reshape(layer.weight.shape))


def prune_by_running_everything(
    model, forward, batches, blocks: list[list[str]], method: str
) -> dict[str, tuple[Tensor, ...]]:
    """blocks: the layers of each, in the order in which they run."""
    results: dict[str, tuple[Tensor, ...]] = {}
    for names in blocks:
        inputs = {name: inputs_of(model, forward, batches, name) for name in names}
        for name in names:
            layer = model.get_submodule(name)
            results[name] = METHODS[method](as_matrix(layer), inputs[name])
            sparse, *factors = results[name]
            set_matrix(layer, sparse + factors[0] @ factors[1] if factors else sparse)
    return results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MODELS)
def test_blocks_get_what_the_pruned_ones_before_them_give(make, method):
    model, forward, batches = build(make)
    if method == "oats" and make is convolutions:
        with pytest.raises(UserError, match="no layer that can be pruned"):
            select_layers(model, Method(method, (2, 4)), None, [])
        return
    layers = select_layers(model, Method(method, (2, 4)), None, [])
    reference, again, _ = build(make)
    reference.load_state_dict(model.state_dict())
    names = [[name for name, reason in block.items() if not reason] for block in layers.values()]
    expected = prune_by_running_everything(reference, again, batches, names, method)

    found = {}
    for block, pruned in prune_blocks(model, forward, batches, layers, Method(method, (2, 4), iterations=3)):
        assert list(pruned) == list(layers[block])
        found |= pruned
    assert len(found) == sum(map(len, layers.values()))
    for name, pruned in found.items():
        if pruned.weight is None:
            assert layers[name.rpartition(".")[0]] or pruned.report.skipped
            continue
        sparse, *factors = expected[name]
        torch.testing.assert_close(pruned.weight, sparse, rtol=1e-3, atol=1e-4)
        assert torch.equal(as_matrix(model.get_submodule(name)), pruned.weight)
        assert (pruned.weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()
        assert pruned.report.sparsity == pytest.approx(0.5, abs=1e-6)
        assert (pruned.report.out_features, pruned.report.in_features) == sparse.shape
        if factors:
            torch.testing.assert_close(pruned.left @ pruned.right, factors[0] @ factors[1], rtol=1e-3, atol=1e-4)
            assert pruned.report.rank == pruned.right.shape[0]


def test_the_reported_error_is_that_of_the_output():
    for method in METHODS:
        model, forward, batches = build(llama)
        before = copy.deepcopy(model)
        layers = select_layers(model, WANDA, ["model.layers.0.mlp.up_proj"], [])
        ((_, pruned),) = prune_blocks(model, forward, batches, layers, Method(method, (2, 4), iterations=3))
        ((name, layer),) = pruned.items()
        x = inputs_of(before, before, batches, name)
        right = x @ before.get_submodule(name).weight.T
        approximation = layer.weight if layer.left is None else layer.weight + layer.left @ layer.right
        assert layer.report.error == pytest.approx(
            float((right - x @ approximation.T).detach().norm() / right.detach().norm()), rel=1e-3
        )


def test_finished_blocks_are_taken_over_and_not_pruned_again():
    for method in METHODS:
        model, forward, batches = build(gpt)
        start = copy.deepcopy(model.state_dict())
        layers = select_layers(model, Method(method, (2, 4)), None, [])
        whole = dict(prune_blocks(model, forward, batches, layers, Method(method, (2, 4), iterations=3)))
        end = copy.deepcopy(model.state_dict())
        model.load_state_dict(start)
        done = {block: whole[block] for block in ("blocks.0", "blocks.1")}
        seen = []
        again = dict(
            prune_blocks(model, forward, batches, layers, Method(method, (2, 4), iterations=3), done.get, seen.append)
        )
        assert [report.name for report in seen] == list(layers["blocks.2"])
        assert all(again[block] is done[block] for block in done)
        assert all(torch.equal(end[name], value) for name, value in model.state_dict().items())


def test_blocks_and_stacks():
    def of(make):
        model, forward, batches = build(make)
        return [(plan.names, plan.like) for plan in find_stacks(model, forward, batches[0], find_blocks(model))]

    assert of(llama) == [(["model.layers.0", "model.layers.1", "model.layers.2"], [0, 0, 0])]
    # the second block sees everything, the others the last four tokens
    assert of(gemma) == [(["model.layers.0", "model.layers.1", "model.layers.2"], [0, 1, 0])]
    assert of(bart) == [
        (["model.encoder.layers.0", "model.encoder.layers.1"], [0, 0]),
        (["model.decoder.layers.0", "model.decoder.layers.1"], [0, 0]),
    ]
    assert of(our_seq2seq) == [
        (["encoder.blocks.0", "encoder.blocks.1"], [0, 0]),
        (["decoder.blocks.0", "decoder.blocks.1"], [0, 0]),
    ]
    assert of(mlp) == [(["0"], [0]), (["2"], [0]), (["4"], [0])]  # between them is a ReLU
    assert of(convolutions) == [(["1.0", "1.1"], [0, 0])]


def test_patterns_choose_layers():
    model, _, _ = build(llama)
    chosen = select_layers(model, WANDA, ["*.mlp.*", "model.layers.0.self_attn.q_proj"], ["*.2.*"])
    assert list(chosen) == ["model.layers.0", "model.layers.1"]
    assert list(chosen["model.layers.0"]) == [
        f"model.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert not any(
        "lm_head" in name
        for layers in select_layers(model, Method("sparsegpt", 0.5), None, []).values()
        for name in layers
    )
    with pytest.raises(
        UserError, match=r"include: found \*.ffn.\*, which matches no layer in a block.*model.layers.0.self_attn"
    ):
        select_layers(model, WANDA, ["*.ffn.*"], [])
    with pytest.raises(UserError, match="exclude: found head"):
        select_layers(model, WANDA, None, ["head"])
    with pytest.raises(UserError, match="no layer that can be pruned"):
        select_layers(model, WANDA, ["*.mlp.*"], ["*"])


def test_layers_that_the_pattern_does_not_fit_stay_and_say_why():
    model, forward, batches = build(mlp)
    layers = select_layers(model, Method("wanda", (1, 16)), None, [])
    results = {
        name: p
        for _, pruned in prune_blocks(model, forward, batches, layers, Method("wanda", (1, 16)))
        for name, p in pruned.items()
    }
    assert results["0"].report.skipped == "in_features=8 is not a multiple of 16"
    assert results["0"].weight is None
    assert (model[0].weight != 0).all()
    assert results["2"].report.sparsity == 15 / 16
    with pytest.raises(UserError, match="include: found 0: in_features=8"):
        select_layers(model, Method("wanda", (1, 16)), ["0"], [])
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1))
    assert "groups=2" in select_layers(grouped, WANDA, None, [])["0"]["0"]


def test_convolutions_that_see_more_than_zeros_around_an_image_stay():
    """What they are multiplied with would be another matrix."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding=1))
    layers = select_layers(model, WANDA, None, [])
    assert "circular" in layers["0"]["0"]
    assert layers["1"] == {"1": ""}


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.before(x) + self.after(x.mul_(scale).relu_())


class ScaledBlocks(nn.Module):
    """Each block has an argument of its own: all of them run when the first one's input is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WritesIntoItsInput() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for number, block in enumerate(self.blocks):
            x = block(x, torch.tensor(float(number + 2)))
        return x


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_that_write_into_what_they_are_given(method):
    def make():
        return (model := ScaledBlocks()), model, list(torch.randn(3, 20, 8))

    model, forward, batches = build(make)
    reference, again, _ = build(make)
    layers = select_layers(model, Method(method, (2, 4)), None, [])
    expected = prune_by_running_everything(
        reference, again, batches, [list(names) for names in layers.values()], method
    )
    for _, pruned in prune_blocks(model, forward, batches, layers, Method(method, (2, 4))):
        for name, layer in pruned.items():
            torch.testing.assert_close(layer.weight, expected[name][0], rtol=1e-3, atol=1e-4)


def test_blocks_without_a_tensor_to_begin_with_are_refused():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([WritesIntoItsInput()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](scale=torch.ones(()), x=x)

    model = Named()
    with pytest.raises(UserError, match=r"calls blocks.0 without a tensor as its first argument"):
        list(prune_blocks(model, model, [torch.randn(4, 8)], select_layers(model, WANDA, None, []), WANDA))


class Gate(nn.Module):
    """Only one of two experts is ever used, and only one of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
        self.blocks[0].forward = lambda x: self.blocks[0]["a"](x)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def test_what_no_token_reaches_stays_and_says_so():
    model = Gate()
    results = {
        name: layer.report.skipped
        for _, pruned in prune_blocks(model, model, [torch.randn(4, 8)], select_layers(model, WANDA, None, []), WANDA)
        for name, layer in pruned.items()
    }
    assert results == {
        "blocks.0.a": "",
        "blocks.0.b": "it was never called with a calibration token",
        "blocks.1.a": "the model never runs it",
        "blocks.1.b": "the model never runs it",
    }
    assert (model.blocks[0]["b"].weight != 0).all()


def test_blocks_used_twice_are_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU())])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.blocks[0](x))

    model = Twice()
    with pytest.raises(UserError, match=r"checkpoint: found a model that uses blocks.0 more than once"):
        list(prune_blocks(model, model, [torch.randn(4, 8)], select_layers(model, WANDA, None, []), WANDA))


def test_what_is_not_finite_is_an_error_naming_the_layer():
    model, forward, batches = build(gpt)
    layers = select_layers(model, WANDA, None, [])
    with torch.no_grad():
        model.blocks[1].ffn.up.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks.1.ffn.up: found weights that are not finite"):
        list(prune_blocks(model, forward, batches, layers, Method("magnitude", (2, 4))))
    model, forward, batches = build(gpt)
    with torch.no_grad():
        model.tok_embed.weight[batches[0][0, 0]] = torch.inf
    with pytest.raises(UserError, match=r"blocks.0.attn.qkv: found calibration inputs that are not finite"):
        list(prune_blocks(model, forward, batches, layers, WANDA))


def test_models_in_half_precision_stay_so():
    model, forward, batches = build(llama)
    model.bfloat16()
    layers = select_layers(model, Method("sparsegpt", 0.5), None, [])
    for _, pruned in prune_blocks(model, forward, batches, layers, Method("sparsegpt", 0.5)):
        assert {layer.weight.dtype for layer in pruned.values()} == {torch.bfloat16}
        assert {round(layer.report.sparsity, 2) for layer in pruned.values()} == {0.5}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
