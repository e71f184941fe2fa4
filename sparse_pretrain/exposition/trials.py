"""Trials: one network each, trained with one setting; a stack of them at once; and what came out, on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_pretrain.config import SparsestConfig
from sparse_pretrain.exposition.connections import connections
from sparse_pretrain.exposition.networks import INPUTS, Shape, accuracy, initial, structure_mask
from sparse_pretrain.exposition.pruners import prune
from sparse_pretrain.exposition.search import Mask, Structure
from sparse_pretrain.exposition.spiral import cubist_spiral
from sparse_pretrain.exposition.training import Sgd, Task, train
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.seeds import hash_seed

STRUCTURE, MASK = "structure", "mask"
# Neurons of a hidden layer over all networks of a stack: what fits into a CPU core's cache, and what fills a GPU.
NEURONS_AT_ONCE = {"cpu": 1024, "cuda": 131_072}


@dataclass(frozen=True)
class Trial:
    """One network and how it is trained; with the settings that all share, everything its outcome depends on.

    Attributes:
        method: `structure` (dense), `mask` (a given one) or a pruning method.
        network: `3-3-3`, or the text of a mask.
        target: of a pruning method: weights to keep, as `20`, or a pattern, as `2:4`.
        draw: number of the initial weights. They depend on the network too, and on nothing else: all methods that prune
            a structure begin with the same ones.
    """

    method: str
    network: str
    target: str
    lr: float
    schedule: str
    draw: int

    @property
    def structure(self) -> Structure:
        if self.method == MASK:
            return Mask.parse(self.network).structure
        d1, d2, d3 = map(int, self.network.split("-"))
        return d1, d2, d3


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        accuracy: share of the points, those it was trained on, in their class.
        kept, weights, parameters, disconnected: as in `connections.Connections`.
    """

    accuracy: float
    kept: int
    weights: int
    parameters: int
    disconnected: int


Found = tuple[Trial, Outcome]


class Lab:
    """Trains trials, and knows those already trained.

    Args:
        cfg: the settings that all trials share.
        path: a JSON line for each trained trial, written a stack at a time. Lines that are damaged count as not there.
    """

    def __init__(self, cfg: SparsestConfig, path: Path, device: torch.device) -> None:
        x, y = cubist_spiral(cfg.points)
        self.cfg, self.path, self.device = cfg, path, device
        self.task = Task(x.to(device), y.to(device), cfg.training.batch_size, cfg.seed)
        self.sgd = Sgd(cfg.training.epochs, cfg.training.momentum, cfg.training.weight_decay)
        self.outcomes = read(path)

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        return [trial for trial in trials if trial not in self.outcomes]

    def found(self, trials: Iterable[Trial]) -> list[Found]:
        return [(trial, self.outcomes[trial]) for trial in trials]

    def run(self, trials: Sequence[Trial], advance: Callable[[int], object]) -> list[Found]:
        """Train what is not yet trained.

        Args:
            advance: called with the number of networks that have come one epoch further.

        Raises:
            OSError: what came out cannot be written.
        """
        for stack in stacks(self.missing(trials), NEURONS_AT_ONCE[self.device.type]):
            found = self.judge(*self.parameters(stack, advance))
            append(self.path, zip(stack, found, strict=True))
            self.outcomes.update(zip(stack, found, strict=True))
        return self.found(trials)

    def judge(self, rows: Tensor, shape: Shape) -> list[Outcome]:
        """What became of trained networks, given their parameters (N, parameters)."""
        shares = accuracy(rows, shape, self.task.x, self.task.y).tolist()
        return [
            Outcome(share, **dataclasses.asdict(connected))
            for share, connected in zip(shares, connections(rows, shape), strict=True)
        ]

    def parameters(self, stack: Sequence[Trial], advance: Callable[[int], object] = int) -> tuple[Tensor, Shape]:
        """Train a stack, whose trials are alike as `stacks` makes them: the parameters (N, parameters), zero where
        pruned."""
        if len(stack) == 1:  # a single product of small matrices is rounded otherwise than those of a batch
            rows, shape = self.parameters([*stack, *stack], lambda networks: advance(networks // 2))
            return rows[:1], shape
        first = stack[0]
        shape = Shape(max(first.structure))
        seeds = [seed_of(self.cfg.seed, trial) for trial in stack]
        start = initial(seeds, [self._fan_in(trial.structure) for trial in stack], shape).to(self.device)
        setting = [trial.lr for trial in stack], [trial.schedule for trial in stack]
        if first.method in (STRUCTURE, MASK):
            if first.method == MASK:
                there = torch.stack([Mask.parse(trial.network).tensor(shape) for trial in stack])
            else:
                there = structure_mask([trial.structure for trial in stack], shape)
            mask = there.float().to(self.device)
            return train(start, mask, shape, self.task, self.sgd, *setting, advance=advance)[0], shape
        targets, options = [trial.target for trial in stack], self.cfg.pruning
        rows = prune(
            *(first.method, targets, start, shape, self.task, self.sgd, *setting),
            *(seeds, options.rounds, options.decay, advance),
        )
        return rows, shape

    def epochs(self, trials: Iterable[Trial]) -> int:
        """How often training them calls for an `advance` of one network."""
        rounds = self.cfg.pruning.rounds
        return sum(self.sgd.epochs * (rounds if trial.method == "imp" else 1) for trial in trials)

    def _fan_in(self, structure: Structure) -> tuple[int, int, int, int]:
        width = self.cfg.search.width
        return (INPUTS, *structure) if width is None else (INPUTS, width, width, width)


def seed_of(seed: int, trial: Trial) -> int:
    network = int.from_bytes(hashlib.sha256(trial.network.encode()).digest()[:8])
    return hash_seed(seed, trial.draw, network)


def stacks(trials: Iterable[Trial], neurons: int) -> Iterator[list[Trial]]:
    """Trials that can be trained together, in order: of one method, padded width and pattern.

    Args:
        neurons: of a hidden layer at most, over all networks of a stack; but a stack has eight networks if there are.
    """
    alike: dict[tuple[str, int, str], list[Trial]] = {}
    for trial in trials:
        pattern = trial.target if parse_pattern(trial.target) else ""
        alike.setdefault((trial.method, max(trial.structure), pattern), []).append(trial)
    for (_, width, _), group in alike.items():
        most = max(8, neurons // width)
        for begin in range(0, len(group), most):
            yield group[begin : begin + most]


def read(path: Path) -> dict[Trial, Outcome]:
    """The trials of a file of lines, without those that are damaged."""
    outcomes = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
            trial = Trial(**{field.name: values.pop(field.name) for field in dataclasses.fields(Trial)})
            outcomes[trial] = Outcome(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return outcomes


def append(path: Path, found: Iterable[Found]) -> None:
    """Add lines, whatever the last one is like, and see them to disk."""
    lines = [json.dumps(dataclasses.asdict(trial) | dataclasses.asdict(outcome)) for trial, outcome in found]
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                lines.insert(0, "")
        file.write("\n".join([*lines, ""]).encode())
        file.flush()
        os.fsync(file.fileno())
