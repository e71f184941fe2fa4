"""`sparse-pretrain doctor`: what this machine can do, and what happens where something is missing."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from sparse24.backends import BACKENDS
from sparse24.backends.base import KINDS, Product

from sparse_pretrain.config import DoctorConfig
from sparse_pretrain.hardware import device_name, peak_tflops
from sparse_pretrain.loggers import logged_in_to_wandb
from sparse_pretrain.paths import cache_dir


def run(cfg: DoctorConfig) -> None:
    """Prints one line per fact; never fails for what is missing."""
    for name, fact in facts(Path(cfg.runs_dir).expanduser().resolve()):
        print(f"{name:20}{fact}")


def facts(runs_dir: Path) -> list[tuple[str, str]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    peak, source = peak_tflops(device, dtype)
    rows = [
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton") or "not installed: no Triton kernels"),
        ("device", f"{device_name(device)}, {torch.cuda.device_count()} GPUs"),
        ("precision=auto", f"{str(dtype).removeprefix('torch.')}; peak {peak:.3g} TFLOP/s ({source})"),
    ]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        rows.append(
            ("sparse cores", f"sm_{major}{minor}: " + ("2:4 tensor cores" if major >= 8 else "none before sm_80"))
        )
        sparselt = torch.backends.cusparselt
        rows.append(
            ("cuSPARSELt", str(sparselt.version()) if sparselt.is_available() else "not in this build of PyTorch")
        )
    compiler = shutil.which("g++") or shutil.which("clang++")
    rows += [
        *backends(device, dtype),
        ("W&B", _wandb()),
        ("compile", compiler or "no C++ compiler: trainer.compile=true will fail on a CPU"),
        ("cache", f"{cache_dir()} ({_free(cache_dir())} free)"),
        ("runs", f"{runs_dir} ({_free(runs_dir)} free)"),
    ]
    return rows


def backends(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    """For each backend, which products of a GPT-2 1.5B FFN layer it can compute here, or why none."""
    rows = []
    for name, backend in BACKENDS.items():
        able, reasons = [], []
        for kind in KINDS:
            yes, reason = backend.supports(Product(kind, 8192, 6400, 1600, dtype), device)
            able += [kind.replace("_", " ")] if yes else []
            reasons += [reason] if not yes else []
        rows.append((f"backend {name}", ", ".join(able) or reasons[0]))
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wandb() -> str:
    if importlib.util.find_spec("wandb") is None:
        return "not installed"
    return "logged in" if logged_in_to_wandb() else "not logged in: logger=wandb records offline"


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
