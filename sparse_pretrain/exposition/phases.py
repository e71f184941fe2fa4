"""The parts of the experiment: the smallest structure, the sparsest masks within it, and what pruning finds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, product

from tqdm import tqdm

from sparse_pretrain.config import SparsestConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.exposition.pruners import fits
from sparse_pretrain.exposition.search import (
    Mask,
    Structure,
    all_masks,
    candidates,
    fewest_weights,
    name,
    some_masks,
    structure_weights,
    structures,
)
from sparse_pretrain.exposition.trials import MASK, STRUCTURE, Found, Lab, Trial

MOST_MASKS = 200_000  # of a structure, for all of them to be tried
MOST_CANDIDATES = 20_000_000  # to go through for them


def smallest_structure(lab: Lab) -> tuple[Structure, list[Found]]:
    """The dense structure with the fewest weights that reaches the target, and every structure tried on the way.

    Raises:
        UserError: none does.
    """
    cfg = lab.cfg
    found: list[Found] = []
    with tqdm(desc="structures", unit=" networks", disable=None, dynamic_ncols=True) as bar:
        for group in structures(cfg.search.max_neurons):
            trials = [
                trial
                for structure in group
                for trial in trainings(cfg, STRUCTURE, name(structure), "", cfg.search.structure_draws)
            ]
            group_found = lab.run(trials, lambda networks: None)
            found += group_found
            bar.update(len(trials))
            bar.set_postfix_str(f"{structure_weights(group[0])} weights, best {best(found)[1].accuracy:.1%}")
            trial, outcome = best(group_found)
            if outcome.accuracy >= cfg.target:
                return trial.structure, found
    raise UserError(
        "target",
        f"{cfg.target:g}, which no structure of up to {cfg.search.max_neurons} neurons a layer reached "
        f"(best: {best(found)[1].accuracy:.4f})",
        "less, or more of search.max_neurons, search.structure_draws or training.epochs",
    )


def masks_of(structure: Structure, cfg: SparsestConfig) -> list[Mask]:
    """The masks to try within a structure, fewest weights first: every one there is, or some of each number of weights.

    Raises:
        UserError: every one is asked for, and there are too many, or no mask is that sparse.
    """
    search = cfg.search
    most = min(search.max_weights or structure_weights(structure), structure_weights(structure))
    if most < fewest_weights(structure):
        raise UserError(
            "search.max_weights",
            f"{most}, with which no mask of {name(structure)} has paths through all its neurons",
            f"at least {fewest_weights(structure)}",
        )
    masks: list[Mask] = []
    if search.masks_per_count is not None:
        for weights in range(1, most + 1):
            masks += some_masks(structure, weights, search.masks_per_count, random.Random(f"{cfg.seed} {weights}"))
        return masks
    if candidates(structure) <= MOST_CANDIDATES:
        masks = list(islice((mask for mask in all_masks(structure) if mask.weights <= most), MOST_MASKS + 1))
    if not 0 < len(masks) <= MOST_MASKS:
        raise UserError(
            "search.masks_per_count",
            f"null, for every mask of {name(structure)} with up to {most} weights: more than {MOST_MASKS:,}",
            "how many to draw for each number of weights, or a lower search.max_weights",
        )
    return sorted(masks, key=lambda mask: mask.weights)


def sparsest_masks(lab: Lab, structure: Structure) -> list[Found]:
    """Every mask, then the best ones of each number of weights from further initial weights; all of them."""
    cfg = lab.cfg
    masks = masks_of(structure, cfg)
    first = [trial for mask in masks for trial in trainings(cfg, MASK, mask.text(), "", cfg.search.mask_draws)]
    with epochs_bar(lab, first, "masks") as advance:
        found = lab.run(first, advance)
    finalists = list(finalists_of(found, cfg.search.finalists))
    draws = cfg.search.mask_draws + cfg.search.finalist_draws
    again = [trial for mask in finalists for trial in trainings(cfg, MASK, mask, "", draws)]
    with epochs_bar(lab, again, "best masks") as advance:
        found_again = lab.run(again, advance)
    return list(dict(found + found_again).items())


def finalists_of(found: Iterable[Found], most: int) -> Iterator[str]:
    """The masks with the highest accuracies among those of as many weights, up to `most` of each."""
    by_weights: dict[int, dict[str, float]] = {}
    for trial, outcome in found:
        group = by_weights.setdefault(Mask.parse(trial.network).weights, {})
        group[trial.network] = max(outcome.accuracy, group.get(trial.network, 0.0))
    for weights in sorted(by_weights):
        group = by_weights[weights]
        yield from sorted(group, key=lambda mask: (-group[mask], mask))[:most]


def pruned_networks(lab: Lab) -> list[Found]:
    """Every method, at every width, with every target that it can have there."""
    cfg = lab.cfg.pruning
    trials = [
        trial
        for method in dict.fromkeys(cfg.methods)
        for width in dict.fromkeys(cfg.widths)
        for target in dict.fromkeys([*map(str, cfg.targets), *cfg.patterns])
        if fits(method, target, width)
        for trial in trainings(lab.cfg, method, name((width, width, width)), target, cfg.draws)
    ]
    with epochs_bar(lab, trials, "pruning") as advance:
        return lab.run(trials, advance)


def trainings(cfg: SparsestConfig, method: str, network: str, target: str, draws: int) -> list[Trial]:
    """One from each of `draws` initial weights; the learning rates and schedules take turns."""
    settings = list(product(cfg.training.schedules, cfg.training.lrs))
    turns = [(draw, *settings[draw % len(settings)]) for draw in range(draws)]
    return [Trial(method, network, target, lr, schedule, draw) for draw, schedule, lr in turns]


def best(found: Sequence[Found]) -> Found:
    """That of the highest accuracy, the first of equals."""
    return max(found, key=lambda pair: pair[1].accuracy)


@contextmanager
def epochs_bar(lab: Lab, trials: Sequence[Trial], text: str) -> Iterator[Callable[[int], object]]:
    """A bar over the epochs of the networks yet to be trained."""
    missing = lab.epochs(lab.missing(trials))
    with tqdm(total=missing, desc=text, unit=" epochs", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        yield bar.update
