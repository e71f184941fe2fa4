"""`sparse-pretrain sparsest`: the sparsest networks that solve a small task, by search, against what pruning finds.

Sparsest Models Elude Pruning (ICML 2024), scaled down unless told otherwise: which masks a method finds can be measured
here against the best there are, in minutes on a CPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from sparse_pretrain import __version__, runs
from sparse_pretrain.config import SparsestConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.exposition import phases, summary
from sparse_pretrain.exposition.connections import without_disconnected
from sparse_pretrain.exposition.pruners import fits
from sparse_pretrain.exposition.trials import Found, Lab
from sparse_pretrain.hardware import device_name, pick_device
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.reporting.table import duration

TRIALS_FILE, SETTINGS_FILE, RESULT_FILE, FIGURE_FILE = "trials.jsonl", "settings.json", "sparsest.json", "sparsest.png"


def run(cfg: SparsestConfig) -> Path:
    """Search, prune, and show what came out; returns the folder of the results. Networks trained before are not
    trained again.

    Raises:
        UserError: options that do not fit together, a folder of other settings or one that cannot be written, or no
            structure reaches the target.
    """
    check(cfg)
    device = pick_device(cfg.accelerator, "accelerator")
    out = resolve_out(cfg)
    with runs.writing(out, "out"):
        out.mkdir(parents=True, exist_ok=True)
    with runs.locked(out), runs.writing(out, "out"):
        check_same_settings(cfg, out)
        lab, start = Lab(cfg, out / TRIALS_FILE, device), time.perf_counter()
        known = len(lab.outcomes)
        print(f"{len(lab.task.y):,} points, {cfg.training.epochs} epochs, on {device_name(device)}; results in {out}")
        if known:
            print(f"{known:,} networks are trained already")
        result, tried = experiment(lab)
        print(f"\n{summary.search_text(result, tried)}\n\n{summary.pruning_text(result)}")
        trained = len(lab.outcomes) - known
        print(f"\n{trained:,} networks trained in {duration(time.perf_counter() - start)}")
        write(lab, result, out)
    print(f"Results: {out}/{RESULT_FILE}, {FIGURE_FILE}")
    return out


def experiment(lab: Lab) -> tuple[summary.Summary, int]:
    """All parts; what came out, and how many structures were looked at."""
    structures: list[Found] = []
    if lab.cfg.search.structure:
        d1, d2, d3 = lab.cfg.search.structure
        structure = d1, d2, d3
    else:
        structure, structures = phases.smallest_structure(lab)
    masks = phases.sparsest_masks(lab, structure)
    pruned = phases.pruned_networks(lab)
    tried = len({trial.network for trial, _ in structures})
    return summary.Summary(lab.cfg.target, structure, structures, masks, pruned), tried


def check(cfg: SparsestConfig) -> None:
    """Refuse options that do not fit together.

    Raises:
        UserError
    """
    lists = {
        "training.lrs": cfg.training.lrs,
        "training.schedules": cfg.training.schedules,
        "pruning.methods": cfg.pruning.methods,
        "pruning.widths": cfg.pruning.widths,
    }
    for option, values in lists.items():
        if not values:
            raise UserError(option, "none", "one or more")
    if cfg.training.batch_size > cfg.points // 4:  # in fewer steps there is no place for what prunes while training
        raise UserError("training.batch_size", cfg.training.batch_size, f"at most a quarter of points={cfg.points}")
    if len(cfg.search.structure) not in (0, 3):
        raise UserError("search.structure", cfg.search.structure, "three numbers of neurons, as [3,3,3], or []")
    for pattern in cfg.pruning.patterns:
        if parse_pattern(pattern) is None:
            raise UserError("pruning.patterns", pattern, "N:M with 0 < N < M, as 2:4 or 1:4")
    targets = [*map(str, cfg.pruning.targets), *cfg.pruning.patterns]
    for method in cfg.pruning.methods:
        if not any(fits(method, target, width) for target in targets for width in cfg.pruning.widths):
            raise UserError(
                "pruning.methods",
                f"{method}, which has nothing to do with targets={cfg.pruning.targets}, "
                f"patterns={cfg.pruning.patterns} and widths={cfg.pruning.widths}",
                "a target below the number of weights, or (for ste, sr_ste and transposable) a pattern whose M divides "
                "a width",
            )


def shared_settings(cfg: SparsestConfig) -> dict[str, Any]:
    """What every trained network depends on beside its own trial."""
    training = {name: value for name, value in dataclasses.asdict(cfg.training).items() if name not in OF_TRIALS}
    return {
        "points": cfg.points,
        **{f"training.{name}": value for name, value in training.items()},
        "search.width": cfg.search.width,
        "pruning.rounds": cfg.pruning.rounds,
        "pruning.decay": cfg.pruning.decay,
        "seed": cfg.seed,
    }


OF_TRIALS = ("lrs", "schedules")


def resolve_out(cfg: SparsestConfig) -> Path:
    if cfg.out is not None:
        return Path(cfg.out).expanduser().resolve()
    digest = hashlib.sha256(json.dumps(shared_settings(cfg), sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.runs_dir).expanduser().resolve() / f"sparsest-{digest}"


def check_same_settings(cfg: SparsestConfig, out: Path) -> None:
    """Whether networks trained here can go on with those in the folder; writes down the settings of a new one.

    Raises:
        UserError: they were trained with other settings.
    """
    here, there = shared_settings(cfg), runs.read_json(out / SETTINGS_FILE)
    if not there:
        runs.write_json(out / SETTINGS_FILE, here)
        return
    for option, value in here.items():
        if there.get(option) != value:
            raise UserError(
                "out",
                f"{out}, holding networks of {option}={there.get(option)} where these have {value}",
                "the folder of an experiment with the same settings, or a new one",
            )


def write(lab: Lab, result: summary.Summary, out: Path) -> None:
    """`sparsest.json`, with the parameters of the two networks that the figure shows, and the figure."""
    from sparse_pretrain.exposition.figure import Drawn, write_figure  # matplotlib takes a second

    drawn: dict[str, Drawn] = {}
    values = summary.numbers(result)
    for which, found in (("sparsest", result.sparsest), ("counterpart", result.counterpart())):
        if found is None:
            continue
        rows, shape = lab.parameters([found[0]])  # trained once more, which on a GPU may give another network
        (outcome,) = lab.judge(rows, shape)
        drawn[which] = Drawn(found[0], outcome, rows.cpu(), shape)
        weights, biases = shape.split(without_disconnected(rows, shape))
        layers = zip(weights, biases, strict=True)
        values[which] |= dataclasses.asdict(outcome) | {
            "layers": [{"weight": weight[0].tolist(), "bias": bias[0, :, 0].tolist()} for weight, bias in layers]
        }
    values["settings"] = dataclasses.asdict(lab.cfg)
    values["versions"] = {
        "sparse_pretrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    values["device"] = device_name(lab.device)
    runs.write_json(out / RESULT_FILE, values)
    write_figure(result, drawn, lab.task.x.cpu(), lab.task.y.cpu(), out / FIGURE_FILE)
