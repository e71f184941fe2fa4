"""What each method keeps: cases by hand, and what must hold for all."""

import itertools

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from sparse_pretrain.exposition import pruners
from sparse_pretrain.exposition.connections import connections
from sparse_pretrain.exposition.masks import (
    ITERATIONS,
    before_training,
    erdos_renyi,
    keep_largest,
    layerwise,
    with_biases,
)
from sparse_pretrain.exposition.networks import Shape, forward, initial, loss_gradients
from sparse_pretrain.exposition.pruners import METHODS, Gradual, OneShot, RigL, fits, prune
from sparse_pretrain.exposition.spiral import cubist_spiral
from sparse_pretrain.exposition.training import Sgd, Task
from sparse_pretrain.limits import CHOICES

TASK = Task(*cubist_spiral(2000), batch_size=100, seed=3)
STEPS = TASK.batches


def networks(width: int, count: int = 4) -> tuple[torch.Tensor, Shape]:
    shape = Shape(width)
    return initial(range(count), [shape.units[:4]] * count, shape), shape


def pruned(
    method: str, targets: list[str], width: int = 4, rounds: int = 3, epochs: int = 2
) -> tuple[torch.Tensor, Shape]:
    start, shape = networks(width, len(targets))
    some = ["cosine"] * len(targets)
    rows = prune(
        *(method, targets, start, shape, TASK, Sgd(epochs, 0.9, 5e-4), [0.1] * len(targets), some),
        *(list(range(len(targets))), rounds, 1e-2, lambda _: None),
    )
    return rows, shape


@pytest.mark.parametrize("method", [method for method in METHODS if method != "transposable"])
def test_as_many_weights_as_asked_for(method):
    rows, shape = pruned(method, ["12", "20", "31", "43"])
    assert (rows[:, : shape.weights] != 0).sum(dim=1).tolist() == [12, 20, 31, 43]
    weights, biases = shape.split(rows)
    for layer in range(3):  # no bias where nothing leads on
        assert not (biases[layer][:, :, 0] != 0)[~(weights[layer + 1] != 0).any(dim=1)].any()


@pytest.mark.parametrize(
    ("method", "pattern"), [("ste", "2:4"), ("ste", "1:4"), ("sr_ste", "1:2"), ("transposable", "2:4")]
)
def test_patterns_hold_between_hidden_layers(method, pattern):
    rows, shape = pruned(method, [pattern] * 3, width=8)
    kept, group = map(int, pattern.split(":"))
    weights, _ = shape.split(rows)
    for layer in (1, 2):
        assert ((weights[layer] != 0).view(3, 8, -1, group).sum(dim=3) == kept).all()
        if method == "transposable":
            assert ((weights[layer].mT != 0).reshape(3, 8, -1, group).sum(dim=3) == kept).all()
    assert (weights[0] != 0).all()
    assert (weights[3] != 0).all()
    if method == "transposable":  # nothing can be left out of every path
        assert all(found.disconnected == 0 for found in connections(rows, shape))


def test_keep_largest():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [5.0, -torch.inf, 1.0, 2.0]])
    kept = keep_largest(scores, torch.tensor([1, 2, 3]))
    assert kept.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1]]


def test_biases_of_neurons_that_lead_nowhere():
    shape = Shape(2)
    weights, _ = shape.split(torch.ones(1, shape.parameters))
    weights[2][0, :, 1] = 0  # nothing reads the second layer's neuron 1
    weights[3][0, 0, 0] = 0
    kept = shape.join(weights, [])[:, : shape.weights] > 0
    _, biases = shape.split(with_biases(kept, shape))
    assert [bias[0, :, 0].tolist() for bias in biases] == [[1, 1], [1, 0], [0, 1], [1]]


def assert_largest(score: torch.Tensor, mask: torch.Tensor, count: int) -> None:
    """Equal scores, as those of dead neurons, may go either way."""
    assert int(mask.sum()) == count
    torch.testing.assert_close(score[mask > 0].sum(), score.topk(count).values.sum(), rtol=1e-4, atol=1e-9)


def test_scores_of_snip_and_grasp_are_autograd_s():
    rows, shape = networks(3)
    rows = 6 * rows  # logits so large that the temperature changes the order
    x, y = next(TASK.epoch(0))
    kept = torch.tensor([9, 11, 13, 15])
    snip, grasp = (before_training(method, rows, kept, shape, x, y) for method in ("snip", "grasp"))

    def loss(row, temperature=1.0):
        return binary_cross_entropy_with_logits(forward(*shape.split(row.unsqueeze(0)), x)[-1][0, 0] / temperature, y)

    for i, row in enumerate(rows):
        gradient = torch.autograd.functional.jacobian(loss, row)
        assert_largest((row * gradient)[: shape.weights].abs(), snip[i, : shape.weights], int(kept[i]))
        gradient = torch.autograd.functional.jacobian(lambda at: loss(at, 200), row)
        gradient[shape.weights :] = 0
        _, product = torch.autograd.functional.hvp(lambda at: loss(at, 200), row, gradient)
        assert_largest((row * product)[: shape.weights], grasp[i, : shape.weights], int(kept[i]))


def test_magnitude_keeps_the_largest():
    rows, shape = networks(3)
    mask = before_training("magnitude", rows, torch.full((4,), 10), shape, *next(TASK.epoch(0)))
    for i in range(4):
        assert set(rows[i, :27].abs().topk(10).indices.tolist()) == set(mask[i, :27].nonzero().flatten().tolist())


def test_synflow_keeps_every_layer_connected():
    """It is made not to cut a layer off; SNIP may, and magnitude does."""
    rows, shape = networks(16, 20)
    kept = torch.full((20,), 24)
    batch = next(TASK.epoch(0))
    synflow = before_training("synflow", rows, kept, shape, *batch) * rows
    assert all(found.weights > 0 for found in connections(synflow, shape))
    magnitude = before_training("magnitude", rows, kept, shape, *batch) * rows
    wasted = [sum(found.kept - found.weights for found in connections(r, shape)) for r in (synflow, magnitude)]
    assert wasted[0] < 0.2 * wasted[1]


def test_iterations_prune_step_by_step_and_force_takes_back():
    rows, shape = networks(8, 30)
    batch = next(TASK.epoch(0))
    kept = torch.full((30,), 30)
    seen = {}
    for method in ("iter_snip", "force"):
        masks = []
        original = with_biases

        def record(weights, shape, masks=masks, original=original):
            masks.append(weights)
            return original(weights, shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparse_pretrain.exposition.masks.with_biases", record)
            before_training(method, rows, kept, shape, *batch)
        seen[method] = torch.stack(masks)
        assert len(masks) == ITERATIONS[method] == 10
        counts = seen[method].sum(dim=2)[:, 0].tolist()
        assert counts[-1] == 30
        for i, count in enumerate(counts[:-1]):
            assert count == int(shape.weights * (30 / shape.weights) ** ((i + 1) / 10))
    assert not (seen["iter_snip"][1:] & ~seen["iter_snip"][:-1]).any()
    assert (seen["force"][1:] & ~seen["force"][:-1]).any()


def test_gradual_schedule():
    rows, shape = networks(8, 2)
    kept, steps = torch.tensor([20, 50]), 1000
    rule, mask, counts = Gradual(kept, shape, steps), torch.ones_like(rows), []
    for step in range(steps):
        mask = rule.mask(step, rows * mask, mask, lambda at: at)
        counts.append(mask[:, : shape.weights].sum(dim=1).tolist())
    total = shape.weights
    assert counts[4] == [total, total]
    assert counts[5 * 100] == [
        20 + int((total - 20) * (1 - 100 / 199) ** 3),
        50 + int((total - 50) * (1 - 100 / 199) ** 3),
    ]
    assert counts[5 * 199] == counts[-1] == [20, 50]
    assert all(a >= b for a, b in itertools.pairwise(counts))
    short = Gradual(kept, shape, 5)
    mask = torch.ones_like(rows)
    for step in range(5):
        mask = short.mask(step, rows * mask, mask, lambda at: at)
    assert mask[:, : shape.weights].sum(dim=1).tolist() == [20, 50]


def test_one_shot_prunes_once_at_half():
    rows, shape = networks(4, 2)
    rule, ones = OneShot(torch.tensor([10, 11]), shape, 9), torch.ones_like(rows)
    assert all(rule.mask(step, rows, ones, lambda at: at) is ones for step in range(9) if step != 4)
    assert rule.mask(4, rows, ones, lambda at: at)[:, : shape.weights].sum(dim=1).tolist() == [10, 11]


def test_imp_prunes_geometrically_and_rewinds(monkeypatch):
    trained = []
    original = pruners.train

    def record(start, mask, *rest):
        trained.append((start.clone(), mask.clone()))
        return original(start, mask, *rest)

    monkeypatch.setattr(pruners, "train", record)
    _, shape = pruned("imp", ["12", "30"], width=8, rounds=4, epochs=1)
    total = shape.weights
    assert len(trained) == 4
    assert all(torch.equal(start, trained[0][0]) for start, _ in trained)  # rewound to the initial weights
    for number, (_, mask) in enumerate(trained):
        expected = [int(total * (12 / total) ** (number / 3)), int(total * (30 / total) ** (number / 3))]
        assert mask[:, :total].sum(dim=1).tolist() == (expected if number < 3 else [12, 30])
    for (_, before), (_, after) in itertools.pairwise(trained):
        assert (after <= before).all()


@pytest.mark.parametrize(
    ("method", "target", "every", "decay"),
    [("ste", "20", 1, 0.0), ("sr_ste", "20", 1, 1e-2), ("sr_ste", "2:4", 1, 1e-2), ("transposable", "2:4", 40, 1e-2)],
)
def test_how_masks_are_learned(monkeypatch, method, target, every, decay):
    rules = []
    original = pruners.train

    def record(start, mask, shape, task, sgd, lrs, schedules, rule, advance):
        rules.append(rule)
        return original(start, mask, shape, task, sgd, lrs, schedules, rule, advance)

    monkeypatch.setattr(pruners, "train", record)
    pruned(method, [target], width=8, epochs=1)
    (rule,) = rules
    assert (rule.straight_through, rule.refresh_every, rule.decay) == (True, every, decay)


def test_erdos_renyi_kernel():
    shape = Shape(16)
    for kept in (20, 60, 150, 559):
        counts = erdos_renyi(kept, shape)
        assert sum(counts) == kept
        assert all(count <= size for count, size in zip(counts, shape.sizes, strict=True))
    density = [count / size for count, size in zip(erdos_renyi(60, shape), shape.sizes, strict=True)]
    factors = [(2 + 16) / (2 * 16), 32 / 256, 32 / 256, 17 / 16]
    for i in range(4):
        assert density[i] == pytest.approx(
            60 * factors[i] / sum(f * s for f, s in zip(factors, shape.sizes, strict=True)), abs=0.06
        )
    assert erdos_renyi(Shape(2).weights - 1, Shape(2))[3] == 2  # full: its share goes to the others


def test_rigl_moves_weights_within_layers():
    rows, shape = networks(8, 3)
    counts = [torch.tensor([3, 4, 5]), torch.tensor([8, 9, 10]), torch.tensor([8, 9, 10]), torch.tensor([2, 3, 4])]
    mask = with_biases(layerwise(torch.rand(3, shape.weights), counts, shape), shape)
    rule = RigL(counts, shape, steps=1000)
    rows = rows * mask
    x, y = next(TASK.epoch(0))
    gradients = loss_gradients(*shape.split(rows), x, y)
    for step in (0, 50, 800):
        assert rule.mask(step, rows, mask, lambda at: gradients) is mask
    new = rule.mask(100, rows, mask, lambda at: gradients)
    share = 0.15 * (1 + torch.cos(torch.tensor(torch.pi * 100 / 750)))
    parts = [rows_.split([*shape.sizes, 25], dim=1) for rows_ in (mask, new, rows, gradients)]
    for before, after, row, gradient, count in zip(*(part[:4] for part in parts), counts, strict=True):
        for i in range(3):
            stay = int(count[i]) - int(int(count[i]) * share)
            kept = row[i].abs().where(before[i] > 0, -1.0).topk(stay).indices
            assert after[i, kept].all()
            grown = after[i].index_fill(0, kept, 0)
            assert_largest(gradient[i].abs().index_fill(0, kept, -1.0), grown, int(count[i]) - stay)


def test_the_options_are_the_methods():
    assert CHOICES["pruning.methods"] == list(METHODS)


def test_what_fits():
    assert fits("gmp", "20", 4)
    assert not fits("gmp", "44", 4)  # 4 + 16 + 16 + 4 + 4 there are
    assert fits("gmp", "43", 4)
    assert not fits("gmp", "2:4", 4)
    assert fits("sr_ste", "2:4", 8)
    assert fits("ste", "20", 8)
    assert not fits("ste", "2:4", 6)
    assert fits("transposable", "2:4", 8)
    assert not fits("transposable", "1:4", 8)
    assert not fits("transposable", "20", 8)
