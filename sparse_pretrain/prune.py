"""`sparse-pretrain prune`: one-shot pruning of a trained model, layer by layer."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_pretrain import pruned, runs
from sparse_pretrain.calibration import Calibration, calibration
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config import PruneConfig
from sparse_pretrain.config_recipe import AdapterConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.hardware import device_name, pick_device
from sparse_pretrain.models.huggingface import is_hugging_face
from sparse_pretrain.pruning.driver import LayerReport, Method, PrunedLayer, prune_blocks, select_layers
from sparse_pretrain.pruning.oats import compression, rank_share
from sparse_pretrain.pruning.partial import PartialResults
from sparse_pretrain.pruning.patterns import parse
from sparse_pretrain.reporting.table import text_table
from sparse_pretrain.tasks.task import Batch, Task, to_device
from sparse_pretrain.tasks.trained import load_trained

RESULT_FILE, PARTIAL, SETTINGS_FILE = "prune.json", "partial", "settings.json"


def run(cfg: PruneConfig) -> Path:
    """Prune, or go on with it, or show what came out where it is done; returns the folder of the result.

    Raises:
        UserError: no such checkpoint or calibration data, options that do not fit each other or the model, or a folder
            that holds something else.
    """
    method = check(cfg)
    device = pick_device(cfg.accelerator, "accelerator")
    trained = load_trained(cfg.checkpoint, device)
    out = Path(cfg.out).expanduser().resolve() if cfg.out else default_out(trained.checkpoint, cfg)
    task = pruned.plain_task(trained)
    layers = select_layers(task.model, method, cfg.include, cfg.exclude)
    hugging_face = is_hugging_face(trained.checkpoint)
    new = pruned.with_merged(trained, [name for block in layers.values() for name in block if not block[name]])
    if hugging_face:
        pruned.check_folder(trained.checkpoint, task.model, new)
    data = calibration(cfg, trained)
    settings = settings_of(cfg, trained.checkpoint, data)
    if is_done(out, settings):
        print(f"{out} is done")
        return finish(out)
    start = time.perf_counter()
    reports, factors = prune(task, layers, method, data, PartialResults(out / PARTIAL, device), cfg.pattern)
    facts = {
        **settings,
        "device": device_name(device),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
        **totals(reports, cfg, method),
        "layers": [asdict(report) for report in reports],
    }
    chosen = [report.name for report in reports if not report.skipped]
    adapter = AdapterConfig(kind="lora", rank_share=facts["rank_share"]) if factors else AdapterConfig()
    if hugging_face:
        pruned.write_folder(out, trained.checkpoint, task.model, new, factors, adapter)
    else:
        recipe = pruned.result_recipe(method.name, cfg.pattern, chosen, adapter)
        pruned.write_run(out, trained, task.model, chosen, factors, recipe, facts)
    runs.write_json(out / RESULT_FILE, facts)
    return finish(out)


def finish(out: Path) -> Path:
    """Give the room of the partial results back, and show the whole one."""
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    show(out)
    return out


def prune(
    task: Task,
    layers: Mapping[str, Mapping[str, str]],
    method: Method,
    data: Calibration,
    partial: PartialResults,
    title: str,
) -> tuple[list[LayerReport], dict[str, tuple[Tensor, Tensor]]]:
    """Prune the task's model in place, with what `partial` has already; returns the layers' figures and the factors of
    their low-rank parts, on the CPU."""
    done: set[str] = set()
    reports: list[LayerReport] = []
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    # On a terminal the bar moves all the time; in a log file it is a line now and then.
    interval = 0.5 if sys.stderr.isatty() else 30
    total = sum(map(len, layers.values()))
    with tqdm(total=total, desc=f"{method.name} {title}", unit="layer", mininterval=interval) as bar:

        def finished(block: str) -> dict[str, PrunedLayer] | None:
            found = partial.get(block)
            if found is not None:
                done.add(block)
                bar.update(len(found))
            return found

        def progress(report: LayerReport) -> None:
            bar.set_postfix_str(report.name, refresh=False)
            bar.update()

        def forward(batch: Batch) -> None:
            task.scores(to_device(batch, partial.device))

        for block, result in prune_blocks(task.model, forward, data.batches, layers, method, finished, progress):
            if block not in done:
                partial.put(block, result)
            for name, layer in result.items():
                reports.append(layer.report)
                if layer.left is not None and layer.right is not None:
                    factors[name] = layer.left.cpu(), layer.right.cpu()
    return reports, factors


def check(cfg: PruneConfig) -> Method:
    """What the options mean.

    Raises:
        UserError: they do not fit each other.
    """
    pattern = parse(cfg.pattern)
    default = PruneConfig(checkpoint="")
    for option in ("rank_ratio", "iterations", "svd"):
        if cfg.method != "oats" and getattr(cfg, option) != getattr(default, option):
            raise UserError(option, f"set with method={cfg.method}", "this only with method=oats")
    if cfg.method == "oats" and compression(pattern, cfg.rank_ratio) <= 0:
        assert isinstance(pattern, tuple)
        raise UserError(
            "rank_ratio",
            f"{cfg.rank_ratio:g} with pattern={cfg.pattern}, which together are no smaller than the layer",
            f"below {1 - pattern[0] / pattern[1]:g}",
        )
    seed = cfg.seed if cfg.svd == "randomized" else None
    return Method(cfg.method, pattern, cfg.rank_ratio, cfg.iterations, seed)


def default_out(checkpoint: Path, cfg: PruneConfig) -> Path:
    """Beside the folder of the run or model."""
    folder = (checkpoint if is_hugging_face(checkpoint) else checkpoint.parent.parent).resolve()
    return folder.parent / f"{folder.name}-{cfg.method}-{cfg.pattern.replace(':', 'of')}"


def weights_digest(checkpoint: Path) -> str:
    """What identifies the weights of a checkpoint or a Hugging Face folder."""
    if not is_hugging_face(checkpoint):
        return str(runs.read_json(checkpoint / store.MANIFEST_FILE)["sha256"])
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def settings_of(cfg: PruneConfig, checkpoint: Path, data: Calibration) -> dict[str, Any]:
    """What decides the result, as JSON has it."""
    used = ["method", "pattern", "include", "exclude", "seed", "batch_size"]
    used += ["rank_ratio", "iterations", "svd"] if cfg.method == "oats" else []
    return {
        "checkpoint": str(checkpoint.resolve()),
        "sha256": weights_digest(checkpoint),
        **{name: getattr(cfg, name) for name in used},
        "calibration": data.facts,
    }


def is_done(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the result is there; if not, `out` is made ready for it.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    result = runs.read_json(out / RESULT_FILE)
    there = result or runs.read_json(out / PARTIAL / SETTINGS_FILE)
    if not there:
        if out.is_dir() and any(path.name != PARTIAL for path in out.iterdir()):
            raise UserError("out", f"{out}, which holds something else", "a new folder")
        with runs.writing(out, "out"):
            (out / PARTIAL).mkdir(parents=True, exist_ok=True)
        runs.write_json(out / PARTIAL / SETTINGS_FILE, settings)
    here, before = _by_option(settings), _by_option(there)
    for name in here if there else ():
        if before.get(name) != here[name]:
            raise UserError(
                "out",
                f"{out}, which has {name}={before.get(name)} where this has {here[name]}",
                "a new folder, or the same options",
            )
    return bool(result)


def _by_option(settings: dict[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in settings.items() if name != "calibration"}
    return flat | {f"calibration.{name}": value for name, value in settings.get("calibration", {}).items()}


def totals(reports: list[LayerReport], cfg: PruneConfig, method: Method) -> dict[str, Any]:
    """Over all layers that were pruned."""
    pruned_layers = [report for report in reports if not report.skipped]
    weights = sum(report.out_features * report.in_features for report in pruned_layers)
    zeros = sum(report.sparsity * report.out_features * report.in_features for report in pruned_layers)
    low_rank = sum(report.rank * (report.out_features + report.in_features) for report in pruned_layers)
    figures = {
        "weights": weights,
        "sparsity": zeros / max(weights, 1),
        "compression": (zeros - low_rank) / max(weights, 1),
        "mean_error": sum(report.error for report in pruned_layers) / max(len(pruned_layers), 1),
    }
    if method.name == "oats":
        figures["rank_share"] = rank_share(method.pattern, cfg.rank_ratio)
    return figures


def show(out: Path) -> None:
    """The table of the layers, and how to go on."""
    facts = runs.read_json(out / RESULT_FILE)
    oats = "rank_share" in facts
    rows = [["layer", "out x in", "zeros", *(["rank"] if oats else []), "error", "seconds"]]
    notes = []
    for layer in facts["layers"]:
        if layer["skipped"]:
            notes.append(f"{layer['name']} stays as it was: {layer['skipped']}")
            continue
        shape = f"{layer['out_features']} x {layer['in_features']}"
        rank = [str(layer["rank"])] if oats else []
        rows.append(
            [
                layer["name"],
                shape,
                f"{layer['sparsity']:.1%}",
                *rank,
                f"{layer['error']:.4f}",
                f"{layer['seconds']:.1f}",
            ]
        )
    notes.append("error: of the layer's output on the calibration data, relative")
    print(f"\n{text_table(rows, notes)}\n")
    beside = f" and adapters; {facts['compression']:.1%} smaller in all" if oats else ""
    weights = f"{facts['sparsity']:.1%} of {facts['weights'] / 1e6:.2f}M weights are zero"
    print(f"{facts['method']} {facts['pattern']}: {weights}{beside}; mean error {facts['mean_error']:.4f}")
    print(f"Result: {out}")
