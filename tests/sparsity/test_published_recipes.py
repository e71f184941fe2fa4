"""The update of each further recipe against its published equations, written out in fp64 and followed through every
phase: STEP, AST with Wanda's metric and SLoRB, SLoPe, MaskLLM; and how their parts go together."""

import copy
import math

import pytest
import torch
from torch import nn

from sparse_pretrain.config import (
    AdapterConfig,
    DecayConfig,
    ModelConfig,
    OptimizerConfig,
    RecipeConfig,
    ScheduleConfig,
)
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.optim.build import build_optimizers
from sparse_pretrain.sparsity import SparseTraining, densify, load_recipe, sparsify
from sparse_pretrain.sparsity.adapters import adapters_of
from sparse_pretrain.sparsity.packed import pack_model
from sparse_pretrain.sparsity.schedule import DENSE_WARMUP, SPARSE, SwitchMonitor

LR, BETA1, BETA2, EPS = 0.05, 0.9, 0.75, 1e-8
OUT, IN, TOKENS, STEPS = 8, 16, 12, 40


def keep(scores, n=2, m=4):
    """N of M by rank: how many of its group go before an entry, larger ones and equal ones to its left."""
    a = scores.detach().double().abs().nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(-1, m)
    left = torch.ones(m, m).tril(-1).bool()  # [i, j]: j is to the left of i
    before = (a[:, None, :] > a[:, :, None]) | ((a[:, None, :] == a[:, :, None]) & left)
    return (before.sum(-1) < n).view(scores.shape)


def build(recipe, steps=STEPS, out=OUT, inputs=IN, eps=EPS, weight_decay=0.0, layer=None):
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": layer or nn.Linear(inputs, out, bias=False)})
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, steps, seed=1, beta2=BETA2, eps=eps)
    cfg = OptimizerConfig(lr=LR, betas=[BETA1, BETA2], eps=eps, weight_decay=weight_decay)
    (optimizer,) = build_optimizers(model, cfg, training.decay, training.second_moment, training.own_lr)
    training.prepare(0)
    return model, training, optimizer


def data(step, scale=1.0):
    """Inputs and what the outputs should be, other ones in each step; inputs differ in size."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(TOKENS, IN, generator=generator) * torch.linspace(0.3, 3.0, IN)
    return x, torch.randn(TOKENS, OUT, generator=generator), scale


def train_step(model, training, optimizer, step, x, y, scale=1.0):
    """One optimizer step; returns outputs and input gradient."""
    x = x.clone().requires_grad_()
    out = model["ffn"](x)
    (scale * 0.5 * (out - y).square().sum() + training.penalty()).backward()
    training.select_gradients()
    optimizer.step()
    optimizer.zero_grad()
    training.prepare(step + 1)
    return out.detach(), x.grad


class Adam:
    """Adam, fp64, of one tensor. frozen: v̂ that takes the place of the second moment."""

    def __init__(self, lr=LR, eps=EPS):
        self.lr, self.eps, self.t, self.m, self.v, self.frozen = lr, eps, 0, 0.0, 0.0, None

    def step(self, weight, gradient, outside=None):
        """outside (AST): what joins the first moment in this step only; the second is then of the two together."""
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * gradient
        update = self.m if outside is None else self.m + outside
        self.v = BETA2 * self.v + (1 - BETA2) * (gradient if outside is None else update) ** 2
        corrected = self.v / (1 - BETA2**self.t) if self.frozen is None else self.frozen
        return weight - self.lr * (update / (1 - BETA1**self.t)) / (corrected**0.5 + self.eps)


def near(found, expected, **tolerance):
    torch.testing.assert_close(found.detach().double(), expected, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


# --- STEP ---


def step_by_hand(weight, eps, mean, earliest, latest, scales):
    """Weights after each step, and the first sparse step, of the published algorithm."""
    window = math.floor(1 / (1 - BETA2))
    adam, changes, switch, weights = Adam(eps=eps), [], None, []
    for t in range(STEPS):
        settled = t >= earliest and len(changes) >= window and sum(changes[-window:]) / window < eps
        if switch is None and (settled or t == latest):
            switch, adam.frozen = t, adam.v / (1 - BETA2**t)
        x, y, _ = data(t)
        used = weight if switch is None else weight * keep(weight)
        gradient = scales[t] * (x.double() @ used.T - y.double()).T @ x.double()
        before = adam.v
        weight = adam.step(weight, gradient)
        change = (adam.v - before).abs()
        changes.append(float(change.mean() if mean == "arithmetic" else change.log().mean().exp()))
        weights.append(weight)
    return weights, switch


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize(("eps", "when"), [(3e-7, "between"), (1e-9, "at the latest"), (1e-2, "at the earliest")])
def test_step_is_the_published_one(mean, eps, when):
    """Dense Adam; the switch when the mean of Z over floor(1/(1−β₂)) = 4 steps is below ε; then straight-through masks,
    the v̂ of the switch kept and m going on."""
    recipe = load_recipe("step")
    recipe.schedule.switch_mean = mean
    earliest, latest = 6, 20
    recipe.schedule.dense_warmup, recipe.schedule.dense_warmup_max = earliest / STEPS, latest / STEPS
    scales = [1e-3 * 0.5 ** min(t, 20) for t in range(STEPS)]  # gradients fall, and so does the change of v
    model, training, optimizer = build(recipe, eps=eps)
    layer = model["ffn"]
    weights, switch = step_by_hand(layer.weight.detach().double(), eps, mean, earliest, latest, scales)
    assert {"between": earliest < switch < latest, "at the latest": switch == latest}.get(when, switch == earliest)
    for t in range(STEPS):
        assert training.phase(t) == (DENSE_WARMUP if t < switch else SPARSE), t
        assert layer.is_sparse == (t >= switch)
        held = copy.deepcopy(optimizer.state[layer.weight].get("exp_avg_sq"))
        out, _ = train_step(model, training, optimizer, t, *data(t, scales[t]))
        near(layer.weight, weights[t])
        if t > switch:
            assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], held)
            before = weights[t - 1]
            near(out, data(t)[0].double() @ (before * keep(before)).T)


def test_the_window_is_the_published_one():
    assert [SwitchMonitor(0, beta, 1e-8).window for beta in (0.0, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999)] == [
        1, 4, 10, 20, 50, 100, 1000,
    ]  # fmt: skip


def test_a_dropped_step_changes_as_much_as_the_one_before_it_resumed_or_not():
    recipe = load_recipe("step")
    recipe.schedule.dense_warmup_max = 1.0

    def run(stop):
        model, training, optimizer = build(recipe, eps=1e-30)
        for t in range(6):
            if t == stop:
                states = [copy.deepcopy(part.state_dict()) for part in (model, training, optimizer)]
                model, training, optimizer = build(recipe, eps=1e-30)
                for part, state in zip((model, training, optimizer), states, strict=True):
                    part.load_state_dict(state)
                training.prepare(t, refresh=False)
            optimizer.found_inf = torch.tensor(float(t == 4))
            train_step(model, training, optimizer, t, *data(t))
        return training.switch.changes

    whole = run(stop=None)
    assert whole[0] == whole[3]  # steps 4 and 3
    assert whole[1] != whole[0]
    for stop in (3, 4, 5):
        assert torch.equal(run(stop), whole)


# --- AST ---


def ast(**schedule):
    recipe = load_recipe("ast")
    assert (recipe.decay.place, recipe.decay.factor, recipe.schedule.refresh_every) == ("momentum", 1e-4, 10)
    assert (recipe.projection, recipe.teacher.models, recipe.teacher.weight) == ("magnitude", ["self"], 0.67)
    recipe.decay.factor, recipe.decay.ramp = 0.8, 0.5  # large enough to be seen in 40 steps
    recipe.schedule.dense_warmup = 0.25
    for name, value in schedule.items():
        setattr(recipe.schedule, name, value)
    return recipe


def test_ast_is_the_published_one():
    """m ← β₁m + (1−β₁)g;  u = m + λ_t(1−M)⊙W;  v ← β₂v + (1−β₂)u²;  W ← W − lr·û/(√v̂ + ε): masks every 10 steps from
    the first sparse one, step 10, and λ_t = λ·min(t/15, 1) with t counted from there. Before it, plain Adam."""
    model, training, optimizer = build(ast())
    layer, adam = model["ffn"], Adam()
    weight = layer.weight.detach().double()
    mask, flipped = keep(weight), 0
    for t in range(STEPS):
        if t in (10, 20, 30):
            flipped += 0 if t == 10 else int((keep(weight) != mask).sum())
            mask = keep(weight)
        factor = 0.0 if t < 10 else 0.8 * min((t - 10) / 15, 1)
        assert training.decay.factor == pytest.approx(factor)
        x, y, _ = data(t)
        used = weight if t < 10 else weight * mask
        outside = None if t < 10 else factor * ~mask * weight
        expected = x.double() @ used.T
        out, dx = train_step(model, training, optimizer, t, x, y)
        near(out, expected, atol=1e-4)
        near(dx, (expected - y.double()) @ used, atol=1e-3)
        weight = adam.step(weight, (expected - y.double()).T @ x.double(), outside)
        near(layer.weight, weight)
    assert flipped > 0


def test_asts_decay_shrinks_pruned_weights_and_leaves_kept_ones():
    """Without a gradient nothing else moves; the public code's ~mask of integers has the opposite sign."""
    recipe = ast(dense_warmup=0.0)
    recipe.decay.ramp = 0.0
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    before, mask = layer.weight.detach().clone(), layer.mask.clone()
    for t in range(3):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        training.prepare(t + 1)
    after = layer.weight.detach()
    assert torch.equal(after[mask], before[mask])
    big = ~mask & (before.abs() > 4 * LR)  # Adam's steps are as large as the learning rate, whatever λ is
    smaller = after[big].abs() < before[big].abs()
    assert big.any()
    assert smaller.all()
    moments = optimizer.state[layer.weight]
    assert not moments["exp_avg"].any()  # outside the first moment
    assert (moments["exp_avg_sq"][~mask] > 0).all()  # and seen by the second


def test_wandas_metric_is_the_published_one():
    """|w|·‖x_j‖₂ over the training inputs since the last refresh: of all micro-batches, none of evaluation."""
    recipe = ast(dense_warmup=3 / STEPS, refresh_every=3)
    recipe.projection = "metric"
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    assert torch.equal(layer.mask, keep(layer.weight))  # no input yet
    squares, differs = torch.zeros(IN, dtype=torch.float64), 0
    for t in range(12):
        if t and t % 3 == 0:
            scores = layer.weight.detach().double() * squares.sqrt()
            assert torch.equal(layer.mask, keep(scores)), t
            differs += int((layer.mask != keep(layer.weight)).sum())
            squares = torch.zeros(IN, dtype=torch.float64)
        x, y, _ = data(t)
        x = x * torch.rand(IN, generator=torch.Generator().manual_seed(t)) ** 3
        for part in (slice(0, 8), slice(8, 12)):
            (layer(x[part].view(2, -1, IN)) - y[part].view(2, -1, OUT)).square().sum().backward()
        squares += x.double().square().sum(0)
        model.eval()
        layer(1e3 * torch.randn(4, IN))  # with gradients, but not in training
        model.train()
        with torch.no_grad():
            layer(1e3 * torch.randn(4, IN))
        before = layer.mask.clone()
        optimizer.step()
        optimizer.zero_grad()
        training.prepare(t + 1)
        if (t + 1) % 3:
            assert torch.equal(layer.mask, before)
    assert differs > 0


def test_wandas_first_masks_are_of_the_last_dense_steps():
    """Of inputs since the last multiple of refresh_every, not of the whole dense warm-up: of step 3 alone."""
    recipe = ast(dense_warmup=4 / STEPS, refresh_every=3)
    recipe.projection = "metric"
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    for t in range(4):
        x, y, _ = data(t)
        x = x.flip(1) if t < 3 else x  # whose largest inputs are then other ones
        train_step(model, training, optimizer, t, x, y)
    assert torch.equal(layer.mask, keep(layer.weight.detach().double() * x.double().square().sum(0).sqrt()))


@pytest.mark.parametrize("init", ["mean", "sum"])
def test_slorb_is_the_published_one(init):
    """From the first sparse step on Y = X Ŵᵀ + (X Pᵀ)Sᵀ, P one-hot sums of k inputs and S the mean (or sum) of the
    pruned weights at that step; both trained by Adam."""
    k, first = 4, 4
    recipe = ast(dense_warmup=first / STEPS)
    recipe.adapter = AdapterConfig(kind="slorb", group=k, init=init)
    model, training, optimizer = build(recipe)
    layer = model["ffn"]
    weight = layer.weight.detach().double()
    adam = {name: Adam() for name in ("weight", "s", "p")}
    p = torch.eye(IN // k, dtype=torch.float64).repeat_interleave(k, dim=1)
    s = torch.zeros(OUT, IN // k, dtype=torch.float64)
    for t in range(20):
        sparse = t >= first
        if t in (first, first + 10):
            mask = keep(weight)
        if t == first:
            s = (weight * ~mask) @ p.T / (k if init == "mean" else 1)
            near(layer.adapter.s, s)
        x, y, _ = data(t)
        used = weight * mask if sparse else weight
        expected = x.double() @ used.T + (x.double() @ p.T @ s.T if sparse else 0)
        out, dx = train_step(model, training, optimizer, t, x, y)
        near(out, expected, atol=1e-4)
        dy = expected - y.double()
        near(dx, dy @ (used + s @ p if sparse else used), atol=1e-3)
        decay = 0.8 * min((t - first) / 18, 1) * ~mask * weight if t >= first else None
        weight = adam["weight"].step(weight, dy.T @ x.double(), decay)
        if sparse:
            s, p = (
                adam["s"].step(s, dy.T @ (x.double() @ p.T)),
                adam["p"].step(p, s.T @ dy.T @ x.double()),
            )
            near(layer.adapter.s, s)
            near(layer.adapter.p, p)
        near(layer.weight, weight)


# --- SLoPe ---


def double_pruned(weight, mask, n=2, m=4):
    """Which entries of Ŵ are left when Ŵᵀ is pruned again along out_features."""
    return keep((weight * mask).T.contiguous(), n, m).T & mask


def test_slope_is_the_published_one():
    """A static mask; dX = dY·(Ŵᵀ pruned again, every 100 steps); dW only for kept weights; X L R / rank in the last
    hundredth."""
    recipe = load_recipe("slope")
    assert recipe.schedule.refresh_every == 100
    assert (recipe.adapter.kind, recipe.adapter.start, recipe.adapter.alpha) == ("lora", 0.99, 1.0)
    steps, recipe.schedule.refresh_every, recipe.adapter.rank = 210, 20, 3
    start = 207  # of 210
    model, training, optimizer = build(recipe, steps=steps)
    layer = model["ffn"]
    weight = layer.weight.detach().double()
    mask = keep(weight)
    drawn, initial = layer.adapter.a.detach().double(), layer.weight.detach()[~mask].clone()
    left, right = drawn, torch.zeros(OUT, 3, dtype=torch.float64)  # L is a transposed, R is b transposed
    adam = {name: Adam() for name in ("weight", "left", "right")}
    again, reselected = double_pruned(weight, mask), 0
    for t in range(steps):
        if t % 20 == 0:
            new = double_pruned(weight, mask)
            reselected += not torch.equal(new, again)
            again = new
        assert layer.adapter.active == (t >= start)
        assert torch.equal(layer.mask, mask)
        assert torch.equal(layer.input_mask & layer.mask, again)
        assert (layer.input_mask.T.reshape(-1, 4).sum(-1) == 2).all()
        x, y, _ = data(t)
        low_rank = t >= start
        expected = x.double() @ (weight * mask).T + (x.double() @ left.T @ right.T / 3 if low_rank else 0)
        dy = expected - y.double()
        out, dx = train_step(model, training, optimizer, t, x, y)
        near(out, expected, atol=1e-3)
        near(dx, dy @ (weight * again) + (dy @ right @ left / 3 if low_rank else 0), atol=1e-2)
        weight = adam["weight"].step(weight, (dy.T @ x.double()) * mask)
        if low_rank:
            left, right = (
                adam["left"].step(left, right.T @ dy.T @ x.double() / 3),
                adam["right"].step(right, dy.T @ (x.double() @ left.T) / 3),
            )
        weight[~mask] = layer.weight.detach().double()[~mask]
        near(layer.weight, weight, rtol=1e-3, atol=1e-4)
        near(layer.adapter.a, left)
        near(layer.adapter.b, right)
    assert reselected > 0
    assert (again.sum() < mask.sum()).item()  # something was lost
    assert right.any()
    assert torch.equal(layer.weight.detach()[~mask], initial)
    moments = optimizer.state[layer.weight]
    assert not moments["exp_avg"][~mask].any()
    assert not moments["exp_avg_sq"][~mask].any()


def test_random_static_masks_follow_the_seed_and_nothing_else():
    def mask(seed=1, scale=1.0):
        recipe = RecipeConfig("test", "static_random", schedule=ScheduleConfig(dense_warmup=0.1))
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b")})
        sparsify(model, recipe, include=["*"])
        training = SparseTraining(model, recipe, STEPS, seed)
        for t in range(8):
            with torch.no_grad():
                model["a"].weight.mul_(scale)
            training.prepare(t)
        assert (model["a"].mask.view(-1, 4).sum(-1) == 2).all()
        assert not torch.equal(model["a"].mask, model["b"].mask)
        return model["a"].mask

    assert torch.equal(mask(), mask(scale=0.5))
    assert not torch.equal(mask(), mask(seed=2))
    shares = mask().view(-1, 4).float().mean(0)
    assert (shares - 0.5).abs().max() < 0.06  # of 1024 groups: the standard error is 0.016


# --- MaskLLM ---

PATTERNS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.float64
)


def maskllm(**changes):
    recipe = load_recipe("maskllm")
    learned = recipe.learned
    assert (learned.temperature, learned.scale, learned.prior_strength) == ([4.0, 0.05], [100.0, 500.0], 3.0)
    assert (learned.logit_std, learned.norm_weight, recipe.train_weights) == (0.01, 1e-5, False)
    recipe.schedule.dense_warmup = 0.25
    learned.norm_weight, learned.logit_lr = 0.05, 2e-3  # large enough to be seen in 40 steps
    learned.temperature = [4.0, 0.5]  # at 0.05 fp32 and fp64 part ways
    for name, value in changes.items():
        setattr(recipe, name, value)
    return recipe


def test_mask_logits_start_from_the_prior():
    """N(0, 0.01), then logit += (overlap − 1)·std(logit)·3 with the overlap of a pattern and the magnitude mask."""
    recipe = maskllm()
    model, _, _ = build(recipe, inputs=512, out=256)
    layer = model["ffn"]
    logits = layer.learned.logits.detach().double()
    overlap = keep(layer.weight).view(256, 128, 4).double() @ PATTERNS.T
    assert set(overlap.unique().tolist()) == {0.0, 1.0, 2.0}
    # what is left without the prior is N(0, 0.01), whatever the overlap: 196608 numbers
    drawn = logits - (overlap - 1) * 0.01 * 3
    for selected in (overlap == 0, overlap == 1, overlap == 2):
        assert float(drawn[selected].mean()) == pytest.approx(0, abs=5e-4)
        assert float(drawn[selected].std()) == pytest.approx(0.01, rel=0.02)
    std = float(drawn.std())
    exact = logits - (overlap - 1) * std * 3
    assert float(exact.std()) == pytest.approx(std, rel=1e-3)


@pytest.mark.parametrize("train_weights", [False, True])
def test_maskllm_is_the_published_one(train_weights):
    """Ŵ = W⊙M̃, M̃ = Σ softmax((κ·logit + Gumbel)/τ)·pattern, κ and τ annealed linearly; loss − λ(1−t/T)·Σ‖M̃⊙W‖²; the
    logits by Adam, the weights frozen from the first sparse step on, or with the gradient dŴ⊙M̃."""
    recipe = maskllm(train_weights=train_weights)
    model, training, optimizer = build(recipe, weight_decay=0.0 if train_weights else 0.1)
    layer = model["ffn"]
    first, last = 10, STEPS - 1
    adam, logit_adam = Adam(), Adam(lr=2e-3)
    weight = layer.weight.detach().double()
    noises = []
    for t in range(STEPS):
        x, y, _ = data(t, 0.01)
        x64, y64 = x.double(), y.double()
        if t < first:
            dy = 0.01 * (x64 @ weight.T - y64)
            train_step(model, training, optimizer, t, x, y, 0.01)
            if not train_weights:
                weight = weight * (1 - LR * 0.1)
            weight = adam.step(weight, dy.T @ x64)
            near(layer.weight, weight)
            continue
        if t == first:
            logits, frozen = layer.learned.logits.detach().double(), layer.weight.detach().clone()
        progress = (t - first) / (last - first)
        kappa, tau = 100 + 400 * progress, 4 - 3.5 * progress
        noises.append(layer.learned.noise.clone())
        share = ((kappa * logits + noises[-1].double()) / tau).softmax(-1)
        soft = (share @ PATTERNS).view(OUT, IN)
        strength = 0.05 * (1 - progress)
        expected = x64 @ (weight * soft).T
        dy = 0.01 * (expected - y64)
        out, dx = train_step(model, training, optimizer, t, x, y, 0.01)
        near(out, expected, atol=1e-3)
        near(dx, dy @ (weight * soft), atol=1e-4)
        of_mask = (dy.T @ x64) * weight - strength * 2 * soft * weight**2
        of_share = of_mask.view(OUT, IN // 4, 4) @ PATTERNS.T
        of_logits = kappa / tau * share * (of_share - (share * of_share).sum(-1, keepdim=True))
        logits = logit_adam.step(logits, of_logits)
        near(layer.learned.logits, logits, rtol=1e-3, atol=2e-4)
        logits = layer.learned.logits.detach().double()  # κ makes much of little: compare step by step
        if train_weights:
            weight = adam.step(weight, (dy.T @ x64) * soft)
            near(layer.weight, weight, rtol=1e-3, atol=1e-3)
            weight = layer.weight.detach().double()
        else:
            assert torch.equal(layer.weight.detach(), frozen)
        # what is evaluated, and deployed at the end, is the likeliest pattern
        hard = PATTERNS[layer.learned.logits.argmax(-1)].view(OUT, IN).bool()
        assert torch.equal(layer.mask, hard)
        model.eval()
        near(layer(x), x64 @ (layer.weight.detach().double() * hard).T, atol=1e-4)
        model.train()
    assert len({float(noise.sum()) for noise in noises}) == len(noises)


def test_mask_noise_is_gumbel_and_follows_seed_and_step():
    model, training, _ = build(maskllm(), inputs=512, out=256)
    training.prepare(12)
    noise = model["ffn"].learned.noise.double()
    again, other, _ = build(maskllm(), inputs=512, out=256)
    other.prepare(12)
    assert torch.equal(again["ffn"].learned.noise.double(), noise)
    other.prepare(13)
    assert not torch.equal(again["ffn"].learned.noise.double(), noise)
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.015)  # 196608 numbers: the standard error is 0.003
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert noise.isfinite().all()


def test_mask_logits_have_their_own_learning_rate_and_no_weight_decay():
    model, _, optimizer = build(maskllm(), weight_decay=0.1)
    logits = model["ffn"].learned.logits
    (group,) = [group for group in optimizer.param_groups if any(p is logits for p in group["params"])]
    assert len(group["params"]) == 1
    assert (group["peak_lr"], group["lr"], group["weight_decay"]) == (2e-3, 2e-3, 0.0)


def test_logits_rest_in_a_dense_warmup():
    model, training, optimizer = build(maskllm())
    before = model["ffn"].learned.logits.detach().clone()
    for t in range(9):
        train_step(model, training, optimizer, t, *data(t))
        assert torch.equal(model["ffn"].learned.logits.detach(), before)
        assert float(training.penalty()) == 0.0
    train_step(model, training, optimizer, 9, *data(9))
    # the prior is that of the weights as they are now
    likeliest = keep(model["ffn"].weight)
    agree = (model["ffn"].mask == likeliest).view(-1, 4).all(-1).double().mean()
    assert agree > 0.95


# --- parts that go together ---


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
    return GPT(ModelConfig(name="tiny", n_layer=2, n_head=2, d_model=16, max_seq_len=8), 32)


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
            (out.square().mean() + training.penalty()).backward()
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
