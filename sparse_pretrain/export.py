"""`sparse-pretrain export`: a trained model as a folder that transformers, lm-eval and PEFT load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparse_pretrain.config import ExportConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.exportable import Source, find_source
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.huggingface.packed import SECTION
from sparse_pretrain.models.huggingface.peft import write_adapters
from sparse_pretrain.models.huggingface.sparsity_section import describe

ADAPTER_FOLDER = "adapter"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(cfg: ExportConfig) -> None:
    """Writes the folder `out`, whole or not at all, and prints what is in it.

    Raises:
        UserError: no such checkpoint, `out` is there already, or transformers or the format cannot hold the model.
    """
    out = Path(cfg.out).expanduser().absolute()
    if out.exists():
        raise UserError("out", f"{out}, which exists", "a new folder")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    scratch = partial / "scratch"
    try:
        with _writing(out):
            scratch.mkdir(parents=True)
        source = find_source(cfg, scratch)
        with _writing(out):
            weights = write(cfg, source, partial)
            shutil.rmtree(scratch)
            os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"checkpoint  {source.text}")
    print(f"weights     {weights}")
    if source.adapters:
        where = out if cfg.format == "adapters" else out / ADAPTER_FOLDER
        print(f'adapters    apart: peft.PeftModel.from_pretrained(model, "{where}") adds them')
    for note in source.notes:
        print(f"note        {note}")
    print(f"written     {out}")
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"            {path.stat().st_size:13,} bytes  {path.relative_to(out)}")
    if cfg.format == "dense":
        print(f'load        transformers.{source.model.class_name}.from_pretrained("{out}")')


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError("out", f"{out}, which cannot be written ({error.strerror or error})", "a new folder") from error


def write(cfg: ExportConfig, source: Source, folder: Path) -> str:
    """Write the files; returns a sentence about the weights.

    Raises:
        UserError: the format is not for such weights.
    """
    model = source.model
    if cfg.format == "adapters":
        if not source.adapters:
            raise UserError("format", f"adapters, but {source.text} has none", ["dense", "packed"])
        write_adapters(folder, source.adapters, model.layers, model.class_name)
        return f"adapters of {len(source.adapters)} layers"
    pattern = parse_pattern(source.pattern)
    if pattern is None:
        raise UserError("checkpoint", f"{source.text} with sparsity_structure={source.pattern}", "N:M, as 2:4")
    section = describe(
        model.tensors, model.config.get("model_type", ""), pattern, source.recipe, cfg.format == "packed"
    )
    if cfg.format == "packed" and (section is None or pattern != (2, 4)):
        found = f"{source.pattern}" if section is not None else "dense"
        raise UserError("format", f"packed, but the weights of {source.text} are {found}", "dense, or 2:4 weights")
    source.write_others(folder)
    if section is not None:
        model.config[SECTION] = section
        for name in section["targets"]:
            model.tensors[f"{name}.weight"] = model.tensors[f"{name}.weight"] + 0  # no zeros with a sign
    huggingface.save(model, folder, source.ids, _DTYPES[cfg.dtype] if cfg.dtype else None)
    if source.adapters:
        (folder / ADAPTER_FOLDER).mkdir()
        write_adapters(folder / ADAPTER_FOLDER, source.adapters, model.layers, model.class_name)
    if section is None:
        return "dense"
    share = f"{section['global_sparsity']:.1%} of all weights are zero"
    return f"{section['sparsity_structure']} in {len(section['targets'])} layers; {share}"
