"""2:4 sparse GEMM on mma.sp (sm_80 and newer), in Gluon; compiled ahead of time with Triton 3.9 to cubins.

D = A B with the sparse A (m, k) in fragment order (`fragments.Fragments`). Both operands come through a ring of
cp.async stages in shared memory: A as it lies in memory, one 16-byte read a lane for each instruction; x swizzled,
so that ldmatrix reads it without bank conflicts. A CTA of four warps computes a tile of (128, 128), each warp
(64, 64), with float32 sums in registers.
"""

from __future__ import annotations

from typing import Literal

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from sparse24.gemm_variant import Variant

BLOCK_M, BLOCK_N = 128, 128
STAGES = 3
GROUP_N = 8  # tiles along n that are computed together, so that they find A in the L2 cache
_TILES_M, _TILES_N = 4, 8  # of (16, 8), per warp


@gluon.constexpr_function
def _mma_asm(dtype: str, step: int, outer: bool) -> str:
    """The sparse MMAs of one step along k for the (64, 64) tile of a warp.

    Operands in this order: 128 sums (written and, tied, read), A: 4 x 4 registers, B: 8 x 4 registers or, if
    `outer`, 8 x 8 halves of registers, metadata: 4 registers.
    """
    kind, depth = {"bf16": ("bf16", 32), "fp16": ("f16", 32), "e4m3": ("e4m3", 64)}[dtype]
    # two steps share one word of metadata with 16-bit types: it is in lanes 0, 1 of four for the first, 2, 3 for
    # the second
    selector = step if depth == 32 else 0
    sums = 4 * _TILES_M * _TILES_N
    first_a = 2 * sums
    first_b = first_a + 4 * _TILES_M
    first_e = first_b + (8 if outer else 4) * _TILES_N

    def registers(first: int) -> str:
        return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"

    lines = ["{"]
    if outer:
        lines.append(f".reg .b32 b<{4 * _TILES_N}>;")
        lines += [f"mov.b32 b{i}, {{${first_b + 2 * i}, ${first_b + 2 * i + 1}}};" for i in range(4 * _TILES_N)]
    for i in range(_TILES_M):
        for j in range(_TILES_N):
            d = registers(4 * (_TILES_N * i + j))
            a = registers(first_a + 4 * i)
            b = "{" + ", ".join(f"b{4 * j + q}" for q in range(4)) + "}" if outer else registers(first_b + 4 * j)
            lines.append(
                f"mma.sp::ordered_metadata.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 "
                f"{d}, {a}, {b}, {d}, ${first_e + i}, {selector};"
            )
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _mma_constraints(outer: bool) -> str:
    sums = 4 * _TILES_M * _TILES_N
    b = ["h"] * (8 * _TILES_N) if outer else ["r"] * (4 * _TILES_N)
    tied = [str(i) for i in range(sums)]
    return ",".join(["=f"] * sums + tied + ["r"] * (4 * _TILES_M) + b + ["r"] * _TILES_M)


# Layouts. Warps are 2 x 2: bit 0 of their number along n, bit 1 along m.


@gluon.constexpr_function
def _copy_x(outer: bool) -> gl.BlockedLayout:
    """From global to shared memory, 16 bytes a lane: (k, n) if outer, else (n, 32-bit words of k)."""
    return (
        gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]) if outer else gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    )


@gluon.constexpr_function
def _shared_x(outer: bool) -> gl.SwizzledSharedLayout:
    """16-byte pieces swizzled, so that ldmatrix has no bank conflicts."""
    return gl.SwizzledSharedLayout(vec=8 if outer else 4, per_phase=1, max_phase=8, order=[1, 0])


@gluon.constexpr_function
def _fragments_x(outer: bool) -> gl.DistributedLinearLayout:
    """B of one instruction for the 64 columns of a warp: registers along k, then tiles of 8 columns.

    (n, 32-bit words of k); if outer, (n, k), where the two halves of a register are neighbours in k.
    """
    scale = 2 if outer else 1
    halves = [[0, 1]] if outer else []
    return gl.DistributedLinearLayout(
        reg_bases=[*halves, [0, 4 * scale], [0, 8 * scale], [8, 0], [16, 0], [32, 0]],
        lane_bases=[[0, scale], [0, 2 * scale], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[64, 0], [0, 0]],
        block_bases=[],
        shape=[BLOCK_N, 16 * scale],
    )


@gluon.constexpr_function
def _store(outer: bool) -> gl.BlockedLayout:
    """The result, 16 bytes a lane."""
    return (
        gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
        if outer
        else gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    )


@gluon.jit
def gemm_mma_sp(
    x_ptr,
    values_ptr,
    metadata_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    m,
    n,
    k,
    x_rows,
    has_bias,
    DTYPE: gl.constexpr,
    OUTER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_N: gl.constexpr,
):
    """One tile of the result; grid: (m / BLOCK_M) * ceil(n / BLOCK_N) CTAs along x.

    Linear: x (n, k), out (n, m), bias (m,) if has_bias, out = x Âᵀ (+ bias), for e4m3 times the float32 at
    scale_ptr before the bias is added. Outer: x (x_rows, n), out (m, n) float32, out = Â x, x_rows at most k: what
    A has beyond them is multiplied by zero. x and out are row-major without gaps. x_ptr points to 32-bit words in
    the linear form. bias, scale and has_bias, or x_rows, are None (constexpr) where they mean nothing.
    """
    gl.static_assert(BLOCK_M == 128 and BLOCK_N == 128)  # the layouts below
    WORDS: gl.constexpr = 32  # 32-bit words of x's row in a step of BLOCK_K: two instructions of 16
    META: gl.constexpr = 2 if DTYPE == "e4m3" else 1  # metadata words a lane has for BLOCK_K
    # tile of 16 rows, instruction, lane, register
    COPY_A: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    COPY_E: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 1, 8], [4, 1, 1], [2, 1, 0])
    SHARED_A: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[3, 2, 1, 0])
    SHARED_E: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0])
    # registers: 4 of a fragment, then tiles of 16 rows
    LOAD_A: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 0, 0, 2], [1, 0, 0, 0], [2, 0, 0, 0]],
        lane_bases=[[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 8, 0], [0, 0, 16, 0]],
        warp_bases=[[0, 0, 0, 0], [4, 0, 0, 0]],
        block_bases=[],
        shape=[8, 1, 32, 4],
    )
    LOAD_E: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1, 0, 0], [2, 0, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16]],
        warp_bases=[[0, 0, 0], [4, 0, 0]],
        block_bases=[],
        shape=[8, 1, 32],
    )
    # The sums as mma.sp holds them: columns 2t, 2t + 1 of rows g, g + 8; then tiles of 8 columns and of 16 rows.
    SUMS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8], [0, 16], [0, 32], [16, 0], [32, 0]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 64], [64, 0]],
        block_bases=[],
        shape=[BLOCK_M, BLOCK_N],
    )

    COPY_X: gl.constexpr = _copy_x(OUTER)
    LOAD_X: gl.constexpr = _fragments_x(OUTER)
    STORE: gl.constexpr = _store(OUTER)

    # Tiles go along n first within groups of GROUP_N, then along m.
    tiles_m = m // BLOCK_M
    tiles_n = gl.cdiv(n, BLOCK_N)
    pid = gl.program_id(0)
    group = pid // (GROUP_N * tiles_m)
    group_n = gl.minimum(tiles_n - group * GROUP_N, GROUP_N)
    within = pid - group * (GROUP_N * tiles_m)
    pid_m = within // group_n
    pid_n = group * GROUP_N + within % group_n
    # 64 bits for the origin of a tile; within it 32 bits are enough
    first_m = pid_m.to(gl.int64) * BLOCK_M
    first_n = pid_n.to(gl.int64) * BLOCK_N
    left_n = n - pid_n * BLOCK_N

    steps = k // BLOCK_K
    a_tile = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, COPY_A))))[:, None, None, None]
    a_step = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, COPY_A))))[None, :, None, None]
    a_lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, COPY_A))))[None, None, :, None]
    a_word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, COPY_A))))[None, None, None, :]
    a_ptrs = values_ptr + first_m // 16 * steps * 256 + (a_tile * (steps * 256) + (a_step * 128 + a_lane * 4 + a_word))
    e_tile = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, COPY_E)))[:, None, None]
    e_step = gl.arange(0, META, gl.SliceLayout(0, gl.SliceLayout(2, COPY_E)))[None, :, None]
    e_lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, COPY_E)))[None, None, :]
    e_ptrs = metadata_ptr + first_m // 16 * steps * (32 * META)
    e_ptrs = e_ptrs + (e_tile * (steps * (32 * META)) + (e_step * 32 + e_lane))
    a_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 8, 2, 32, 4], SHARED_A)
    e_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 8, META, 32], SHARED_E)

    if OUTER:
        x_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, BLOCK_K, BLOCK_N], _shared_x(OUTER))
        x_row = gl.arange(0, BLOCK_K, gl.SliceLayout(1, COPY_X))[:, None]
        x_col = gl.arange(0, BLOCK_N, gl.SliceLayout(0, COPY_X))[None, :]
        x_ptrs = x_ptr + first_n + (x_row * n + x_col)
        x_mask = x_col < left_n
        x_advance = n.to(gl.int64) * BLOCK_K
    else:
        x_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, WORDS], _shared_x(OUTER))
        x_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY_X))[:, None]
        x_col = gl.arange(0, WORDS, gl.SliceLayout(0, COPY_X))[None, :]
        x_ptrs = x_ptr + first_n * (steps * WORDS) + (x_row * (steps * WORDS) + x_col)
        x_mask = x_row < left_n
        x_advance = WORDS

    for step in gl.static_range(STAGES - 1):
        if OUTER:
            async_copy.async_load(x_smem.index(step), x_ptrs, mask=x_mask & (x_row < x_rows - step * BLOCK_K))
        else:
            async_copy.async_load(x_smem.index(step), x_ptrs, mask=x_mask & (step < steps))
        async_copy.async_load(a_smem.index(step), a_ptrs, mask=(a_tile >= 0) & (step < steps))
        async_copy.async_load(e_smem.index(step), e_ptrs, mask=(e_tile >= 0) & (step < steps))
        async_copy.commit_group()
        x_ptrs += x_advance
        a_ptrs += 256
        e_ptrs += 32 * META

    acc = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SUMS)
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        gl.barrier()  # the stage is there for all warps, and all have read the one that is filled next
        ahead = step + (STAGES - 1)
        slot = ahead % STAGES
        if OUTER:
            async_copy.async_load(x_smem.index(slot), x_ptrs, mask=x_mask & (x_row < x_rows - ahead * BLOCK_K))
        else:
            async_copy.async_load(x_smem.index(slot), x_ptrs, mask=x_mask & (ahead < steps))
        async_copy.async_load(a_smem.index(slot), a_ptrs, mask=(a_tile >= 0) & (ahead < steps))
        async_copy.async_load(e_smem.index(slot), e_ptrs, mask=(e_tile >= 0) & (ahead < steps))
        async_copy.commit_group()
        x_ptrs += x_advance
        a_ptrs += 256
        e_ptrs += 32 * META

        x_now = x_smem.index(step % STAGES)
        a_now = a_smem.index(step % STAGES)
        e_now = e_smem.index(step % STAGES)
        for i in gl.static_range(2):
            a = a_now.slice(i, 1, dim=1).load(LOAD_A)
            e = e_now.slice(i % META, 1, dim=1).load(LOAD_E)
            if OUTER:
                b = x_now.slice(i * 32, 32, dim=0).permute([1, 0]).load(LOAD_X)  # ldmatrix transposes
            else:
                b = x_now.slice(i * 16, 16, dim=1).load(LOAD_X)
            acc = gl.inline_asm(
                _mma_asm(DTYPE, i, OUTER), _mma_constraints(OUTER), [acc, a, b, e], acc.type, is_pure=True
            )
    async_copy.wait_group(0)

    # 16 bytes a lane, through shared memory
    if OUTER:
        out = gl.convert_layout(acc, STORE)
        row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, STORE))[:, None]
        col = gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))[None, :]
        gl.store(out_ptr + (first_m * n + first_n) + (row * n + col), out, mask=(row >= 0) & (col < left_n))
    else:
        if DTYPE == "e4m3":
            acc = acc * gl.load(scale_ptr)
        bias_row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SUMS))
        bias = gl.load(bias_ptr + first_m + bias_row, mask=(bias_row >= 0) & (has_bias != 0), other=0.0)
        acc = acc + bias.to(gl.float32)[:, None]
        out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty).permute([1, 0]), STORE)
        row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, STORE))[:, None]
        col = gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))[None, :]
        gl.store(out_ptr + (first_n * m + first_m) + (row * m + col), out, mask=(row < left_n) & (col >= 0))


def _variant(form: Literal["linear", "outer"], dtype: Literal["bf16", "fp16", "e4m3"]) -> Variant:
    outer, fp8 = form == "outer", dtype == "e4m3"
    result = {"bf16": "bf16", "fp16": "fp16", "e4m3": "bf16"}[dtype]
    signature = {
        "x_ptr": f"*{dtype}" if outer else "*i32",
        "values_ptr": "*i32",
        "metadata_ptr": "*i32",
        "bias_ptr": "constexpr" if outer else f"*{result}",
        "scale_ptr": "*fp32" if fp8 else "constexpr",
        "out_ptr": "*fp32" if outer else f"*{result}",
        "m": "i32",
        "n": "i32",
        "k": "i32",
        "x_rows": "i32" if outer else "constexpr",
        "has_bias": "constexpr" if outer else "i32",
    }
    absent = {name: None for name, kind in signature.items() if kind == "constexpr"}
    block_k = 128 if fp8 else 64
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k, "STAGES": STAGES, "GROUP_N": GROUP_N}
    constexprs = absent | {"DTYPE": dtype, "OUTER": outer} | tile
    pointers = ("x_ptr", "values_ptr", "metadata_ptr", "bias_ptr", "out_ptr")
    attrs = {name: 16 for name in (*pointers, "m", "k") if signature[name] != "constexpr"}
    if outer:
        attrs["n"] = 8  # rows of x of whole 16-byte pieces
    return Variant(
        name=f"mma_sp_{form}_{dtype}",
        form=form,
        dtype=dtype,
        capability=89 if fp8 else 80,
        kernel=gemm_mma_sp,
        signature=signature | {name: "constexpr" for name in constexprs if name not in signature},
        constexprs=constexprs,
        num_warps=4,
        num_ctas=1,
        block=(BLOCK_M, BLOCK_N, block_k),
        attrs=attrs,
    )


VARIANTS = [
    _variant("linear", "bf16"),
    _variant("linear", "fp16"),
    _variant("linear", "e4m3"),
    _variant("outer", "bf16"),
    _variant("outer", "fp16"),
]
