"""Compile GEMM variants with Triton 3.9 in a process of its own, and operands to emulate them with."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse24.fragments import to_fragments
from sparse24.reference import magnitude_mask, pack

KERNELS = Path(__file__).parents[2] / "kernels"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn, "fp32": torch.float32}

# prints one JSON object a variant: what the tests look at
_BUILD = """
import importlib, json, os, re, subprocess, sys, tempfile
from collections import Counter
import triton
from sparse24.gemm_variant import compile_variant
tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
for variant in importlib.import_module(sys.argv[1]).VARIANTS:
    compiled = compile_variant(variant)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = lambda *arguments: subprocess.run(
            [tools + "/cuobjdump", *arguments, file.name], check=True, capture_output=True, text=True).stdout
        usage, sass = tool("-res-usage"), tool("-sass")
    instructions = re.findall(r"/[*][0-9a-f]{4,}[*]/\\s+(?:@!?U?P\\d+ )?([A-Z][A-Z0-9_.]*)", sass)
    print("VARIANT" + json.dumps({
        "name": variant.name, "form": variant.form, "dtype": variant.dtype, "block": variant.block,
        "arguments": [name for name, kind in variant.signature.items() if kind != "constexpr"],
        "num_ctas": variant.num_ctas, "shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"],
        "registers": int(re.search(r"REG:(\\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\\d+)", usage)[1]), "instructions": Counter(instructions)}))
"""


@lru_cache
def compile_variants(module):
    """Variant's name -> what `_BUILD` prints of it, for the VARIANTS of a module of the package."""
    triton39 = os.environ.get("SPARSE24_TRITON39")
    if not triton39:
        pytest.skip("SPARSE24_TRITON39 is not set: it names the folder that holds Triton 3.9, see scripts/build-cubins")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_ALWAYS_COMPILE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([triton39, str(KERNELS)])
    process = subprocess.run(
        [sys.executable, "-c", _BUILD, f"sparse24.{module}"], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    found = [json.loads(line[7:]) for line in process.stdout.splitlines() if line.startswith("VARIANT")]
    return {variant["name"]: variant for variant in found}


def to_numpy(tensor):
    """The bits of a tensor, as the emulator takes them."""
    if tensor.dtype == torch.float32 or not tensor.is_floating_point():
        return np.ascontiguousarray(tensor.numpy())
    same = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
    return np.ascontiguousarray(tensor.view(same).numpy().view({1: np.uint8, 2: np.uint16}[tensor.element_size()]))


def poisoned(rows, cols, dtype):
    """A result that is NaN wherever nothing is written."""
    return to_numpy(torch.full((rows, cols), torch.nan).to(dtype))


def from_numpy(array, dtype):
    """float32 tensor of an array of bits."""
    if dtype == torch.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(dtype).float()


def randn(rows, cols, dtype, seed):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse(rows, cols, dtype, seed=0):
    """A random 2:4 matrix: dense float32, and (values, metadata) in fragment order as numpy arrays."""
    dense = randn(rows, cols, torch.float32, seed)
    dense = (dense * magnitude_mask(dense)).to(dtype)
    if dense.element_size() == 1:  # pack() of fp8: by its bits, as it has no arithmetic
        packed = pack(dense.view(torch.uint8).float().mul(dense.float() != 0))
        packed = packed._replace(values=packed.values.to(torch.uint8).view(dtype))
    else:
        packed = pack(dense)
    fragments = to_fragments(packed)
    return dense.float(), to_numpy(fragments.values), to_numpy(fragments.metadata)


def assert_rounded(result, expected, dtype):
    """Equal within the rounding of the result's dtype and of float32 sums."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=max(eps, 1e-5), atol=2e-6 * float(expected.abs().max()))
