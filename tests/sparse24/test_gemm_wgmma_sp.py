"""The wgmma.sp kernels: what the compiler makes of them, and their PTX emulated against dense products."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from gemm_emulation import (
    DTYPES,
    KERNELS,
    assert_rounded,
    compile_variants,
    from_numpy,
    poisoned,
    randn,
    sparse,
    to_numpy,
)
from ptx_emulator import Emulator, Pointer, TensorMap

TILES = ["128x128_c1", "128x256_c1", "128x256_c2", "256x128_c2", "256x128_c4"]
SIMPLE = [f"wgmma_sp_simple_{dtype}_128x128_c1" for dtype in ("bf16", "fp16")]
LINEAR = [f"wgmma_sp_linear_{dtype}_{tile}" for dtype in ("bf16", "fp16", "e4m3") for tile in TILES]
OUTER = [f"wgmma_sp_outer_{dtype}_{tile}" for dtype in ("bf16", "fp16") for tile in TILES]
# one of each kind of cluster and of each layout of the accumulators, in the two widths of the operands
SOME_LINEAR = [
    "wgmma_sp_linear_bf16_128x128_c1",
    "wgmma_sp_linear_bf16_128x256_c2",
    "wgmma_sp_linear_bf16_256x128_c2",
    "wgmma_sp_linear_e4m3_128x256_c1",
    "wgmma_sp_linear_e4m3_256x128_c2",
]
SOME_OUTER = ["wgmma_sp_outer_bf16_128x256_c1", "wgmma_sp_outer_bf16_256x128_c2", "wgmma_sp_outer_fp16_128x128_c1"]


@pytest.fixture(scope="module")
def variants():
    return compile_variants("gemm_wgmma_sp")


def run(variant, arguments, programs, **how):
    """Launch with the arguments by name; a program is a cluster."""
    given = []
    for name in variant["arguments"]:
        value = arguments[name]
        given += value.arguments() if isinstance(value, TensorMap) else [value]
    ctas = variant["num_ctas"]
    emulator = Emulator(variant["ptx"])
    return emulator.launch((programs * ctas, 1, 1), given, cluster=ctas, shared=variant["shared"], **how)


def linear(variant, m, n, steps, bias=True, programs=1, values=lambda v: v, **how):
    """(result, expected) as float32 tensors."""
    dtype, (_, bn, bk) = DTYPES[variant["dtype"]], variant["block"]
    result = torch.bfloat16 if variant["dtype"] == "e4m3" else dtype
    k = steps * bk
    dense, a, metadata = sparse(m, k, dtype)
    x, b, scale = randn(n, k, dtype, 1), randn(1, m, result, 2), torch.tensor([0.25])
    out = poisoned(n, m, result)
    arguments = {
        "x_desc": TensorMap(to_numpy(x), (n, k), (bn, bk)), "x_ptr": to_numpy(x),
        "y_desc": TensorMap(out, (n, m), (bn, 64)), "y_ptr": out,
        "values_ptr": values(a), "metadata_ptr": metadata, "bias_ptr": to_numpy(b) if bias else 0,
        "scale_ptr": to_numpy(scale), "m": m, "n": n, "k": k, "has_bias": int(bias),
    }  # fmt: skip
    run(variant, arguments, programs, **how)
    expected = x.float() @ dense.T * (scale if variant["dtype"] == "e4m3" else 1.0)
    return from_numpy(out, result), expected + b.float() if bias else expected


def outer(variant, m, n, k, x_rows, programs=1, **how):
    dtype = DTYPES[variant["dtype"]]
    dense, values, metadata = sparse(m, k, dtype)
    x, out = randn(x_rows, n, dtype, 1), poisoned(m, n, torch.float32)
    arguments = {
        "x_desc": TensorMap(to_numpy(x), (x_rows, n), (64, 64)), "values_ptr": values, "metadata_ptr": metadata,
        "out_ptr": out, "m": m, "n": n, "k": k,
    }  # fmt: skip
    run(variant, arguments, programs, **how)
    return from_numpy(out, torch.float32), dense[:, :x_rows] @ x.float()


def rounding(variant):
    return torch.float16 if variant["dtype"] == "fp16" else torch.bfloat16


@pytest.mark.parametrize("name", [*SIMPLE, *LINEAR, *OUTER])
def test_machine_code(variants, name):
    """No spills; wgmma.sp, not serialised: one fence a step, one wait a step and one behind the loop."""
    variant = variants[name]
    count = variant["instructions"]
    assert (variant["stack"], variant["local"]) == (0, 0)
    assert not {"LDL", "STL"} & {op.split(".")[0] for op in count}
    multiply = {op: n for op, n in count.items() if "GMMA" in op}
    steps = 1 if name in SIMPLE else 4
    e4m3 = variant["dtype"] == "e4m3"
    assert multiply == {"QGMMA.SP.64" if e4m3 else "HGMMA.SP.64": 2 * steps * variant["block"][0] // 128}
    assert f"wgmma.mma_async.sp.sync.aligned.m64n{variant['block'][1]}k{64 if e4m3 else 32}." in variant["ptx"]
    assert count["WARPGROUP.ARRIVE"] == steps
    assert count["WARPGROUP.DEPBAR.LE"] == (1 if name in SIMPLE else 5)
    if name in LINEAR:
        # the result, transposed on its way to shared memory
        assert count["UTMASTG.2D"] == 1
        assert any(op.startswith("STSM.16.MT88") for op in count)
    if name in SIMPLE:
        assert all(op.endswith(".128") for op in count if op.startswith("STG"))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(("n", "steps", "bias"), [(133, 1, True), (5, 3, False), (128, 9, True)])
def test_simple(variants, n, steps, bias, lazy):
    variant = variants[SIMPLE[0]]
    tiles = 2 * -(-n // 128)  # this kernel computes one tile a program
    result, expected = linear(variant, 256, n, steps, bias, programs=tiles, lazy=lazy)
    assert_rounded(result, expected, torch.bfloat16)


def test_simple_fp16(variants):
    result, expected = linear(variants[SIMPLE[1]], 128, 72, 5)
    assert_rounded(result, expected, torch.float16)


@pytest.mark.parametrize("name", LINEAR)
def test_linear(variants, name):
    """Several tiles of one program, the last one ragged; rows of A that two tiles share; the ring of slots wraps."""
    variant = variants[name]
    bm, bn, _ = variant["block"]
    m = bm * variant["num_ctas"] + (128 if variant["num_ctas"] < 4 else 0)
    result, expected = linear(variant, m, bn + 5, 5, lazy=variant["num_ctas"] < 4)
    assert_rounded(result, expected, rounding(variant))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(("m", "n", "steps", "bias"), [(128, 1, 1, False), (384, 40, 9, True)])
@pytest.mark.parametrize("name", SOME_LINEAR)
def test_linear_edges(variants, name, m, n, steps, bias, lazy):
    """One step and less than a tile; more steps than slots, and two programs."""
    variant = variants[name]
    result, expected = linear(variant, m, n, steps, bias, programs=2, lazy=lazy)
    assert_rounded(result, expected, rounding(variant))


@pytest.mark.parametrize("name", OUTER)
def test_outer(variants, name):
    variant = variants[name]
    bm, bn, _ = variant["block"]
    m = bm * variant["num_ctas"] + (128 if variant["num_ctas"] < 4 else 0)
    result, expected = outer(variant, m, bn + 8, 320, 320, lazy=variant["num_ctas"] < 4)
    assert_rounded(result, expected, torch.float32)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "x_rows"), [(128, 8, 64, 1), (384, 136, 576, 509)])
@pytest.mark.parametrize("name", SOME_OUTER)
def test_outer_edges(variants, name, m, n, k, x_rows, lazy):
    """x ends before A's padding does."""
    result, expected = outer(variants[name], m, n, k, x_rows, programs=2, lazy=lazy)
    assert_rounded(result, expected, torch.float32)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["wgmma_sp_linear_bf16_256x128_c2", "wgmma_sp_linear_bf16_128x256_c1"])
def test_any_order_of_the_warps(variants, name, seed, lazy):
    result, expected = linear(variants[name], 256, 300, 5, lazy=lazy, seed=seed)
    assert_rounded(result, expected, torch.bfloat16)


def test_tiles_in_groups(variants):
    """More rows of tiles than a group has, a last group that is not full, and programs that do not divide them."""
    result, expected = linear(variants["wgmma_sp_linear_bf16_128x128_c1"], 18 * 128, 140, 1, programs=5)
    assert_rounded(result, expected, torch.bfloat16)


def test_swapped_registers_are_found(variants):
    """The comparison would notice fragments in another order."""
    variant = variants["wgmma_sp_linear_bf16_128x128_c1"]
    result, expected = linear(variant, 128, 16, 1, values=lambda v: np.ascontiguousarray(v[..., [0, 2, 1, 3]]))
    with pytest.raises(AssertionError):
        assert_rounded(result, expected, torch.bfloat16)


def test_beyond_32_bits(variants):
    """The last rows of A and of the result, beyond 2³¹ elements; only this tile exists."""
    variant, m, n, k = variants["wgmma_sp_outer_bf16_128x128_c1"], 2**27, 128, 64
    dense, values, metadata = sparse(128, k, torch.bfloat16)
    x, out = randn(k, n, torch.bfloat16, 1), poisoned(128, n, torch.float32)
    before = (m - 128) // 16  # tiles of 16 rows
    arguments = {
        "x_desc": TensorMap(to_numpy(x), (k, n), (64, 64)), "values_ptr": Pointer(values, -before * 1024),
        "metadata_ptr": Pointer(metadata, -before * 128), "out_ptr": Pointer(out, -(m - 128) * n * 4),
        "m": m, "n": n, "k": k,
    }  # fmt: skip
    run(variant, arguments, m // 128, only=[(m // 128 - 1, 0, 0)])
    assert_rounded(from_numpy(out, torch.float32), dense @ x.float(), torch.float32)


def test_simple_beyond_32_bits(variants):
    """The last rows of x and of the result."""
    variant, m, n, k = variants[SIMPLE[0]], 128, 2**26, 64
    dense, values, metadata = sparse(m, k, torch.bfloat16)
    x, out = randn(128, k, torch.bfloat16, 1), poisoned(128, m, torch.bfloat16)
    arguments = {
        "x_ptr": Pointer(to_numpy(x), -(n - 128) * k * 2), "values_ptr": values, "metadata_ptr": metadata,
        "bias_ptr": 0, "y_ptr": Pointer(out, -(n - 128) * m * 2), "m": m, "n": n, "k": k, "has_bias": 0,
    }  # fmt: skip
    run(variant, arguments, n // 128, only=[(n // 128 - 1, 0, 0)])
    assert_rounded(from_numpy(out, torch.bfloat16), x.float() @ dense.T, torch.bfloat16)


# Triton's own dense product of (64, 64) and (64, 256) on wgmma, whose descriptors are known to work on hardware
_DENSE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from sparse24.gemm_wgmma_sp import descriptor

@gluon.jit
def load(pointer, ROWS: gl.constexpr, COLS: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row, column = gl.arange(0, ROWS, gl.SliceLayout(1, L)), gl.arange(0, COLS, gl.SliceLayout(0, L))
    value = gl.load(pointer + row[:, None] * COLS + column[None, :])
    return gl.allocate_shared_memory(gl.bfloat16, [ROWS, COLS], gl.NVMMASharedLayout(128, 16, 2), value)

@gluon.jit
def dense(a_ptr, b_ptr, out_ptr, N_MAJOR: gl.constexpr):
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    a = load(a_ptr, 64, 64)
    if N_MAJOR:
        b = load(b_ptr, 64, 256)
    else:
        b = load(b_ptr, 256, 64).permute([1, 0])
    fence_async_shared()
    gl.barrier()
    acc = warpgroup_mma(a, b, gl.full([64, 256], 0.0, gl.float32, ACC))
    row, column = gl.arange(0, 64, gl.SliceLayout(1, ACC)), gl.arange(0, 256, gl.SliceLayout(0, ACC))
    gl.store(out_ptr + row[:, None] * 256 + column[None, :], acc)

found = []
for n_major in (False, True):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "N_MAJOR": "constexpr"}
    source = GluonASTSource(dense, signature, {"N_MAJOR": n_major}, {(i,): [["tt.divisibility", 16]] for i in range(3)})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    found.append((compiled.asm["ptx"], compiled.metadata.shared, *descriptor.fn(n_major)))
print("FOUND" + json.dumps(found))
"""


def test_descriptors_are_those_of_tritons_dense_product(variants):
    """The same bits and steps; and the emulator reads through Triton's as it does through ours."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.environ["SPARSE24_TRITON39"], str(KERNELS)])
    with_source = f"import linecache; linecache.cache['dense'] = (0, None, {_DENSE!r}.splitlines(True), 'dense')\n"
    program = with_source + f"exec(compile({_DENSE!r}, 'dense', 'exec'))"
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    line = next(line for line in process.stdout.splitlines() if line.startswith("FOUND"))
    for n_major, (ptx, shared, constant, step) in zip((False, True), json.loads(line[5:]), strict=True):
        wgmma = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, %rd\d+, (%rd\d+), [^;]*, (\d);", ptx)
        assert len(wgmma) == 4  # of 16 along k; wgmma.sp has 32
        assert {transposed for _, transposed in wgmma} == {str(int(n_major))}
        low, high = constant & 0xFFFFFFFF, constant >> 32 << 32
        for number, (register, _) in enumerate(wgmma):
            part, found_high = re.search(rf"or\.b64 \s*{register}, (%rd\d+), (\d+);", ptx).groups()
            assert int(found_high) == high
            part = re.search(rf"cvt\.u64\.u32 \s*{part}, (%r\d+);", ptx)[1]
            added = re.search(rf"(?:add\.s32|or\.b32) \s*{part}, %r\d+, (\d+);", ptx)
            assert (int(added[1]) if added else 0) == low + number * step // 2

        a, b = randn(64, 64, torch.bfloat16, 1), randn(256, 64, torch.bfloat16, 2)
        out = poisoned(64, 256, torch.float32)
        arguments = [to_numpy(a), to_numpy(b.T.contiguous() if n_major else b), out]
        Emulator(ptx).launch((1, 1, 1), arguments, shared=shared)
        assert_rounded(from_numpy(out, torch.float32), a.float() @ b.float().T, torch.float32)
