"""A recipe at work: phases, refreshes, decay and flips, each against an independent computation."""

import pytest
import torch
from sparse24.reference import mvue24, uniform24
from torch import nn

from sparse_pretrain.config_recipe import DecayConfig, RecipeConfig, ScheduleConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.optim.adamw import AdamW
from sparse_pretrain.sparsity import SparseLinear, SparseTraining, densify, load_recipe, sparsify
from sparse_pretrain.sparsity.packed import pack_model
from sparse_pretrain.sparsity.schedule import DENSE_FINETUNE, DENSE_WARMUP, SPARSE, PhaseSchedule

STEPS = 20


def build(projection="magnitude", weight_gradient="dense", decay=None, seed=1, **schedule):
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})})
    recipe = RecipeConfig(
        "test",
        projection,
        weight_gradient=weight_gradient,
        decay=decay or DecayConfig(),
        schedule=ScheduleConfig(**schedule),
    )
    sparsify(model, recipe)
    training = SparseTraining(model, recipe, STEPS, seed)
    training.prepare(0)
    return model, training


def forward(model, x):
    return model["ffn"]["down"](torch.relu(model["ffn"]["up"](x)))


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)


def top2(weight):
    """2:4 by magnitude, written another way: sort each group."""
    groups = weight.detach().reshape(-1, 4)
    threshold = groups.abs().sort(dim=1).values[:, 2:3]
    return (groups.abs() >= threshold).view(weight.shape)


def test_phases_are_shares_of_the_run():
    schedule = PhaseSchedule.from_config(ScheduleConfig(dense_warmup=0.1, dense_finetune=1 / 6, refresh_every=4), 24)
    phases = [schedule.phase(step) for step in range(26)]
    assert phases == [DENSE_WARMUP] * 2 + [SPARSE] * 18 + [DENSE_FINETUNE] * 6
    assert [step for step in range(26) if schedule.refresh_due(step)] == [2, 6, 10, 14, 18]


def test_fst_runs_dense_from_step_250k_of_300k():
    schedule = PhaseSchedule.from_config(load_recipe("fst").schedule, 300_000)
    assert schedule.phase(249_999) == SPARSE
    assert schedule.phase(250_000) == DENSE_FINETUNE


def test_a_run_that_ends_sparse_stays_sparse_after_its_last_step():
    schedule = PhaseSchedule.from_config(ScheduleConfig(refresh_every=1), STEPS)
    assert schedule.phase(STEPS) == SPARSE
    assert schedule.refresh_due(STEPS)


def test_between_refreshes_the_mask_holds_and_the_weight_follows():
    model, training = build(refresh_every=3)
    layer = model["ffn"]["up"]
    for step in range(1, 7):
        before = layer.mask.clone()
        perturb(model)
        training.prepare(step)
        if step % 3:
            assert torch.equal(layer.mask, before)
        else:
            assert torch.equal(layer.mask, top2(layer.weight))
        assert torch.equal(layer.sparse_weight, layer.weight * layer.mask)


def test_dense_phases_use_the_master_weight():
    model, training = build(decay=DecayConfig("gradient", 0.1), dense_warmup=0.25, dense_finetune=0.25)
    x = torch.randn(3, 8)
    dense = (
        torch.relu(x @ model["ffn"]["up"].weight.T + model["ffn"]["up"].bias) @ model["ffn"]["down"].weight.T
        + model["ffn"]["down"].bias
    )
    for step, is_dense in ((0, True), (4, True), (5, False), (14, False), (15, True), (STEPS, True)):
        training.prepare(step)
        assert torch.allclose(forward(model, x), dense) == is_dense
        assert training.decay.factor == (0.0 if is_dense else 0.1)


def test_flip_rate_is_the_share_of_changed_entries():
    model, training = build(refresh_every=2)
    assert training.flip_rate() is None
    masks = {name: layer.mask.clone() for name, layer in training.layers.items()}
    perturb(model)
    training.prepare(1)
    assert training.flip_rate() is None  # no second refresh yet
    training.prepare(2)
    changed = {name: int((layer.mask != masks[name]).sum()) for name, layer in training.layers.items()}
    assert sum(changed.values()) > 0
    assert training.flip_rate() == sum(changed.values()) / (2 * 8 * 16)
    assert training.layer_flip_rates() == {name: n / 128 for name, n in changed.items()}


def test_state_restores_flips_and_masks_without_a_refresh():
    model, training = build(refresh_every=2)
    perturb(model)
    training.prepare(2)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, training.state_dict()
    other, resumed = build(refresh_every=2)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    resumed.prepare(2, refresh=False)
    assert resumed.flip_rate() == training.flip_rate()
    for name, layer in training.layers.items():
        assert torch.equal(resumed.layers[name].sparse_weight, layer.sparse_weight)


@pytest.mark.parametrize("name", ["ste", "sr_ste"])
def test_steps_are_the_published_ones(name):
    """ste and sr_ste against a plain loop: Adam on the straight-through gradient, decay beside the step."""
    factor, lr = 2e-4 if name == "sr_ste" else 0.0, 0.05
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": nn.Linear(8, 4, bias=False)})
    weight = model["ffn"].weight.detach().double()
    recipe = load_recipe(name)
    assert recipe.decay.factor == factor
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, STEPS, seed=1)
    optimizer = AdamW(
        [{"params": list(model.parameters()), "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        decay=training.decay,
    )
    training.prepare(0)
    x, y = torch.randn(32, 8), torch.randn(32, 4)
    m = v = torch.zeros(4, 8, dtype=torch.float64)
    for t in range(1, STEPS + 1):
        (model["ffn"](x) - y).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        training.prepare(t)

        mask = top2(weight)
        gradient = 2 * (x.double() @ (weight * mask).T - y.double()).T @ x.double()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight - lr * (adam + factor * ~mask * weight)
        torch.testing.assert_close(model["ffn"].weight.detach().double(), weight, rtol=1e-4, atol=1e-5)


def test_fst_step_is_the_published_one():
    """Clip, then λ(1−M)⊙W onto the gradient, then Adam; the three products with M⊙W; dY pruned without bias."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": nn.Linear(8, 4, bias=False)})
    recipe = load_recipe("fst")
    recipe.decay.factor = 0.5
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, STEPS, seed=1)
    optimizer = AdamW(
        [{"params": list(model.parameters()), "weight_decay": 0.0}],
        lr=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        decay=training.decay,
    )
    training.prepare(0)
    layer = model["ffn"]
    weight, mask = layer.weight.detach().clone(), layer.mask.clone()
    x, dy = torch.randn(16, 8, requires_grad=True), torch.randn(16, 4)
    y = layer(x)
    torch.testing.assert_close(y, x @ (weight * mask).T)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ (weight * mask))
    pruned = mvue24(dy, uniform24(1, 0, 0, 16, 4))
    assert ((pruned.view(4, 4, 4) != 0).sum(1) <= 2).all()
    torch.testing.assert_close(layer.weight.grad, pruned.T @ x.detach())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    gradient = (pruned.T @ x.detach()) / norm + 0.5 * ~mask * weight
    optimizer.step()
    torch.testing.assert_close(
        layer.weight.detach(), weight - 0.1 * gradient / (gradient.abs() + 1e-8), rtol=1e-4, atol=1e-5
    )


def soft_top2(weight):
    """S(W), written another way: sort each group, subtract the third largest magnitude."""
    groups = weight.reshape(-1, 4)
    third = groups.abs().sort(dim=1).values[:, 1:2]
    return (groups.sign() * (groups.abs() - third).clamp(min=0)).view(weight.shape)


def test_s_ste_steps_are_the_published_ones():
    """Ŵ = β·S(W) with β from the start; dX = dY Ŵ; dW = MVUE(dY)ᵀ X, without β, into Adam; no decay."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": nn.Linear(16, 8, bias=False)})
    recipe = load_recipe("s_ste")
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, STEPS, seed=1)
    optimizer = AdamW(
        [{"params": list(model.parameters()), "weight_decay": 0.0}], lr=0.05, betas=(0.9, 0.95), eps=1e-8,
        decay=training.decay,
    )  # fmt: skip
    layer = model["ffn"]
    weight = layer.weight.detach().double()
    soft = soft_top2(weight)
    beta = (weight * soft).sum() / (soft * soft).sum()
    m = v = torch.zeros(8, 16, dtype=torch.float64)
    training.prepare(0)
    for t in range(1, STEPS + 1):
        x, dy = torch.randn(32, 16, requires_grad=True), torch.randn(32, 8)
        y = layer(x)
        expected = beta * soft_top2(weight)
        torch.testing.assert_close(y.double(), x.double() @ expected.T, rtol=1e-4, atol=1e-4)
        y.backward(dy)
        torch.testing.assert_close(x.grad.double(), dy.double() @ expected, rtol=1e-4, atol=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        training.prepare(t)

        pruned = mvue24(dy, uniform24(1, t - 1, 0, 32, 8)).double()
        gradient = pruned.T @ x.detach().double()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        weight = weight - 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-4, atol=1e-5)
    assert float(layer.scale) == pytest.approx(float(beta), rel=1e-5)
    assert training.decay.factor == 0


def in_fp8(x, dtype):
    """x as fp8 values with one scale see it: the published factor, largest finite value / amax."""
    factor = torch.finfo(dtype).max / x.abs().max()
    return (x * factor).to(dtype).double() / factor.double()


def test_s_ste_steps_in_fp8_are_the_published_ones():
    """Z = E4M3(X) E4M3(Ŵ)ᵀ; dX = E5M2(dZ) E5M2(Ŵ); dW = E5M2(MVUE(dZ))ᵀ E5M2(X), into Adam on the fp32 weight."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": nn.Linear(16, 8, bias=False)})
    recipe = load_recipe("s_ste")
    recipe.fp8 = True
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, STEPS, seed=1)
    optimizer = AdamW(
        [{"params": list(model.parameters()), "weight_decay": 0.0}], lr=0.05, betas=(0.9, 0.95), eps=1e-8,
        decay=training.decay,
    )  # fmt: skip
    layer = model["ffn"]
    m = v = torch.zeros(8, 16, dtype=torch.float64)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    training.prepare(0)
    for t in range(1, STEPS + 1):
        before = layer.weight.detach().clone()  # rounding to fp8 has jumps: compare step by step
        sparse = layer.scale * soft_top2(before)
        x, dy = torch.randn(32, 16, requires_grad=True), torch.randn(32, 8)
        y = layer(x)
        torch.testing.assert_close(y.double(), in_fp8(x, e4m3) @ in_fp8(sparse, e4m3).T, rtol=1e-5, atol=1e-5)
        y.backward(dy)
        torch.testing.assert_close(x.grad.double(), in_fp8(dy, e5m2) @ in_fp8(sparse, e5m2), rtol=1e-5, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        training.prepare(t)

        pruned = mvue24(dy, uniform24(1, t - 1, 0, 32, 8))
        gradient = in_fp8(pruned, e5m2).T @ in_fp8(x.detach(), e5m2)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        step = 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(layer.weight.detach().double(), before - step, rtol=1e-4, atol=1e-5)


def test_a_fp8_layer_holds_its_weight_quantised_once_a_step():
    model = nn.ModuleDict({"ffn": nn.Linear(16, 8)})
    recipe = load_recipe("ste")
    recipe.fp8 = True
    sparsify(model, recipe, include=["ffn"])
    layer, x = model["ffn"], torch.randn(4, 16)
    assert layer.is_sparse
    assert set(model.state_dict()) == {"ffn.weight", "ffn.bias", "ffn.mask"}
    held = [*layer.packed.forward.tensors, *layer.packed.input_gradient.tensors]
    assert [t.dtype for t in held] == [torch.float8_e4m3fn, torch.float32, torch.float8_e5m2, torch.float32]
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), before)
    layer.project()
    assert [t.data_ptr() for t in (*layer.packed.forward.tensors, *layer.packed.input_gradient.tensors)] == [
        t.data_ptr() for t in held
    ]
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    model.bfloat16()  # which must leave the fp8 values what they are
    assert layer.packed.forward.tensors[0].dtype == torch.float8_e4m3fn
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.go_dense()
    torch.testing.assert_close(layer(x.bfloat16()), nn.functional.linear(x.bfloat16(), layer.weight, layer.bias))


def test_beta_of_normal_weights():
    model = nn.ModuleDict({"ffn": nn.Linear(512, 2048)})
    nn.init.normal_(model["ffn"].weight, std=0.02)
    sparsify(model, load_recipe("s_ste"), include=["ffn"])
    assert float(model["ffn"].scale) == pytest.approx(1.4837, abs=0.01)  # its spread at this size: 0.0015


def test_beta_is_saved_and_a_dense_checkpoint_sets_it_anew():
    def build_one(std):
        torch.manual_seed(int(100 * std))
        model = nn.ModuleDict({"ffn": nn.Linear(16, 8)})
        nn.init.uniform_(model["ffn"].weight, -std, std)
        return model

    recipe = load_recipe("s_ste")
    trained, other, dense = build_one(1.0), build_one(0.5), build_one(0.25)
    sparsify(trained, recipe, include=["ffn"])
    sparsify(other, recipe, include=["ffn"])
    beta = float(trained["ffn"].scale)
    with torch.no_grad():
        trained["ffn"].weight.mul_(torch.rand(8, 16))
    other.load_state_dict(trained.state_dict())
    assert float(other["ffn"].scale) == beta
    other.load_state_dict(dense.state_dict())
    soft = soft_top2(dense["ffn"].weight.detach())
    expected = (dense["ffn"].weight.detach() * soft).sum() / soft.square().sum()
    assert float(other["ffn"].scale) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("how", ["densify", "pack"])
def test_a_layer_taken_out_of_s_ste_computes_the_same(how):
    model = nn.ModuleDict({"ffn": nn.Linear(16, 8)})
    sparsify(model, load_recipe("s_ste"), include=["ffn"])
    x = torch.randn(4, 16)
    with torch.no_grad():
        before = model["ffn"](x)
        assert (densify if how == "densify" else pack_model)(model)
        torch.testing.assert_close(model["ffn"](x), before)


def test_mvue_draws_depend_on_seed_step_and_position_only():
    x, dy = torch.randn(16, 8), torch.randn(16, 8)

    def gradient(seed=1, step=0, splits=1):
        model, training = build("transposable", "mvue", seed=seed, refresh_every=100)
        training.prepare(step)
        for i in range(splits):
            rows = slice(i * 16 // splits, (i + 1) * 16 // splits)
            training.at_tokens(rows.start)
            forward(model, x[rows]).backward(dy[rows])
        return model["ffn"]["up"].weight.grad

    assert torch.equal(gradient(), gradient())
    torch.testing.assert_close(gradient(), gradient(splits=4))
    assert not torch.allclose(gradient(), gradient(seed=2))
    assert not torch.allclose(gradient(), gradient(step=1))


def test_mvue_outside_a_sparse_training_is_refused():
    model = nn.ModuleDict({"ffn": nn.Linear(8, 8)})
    sparsify(model, load_recipe("fst"), include=["ffn"])
    with pytest.raises(RuntimeError, match="SparseTraining"):
        model["ffn"](torch.randn(4, 8))
    with torch.no_grad():
        model["ffn"](torch.randn(4, 8))


def test_an_unknown_recipe():
    with pytest.raises(
        UserError,
        match=r"recipe: found fstt; allowed: ast, dense, fst, maskllm, s_ste, slope, sr_ste, ste, step; did you mean fst\?",
    ):
        load_recipe("fstt")


def test_layers_are_sparse_linears():
    _, training = build()
    assert list(training.layers) == ["ffn.up", "ffn.down"]
    assert all(isinstance(layer, SparseLinear) for layer in training.layers.values())
