"""The device of a run: which one, in which precision, its peak rate (for MFU), and the memory in use."""

from __future__ import annotations

import resource
import sys
import time

import torch

from sparse_pretrain.errors import UserError

# Dense bf16/fp16 tensor-core peak in TFLOP/s with fp32 accumulation, without sparsity; from NVIDIA's data sheets.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def pick_device(accelerator: str, option: str) -> torch.device:
    """The device that `auto`, `cpu` or `gpu` means here.

    Raises:
        UserError: naming `option`: gpu, and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(option, "gpu, but PyTorch sees no GPU here", ["auto", "cpu"])
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def precision_dtype(precision: str, device: torch.device, option: str) -> torch.dtype:
    """The dtype of matrix products; weights stay fp32. `auto`: bf16 where the GPU has it, else fp32.

    Raises:
        UserError: naming `option`: fp16 on a CPU.
    """
    cuda = device.type == "cuda"
    if precision == "auto":
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    if precision == "fp16" and not cuda:
        raise UserError(option, "fp16 on a CPU", ["fp32", "bf16"])
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def peak_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak for products in `dtype`, in TFLOP/s, and where the figure is from: a data sheet, or
    (for anything not listed) the best of a few matrix products measured now, in well under a second."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops, f"data sheet, {known}"
    return _measured_tflops(device, dtype), "measured matrix product"


def _measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    n = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has used so far, in GB: on the device, or resident on the host for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
