"""Networks with 2:4 convolutions: recipes, what is left dense, and the choice of products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sparse24.dispatch import Plan
from torch import nn

from sparse_pretrain.config_recipe import AdapterConfig, RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.optim.adamw import AdamW, parameter_groups
from sparse_pretrain.sparsity import (
    SparseLinear,
    SparseTraining,
    choose_plans,
    densify,
    load_recipe,
    products,
    sparsify,
)
from sparse_pretrain.sparsity.conv import SparseConv2d
from sparse_pretrain.sparsity.packed import PackedConv2d, pack_model
from sparse_pretrain.sparsity.swap import select_layers
from tests.sparsity.by_hand import keep


def network() -> nn.Module:
    """A stem, three kinds of convolution, a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


SPARSE = ["2", "5", "7"]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is the quarter that is bright."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (16,), generator=generator)
    images = torch.randn(16, 3, 8, 8, generator=generator) * 0.3
    for image_, label in zip(images, labels.tolist(), strict=True):
        image_[label % 3, :, label * 2 : label * 2 + 2] += 2.0
    return images, labels


def train(model, recipe, steps=24):
    training = SparseTraining(model, recipe, steps, seed=1)
    groups = parameter_groups(model, 0.0, 1e-2, training.own_lr)
    optimizer = AdamW(groups, 1e-2, (0.9, 0.95), 1e-8, decay=training.decay, second_moment=training.second_moment)
    training.prepare(0)
    losses = []
    for step in range(steps):
        images, labels = batch(step)
        training.at_tokens(0)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        training.adjust_gradients()
        optimizer.step()
        optimizer.zero_grad()
        training.prepare(step + 1)
        losses.append(loss.item())
    return training, losses


RECIPES = ["ast", "fst", "maskllm", "s_ste", "slope", "sr_ste", "ste", "step"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_a_convolutional_network(name):
    recipe, model = load_recipe(name), network()
    sparsify(model, recipe)
    training, losses = train(model, recipe)
    assert list(training.layers) == SPARSE
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    for layer in training.layers.values():
        mask = layer.mask.flatten(1)
        assert (mask.reshape(-1, 4).sum(-1) == 2).all()
        assert layer.is_sparse == (name != "fst")  # which ends dense
        if layer.is_sparse:
            assert ((layer.sparse_weight.reshape(-1, 4) != 0).sum(-1) <= 2).all()
        if name == "fst":
            assert (mask.t().reshape(-1, 4).sum(-1) == 2).all()


def test_the_default_is_all_but_stem_and_classifier():
    rows = {row.name: row for row in sparsify(network(), load_recipe("slope"))}
    assert [name for name, row in rows.items() if row.sparse] == SPARSE
    assert (rows["2"].out_features, rows["2"].in_features) == (16, 72)
    assert (rows["7"].out_features, rows["7"].in_features) == (16, 36)
    assert not any(row.skipped or row.adapted for row in rows.values())  # adapters are for linear layers


def test_what_has_no_groups_of_four_stays_dense_and_says_so():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 2, groups=2),
        nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    rows = {row.name: row for row in select_layers(model, RecipeConfig("test", "transposable"))}
    assert rows["1"].skipped == "in_features=9 is not a multiple of 4"
    assert rows["2"].sparse
    assert rows["3"].skipped == "out_features=3 is not a multiple of 4, as transposable masks need"
    with pytest.raises(UserError, match="recipe.include: found 0, whose in_features=27 is not a multiple of 4"):
        sparsify(model, RecipeConfig("test", "magnitude"), include=["0"])
    with pytest.raises(UserError, match="recipe.include: found 3, whose groups=2 have no fp8 product"):
        sparsify(model, RecipeConfig("test", "magnitude", fp8=True), include=["3"])
    with pytest.raises(UserError, match="adapter would be for a linear layer"):
        sparsify(model, RecipeConfig("test", adapter=AdapterConfig("lora")), include=["2"])


def test_convolutions_beside_an_ffn_need_a_pattern():
    model = nn.ModuleDict({"patches": nn.Conv2d(3, 8, 4, 4), "mlp": nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1))})
    assert [row.name for row in select_layers(model, RecipeConfig("test", "magnitude")) if row.sparse] == ["mlp.0"]
    rows = select_layers(model, RecipeConfig("test", "magnitude"), include=["*"])
    assert [row.name for row in rows if row.sparse] == ["patches", "mlp.0", "mlp.1"]


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_compute_something_else_are_left_alone():
    model = nn.ModuleDict({
        "plain": nn.Conv2d(8, 8, 1),
        "standardized": Standardized(8, 8, 1),
        "scaled": Scaled(8, 8),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "attention": nn.MultiheadAttention(8, 2),
    })  # fmt: skip
    rows = {row.name: row for row in select_layers(model, RecipeConfig("test", "magnitude"), include=["*"])}
    assert {name: row.skipped for name, row in rows.items() if not row.sparse} == {
        "standardized": "product is computed by Standardized in its own way",
        "scaled": "product is computed by Scaled in its own way",
        "normed": "weight is computed from others",
        "attention.out_proj": "product is computed by nn.MultiheadAttention",
    }


def test_parameters_and_names_stay():
    model = network()
    before = dict(model.named_parameters())
    sparsify(model, load_recipe("fst"))
    after = dict(model.named_parameters())
    assert {name: id(p) for name, p in before.items()} == {name: id(p) for name, p in after.items()}
    assert model[2].mask.shape == model[2].weight.shape == (16, 8, 3, 3)


@pytest.mark.parametrize("recipe", ["fst", "s_ste", "ste"])
def test_densify_and_pack_keep_the_outputs(recipe):
    model = network()
    sparsify(model, load_recipe(recipe))
    model.eval()
    images, _ = batch(0)
    with torch.no_grad():
        expected = model(images)
    packed = copy.deepcopy(model)
    assert pack_model(packed) == 3
    assert [name for name, m in packed.named_modules() if isinstance(m, PackedConv2d)] == SPARSE
    torch.testing.assert_close(packed(images), expected)
    densify(model)
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    for name in SPARSE:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Conv2d
        assert ((layer.weight.flatten(1).reshape(-1, 4) != 0).sum(-1) == 2).all()
    torch.testing.assert_close(model(images), expected)


def test_dense_and_sparse_state_dicts_load_into_each_other():
    dense, sparse = network(), network()
    sparsify(sparse, load_recipe("ste"))
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_()
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse[2].mask.flatten(1), keep(dense[2].weight.flatten(1)))
    left = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert left.missing_keys == []
    assert left.unexpected_keys == [f"{name}.mask" for name in SPARSE]
    state = copy.deepcopy(sparse.state_dict())
    state["2.mask"] = state["2.mask"].flatten(1).flip(1).view(16, 8, 3, 3)
    sparse.load_state_dict(state)
    assert torch.equal(sparse[2].sparse_weight, (sparse[2].weight * state["2.mask"]).flatten(1))


def test_patches_train_as_convolutions_do(reference):
    """The same losses with packed products of patches."""
    losses = []
    for by_patches in (False, True):
        recipe, model = load_recipe("fst"), network()
        sparsify(model, recipe, include=["2", "5"])
        if by_patches:
            model[2].plan = Plan("dense", "reference:a", "reference:a")
            model[5].plan = Plan("reference:a", "reference:b", "reference:a")
        losses.append(train(model, recipe, 12)[1])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize("recipe", ["ste", "slope"])
def test_compiled_without_a_graph_break(recipe):
    recipe, model = load_recipe(recipe), network()
    sparsify(model, recipe)
    SparseTraining(model, recipe, 24, seed=1).prepare(0)
    images, labels = batch(0)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = F.cross_entropy(run(images), labels)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(found[0], found[1])


# --- the choice of products ---

ROWS = {"2": 16 * 16, "5": 16 * 16, "7": 16 * 16}


def plans(backend="auto", device="cpu", include=None, rows=ROWS):
    model = network()
    sparsify(model, load_recipe("ste"), include=include)
    return choose_plans(model, rows, torch.float32, torch.device(device), backend=backend)


def test_on_a_cpu_nothing_is_measured():
    assert plans() == (dict.fromkeys(SPARSE, Plan()), "")


def test_a_backend_asked_for_serves_convolutions_but_grouped_ones(reference):
    chosen, table = plans("reference", include=["5"])
    assert chosen["5"].forward.startswith("reference:")
    assert "16x16, 256 tokens" in table
    with pytest.raises(UserError, match=r"reference, which serves 2:4 weights, with a convolution of 4 groups"):
        plans("reference", include=["5", "7"])
    with pytest.raises(UserError, match=r"reference, which cannot serve 2: .*multiples of 16, found 72"):
        plans("reference", include=["2"])


@pytest.mark.parametrize(("by_patches", "chosen"), [(0.9, True), (0.99, False), (2.0, False)])
def test_auto_asks_whether_the_whole_layer_is_faster(reference, monkeypatch, by_patches, chosen):
    """As on a GPU, where products were measured to be faster sparse: so must be the layer, or it stays a convolution."""
    sparse = Plan("reference:a", "dense", "dense")
    monkeypatch.setattr(products, "choose", lambda shape, *_: (sparse, []))
    seen = []

    def pretend_ms(step, device):
        step()  # both ways do run
        seen.append(device)
        return 1.0 if len(seen) % 2 else by_patches

    monkeypatch.setattr(products, "median_ms", pretend_ms)

    class Cuda:
        """A CPU that says it is a GPU."""

        type = "cuda"

    model = network()
    sparsify(model, load_recipe("ste"), include=["2", "5"])
    model[2] = SparseConv2d(nn.Conv2d(16, 16, 3, stride=2, padding=1), load_recipe("ste"))
    real = torch.device("cpu")
    monkeypatch.setattr(products, "_beats_convolution", lambda *args, f=products._beats_convolution: f(*args[:3], real))
    chosen_plans, table = choose_plans(model, ROWS, torch.float32, Cuda())
    assert chosen_plans == {"2": sparse if chosen else Plan(), "5": sparse if chosen else Plan()}
    assert "16x144, 256 tokens, a 3x3 convolution" in table
    assert f"*{by_patches:.3f} ms" in table if chosen else "*1.000 ms" in table
    assert len(seen) == 4
