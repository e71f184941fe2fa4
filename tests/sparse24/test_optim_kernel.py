"""The multi-tensor AdamW against the optimizer it stands in for, and against the formulas."""

import pytest
import torch
from sparse24.optim import DECAY_PLACES, TensorTable, adamw_step
from torch import nn

from sparse_pretrain.optim.adamw import AdamW, MaskedDecay

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LR, FACTOR = 1e-2, 0.3
SHAPES = [(40, 64), (1,), (3, 5), (0, 4), (1024,), (1025,), (2, 3, 7, 11), (), (5000,)]


def draw(*shape, seed, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


class State:
    """Tensors of a few parameters, the even ones with a mask."""

    def __init__(self, device, dtypes=(torch.float32,) * 4, shapes=SHAPES):
        p, g, m, v = dtypes
        self.params = [draw(*shape, seed=i, device=device, dtype=p) for i, shape in enumerate(shapes)]
        self.exp_avgs = [torch.zeros_like(x, dtype=m) for x in self.params]
        self.exp_avg_sqs = [torch.zeros_like(x, dtype=v) for x in self.params]
        self.steps = [torch.zeros((), device=device) for _ in shapes]
        self.masks = [
            None if i % 2 else draw(*shape, seed=100 + i, device=device) > 0 for i, shape in enumerate(shapes)
        ]
        self.grad_dtype, self.device, self.shapes = g, device, shapes
        self.table = TensorTable()

    def grads(self, t):
        return [
            draw(*shape, seed=1000 * t + i, device=self.device, dtype=self.grad_dtype)
            for i, shape in enumerate(self.shapes)
        ]

    def step(self, grads, **changes):
        arguments = {**SETTINGS, "lr": LR, "table": self.table, **changes}
        adamw_step(self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.masks, **arguments)

    def tensors(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.steps]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("place", DECAY_PLACES)
def test_same_as_the_optimizer(place, tensor_lr, device):
    ours = State(device)
    theirs = [nn.Parameter(p.clone()) for p in ours.params]
    masks = {p: mask for p, mask in zip(theirs, ours.masks, strict=True) if mask is not None}
    optimizer = AdamW(
        [{"params": theirs, "weight_decay": SETTINGS["weight_decay"]}],
        lr=LR,
        betas=SETTINGS["betas"],
        eps=SETTINGS["eps"],
        decay=MaskedDecay(place=place, factor=FACTOR, masks=masks),
    )
    for t in range(1, 8):
        lr = LR / t
        grads = ours.grads(t)
        ours.step(
            grads,
            lr=torch.tensor(lr, device=device) if tensor_lr else lr,
            decay_place=place,
            decay_factor=FACTOR,
        )
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    state = [optimizer.state[p] for p in theirs]
    for i in range(len(theirs)):
        # rounding differs with the order of operations: a few units in the last place of numbers of about 1
        close = {"rtol": 2e-6, "atol": 1e-6}
        torch.testing.assert_close(ours.params[i], theirs[i].detach(), **close)
        torch.testing.assert_close(ours.exp_avgs[i], state[i]["exp_avg"], **close)
        torch.testing.assert_close(ours.exp_avg_sqs[i], state[i]["exp_avg_sq"], **close)
        assert ours.steps[i].item() == state[i]["step"].item() == 7


def published_update(p, m, v, t, grad, mask, place, frozen=False):
    """One step in float64; a parameter without a mask has none of it. A frozen v is v̂ itself, and stays."""
    place = "none" if mask is None else place
    (beta1, beta2), eps, weight_decay = SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    decay = torch.zeros_like(p) if mask is None else FACTOR * (~mask).double() * p
    g = grad + decay if place == "gradient" else grad
    p = p - LR * decay if place == "weight" else p
    m = beta1 * m + (1 - beta1) * g
    u = m + decay if place == "momentum" else m
    if not frozen:
        v = beta2 * v + (1 - beta2) * (u if place == "momentum" else g) ** 2
    corrected = v if frozen else v / (1 - beta2**t)
    p = p - LR * weight_decay * p - LR * (u / (1 - beta1**t)) / (corrected.sqrt() + eps)
    return p, m, v


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "dtypes",
    [
        (FP32, BF16, FP32, FP32),
        (FP32, FP32, BF16, BF16),
        (FP32, BF16, BF16, FP32),
        (BF16, BF16, FP32, FP32),
        (FP16, FP16, FP32, FP32),
    ],
)
@pytest.mark.parametrize("place", DECAY_PLACES)
def test_one_step_in_other_dtypes(place, dtypes, device):
    state = State(device, dtypes)
    state.exp_avgs = [draw(*s, seed=50, device=device, dtype=dtypes[2]) for s in SHAPES]
    state.exp_avg_sqs = [draw(*s, seed=51, device=device).square().to(dtypes[3]) for s in SHAPES]
    for step in state.steps:
        step.fill_(20)
    grads = state.grads(1)
    expected = [
        published_update(p.double(), m.double(), v.double(), 21, g.double(), mask, place)
        for p, m, v, g, mask in zip(state.params, state.exp_avgs, state.exp_avg_sqs, grads, state.masks, strict=True)
    ]
    state.step(grads, decay_place=place, decay_factor=FACTOR)
    # one rounding, to nearest; the interpreter cuts bfloat16 off
    error = {FP32: 2e-6, FP16: 2.0**-11, BF16: 2.0**-8 if device.type == "cuda" else 2.0**-7}
    for i, tensors in enumerate(zip(state.params, state.exp_avgs, state.exp_avg_sqs, strict=True)):
        for tensor, value, dtype in zip(tensors, expected[i], (dtypes[0], *dtypes[2:]), strict=True):
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor.double(), value, rtol=error[dtype] * 1.01, atol=1e-6)


@pytest.mark.parametrize("place", DECAY_PLACES)
def test_a_frozen_second_moment_divides_and_stays(place, device):
    state = State(device)
    state.exp_avg_sqs = [draw(*s, seed=51, device=device).square() for s in SHAPES]
    before = [v.clone() for v in state.exp_avg_sqs]
    expected = [
        (p.double(), m.double(), v.double()) for p, m, v in zip(state.params, state.exp_avgs, before, strict=True)
    ]
    for t in (1, 2, 3):
        grads = state.grads(t)
        expected = [
            published_update(*three, t, g.double(), mask, place, frozen=True)
            for three, g, mask in zip(expected, grads, state.masks, strict=True)
        ]
        state.step(grads, decay_place=place, decay_factor=FACTOR, frozen=True)
    for i, (p, m, _) in enumerate(expected):
        # v̂ near 0 makes steps of hundreds: relative
        torch.testing.assert_close(state.params[i].double(), p, rtol=5e-6, atol=1e-5)
        torch.testing.assert_close(state.exp_avgs[i].double(), m, rtol=2e-6, atol=1e-6)
        assert torch.equal(state.exp_avg_sqs[i], before[i])
        assert state.steps[i] == 3


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("place", DECAY_PLACES)
def test_a_dropped_step_changes_nothing(place, frozen, device):
    state = State(device)
    found_inf = torch.zeros((), device=device)
    state.step(state.grads(1), decay_place=place, decay_factor=FACTOR, found_inf=found_inf)
    assert all(step == 1 for step in state.steps)
    before = [x.clone() for x in state.tensors()]
    found_inf.fill_(1)
    grads = [torch.full_like(p, torch.nan) for p in state.params]
    state.step(grads, decay_place=place, decay_factor=FACTOR, found_inf=found_inf, frozen=frozen)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
    found_inf.fill_(0)
    state.step(state.grads(2), decay_place=place, decay_factor=FACTOR, found_inf=found_inf)
    assert not torch.equal(before[0], state.params[0])
    assert all(step == 2 for step in state.steps)


def test_gradients_are_divided_by_their_scale_and_not_written(device):
    a, b = State(device), State(device)
    grads = a.grads(1)
    scaled = [g * 1024 for g in grads]
    copies = [g.clone() for g in scaled]
    a.step(grads)
    b.step(scaled, grad_scale=torch.tensor(1024.0, device=device))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(scaled, copies, strict=True))


@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999, 0.99999])
def test_bias_correction_at_every_scale_of_t(beta2, device):
    """Far from 1 and close to it: 1 − βᵗ must not cancel."""
    for t in (1, 2, 10, 499, 501, 100_000):
        p, m, v = (torch.zeros(4, device=device) for _ in range(3))
        g = torch.tensor([1.0, -2.0, 1e-3, 4.0], device=device)
        m += g
        v += g * g
        step = torch.tensor(t - 1.0, device=device)
        adamw_step([p], [g], [m], [v], [step], lr=1.0, betas=(0.9, beta2), eps=0.0, weight_decay=0.0)
        expected = -g.double().sign() / (1 - 0.9**t) * (1 - beta2**t) ** 0.5
        torch.testing.assert_close(p.double(), expected, rtol=2e-6, atol=0)


def test_dense_tensors_in_any_order_of_dimensions(device):
    p, g, m, v = (draw(6, 50, seed=i, device=device).t() for i in range(4))
    v.square_()
    mask = (draw(6, 50, seed=9, device=device) > 0).t()
    step = torch.zeros((), device=device)
    expected = published_update(p.double(), m.double(), v.double(), 1, g.double(), mask, "gradient")
    adamw_step([p], [g], [m], [v], [step], [mask], lr=LR, decay_factor=FACTOR, decay_place="gradient", **SETTINGS)
    torch.testing.assert_close(p.double(), expected[0], rtol=2e-6, atol=1e-6)


def test_unaligned_tensors_and_a_shared_step(device):
    aligned, moved = State(device, shapes=[(2000,), (33,)]), State(device, shapes=[(2000,), (33,)])
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        tensors = getattr(moved, name)
        for i, x in enumerate(tensors):
            tensors[i] = torch.cat([x.new_zeros(1), x])[1:]
    moved.steps = [moved.steps[0]] * 2
    for t in (1, 2):
        aligned.step(aligned.grads(t), decay_place="gradient", decay_factor=FACTOR)
        moved.step(moved.grads(t), decay_place="gradient", decay_factor=FACTOR)
    assert all(torch.equal(a, b) for a, b in zip(aligned.tensors(), moved.tensors(), strict=True))
    assert moved.steps[0] == 2


def test_many_tensors_are_one_launch(device):
    state = State(device, shapes=[(i,) for i in range(1, 200)])
    grads = state.grads(1)
    expected = [
        published_update(p.double(), 0 * p.double(), 0 * p.double(), 1, g.double(), mask, "weight")[0]
        for p, g, mask in zip(state.params, grads, state.masks, strict=True)
    ]
    state.step(grads, decay_place="weight", decay_factor=FACTOR)
    for p, value in zip(state.params, expected, strict=True):
        torch.testing.assert_close(p.double(), value, rtol=2e-6, atol=1e-6)
    aligned = {kind[1] for kind in state.table._launches}
    assert len(state.table._launches) == len(aligned)


def test_the_table_is_rebuilt_only_when_a_tensor_moves(device):
    state = State(device)
    grads = state.grads(1)
    state.step(grads)
    built = state.table._launches
    state.step(grads)
    assert state.table._launches is built
    fresh = State(device)
    for _ in range(2):
        fresh.step([g.clone() for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), fresh.tensors(), strict=True))


def test_nothing_to_do(device):
    adamw_step([], [], [], [], [], lr=LR, **SETTINGS)
    empty, step = torch.zeros(0, device=device), torch.zeros((), device=device)
    adamw_step([empty], [empty], [empty], [empty], [step], lr=LR, **SETTINGS)
    assert step == 1


def test_bad_arguments_are_named(device):
    p, step = torch.zeros(4, 4, device=device), torch.zeros((), device=device)

    def call(grad=p, m=p, step=step, masks=None, **changes):
        adamw_step([p], [grad], [m], [p], [step], masks, **{"lr": LR, **SETTINGS, **changes})

    with pytest.raises(ValueError, match="decay_place must be one of none, gradient, momentum, weight; found 'grad'"):
        call(decay_place="grad")
    with pytest.raises(ValueError, match=r"grads\[0\] must be.*shape \(4, 4\).*found torch.float32 \(4, 3\)"):
        call(torch.zeros(4, 3, device=device))
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] must be float32 or bfloat16 or float16.*found torch.int32"):
        call(m=p.int())
    with pytest.raises(ValueError, match=r"grads\[0\].*strides"):
        call(torch.zeros(4, 4, device=device).t())
    with pytest.raises(ValueError, match=r"steps\[0\] must be 0-dim float32"):
        call(step=step.view(1))
    with pytest.raises(ValueError, match=r"masks\[0\] must be bool"):
        call(masks=[p])
    with pytest.raises(ValueError, match="masks must be as many as params, 1; found 2"):
        call(masks=[None, None])
    with pytest.raises(ValueError, match="lr must be float32 of one element"):
        call(lr=torch.tensor([1.0, 2.0], device=device))
    wide = torch.zeros(4, 8, device=device)[:, :4]
    with pytest.raises(ValueError, match=r"params\[0\] must be dense"):
        adamw_step([wide], [wide], [wide], [wide], [step], lr=LR, **SETTINGS)
