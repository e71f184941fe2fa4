"""The mma.sp kernels: what the compiler makes of them, and their PTX emulated against dense products."""

import re

import pytest
import torch
from gemm_emulation import DTYPES, assert_rounded, compile_variants, from_numpy, poisoned, randn, sparse, to_numpy
from ptx_emulator import Emulator, EmulatorError, Pointer

LINEAR = ["mma_sp_linear_bf16", "mma_sp_linear_fp16", "mma_sp_linear_e4m3"]
OUTER = ["mma_sp_outer_bf16", "mma_sp_outer_fp16"]


@pytest.fixture(scope="module")
def variants():
    return compile_variants("gemm_mma_sp")


def run(variant, arguments, m, n, **how):
    """Launch with the arguments by name."""
    grid = (m // variant["block"][0] * -(-n // variant["block"][1]), 1, 1)
    emulator = Emulator(variant["ptx"])
    return emulator.launch(grid, [arguments[name] for name in variant["arguments"]], shared=variant["shared"], **how)


def linear(variant, m, n, k, bias=True, **how):
    """(result, expected) as float32 tensors."""
    dtype = DTYPES[variant["dtype"]]
    result = torch.bfloat16 if variant["dtype"] == "e4m3" else dtype
    dense, values, metadata = sparse(m, k, dtype)
    x, b, scale = randn(n, k, dtype, 1), randn(1, m, result, 2), torch.tensor([0.25])
    out = poisoned(n, m, result)
    arguments = {
        "x_ptr": to_numpy(x), "values_ptr": values, "metadata_ptr": metadata, "bias_ptr": to_numpy(b),
        "scale_ptr": to_numpy(scale), "out_ptr": out, "m": m, "n": n, "k": k, "has_bias": int(bias),
    }  # fmt: skip
    run(variant, arguments, m, n, **how)
    expected = x.float() @ dense.T * (scale if variant["dtype"] == "e4m3" else 1.0)
    return from_numpy(out, result), expected + b.float() if bias else expected


def outer(variant, m, n, k, x_rows, **how):
    dtype = DTYPES[variant["dtype"]]
    dense, values, metadata = sparse(m, k, dtype)
    x, out = randn(x_rows, n, dtype, 1), poisoned(m, n, torch.float32)
    arguments = {
        "x_ptr": to_numpy(x), "values_ptr": values, "metadata_ptr": metadata, "out_ptr": out,
        "m": m, "n": n, "k": k, "x_rows": x_rows,
    }  # fmt: skip
    run(variant, arguments, m, n, **how)
    return from_numpy(out, torch.float32), dense[:, :x_rows] @ x.float()


@pytest.mark.parametrize("name", [*LINEAR, *OUTER])
def test_machine_code(variants, name):
    variant = variants[name]
    count = variant["instructions"]
    assert (variant["stack"], variant["local"]) == (0, 0)
    mma = {op: n for op, n in count.items() if op.split(".")[0] in ("HMMA", "QMMA", "IMMA")}
    assert sum(mma.values()) == 64  # two steps of 4 x 8 tiles
    assert all(".SP." in op for op in mma)
    family = {op.split(".")[0] for op in count}
    assert {"LDGSTS", "LDSM"} <= family  # cp.async, ldmatrix
    assert not {"LDL", "STL", "SHFL"} & family
    assert all(op.endswith(".128") for op in count if op.startswith("STG"))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(("m", "n", "blocks", "bias"), [(256, 160, 1, True), (128, 1, 3, False), (128, 136, 8, True)])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(variants, name, m, n, blocks, bias, lazy):
    """One step, fewer and more steps than stages; ragged edges."""
    variant = variants[name]
    result, expected = linear(variant, m, n, blocks * variant["block"][2], bias, lazy=lazy)
    assert_rounded(result, expected, torch.float16 if variant["dtype"] == "fp16" else torch.bfloat16)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "x_rows"), [(256, 160, 64, 64), (128, 8, 192, 130), (128, 136, 512, 509)])
@pytest.mark.parametrize("name", OUTER)
def test_outer(variants, name, m, n, k, x_rows, lazy):
    """Rows of x end before A's padding does: what lies behind them would be outside of the array."""
    result, expected = outer(variants[name], m, n, k, x_rows, lazy=lazy)
    assert_rounded(result, expected, torch.float32)


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_the_warps(variants, seed):
    for lazy in (True, False):
        result, expected = linear(variants["mma_sp_linear_bf16"], 128, 128, 320, seed=seed, lazy=lazy)
        assert_rounded(result, expected, torch.bfloat16)


def test_tiles_in_groups(variants):
    """More tiles along n than a group has, and a last group that is not full."""
    result, expected = linear(variants["mma_sp_linear_bf16"], 256, 10 * 128 - 7, 64)
    assert_rounded(result, expected, torch.bfloat16)


def test_linear_beyond_32_bits(variants):
    """The last tile of x and of the result lie beyond 2³¹ elements; only this tile exists."""
    variant, m, n, k = variants["mma_sp_linear_bf16"], 128, 2**26, 64
    dense, values, metadata = sparse(m, k, torch.bfloat16)
    x, out = randn(128, k, torch.bfloat16, 1), poisoned(128, m, torch.bfloat16)
    arguments = {
        "x_ptr": Pointer(to_numpy(x), -(n - 128) * k * 2), "values_ptr": values, "metadata_ptr": metadata,
        "bias_ptr": 0, "out_ptr": Pointer(out, -(n - 128) * m * 2), "m": m, "n": n, "k": k, "has_bias": 0,
    }  # fmt: skip
    run(variant, arguments, m, n, only=[(n // 128 - 1, 0, 0)])
    assert_rounded(from_numpy(out, torch.bfloat16), x.float() @ dense.T, torch.bfloat16)


def test_outer_beyond_32_bits(variants):
    """The last rows of A and of the result."""
    variant, m, n, k = variants["mma_sp_outer_bf16"], 2**27, 128, 64
    dense, values, metadata = sparse(128, k, torch.bfloat16)
    x, out = randn(k, n, torch.bfloat16, 1), poisoned(128, n, torch.float32)
    before = (m - 128) // 16  # tiles of 16 rows
    arguments = {
        "x_ptr": to_numpy(x), "values_ptr": Pointer(values, -before * 1024),
        "metadata_ptr": Pointer(metadata, -before * 128), "out_ptr": Pointer(out, -(m - 128) * n * 4),
        "m": m, "n": n, "k": k, "x_rows": k,
    }  # fmt: skip
    run(variant, arguments, m, n, only=[(m // 128 - 1, 0, 0)])
    assert_rounded(from_numpy(out, torch.float32), dense @ x.float(), torch.float32)


def test_emulation_finds_mistakes(variants):
    """Negative controls: without the wait, without the barrier, with the wrong sparsity selector."""
    variant = variants["mma_sp_linear_bf16"]
    ptx = variant["ptx"]
    without_wait = ptx.replace("cp.async.wait_group 1;", "").replace("cp.async.wait_group \t1;", "")
    assert without_wait != ptx
    with pytest.raises(EmulatorError, match="copy to it is under way|before it was written"):
        linear(variant | {"ptx": without_wait}, 128, 128, 256, lazy=True)
    without_barrier = ptx.replace("bar.sync \t0;", "")
    assert without_barrier != ptx
    with pytest.raises(EmulatorError, match="copy to it is under way|before it was written"):
        linear(variant | {"ptx": without_barrier}, 128, 128, 256, lazy=True)
    swapped = re.sub(r"(mma\.sp[^;]*), ([01]);", lambda mma: f"{mma[1]}, {1 - int(mma[2])};", ptx)
    result, expected = linear(variant | {"ptx": swapped}, 128, 128, 64)
    assert (result - expected).abs().max() > 1
