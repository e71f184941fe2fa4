"""The emulator's tensor cores: sparse products by hand, and Triton's dense kernels, which are known to be right."""

import os
import subprocess
import sys

import numpy as np
import pytest
from ptx_emulator import Emulator, EmulatorError, TensorMap

from tests.sparse24.test_ptx_emulator import NAN, kernel


@pytest.mark.parametrize(("selector", "lane"), [(0, 13), (1, 15)])
def test_one_sparse_product_by_hand(selector, lane):
    """A[3][17] * B[17][5] alone.

    Column 17 is position 1 of group 4, whose pair is stored in columns 8 and 9: register 2 (columns 8 + 2t, row g)
    of lane 4·3 + 0, low half. The metadata of groups 4 to 7 is in the second thread of the pair that the selector
    names; group 4 has its lowest four bits: positions 1 and 2. B[17][5] is row 2t + 8q + 1 with t = 0, q = 2 of
    lane 4·5, high half. The result is row g = 3, column 2t + 1 with t = 2.
    """
    body = """
    mul.wide.u32 %rd4, %r0, 16;
    add.s64 %rd5, %rd0, %rd4;
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd5];
    add.s64 %rd5, %rd1, %rd4;
    ld.global.v4.b32 {%r8, %r9, %r10, %r11}, [%rd5];
    mul.wide.u32 %rd6, %r0, 4;
    add.s64 %rd5, %rd2, %rd6;
    ld.global.b32 %r12, [%rd5];
    mov.b32 %r13, 0;
    mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%r16, %r17, %r18, %r19},
        {%r4, %r5, %r6, %r7}, {%r8, %r9, %r10, %r11}, {%r13, %r13, %r13, %r13}, %r12, SELECTOR;
    add.s64 %rd5, %rd3, %rd4;
    st.global.v4.b32 [%rd5], {%r16, %r17, %r18, %r19};
    """
    a, b, out = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32), np.full((32, 4), NAN)
    metadata = np.full(32, 0x44444444, np.uint32)  # positions 0 and 1 everywhere
    a[12, 2] = 0x4040  # 3
    b[20, 2] = 0x40A0 << 16  # 5
    metadata[lane] = 0x44444449
    emulator = Emulator(kernel(body.replace("SELECTOR", str(selector)), ("u64",) * 4, registers=20))
    emulator.launch((1, 1, 1), [a, b, metadata, out])
    assert out[14, 1] == 15.0
    assert np.count_nonzero(out) == 1
    metadata[lane] = 0x44444446  # positions 2 and 1
    with pytest.raises(EmulatorError, match="not in increasing order"):
        emulator.launch((1, 1, 1), [a, b, metadata, out])


# D (64, 8) = A B with A from registers, all ones, and B of 16 x 8 ones in shared memory (no swizzle)
WGMMA = """
    shl.b32 %r2, %r0, 2;
    add.s32 %r2, %r2, %r1;
    mov.b32 %r3, 0x3F803F80;
    @%p0 bra skip;
    st.shared.b32 [%r2], %r3;
    skip:
    fence.proxy.async.shared::cta;
    bar.sync 0;
    and.b32 %r4, %r1, 0x3FFFF;
    shr.u32 %r4, %r4, 4;
    cvt.u64.u32 %rd1, %r4;
    or.b64 %rd1, %rd1, 0x0000001000080000;
    mov.b32 %r8, 0; mov.b32 %r9, 0; mov.b32 %r10, 0; mov.b32 %r11, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r8, %r9, %r10, %r11}, {%r3, %r3, %r3, %r3}, %rd1, 1, 1, 1, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r8, %r9, %r10, %r11}, {%r3, %r3, %r3, %r3}, %rd1, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd2, %r0, 16;
    add.s64 %rd2, %rd0, %rd2;
    st.global.v4.b32 [%rd2], {%r8, %r9, %r10, %r11};
""".replace("@%p0", "setp.ge.u32 %p0, %r0, 64; @%p0")


@pytest.mark.parametrize("lazy", [True, False])
def test_wgmma_in_flight(lazy):
    def run(ptx):
        out = np.zeros((128, 4), np.float32)
        Emulator(kernel(ptx, threads=128)).launch((1, 1, 1), [out], lazy=lazy)
        return out

    assert (run(WGMMA) == 32.0).all()
    wait, fence = "wgmma.wait_group.sync.aligned 0;", "wgmma.fence.sync.aligned;"
    with pytest.raises(EmulatorError, match="%r8 read while a wgmma has to write it"):
        run(WGMMA.replace(wait, "wgmma.wait_group.sync.aligned 1;"))
    with pytest.raises(EmulatorError, match="%r3 changed while a wgmma had to read it"):
        run(WGMMA.replace(wait, f"mov.b32 %r3, 0; {wait}"))
    with pytest.raises(EmulatorError, match="%r9 written while a wgmma was to write it"):
        run(WGMMA.replace(wait, f"mov.b32 %r9, 0; {wait}"))
    with pytest.raises(EmulatorError, match=r"without a wgmma\.fence"):
        run(WGMMA.replace(fence, ""))
    with pytest.raises(EmulatorError, match=r"%r8 changed after the last wgmma\.fence"):
        run(WGMMA.replace(fence, f"{fence} mov.b32 %r8, 1;"))
    with pytest.raises(EmulatorError, match=r"without fence\.proxy\.async"):
        run(WGMMA.replace("fence.proxy.async.shared::cta;", ""))
    with pytest.raises(EmulatorError, match="ends while a wgmma is in flight"):
        run(WGMMA.split(wait)[0])


# --- Triton's dense kernels: their descriptors, swizzles and barriers are known to be right on hardware ---

DENSE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def dense(a_desc, b_desc, c_desc, k, N_FIRST: tl.constexpr):
    sums = tl.zeros((64, 64), tl.float32)
    for step in range(0, k, 64):
        a = a_desc.load([tl.program_id(0) * 64, step])
        b = b_desc.load([step, 0]) if N_FIRST else b_desc.load([0, step]).T
        sums = tl.dot(a, b, sums)
    c_desc.store([tl.program_id(0) * 64, 0], sums.to(tl.bfloat16))


tile = "tensordesc<bf16[64, 64]>"
signature = {"a_desc": tile, "b_desc": tile, "c_desc": tile, "k": "i32", "N_FIRST": "constexpr"}
for n_first in (False, True):
    source = ASTSource(dense, signature, {"N_FIRST": n_first}, {(3,): [["tt.divisibility", 16]]})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    with open(f"{sys.argv[1]}/{n_first}.ptx", "w") as file:
        file.write(compiled.asm["ptx"])
"""


def test_tritons_dense_kernels(tmp_path):
    """TMA with 128-byte swizzle both ways, mbarriers, pipelined wgmma with B contiguous along k and along n."""
    pytest.importorskip("triton")
    (tmp_path / "dense.py").write_text(DENSE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "dense.py", str(tmp_path)], cwd=tmp_path, env=environment, check=True)
    rng = np.random.default_rng(0)

    def bf16(values):
        """Small integers, which bfloat16 and the sums hold exactly."""
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    a, b = rng.integers(-3, 4, (128, 256)), rng.integers(-3, 4, (256, 64))
    for n_first in (False, True):
        ptx = (tmp_path / f"{n_first}.ptx").read_text()
        assert "wgmma.mma_async.sync.aligned.m64n64k16" in ptx
        right = np.ascontiguousarray(bf16(b if n_first else b.T))
        for lazy, seed in [(True, None), (False, None), (True, 1), (False, 1)]:
            out = np.zeros((128, 64), np.uint16)
            maps = [TensorMap(x, x.shape, (64, 64)) for x in (bf16(a), right, out)]
            arguments = [value for tensor_map in maps for value in tensor_map.arguments()]
            Emulator(ptx).launch((2, 1, 1), [*arguments, 256], lazy=lazy, seed=seed)
            expected = (a @ b).astype(np.float32)
            result = (out.astype(np.uint32) << 16).view(np.float32)
            assert np.abs(result - expected).max() <= np.abs(expected).max() / 256
