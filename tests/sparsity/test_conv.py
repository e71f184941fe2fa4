"""Sparse convolutions: PyTorch's own with the masked weight, whichever way they are computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sparse24 import backends, dispatch
from sparse24.autograd import MvueKey
from sparse24.dispatch import Plan
from sparse24.reference import mvue24, uniform24
from torch import nn

from sparse_pretrain.config import AdapterConfig, LearnedConfig, RecipeConfig
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
from sparse_pretrain.sparsity.conv import Geometry, SparseConv2d
from sparse_pretrain.sparsity.packed import PackedConv2d, pack_model
from sparse_pretrain.sparsity.swap import select_layers
from tests.sparse24.reference_backend import Reference
from tests.sparsity.by_hand import keep

BY_PATCHES = Plan("dense", "dense", "reference")  # what a sparse product of dW would need, without one

# fmt: off
GEOMETRIES = {
    "1x1": {"in_channels": 8, "kernel_size": 1},
    "1x1, stride": {"in_channels": 8, "kernel_size": 1, "stride": 2},
    "1x1, padding": {"in_channels": 8, "kernel_size": 1, "padding": 1},
    "3x3": {"in_channels": 8, "kernel_size": 3},
    "3x3, padding": {"in_channels": 8, "kernel_size": 3, "padding": 1, "bias": False},
    "3x3, stride": {"in_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1},
    "3x3, dilation": {"in_channels": 4, "kernel_size": 3, "dilation": 2, "padding": 2},
    "uneven": {"in_channels": 4, "kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "odd channels, 2x2": {"in_channels": 3, "kernel_size": 2},
    "same": {"in_channels": 4, "kernel_size": (4, 2), "padding": "same"},
    "valid": {"in_channels": 4, "kernel_size": 3, "padding": "valid"},
    "circular": {"in_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"in_channels": 4, "kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "groups": {"in_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise 4x4": {"in_channels": 8, "kernel_size": 4, "stride": 2, "groups": 8},
}  # fmt: skip


def conv(name="3x3, padding", out=8, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return nn.Conv2d(out_channels=out, **{**GEOMETRIES[name], **changes}).to(dtype)


def image(layer, batch=3, height=9, width=10):
    torch.manual_seed(1)
    return torch.randn(batch, layer.in_channels, height, width, dtype=layer.weight.dtype)


def swap(dense, projection="magnitude", plan=None, **changes):
    layer = SparseConv2d(dense, RecipeConfig("test", projection, **changes))
    layer.plan = plan or Plan()
    layer.project()
    return layer


def gradients(output, *inputs):
    torch.manual_seed(2)  # `randn_like` would fill in the order of memory
    return torch.autograd.grad(
        output, [i for i in inputs if i is not None], torch.randn(output.shape, dtype=output.dtype)
    )


def same_convolution(dense, x, weight):
    """PyTorch's, with another weight: padding of every kind is its own."""
    return dense._conv_forward(x, weight, dense.bias)


# a grouped convolution has no patches
WAYS = [
    (name, plan) for name in GEOMETRIES for plan in (Plan(), BY_PATCHES)[: 1 if "groups" in GEOMETRIES[name] else 2]
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("projection", ["magnitude", "transposable"])
@pytest.mark.parametrize(
    ("name", "plan"), WAYS, ids=lambda value: {Plan(): "conv", BY_PATCHES: "patches"}.get(value, value)
)
def test_outputs_and_gradients_are_those_of_the_masked_convolution(name, projection, plan):
    dense = conv(name)
    layer = swap(copy.deepcopy(dense), projection, plan)
    groups = layer.weight.flatten(1).mul(layer.mask.flatten(1)).reshape(-1, 4)
    assert ((groups != 0).sum(-1) == 2).all()
    if projection == "magnitude":
        assert torch.equal(layer.mask.flatten(1), keep(dense.weight.flatten(1)))
    x = image(dense).requires_grad_()
    masked = (dense.weight * layer.mask).detach().requires_grad_()
    expected = same_convolution(dense, x, masked)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    wanted = gradients(expected, x, masked, dense.bias)
    for a, b in zip(gradients(found, x, layer.weight, layer.bias), wanted, strict=True):
        torch.testing.assert_close(a, b)  # straight through: dW is whole


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name not in ("circular", "reflect")])
def test_the_smallest_input_of_an_output(name):
    dense = conv(name)
    height, width = Geometry.of(dense).input_size((5, 7))
    assert dense(image(dense, 1, height, width)).shape[2:] == (5, 7)
    assert dense(image(dense, 1, height - 1, width)).shape[2:] == (4, 7)
    assert dense(image(dense, 1, height, width - 1)).shape[2:] == (5, 6)


@pytest.mark.parametrize("plan", [Plan(), BY_PATCHES], ids=["convolution", "patches"])
def test_in_float32(plan):
    dense = conv(dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), plan=plan)
    x = image(dense)
    torch.testing.assert_close(layer(x), same_convolution(dense, x, dense.weight * layer.mask))


@pytest.mark.parametrize("plan", [Plan(), BY_PATCHES], ids=["convolution", "patches"])
@pytest.mark.parametrize("input_gradient", ["dense", "double_pruned"])
def test_the_input_gradient_may_use_another_weight(input_gradient, plan):
    dense = conv("3x3, stride")
    layer = swap(copy.deepcopy(dense), plan=plan, input_gradient=input_gradient)
    other = dense.weight if input_gradient == "dense" else dense.weight * layer.mask * layer.input_mask
    x = image(dense).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, same_convolution(dense, x, dense.weight * layer.mask))
    (dx,) = gradients(y, x)
    torch.testing.assert_close(dx, gradients(same_convolution(dense, x, other), x)[0])
    if input_gradient == "double_pruned":
        columns = layer.input_mask.flatten(1).t().reshape(-1, 4)
        assert (columns.sum(-1) == 2).all()


@pytest.fixture
def reference(monkeypatch):
    """A backend that anything can be computed with."""
    known = {**backends.BACKENDS, "reference": Reference()}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(dispatch, "BACKENDS", known)


MVUE_CASES = [("1x1, stride", Plan()), ("3x3, padding", Plan()), ("groups", Plan())]
MVUE_CASES += [("1x1, stride", BY_PATCHES), ("3x3, padding", BY_PATCHES)]


@pytest.mark.parametrize(("name", "plan"), MVUE_CASES, ids=str)
def test_mvue_prunes_the_gradient_along_positions(name, plan, reference):
    """dW is that of the output gradient as the reference prunes it; dX and db are those of the whole one."""
    dense = conv(name, bias=True)
    layer = swap(copy.deepcopy(dense), plan=plan, weight_gradient="mvue")
    layer.mvue = MvueKey(7, torch.tensor(5), torch.tensor([3, 16]))
    x = image(dense, batch=4).requires_grad_()
    masked = (dense.weight * layer.mask).detach().requires_grad_()
    expected = same_convolution(dense, x, masked)
    dy = torch.randn_like(expected)
    tokens = dy.permute(0, 2, 3, 1).reshape(-1, 8)
    pruned = mvue24(tokens, uniform24(7, 3, 5, len(tokens), 8, first_token=16))
    assert (pruned == 0).float().mean() > 0.4
    pruned = pruned.view(4, *expected.shape[2:], 8).permute(0, 3, 1, 2)
    (dw,) = torch.autograd.grad(expected, masked, pruned, retain_graph=True)
    dx, db = torch.autograd.grad(expected, (x, dense.bias), dy)
    for found, wanted in zip(
        torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy), (dx, dw, db), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # mvue24 computes in fp32


def test_mvue_is_unbiased():
    """The mean of dW over many steps is the dense dW, within five standard errors."""
    dense = conv("3x3, padding", dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), weight_gradient="mvue")
    counter = torch.zeros(2, dtype=torch.int64)
    layer.mvue = MvueKey(11, torch.tensor(0), counter)
    x = image(dense, batch=2, height=5, width=6)
    masked = (dense.weight * layer.mask).detach().requires_grad_()
    expected = same_convolution(dense, x, masked)
    dy = torch.randn_like(expected)
    (exact,) = torch.autograd.grad(expected, masked, dy)
    draws = []
    for step in range(400):
        counter[0] = step
        draws.append(torch.autograd.grad(layer(x), layer.weight, dy)[0])
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert draws.std(0).min() > 0
    assert error.max() < 5
    assert 0.5 < error.square().mean() < 1.5  # as of a standard normal


def test_without_a_sparse_training_mvue_is_refused():
    dense = conv()
    layer = swap(dense, weight_gradient="mvue")
    with pytest.raises(RuntimeError, match="only under a SparseTraining"):
        layer(image(dense))


@pytest.mark.parametrize("name", ["3x3, stride", "uneven", "circular", "groups"])
def test_inputs_are_measured_for_the_metric(name):
    dense = conv(name, dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), "metric")
    x = image(dense)
    layer(x)
    layer.input_square += layer.step_square
    # what each input of the products adds: the gradient of a convolution of the squares, with as many outputs as groups
    groups = dense.groups
    probe = nn.Conv2d(
        dense.in_channels, groups, dense.kernel_size, dense.stride, dense.padding, dense.dilation, groups, False,
        dense.padding_mode,
    )  # fmt: skip
    probe(x.square()).sum().backward()
    square = probe.weight.grad.flatten(1)
    torch.testing.assert_close(layer.input_square.view(groups, -1), square)
    layer.refresh()
    scores = dense.weight.flatten(1) * square.sqrt().repeat_interleave(8 // groups, 0)
    assert torch.equal(layer.mask.flatten(1), keep(scores))
    assert layer.input_square.sum() == 0


def test_learned_masks_reach_their_logits():
    dense = conv("3x3", dtype=torch.float32)
    layer = swap(dense, "learned", learned=LearnedConfig(logit_std=1.0))
    layer.learned.draw(0.5, seed=3)
    x = image(dense)
    y = layer(x)
    soft = layer.learned.soft_mask().view(layer.weight.shape)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight * soft, layer.bias))
    y.square().sum().backward()
    assert layer.learned.logits.grad.abs().sum() > 0
    torch.testing.assert_close(layer.eval()(x), F.conv2d(x, layer.weight * layer.mask, layer.bias))


@pytest.mark.parametrize("plan", [Plan(), BY_PATCHES], ids=["convolution", "patches"])
def test_under_autocast(plan):
    dense = conv(dtype=torch.float32, bias=True)
    layer = swap(copy.deepcopy(dense), plan=plan)
    x = image(dense).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = same_convolution(dense, x, dense.weight * layer.mask)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    found, wanted = gradients(y, x, layer.weight, layer.bias), gradients(expected, x, dense.weight, dense.bias)
    assert [g.dtype for g in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1] * layer.mask, wanted[1], rtol=2e-2, atol=0.2)


def test_in_fp8():
    dense = conv(dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), fp8=True)
    x = image(dense).requires_grad_()
    expected = same_convolution(dense, x, dense.weight * layer.mask)
    found = layer(x)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    (found,), (expected,) = gradients(found, x), gradients(expected, x)
    assert (found - expected).norm() / expected.norm() < 0.2


def test_one_image_and_weights_in_channels_last():
    dense = conv().to(memory_format=torch.channels_last)
    weight = dense.weight
    layer = swap(dense)
    assert layer.weight is weight
    x = image(dense)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert torch.equal(layer.mask.flatten(1), keep(layer.weight.flatten(1)))
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight * layer.mask, layer.bias, padding=1))


def test_as_a_packed_product(reference):
    dense = conv("3x3, stride", in_channels=16, out=16, dtype=torch.float32)
    layer = swap(copy.deepcopy(dense), "transposable", Plan("reference:a", "reference:b", "dense"))
    assert layer.sparse_weight is None
    x = image(dense).requires_grad_()
    expected = same_convolution(dense, x, dense.weight * layer.mask)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, x), gradients(expected, x))


# --- networks ---


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
