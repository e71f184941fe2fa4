"""Training of a stack of networks by SGD, with masks that stay or that a rule changes on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sparse_pretrain.exposition.networks import Shape, loss_gradients
from sparse_pretrain.seeds import hash_seed


@dataclass(frozen=True)
class Task:
    """The points x (n, 2), their classes y (n,) in {0, 1}, and the order in which batches of them come."""

    x: Tensor
    y: Tensor
    batch_size: int
    seed: int

    @property
    def batches(self) -> int:
        """In an epoch; a last one that is not full is left out."""
        return len(self.y) // self.batch_size

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (2, batch_size), (batch_size,): a function of the seed and the epoch's number."""
        generator = torch.Generator().manual_seed(hash_seed(self.seed, number))
        order = torch.randperm(len(self.y), generator=generator).to(self.y.device)[: self.batches * self.batch_size]
        xs = self.x[order].unflatten(0, (self.batches, self.batch_size)).transpose(1, 2).contiguous()
        return zip(xs, self.y[order].unflatten(0, (self.batches, self.batch_size)), strict=True)


@dataclass(frozen=True)
class Sgd:
    """SGD as torch.optim.SGD has it; weight decay reaches biases too."""

    epochs: int
    momentum: float
    weight_decay: float


Gradients = Callable[[Tensor], Tensor]
"""Of each network's loss on a step's batch, at the parameters given: both (N, parameters)."""


class Rule(Protocol):
    """What changes masks while networks train."""

    @property
    def straight_through(self) -> bool:
        """Whether pruned weights live on and get the gradients of the masked ones (STE); else they are zero."""
        ...

    @property
    def decay(self) -> float:
        """With STE: what a pruned weight's gradient gets of the weight itself (SR-STE)."""
        ...

    def mask(self, step: int, rows: Tensor, mask: Tensor, gradients: Gradients) -> Tensor:
        """The mask of this step, 0 or 1, from the parameters before it; all are (N, parameters) float32."""
        ...


def schedule_factor(schedule: str, epoch: int, epochs: int) -> float:
    """What multiplies the learning rate in an epoch."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "steps":
        return 0.1 ** sum(epoch >= math.ceil(share * epochs) for share in (0.3, 0.6))
    assert schedule == "constant"
    return 1.0


def train(
    start: Tensor,
    mask: Tensor,
    shape: Shape,
    task: Task,
    sgd: Sgd,
    lrs: Sequence[float],
    schedules: Sequence[str],
    rule: Rule | None = None,
    advance: Callable[[int], object] = lambda networks: None,
) -> tuple[Tensor, Tensor]:
    """Train N networks on the same batches.

    Args:
        start, mask: (N, parameters) float32, the mask 0 or 1; neither is changed.
        lrs, schedules: of each network.
        advance: called after every epoch with the number of networks.

    Returns:
        Parameters, zero where pruned, and mask, both (N, parameters).
    """
    learned = rule is not None and rule.straight_through
    rows = start.clone() if learned else start * mask
    live = torch.empty_like(rows) if learned else rows  # what the networks compute with
    velocity, (weights, biases) = torch.zeros_like(rows), shape.split(live)
    rates = torch.tensor(lrs, dtype=torch.float32, device=rows.device)
    step = 0
    for epoch in range(sgd.epochs):
        factors = [schedule_factor(schedule, epoch, sgd.epochs) for schedule in schedules]
        rate = (rates * torch.tensor(factors).to(rates)).unsqueeze(1)
        for x, y in task.epoch(epoch):
            if rule is not None:
                mask = rule.mask(step, rows, mask, partial(_gradients, shape, x, y))
                torch.mul(rows, mask, out=live)
                if not learned:
                    velocity.mul_(mask)
            gradients = loss_gradients(weights, biases, x, y).add_(rows, alpha=sgd.weight_decay)
            if rule is not None and learned:
                gradients.addcmul_(rows, 1 - mask, value=rule.decay)
            else:
                gradients.mul_(mask)
            velocity.mul_(sgd.momentum).add_(gradients)
            rows.addcmul_(velocity, rate, value=-1)
            step += 1
        advance(len(rows))
    return rows * mask, mask


def _gradients(shape: Shape, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    return loss_gradients(*shape.split(rows), x, y)
