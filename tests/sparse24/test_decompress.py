import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sparse24 import decompress
from sparse24.decompress import decompress_linear
from sparse24.packing import pack, unpack
from sparse24.reference import magnitude_mask

ON_GPU = torch.cuda.is_available()
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ERROR = {FP32: 1e-6, FP16: 5e-4, BF16: 4e-3}  # of the whole result; 16-bit: its rounding


def problem(n, m, k, dtype, device, bias=True):
    generator = torch.Generator().manual_seed(n + m + k)
    weight = torch.randn(m, k, generator=generator).to(dtype)
    weight = pack(weight, magnitude_mask(weight))
    weight = weight._replace(values=weight.values.to(device), metadata=weight.metadata.to(device))
    x = torch.randn(n, k, generator=generator).to(dtype).to(device)
    return x, weight, torch.randn(m, generator=generator).to(dtype).to(device) if bias else None


def expected(x, packed, bias):
    y = x.double() @ unpack(packed).double().t()
    return y if bias is None else y + bias.double()


def check(y, x, packed, bias):
    right = expected(x, packed, bias)
    assert (y.double() - right).norm() <= ERROR[x.dtype] * right.norm()


# ragged in every direction, several steps along k, several tiles
SHAPES = [(1, 64, 128), (3, 65, 4), (17, 130, 140), (40, 70, 268), (130, 64, 64)]


@pytest.mark.parametrize("dtype", [FP32, FP16] + [BF16] * ON_GPU)  # Triton's interpreter is wrong on dots of bf16
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_dense_product(shape, dtype, device, runtime_loops):
    n, m, k = shape
    x, packed, bias = problem(n, m, k, dtype, device)
    out = torch.full((n, m), torch.nan, dtype=dtype, device=device)
    assert decompress_linear(x, packed, bias, out) is out
    check(out, x, packed, bias)
    check(decompress_linear(x, packed), x, packed, None)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("splits", [2, 3])
def test_k_in_parts(splits, dtype, device, runtime_loops):
    x, packed, bias = problem(5, 70, 3 * 128 - 20, dtype, device)
    first = torch.full((5, 70), torch.nan, dtype=dtype, device=device)
    decompress._launch(x, packed, bias, first, splits)
    check(first, x, packed, bias)
    again = torch.full_like(first, torch.nan)
    decompress._launch(x, packed, bias, again, splits)
    assert torch.equal(first, again)


def test_every_pattern_and_place(device, runtime_loops):
    # each of the six pairs of places, each value at a place of its own
    rows = torch.tensor(
        [
            [i < 2 for i in order]
            for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1), (2, 0, 1, 3), (2, 0, 3, 1), (2, 3, 0, 1))
        ]
    )
    weight = torch.arange(1.0, 7 * 64 - 63).reshape(6, 64).half() * rows.repeat(1, 16)
    weight = weight.to(device)
    x = torch.eye(64, dtype=FP16, device=device)
    assert torch.equal(decompress_linear(x, pack(weight, rows.repeat(1, 16).to(device))), weight.t())


def test_rows_of_x_may_have_gaps(device, runtime_loops):
    x, packed, bias = problem(6, 32, 64, FP16, device)
    wide = torch.full((6, 100), torch.nan, dtype=FP16, device=device)
    wide[:, 7:71] = x
    check(decompress_linear(wide[:, 7:71], packed, bias), x, packed, bias)


def test_nothing_to_do(device):
    x, packed, _ = problem(3, 32, 64, FP16, device)
    assert decompress_linear(x[:0], packed).shape == (0, 32)


@pytest.mark.parametrize(
    ("n", "m", "k", "splits"),
    [
        (8, 4096, 4096, 4),
        (8, 16384, 4096, 1),
        (16, 2048, 8192, 8),
        (128, 4096, 16384, 4),
        (128, 4096, 4096, 1),
        (1, 64, 128, 1),
    ],
)
def test_parts_of_k_on_132_multiprocessors(n, m, k, splits):
    assert decompress._splits(n, m, k, BF16, 132) == splits


@pytest.mark.parametrize("n", [1, 16, 33, 128])
@pytest.mark.parametrize("k", [4, 1000, 1152, 4096, 11008])
def test_no_part_is_empty(n, k):
    splits = decompress._splits(n, 128, k, BF16, 132)
    steps = -(-k // decompress._blocks(n, BF16)[1])
    assert (splits - 1) * -(-steps // splits) < steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x must be bfloat16, float16 or float32; found torch.float64"),
        ({"x": torch.zeros(2, 60)}, r"x must be \(tokens, k=64\) with contiguous rows; found \(2, 60\)"),
        ({"x": torch.zeros(64, 2).t()}, r"with strides \(1, 2\)"),
        ({"x": torch.zeros(2, 64, dtype=FP16)}, "values must be contiguous torch.float16"),
        ({"metadata": torch.zeros(32, 4, dtype=torch.int32)}, "metadata must be contiguous int16"),
        ({"values": torch.zeros(32, 64)[:, ::2]}, "values must be contiguous torch.float32"),
        ({"bias": torch.zeros(31)}, r"bias must be floating point of shape \(32,\)"),
        ({"out": torch.zeros(32, 2)}, r"out must be contiguous torch.float32 of shape \(2, 32\)"),
    ],
)
def test_errors(change, message):
    x, packed, bias = problem(2, 32, 64, FP32, "cpu")
    packed = packed._replace(**{name: change.pop(name) for name in ("values", "metadata") if name in change})
    arguments = {"x": x, "bias": bias, **change}
    with pytest.raises(ValueError, match=message):
        decompress_linear(arguments["x"], packed, arguments["bias"], arguments.get("out"))


AOT = """
import sys
sys.path.insert(0, sys.argv[1])
import aot
for name in [name for name in aot.CASES if name.startswith("decompress_16_bit")]:
    for arch in (80, 90):
        compiled = aot.compile_case(aot.CASES[name], arch)
        report = aot.inspect(compiled.asm["cubin"])
        instruction = "wgmma.mma_async" if arch == 90 else "mma.sync"
        print(name, arch, report["spills"], report["stack_bytes"], instruction in compiled.asm["ptx"], compiled.metadata.shared)
"""


def test_compiled_for_tensor_cores():
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(here.parents[1] / "kernels")
    command = [sys.executable, "-c", AOT, str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines
    for name, arch, spills, stack, tensor_cores, shared in lines:
        assert (spills, stack) == ("0", "0"), name
        assert tensor_cores == "True", (name, arch)
        assert int(shared) <= 99 * 1024, (name, arch)  # sm_86 and sm_89 have least
