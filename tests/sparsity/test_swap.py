"""Swapping layers: exactly the ones meant, the same Parameters, and back."""

import pytest
import torch
from torch import nn

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.sparsity import SparseLinear, densify, load_recipe, sparsify
from sparse_pretrain.sparsity.packed import pack_model

CONFIG = GPTConfig(name="tiny", n_layer=2, n_head=2, d_model=16, max_seq_len=8)
FFN = ["blocks.0.ffn.up", "blocks.0.ffn.down", "blocks.1.ffn.up", "blocks.1.ffn.down"]


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG, 32)


def sparse_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def recipe(projection="magnitude", **changes) -> RecipeConfig:
    return RecipeConfig(name="test", projection=projection, **changes)


def test_default_is_the_ffn_of_every_block():
    model = gpt()
    rows = sparsify(model, load_recipe("fst"))
    assert sparse_names(model) == FFN
    assert [row.name for row in rows if row.sparse] == FFN
    assert "head" in [row.name for row in rows]


def test_patterns_are_anchored():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"ffn": nn.Linear(4, 4)}) for _ in range(21))})
    sparsify(model, recipe(), include=["blocks.2.ffn"])
    assert sparse_names(model) == ["blocks.2.ffn"]


def test_exclude_wins():
    model = gpt()
    sparsify(model, recipe(), include=["*.ffn.*", "*.attn.*"], exclude=["blocks.0.*"])
    assert sparse_names(model) == [
        "blocks.1.attn.qkv", "blocks.1.attn.out", "blocks.1.ffn.up", "blocks.1.ffn.down",
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option):
    model = gpt()
    with pytest.raises(UserError, match=rf"recipe.{option}: found \*.fnn.\*, which matches no linear layer"):
        sparsify(model, recipe(), **{"include": ["*.ffn.*"], option: ["*.fnn.*"]})
    assert sparse_names(model) == []


def odd_shapes() -> nn.Module:
    return nn.ModuleDict({"good": nn.Linear(8, 8), "narrow": nn.Linear(6, 8), "short": nn.Linear(8, 6)})


def test_a_shape_that_cannot_be_2_4_is_skipped_and_listed_under_a_wildcard():
    model = odd_shapes()
    rows = {row.name: row for row in sparsify(model, recipe("transposable"), include=["*"])}
    assert sparse_names(model) == ["good"]
    assert rows["narrow"].skipped == "in_features=6 is not a multiple of 4"
    assert "out_features=6" in rows["short"].skipped
    model = odd_shapes()
    sparsify(model, recipe("magnitude"), include=["*"])
    assert sparse_names(model) == ["good", "short"]


def test_and_refused_when_named():
    with pytest.raises(UserError, match="recipe.include: found narrow, whose in_features=6"):
        sparsify(odd_shapes(), recipe(), include=["narrow"])
    with pytest.raises(UserError, match="no layer that can be sparse"):
        sparsify(odd_shapes(), recipe(), include=["narro*"])


def test_a_model_without_ffn_names_asks_for_patterns():
    with pytest.raises(UserError, match="recipe.include: found no FFN layer by its usual names"):
        sparsify(odd_shapes(), recipe())


def test_dense_swaps_nothing():
    model = gpt()
    rows = sparsify(model, load_recipe("dense"))
    assert sparse_names(model) == []
    assert not any(row.sparse for row in rows)


def test_parameters_are_the_same_objects_and_names():
    model = gpt()
    before = dict(model.named_parameters())
    sparsify(model, recipe())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert set(model.state_dict()) - set(before) == {f"{name}.mask" for name in FFN} | {"head.weight"}


@pytest.mark.parametrize("projection", ["magnitude", "transposable"])
def test_the_weight_is_2_4_and_densify_keeps_the_outputs(projection):
    model = gpt()
    dense_types = {name: type(model.get_submodule(name)) for name in FFN}
    sparsify(model, recipe(projection))
    for name in FFN:
        groups = model.get_submodule(name).sparse_weight.reshape(-1, 4)
        assert ((groups != 0).sum(-1) == 2).all()
    tokens = torch.randint(32, (2, 8))
    expected = model(tokens)
    densify(model)
    assert {name: type(model.get_submodule(name)) for name in FFN} == dense_types
    assert torch.equal(model(tokens), expected)


def test_packed_weights_compute_the_same():
    model = gpt()
    sparsify(model, recipe())
    tokens = torch.randint(32, (2, 8))
    expected = model(tokens)
    assert pack_model(model) == 4
    assert torch.equal(model(tokens), expected)
    assert sparse_names(model) == []


def test_dense_and_sparse_state_dicts_load_into_each_other():
    dense, sparse = gpt(), gpt()
    sparsify(sparse, recipe())
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_()
    assert sparse.load_state_dict(dense.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    fresh = gpt()
    fresh.load_state_dict(dense.state_dict())
    sparsify(fresh, recipe())
    tokens = torch.randint(32, (2, 8))
    assert torch.equal(sparse(tokens), fresh(tokens))  # masks follow the loaded weights
    missing = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert set(missing.unexpected_keys) == {f"{name}.mask" for name in FFN}


def test_a_sparse_checkpoint_restores_its_masks_not_new_ones():
    model = gpt()
    sparsify(model, recipe())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    mask = state["blocks.0.ffn.up.mask"]
    state["blocks.0.ffn.up.mask"] = mask.flip(1)  # still 2:4, but not of the largest magnitudes
    model.load_state_dict(state)
    layer = model.blocks[0].ffn.up
    assert torch.equal(layer.mask, mask.flip(1))
    assert torch.equal(layer.sparse_weight, layer.weight * mask.flip(1))


@pytest.mark.parametrize("projection", ["magnitude", "transposable"])
def test_hugging_face_conv1d(projection):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": conv1d(32, 8)})})
    dense = model["mlp"]["c_fc"]
    weight = dense.weight.detach().clone()  # (in, out)
    rows = sparsify(model, recipe(projection))
    layer = model["mlp"]["c_fc"]
    assert (rows[0].out_features, rows[0].in_features) == (32, 8)
    assert layer.weight is dense.weight
    assert ((layer.mask.t().reshape(-1, 4)).sum(-1) == 2).all()
    x = torch.randn(3, 5, 8, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ (weight * layer.mask) + dense.bias)
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().flatten(0, 1).sum(0)[:, None].expand(8, 32))
    densify(model)
    assert model["mlp"]["c_fc"] is dense
    torch.testing.assert_close(dense(x), y)


def test_a_hugging_face_gpt2_trains_sparse():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    sparsify(model, load_recipe("ste"))
    assert sparse_names(model) == [f"transformer.h.{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")]
    tokens = torch.randint(64, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in model.modules():
            if isinstance(layer, SparseLinear):
                layer.refresh()
                layer.project()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_densify_leaves_a_tied_partner_alone():
    model = gpt()
    sparsify(model, recipe(), include=["*"])  # the head is tied to the embedding
    tokens = torch.randint(32, (2, 8))
    expected, embedding = model(tokens), model.tok_embed.weight.detach().clone()
    densify(model)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model.tok_embed.weight, embedding)


def test_a_layer_used_twice_is_swapped_under_both_names():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    rows = sparsify(model, recipe(), include=["0"])
    assert model[0] is model[2]
    assert isinstance(model[0], SparseLinear)
    assert [row.name for row in rows] == ["0"]
    x = torch.randn(3, 8)
    expected = model(x)
    densify(model)
    assert model[0] is model[2] is layer
    assert torch.equal(model(x), expected)


def test_a_bare_layer_cannot_be_swapped_in_place():
    with pytest.raises(ValueError, match="put it into a module"):
        sparsify(nn.Linear(8, 8), recipe(), include=["*"])
