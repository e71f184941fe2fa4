"""Training of stacks against torch.optim, and of each network apart from the others."""

import pytest
import torch
from test_networks import single
from torch.nn.functional import binary_cross_entropy_with_logits

from sparse_pretrain.exposition.networks import Shape, initial, loss_gradients
from sparse_pretrain.exposition.pruners import Learned
from sparse_pretrain.exposition.spiral import cubist_spiral
from sparse_pretrain.exposition.training import Sgd, Task, schedule_factor, train

TASK = Task(*cubist_spiral(2000), batch_size=64, seed=3)
SGD = Sgd(epochs=2, momentum=0.9, weight_decay=5e-4)


def stack(width: int, networks: int) -> tuple[torch.Tensor, Shape]:
    shape = Shape(width)
    return initial(range(networks), [shape.units[:4]] * networks, shape), shape


def test_is_torch_sgd():
    start, shape = stack(3, 4)
    mask = (torch.rand(start.shape, generator=torch.Generator().manual_seed(0)) > 0.2).float()
    lrs, schedules = [0.1, 0.05, 0.1, 0.2], ["cosine", "steps", "constant", "cosine"]
    rows, kept = train(start, mask, shape, TASK, SGD, lrs, schedules)
    assert torch.equal(kept, mask)
    assert torch.equal(rows[mask == 0], torch.zeros(int((mask == 0).sum())))
    for i in range(4):
        model, keep = single(start[i] * mask[i], 3), single(mask[i], 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=lrs[i], momentum=0.9, weight_decay=5e-4)
        scheduler = {
            "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2),
            "steps": torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.1),
            "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        }[schedules[i]]
        for epoch in range(2):
            for x, y in TASK.epoch(epoch):
                optimizer.zero_grad()
                binary_cross_entropy_with_logits(model(x.T)[:, 0], y).backward()
                optimizer.step()
                for parameter, there in zip(model.parameters(), keep.parameters(), strict=True):
                    parameter.data *= there
            scheduler.step()
        weights, biases = shape.split(rows[i : i + 1])
        for j, layer in enumerate(model[::2]):
            torch.testing.assert_close(weights[j][0], layer.weight.data, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(biases[j][0, :, 0], layer.bias.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [3, 5, 8, 17])
def test_each_network_is_apart_from_the_others(width):
    start, shape = stack(width, 40)
    mask, lrs, schedules = torch.ones_like(start), [0.1, 0.05] * 20, ["cosine", "constant"] * 20
    together, _ = train(start, mask, shape, TASK, SGD, lrs, schedules)
    for some in ([4, 5], [39, 0, 7], list(range(10, 31))):
        alone, _ = train(
            start[some], mask[some], shape, TASK, SGD, [lrs[i] for i in some], [schedules[i] for i in some]
        )
        assert torch.equal(alone, together[some])


def test_batches():
    first, again, other = (list(TASK.epoch(number)) for number in (0, 0, 1))
    assert len(first) == TASK.batches == len(TASK.y) // 64
    assert torch.equal(first[3][0], again[3][0])
    assert not torch.equal(first[3][0], other[3][0])
    points = {tuple(point) for x, _ in first for point in x.T.tolist()}
    assert len(points) > 0.9 * 64 * len(first)  # a permutation; corners of the curves are there twice
    labels = {tuple(point): label for point, label in zip(TASK.x.tolist(), TASK.y.tolist(), strict=True)}
    assert all(
        labels[tuple(point)] == label for x, y in first for point, label in zip(x.T.tolist(), y.tolist(), strict=True)
    )


def test_schedules_are_those_of_torch():
    for schedule, build in {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50),
        "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [15, 30], gamma=0.1),
    }.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build(optimizer)
        for epoch in range(50):
            assert schedule_factor(schedule, epoch, 50) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_straight_through_moves_what_is_pruned(decay):
    """STE and SR-STE, a step at a time by hand."""
    start, shape = stack(4, 3)

    def project(weights):
        return weights.abs() >= weights.abs().median(dim=1, keepdim=True).values

    rule = Learned(project, shape, decay, refresh_every=1)
    sgd = Sgd(epochs=1, momentum=0.9, weight_decay=5e-4)
    rows, mask = train(start, torch.ones_like(start), shape, TASK, sgd, [0.1] * 3, ["constant"] * 3, rule)
    master, velocity = start.clone(), torch.zeros_like(start)
    for x, y in TASK.epoch(0):
        keep = rule.mask(0, master, mask, lambda at: at)
        gradient = loss_gradients(*shape.split(master * keep), x, y) + 5e-4 * master + decay * (1 - keep) * master
        velocity = 0.9 * velocity + gradient
        master = master - 0.1 * velocity
    torch.testing.assert_close(rows, master * keep, rtol=1e-3, atol=1e-5)
    assert (master[keep == 0] != 0).any()


def test_progress_counts_networks_and_epochs():
    start, shape = stack(3, 5)
    steps = []
    train(start, torch.ones_like(start), shape, TASK, SGD, [0.1] * 5, ["cosine"] * 5, advance=steps.append)
    assert steps == [5, 5]
