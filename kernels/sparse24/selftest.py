"""Each of our compiled GEMMs once on this GPU, in a process of its own, before anything relies on them.

A kernel that hangs or breaks the CUDA context would take the process with it that calls it; here it takes one that is
there for it. `python -m sparse24.selftest 0` prints what it finds, for GPU 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from sparse24 import cubin, matmul
from sparse24.fragments import to_fragments
from sparse24.packing import pack, unpack
from sparse24.reference import magnitude_mask

SECONDS = 120.0  # for all kernels; each takes microseconds, the process some seconds to start
M, N, K = 1024, 200, 768  # the tallest tile of a cluster; a ragged last tile; a ring of slots once around
TOLERANCE = 1e-2  # ‖result − expected‖ / ‖expected‖
_DTYPES = {name: dtype for dtype, name in matmul.DTYPES.items()}


@lru_cache
def broken(device: int) -> dict[str, str]:
    """The kernels that must not be used on this GPU, by name, and why. Takes some seconds, once in a process."""
    found: dict[str, str] = {}
    passed: set[str] = set()
    while True:
        lines, end = _run_child(device, [*found, *passed])
        tried = [name for word, name, *_ in lines if word == "try"]
        for word, name, *reasons in lines:
            if word == "right":
                passed.add(name)
            elif word == "wrong":
                found[name] = " ".join(reasons)
        if not end:
            break
        unfinished = [name for name in tried if name not in found and name not in passed]
        if not unfinished:  # it was none of the kernels: without a process to test them in, none is used
            found |= {name: f"could not be tested: {end}" for name in cubin.manifest() if name not in passed}
            break
        found[unfinished[-1]] = end
    for name, reason in found.items():
        warnings.warn(f"sparse24: {name} is not used: {reason}", stacklevel=2)
    return found


def _command(device: int, skipped: list[str]) -> list[str]:
    return [sys.executable, "-m", "sparse24.selftest", str(device), *skipped]


def _run_child(device: int, skipped: list[str]) -> tuple[list[list[str]], str]:
    """The words of each line that it printed, and how it ended: empty if well."""
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        _command(device, skipped),
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = ""
    try:
        out, err = child.communicate(timeout=SECONDS)
        if child.returncode:
            last = err.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            end = f"it ended the process: {last[0]}"
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
        end = f"it hung: no result in {SECONDS:.0f} s"
    return [line.split() for line in out.splitlines() if line.startswith(("try ", "right ", "wrong "))], end


def main() -> None:
    device, skipped = torch.device("cuda", int(sys.argv[1])), sys.argv[2:]
    capability = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        for name, entry in cubin.manifest().items():
            if name in skipped or not entry.runs_on(capability):
                continue
            print("try", name, flush=True)
            off = _error(entry, device)
            print(*(("right", name) if off <= TOLERANCE else ("wrong", name, f"off by {off:.2g}")), flush=True)


def _error(entry: cubin.Entry, device: torch.device) -> float:
    """Of one kernel, on random operands packed on the CPU; NaN if anything is."""
    generator = torch.Generator().manual_seed(0)
    dtype = _DTYPES[entry.dtype]
    dense = torch.randn(M, K, generator=generator).to(dtype)
    packed = pack(dense.float(), magnitude_mask(dense.float()))
    sparse = unpack(packed)
    fragments = to_fragments(packed._replace(values=packed.values.to(dtype)))
    fragments = fragments._replace(values=fragments.values.to(device), metadata=fragments.metadata.to(device))
    if entry.form == "outer":
        x = torch.randn(K - 5, N, generator=generator).to(dtype)  # fewer tokens than a multiple of 64
        expected = sparse[:, : K - 5] @ x.float()
        result = matmul.outer(fragments, x.to(device), variant=entry.name)
    else:
        x = torch.randn(N, K, generator=generator).to(dtype)
        bias = torch.randn(M, generator=generator).to(torch.float16 if dtype == torch.float16 else torch.bfloat16)
        scale = torch.tensor(0.5, device=device) if dtype.itemsize == 1 else None
        expected = x.float() @ sparse.t() * (0.5 if scale is not None else 1.0) + bias.float()
        result = matmul.linear(fragments, x.to(device), bias.to(device), variant=entry.name, scale=scale)
    return ((result.float().cpu() - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
