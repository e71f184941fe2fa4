"""Pruning and mask learning of many small networks at once: every method of the benchmark, from start to end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from sparse24.reference import magnitude_mask, transposable_mask
from torch import Tensor

from sparse_pretrain.exposition.masks import (
    ITERATIONS,
    before_training,
    erdos_renyi,
    keep_largest,
    layerwise,
    with_biases,
)
from sparse_pretrain.exposition.networks import LAYERS, Shape
from sparse_pretrain.exposition.training import Gradients, Rule, Sgd, Task, train
from sparse_pretrain.limits import parse_pattern

GRADUAL_PRUNINGS = 199
RIGL_EVERY, RIGL_SHARE, RIGL_END = 100, 0.3, 0.75
REFRESH_EVERY = {"transposable": 40}  # steps, as FST does (arXiv 2404.01847)
HIDDEN = (1, 2)  # layers that an N:M pattern is for: those in the middle


def magnitudes(rows: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    """|w| of the weights (N, weights); -1 where pruned, after all that are there."""
    return rows[:, : shape.weights].abs().where(mask[:, : shape.weights] > 0, -1.0)


class Gradual:
    """GMP: the smallest weights go at 199 times over the run, on a cubic schedule (Zhu & Gupta 2017)."""

    straight_through, decay = False, 0.0

    def __init__(self, kept: Tensor, shape: Shape, steps: int) -> None:
        self.kept, self.shape = kept, shape
        self.prunings = min(GRADUAL_PRUNINGS, steps - 1)
        self.every = steps // (self.prunings + 1)

    def mask(self, step: int, rows: Tensor, mask: Tensor, gradients: Gradients) -> Tensor:
        number, rest = divmod(step, self.every)
        if rest or not 0 < number <= self.prunings:
            return mask
        dense = (1 - number / self.prunings) ** 3
        left = self.kept + ((self.shape.weights - self.kept) * dense).long()
        return with_biases(keep_largest(magnitudes(rows, mask, self.shape), left), self.shape)


class OneShot:
    """Half of the steps dense, then the smallest weights go, at once, and the rest of the steps are theirs."""

    straight_through, decay = False, 0.0

    def __init__(self, kept: Tensor, shape: Shape, steps: int) -> None:
        self.kept, self.shape, self.at = kept, shape, steps // 2

    def mask(self, step: int, rows: Tensor, mask: Tensor, gradients: Gradients) -> Tensor:
        if step != self.at:
            return mask
        return with_biases(keep_largest(magnitudes(rows, mask, self.shape), self.kept), self.shape)


class RigL:
    """Sparse from the start; every 100 steps of the first three quarters the smallest weights of each layer give way
    to those with the largest gradients (Evci et al., ICML 2020)."""

    straight_through, decay = False, 0.0

    def __init__(self, counts: Sequence[Tensor], shape: Shape, steps: int) -> None:
        self.counts, self.shape, self.end = counts, shape, RIGL_END * steps

    def mask(self, step: int, rows: Tensor, mask: Tensor, gradients: Gradients) -> Tensor:
        if step % RIGL_EVERY or not 0 < step < self.end:
            return mask
        share = RIGL_SHARE / 2 * (1 + math.cos(math.pi * step / self.end))
        staying = [count - (count * share).long() for count in self.counts]
        stay = layerwise(magnitudes(rows, mask, self.shape), staying, self.shape)
        # What stays is first in the order, then what has the largest gradient; new weights begin at 0.
        growth = gradients(rows)[:, : self.shape.weights].abs().masked_fill(stay, torch.inf)
        return with_biases(layerwise(growth, self.counts, self.shape), self.shape)


@dataclass(frozen=True)
class Learned:
    """STE: networks compute with the projection of the weights, all of which get its gradients; with `decay`, SR-STE
    (Zhou et al., ICLR 2021)."""

    project: Callable[[Tensor], Tensor]  # weights (N, weights) to a boolean mask
    shape: Shape
    decay: float
    refresh_every: int
    straight_through = True

    def mask(self, step: int, rows: Tensor, mask: Tensor, gradients: Gradients) -> Tensor:
        if step % self.refresh_every:
            return mask
        return with_biases(self.project(rows[:, : self.shape.weights]), self.shape)


BETWEEN = ("one_shot", "gmp", "imp", "rigl")  # the mask follows from training
LEARNED = ("ste", "sr_ste", "transposable")  # can keep N of M weights; transposable only that, and only 2:4
METHODS = (*ITERATIONS, *BETWEEN, *LEARNED)


def fits(method: str, target: str, width: int) -> bool:
    """Whether a method can prune a network of this width to a number of weights, or to an N:M pattern."""
    pattern = parse_pattern(target)
    if pattern is None:
        return method != "transposable" and int(target) < Shape(width).weights
    return method in LEARNED and width % pattern[1] == 0 and (method != "transposable" or pattern == (2, 4))


def prune(
    method: str,
    targets: Sequence[str],
    start: Tensor,
    shape: Shape,
    task: Task,
    sgd: Sgd,
    lrs: Sequence[float],
    schedules: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    decay: float,
    advance: Callable[[int], object],
) -> Tensor:
    """Train N networks to their targets.

    Args:
        method: of `METHODS`.
        targets: of each network the weights to keep, as `20`, or for all the same pattern, as `2:4`.
        start: initial parameters (N, parameters).
        seeds: of each network, for random masks.
        rounds: trainings of IMP, each as long as that of another method.
        decay: of SR-STE and transposable masks.

    Returns:
        Parameters (N, parameters), zero where pruned.
    """
    steps = sgd.epochs * task.batches
    pattern = parse_pattern(targets[0])
    kept = torch.tensor([0 if pattern else int(target) for target in targets], device=start.device)
    mask = torch.ones_like(start)
    rule: Rule | None = None

    def trained(mask: Tensor, rule: Rule | None = None) -> Tensor:
        return train(start, mask, shape, task, sgd, lrs, schedules, rule, advance)[0]

    if method in ITERATIONS:
        x, y = next(task.epoch(0))
        mask = before_training(method, start, kept, shape, x, y)
    elif method == "imp":  # Frankle & Carbin, ICLR 2019: the weights go back to where they began
        for number in range(1, rounds):
            left = shape.weights * (kept.double() / shape.weights).pow(number / (rounds - 1))
            scores = magnitudes(trained(mask), mask, shape)
            mask = with_biases(keep_largest(scores, kept if number == rounds - 1 else left.long()), shape)
    elif method == "gmp":
        rule = Gradual(kept, shape, steps)
    elif method == "one_shot":
        rule = OneShot(kept, shape, steps)
    elif method == "rigl":
        counts = torch.tensor([erdos_renyi(int(target), shape) for target in targets], device=start.device)
        draws = [torch.rand(shape.weights, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        mask = with_biases(layerwise(torch.stack(draws).to(start.device), counts.unbind(dim=1), shape), shape)
        rule = RigL(counts.unbind(dim=1), shape, steps)
    else:
        project = partial(_project, method, shape, kept, pattern)
        rule = Learned(project, shape, decay if method != "ste" else 0.0, REFRESH_EVERY.get(method, 1))
    return trained(mask, rule)


def _project(method: str, shape: Shape, kept: Tensor, pattern: tuple[int, int] | None, weights: Tensor) -> Tensor:
    """The mask (N, weights) of this step's weights."""
    if pattern is None:
        return keep_largest(weights.abs(), kept)
    parts = list(weights.split(shape.sizes, dim=1))
    for layer in range(LAYERS):
        if layer not in HIDDEN:
            parts[layer] = torch.ones_like(parts[layer], dtype=torch.bool)
        elif method == "transposable":
            parts[layer] = transposable_mask(parts[layer].reshape(-1, shape.width)).view_as(parts[layer])
        else:
            parts[layer] = magnitude_mask(parts[layer].reshape(-1, shape.width), *pattern).view_as(parts[layer])
    return torch.cat(parts, dim=1)
