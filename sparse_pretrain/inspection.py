"""`sparse-pretrain inspect`: attention sinks, outlier features, masks and spectra of checkpoints, side by side.

The module is not called as its command: a script started in this folder would then import it as Python's `inspect`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_pretrain import runs
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config import InspectConfig
from sparse_pretrain.config_models import BertConfig, GPTConfig, ModelConfig
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.data.sources import file_documents, find_files
from sparse_pretrain.data.token_store import TokenStore
from sparse_pretrain.data.tokenizer import encode_documents, load_tokenizer
from sparse_pretrain.diagnostics.findings import (
    DEFINITIONS,
    Findings,
    PairAgreement,
    agreements,
    input_findings,
    layer_findings,
)
from sparse_pretrain.diagnostics.masks import pruned_layers
from sparse_pretrain.diagnostics.probe import run_probe
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluate import recorded_data
from sparse_pretrain.hardware import pick_device
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.reporting.table import text_table
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.represent import represent
from sparse_pretrain.tasks.trained import Trained, load_trained

HEADER = (
    *("checkpoint", "1st sink", "any", "highest", "rank-1", "max/med", "kurtosis"),
    *("pruned", "+adapter", "eff. rank", "of W"),
)


@dataclass(frozen=True)
class Checkpoint:
    """folder: a run's checkpoint, or a Hugging Face folder, which has no recipe."""

    folder: Path
    label: str
    recipe: RecipeConfig | None


def run(cfg: InspectConfig) -> None:
    """Prints a table of the main figures; all of them go to `inspect.json`, with pictures beside it.

    Raises:
        UserError: no checkpoints, ones that cannot be compared on one text, too little text, or an `out` that cannot be
            written.
    """
    from sparse_pretrain.diagnostics.figures import write_figures  # matplotlib takes a second

    device = pick_device(cfg.accelerator, "accelerator")
    checkpoints = find(cfg)
    out = Path(cfg.out).expanduser().resolve()
    with runs.writing(out, "out"):
        out.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(checkpoints)
    reference = reference_weights(cfg, recipe, device)
    tokens, where = torch.empty(0), ""
    found: list[Findings] = []
    for checkpoint in checkpoints:
        trained = load_trained(str(checkpoint.folder), device, "checkpoints")
        if not found:
            tokens, where = probe_tokens(cfg, trained)
        print(f"{checkpoint.label}: {checkpoint.folder}", flush=True)
        found.append(examine(checkpoint.label, trained, recipe, tokens.to(device), cfg, reference))
    pairs = agreements(found)
    settings = {**dataclasses.asdict(cfg), "text": where, "mask_recipe": recipe.name, "pattern": recipe.pattern}
    with runs.writing(out, "out"):
        (out / "inspect.json").write_text(json.dumps(results_json(found, pairs, settings)) + "\n", encoding="utf-8")
        write_figures(found, pairs, cfg.threshold, out)
    print(f"\n{table(found, pairs, f'{len(tokens)} sequences of {cfg.seq_len} tokens of {where}')}")
    print(f"\nResults: {out}/inspect.json, sinks.png, outliers.png, masks.png, spectra.png")


def find(cfg: InspectConfig) -> list[Checkpoint]:
    """The checkpoints, each once, with labels that tell them apart.

    Raises:
        UserError: there are none, one is not there, is of another kind of model, is made for shorter sequences, or has
            another tokenizer than the first.
    """
    folders = list(dict.fromkeys(_resolve(path) for path in cfg.checkpoints))
    if not folders:
        raise UserError("checkpoints", "none", "run, checkpoint or Hugging Face folders, as [runs/A,runs/B]")
    recipes: list[RecipeConfig | None] = []
    first: bytes | None = None
    for folder in folders:
        if huggingface.is_hugging_face(folder):
            run_dir = folder
            check_model(huggingface.options(folder, "checkpoints"), folder, cfg)
            recipes.append(None)
        else:
            run_dir = folder.parent.parent
            its = runs.read_config(run_dir)
            check_model(its.model, folder, cfg)
            recipes.append(its.recipe)
        tokenizer = run_dir / runs.TOKENIZER_FILE
        if not tokenizer.is_file():
            raise UserError("checkpoints", f"{folder}, which has no {tokenizer.name}", "a model with its tokenizer")
        first = first or tokenizer.read_bytes()
        if tokenizer.read_bytes() != first:
            raise UserError(
                "checkpoints",
                f"{folder}, which has another tokenizer than {folders[0]}",
                "checkpoints that read the same tokens",
            )
    return [Checkpoint(*fields) for fields in zip(folders, labels(folders, recipes), recipes, strict=True)]


def _resolve(path: str) -> Path:
    folder = Path(path).expanduser().resolve()
    return folder if huggingface.is_hugging_face(folder) else store.resolve(folder, "checkpoints")


def check_model(model: ModelConfig, folder: Path, cfg: InspectConfig) -> None:
    """Raises UserError if it is no model of a text, or one of shorter sequences."""
    if not isinstance(model, GPTConfig | BertConfig):
        raise UserError("checkpoints", f"{folder}, a model of family {model.family}", ["gpt", "bert"])
    if cfg.seq_len > model.max_seq_len:
        raise UserError("seq_len", cfg.seq_len, f"at most {model.max_seq_len}, what {folder} is made for")


def labels(folders: Sequence[Path], recipes: Sequence[RecipeConfig | None]) -> list[str]:
    """A run's recipe, a Hugging Face folder's name; where others have the same, the run's folder, or that with the
    step, or the whole path."""
    run_dirs = [
        folder if recipe is None else folder.parent.parent for folder, recipe in zip(folders, recipes, strict=True)
    ]
    names = [run_dir.name if recipe is None else recipe.name for run_dir, recipe in zip(run_dirs, recipes, strict=True)]
    for longer in (
        [run_dir.name for run_dir in run_dirs],
        [f"{run_dir.name} {folder.name}" for run_dir, folder in zip(run_dirs, folders, strict=True)],
        [str(folder) for folder in folders],
    ):
        names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return names


def _recipe(checkpoints: Sequence[Checkpoint]) -> RecipeConfig:
    """Which layers of a dense model are pruned to compare: those of the first sparse one, else the FFN's."""
    recipes = (checkpoint.recipe for checkpoint in checkpoints)
    sparse = (recipe for recipe in recipes if recipe is not None and recipe.projection != "none")
    return next(sparse, RecipeConfig(name="magnitude", projection="magnitude"))


def probe_tokens(cfg: InspectConfig, trained: Trained) -> tuple[Tensor, str]:
    """Token ids (sequences, seq_len) int64, spread evenly over the text without overlap, and a name for the text.

    Raises:
        UserError: no such files, too little text, or none where the checkpoint is not of a run on a text.
    """
    if cfg.text:
        tokenizer = load_tokenizer(trained.tokenizer_path.read_bytes(), str(trained.tokenizer_path))
        documents = [document for path in find_files(cfg.text, "text") for document in file_documents(path, "text")]
        tokens, where = encode_documents(tokenizer, documents, np.int64), ", ".join(cfg.text)
    else:
        data = None if huggingface.is_hugging_face(trained.checkpoint) else recorded_data(trained)
        if not isinstance(data, TokenStore):
            found = f"none, and {trained.checkpoint} is not of a run on a text"
            raise UserError("text", found, "files of text, as [novel.txt]")
        tokens, where = data.split("validation"), f"{data.manifest['name']}, validation split"
    whole = len(tokens) // cfg.seq_len
    if whole < cfg.sequences:
        raise UserError("sequences", cfg.sequences, f"at most {whole}, with seq_len={cfg.seq_len} and {where}")
    rows = np.linspace(0, whole - 1, cfg.sequences).round().astype(np.int64) * cfg.seq_len
    return torch.from_numpy(tokens[rows[:, None] + np.arange(cfg.seq_len)].astype(np.int64)), where


def reference_weights(cfg: InspectConfig, recipe: RecipeConfig, device: torch.device) -> dict[str, Tensor]:
    """Of the layers that may be pruned, the weights before: those of `cfg.reference`; none where it is null."""
    if cfg.reference is None:
        return {}
    trained = load_trained(cfg.reference, device, "reference")
    check_model(trained.cfg.model, trained.checkpoint, cfg)
    return {name: layer.weight for name, layer in pruned_layers(body_of(trained), recipe).items()}


def body_of(trained: Trained) -> GPT | Bert:
    """The part of a model that reads tokens."""
    return next(module for module in trained.model.modules() if isinstance(module, GPT | Bert))


def examine(
    label: str,
    trained: Trained,
    recipe: RecipeConfig,
    tokens: Tensor,
    cfg: InspectConfig,
    reference: dict[str, Tensor],
) -> Findings:
    """Everything about one checkpoint.

    Raises:
        UserError: weights are not finite, no layer of its blocks is sparse, or they are not those of `cfg.reference`.
    """
    body = body_of(trained)
    for name, parameter in body.named_parameters():
        if not parameter.isfinite().all():
            raise UserError("checkpoints", f"{trained.checkpoint}, whose {name} is not finite", "finite weights")
    probe = run_probe(body, body.hidden, ((part, None) for part in tokens.split(cfg.batch_size)), cfg.threshold)
    pruned = {name: layer for name, layer in pruned_layers(body, recipe).items() if name in probe.inputs}
    if not pruned:
        raise UserError("checkpoints", f"{trained.checkpoint}, sparse outside of its blocks alone", "sparse blocks")
    if cfg.reference is not None:
        for name, layer in pruned.items():
            if name not in reference or reference[name].shape != layer.weight.shape:
                found = f"{cfg.reference}, which has no {name} as that of {trained.checkpoint}"
                raise UserError("reference", found, "a checkpoint of the same model")
    weights = represent(trained.model, "auto")
    zeros = sum(layer.is_sparse and not isinstance(layer.layer, SparseLinear) for layer in pruned.values())
    return Findings(
        label=label,
        path=str(trained.checkpoint),
        step=trained.step,
        recipe=trained.cfg.recipe.name,
        weights=f"{weights}, with {recipe.pattern} zeros in {zeros} layers" if zeros else weights,
        is_sparse=any(layer.is_sparse for layer in pruned.values()),
        attention={name: meter.result() for name, meter in probe.heads.items()},
        hidden={name: meter.result() for name, meter in probe.hidden.items()},
        inputs=input_findings(probe),
        layers=layer_findings(pruned, probe, reference),
        masks={name: layer.mask.cpu() for name, layer in pruned.items()},
    )


def results_json(found: Sequence[Findings], pairs: Sequence[PairAgreement], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": settings,
        "definitions": DEFINITIONS,
        "checkpoints": [checkpoint.to_json() for checkpoint in found],
        "mask_agreement": [dataclasses.asdict(pair) for pair in pairs],
    }


def table(found: Sequence[Findings], pairs: Sequence[PairAgreement], text: str) -> str:
    rows = []
    for checkpoint in found:
        values = checkpoint.summary()
        lacking = values["residual_after_adapter_norm"]
        rows.append(
            [
                checkpoint.label,
                f"{values['first_sink']:.1%}",
                f"{values['any_sink']:.1%}",
                f"{values['highest_alpha']:.2f}",
                f"{values['rank1_share']:.1%}",
                f"{values['largest_over_median']:.1f}",
                f"{values['kurtosis']:.2f}",
                f"{values['residual_norm']:.1%}",
                "-" if lacking is None else f"{lacking:.1%}",
                f"{values['residual_effective_rank']:.1f}",
                f"{values['weight_effective_rank']:.1f}",
            ]
        )
    notes = [f"{text}."]
    notes += [f"{checkpoint.label}: {checkpoint.weights}." for checkpoint in found]
    notes += [
        "1st sink: share of layers, heads and sequences in which the first token is a sink, that is gets more than the "
        "threshold of attention on average; any: in which some token is. highest: attention to a token, of the head "
        "with most, mean over sequences.",
        "rank-1: share of the heads' outputs along the value of the token with most attention.",
        "max/med: largest |h| / median |h|; it and kurtosis are of the hidden state with the largest.",
        "pruned: norm of what is pruned / norm of the weight, +adapter: of what an adapter does not give back; "
        "effective ranks of what is pruned and of W; means over layers. Of a dense model: what magnitude pruning would "
        "take.",
        *(
            f"masks of {pair.a} and {pair.b}: {pair.mean.equal:.1%} equal ({pair.mean.equal_by_chance:.0%} by chance)."
            for pair in pairs
            if pair.mean is not None
        ),
    ]
    return text_table([HEADER, *rows], notes)
