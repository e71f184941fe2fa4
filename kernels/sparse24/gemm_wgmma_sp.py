"""2:4 GEMMs for Hopper in Gluon: sparse warpgroup instructions (wgmma.sp), the sparse matrix in registers.

D = A B, A (m, k) 2:4 along k in fragment order (fragments.py; the layouts are written out there). Two forms:
    linear   B is x (n, k) row-major: y (n, m) = x Âᵀ (+ bias), in x's dtype; e4m3: bfloat16, times an fp32 scale
    outer    B is x (k, n) row-major: out (m, n) = Â x, float32
m % 128 == 0; k % 64 == 0 (e4m3: % 128), k < 2²³ (32-bit offsets of A within a tile); any n for which rows of x and
y are multiples of 16 bytes (TMA). Nothing beyond m and n is read or written. k is rounded up to four steps, with
zeros for B: a k that is no multiple of 256 (e4m3: of 512) costs time, and there a value of A that is not finite makes
its row NaN.

    wgmma_sp_simple   one group of 8 warps does everything; cp.async; linear only. The fall-back: needs neither TMA
                      descriptors nor clusters.
    wgmma_sp_linear,  a producer warp feeds a ring of B tiles by TMA, two warpgroups multiply; persistent: the ring
    wgmma_sp_outer    fills for the next tile of the result while this one is stored

Why this way. One wgmma.sp m64nNk32 takes as long as the dense m64nNk16 and reads twice as much B: 128 bytes a clock,
all that shared memory gives, whatever N. So (1) A comes straight from global memory into registers and never passes
shared memory; (2) the tile is tall: writing B to shared memory costs 8192/BM bytes a clock more, BM the rows of the
CTA's tile; (3) the CTAs of a cluster lie along m and share B by TMA multicast, since L2 would have to deliver
4608/BN (A) + 8192/(BM * cluster) (B) bytes a clock. All at full sparse rate; computed, 16-bit types.

A warp holds the A fragments of four steps along k (9 registers each for 16 rows): one that is being multiplied and
three on their way, as L2 answers later than one step takes. One wgmma group stays in flight while the next step is
prepared. `wait_group 1` then frees the registers and the ring's slot of the step before.

One step along k is 128 bytes of B: 64 columns of 16 bits, 128 of 8 bits; two wgmma.sp.

Compiled ahead of time with Triton 3.9 (`VARIANTS`); never imported at run time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparse24.gemm_variant import Variant

UNROLL = gl.constexpr(4)  # steps along k in the loop's body, and sets of A fragments


# --- the instruction ---


@gluon.constexpr_function
def descriptor(n_major):
    """The constant part of the shared-memory matrix descriptor of a B tile, and its step for the second wgmma.

    bits 0-13 address / 16 (added at run time), 16-29 leading byte offset / 16, 32-45 stride byte offset / 16,
    62-63 swizzle (1: 128 bytes, as in NVMMASharedLayout and TMA). Eight rows of 128 bytes are one 1024-byte atom.
    Tile [n][k], k contiguous: atoms follow each other along n (stride); the second half of k is 64 bytes on.
    Tile [k][n], n contiguous: atoms follow each other along k (stride), 64 columns of n are one block of 64 rows
    of 128 bytes (leading); the second half of k is 32 rows on. Both are what Triton emits for a dense wgmma.
    """
    atoms = 1 << 62 | (1024 >> 4) << 32
    return (atoms | (64 * 128 >> 4) << 16, 32 * 128 >> 4) if n_major else (atoms, 64 >> 4)


@gluon.constexpr_function
def multiply_asm(dtype, n, repeats, n_major, in_flight):
    """acc += A B for one step: two wgmma.sp for each 64 rows of the warpgroup, committed as one group.

    $ operands: acc out, acc in, A values (per 64 rows two k halves of 4), metadata, address of the B tile.
    Metadata: 16-bit types have both halves in one register (sparsity selector), e4m3 has one register for each.
    """
    shape, metadata, tail = {
        "bf16": ("k32.f32.bf16.bf16", 1, f"1, 1, 1, {int(n_major)}"),
        "fp16": ("k32.f32.f16.f16", 1, f"1, 1, 1, {int(n_major)}"),
        "e4m3": ("k64.f32.e4m3.e4m3", 2, "1, 1, 1"),
    }[dtype]
    constant, step = descriptor(n_major)
    acc = n // 2
    values = 2 * acc * repeats
    words = values + 8 * repeats
    lines = [
        ".reg .b32 address;",
        ".reg .b64 tile;",
        f"and.b32 address, ${words + metadata * repeats}, 0x3FFFF;",
        "shr.u32 address, address, 4;",
        "cvt.u64.u32 tile, address;",
        f"or.b64 tile, tile, {constant:#x};",
        "wgmma.fence.sync.aligned;",
    ]
    for half in range(2):
        if half:
            lines.append(f"add.s64 tile, tile, {step};")
        for r in range(repeats):
            d = ", ".join(f"${acc * r + i}" for i in range(acc))
            a = ", ".join(f"${values + 8 * r + 4 * half + i}" for i in range(4))
            word = f"${words + r}, {half}" if metadata == 1 else f"${words + 2 * r + half}, 0"
            lines.append(f"wgmma.mma_async.sp.sync.aligned.m64n{n}{shape} {{{d}}}, {{{a}}}, tile, {word}, {tail};")
    lines += ["wgmma.commit_group.sync.aligned;", f"wgmma.wait_group.sync.aligned {in_flight};"]
    return "\n".join(["{", *lines, "}"])


@gluon.constexpr_function
def tied(outputs, inputs):
    """Constraints: float outputs that are inputs too, then `inputs` 32-bit registers."""
    return ",".join(["=f"] * outputs + [str(i) for i in range(outputs)] + ["r"] * inputs + ["~{memory}"])


@gluon.jit
def multiply(
    acc, values, metadata, tile,
    DTYPE: gl.constexpr, BN: gl.constexpr, REPEATS: gl.constexpr, N_MAJOR: gl.constexpr, IN_FLIGHT: gl.constexpr
):  # fmt: skip
    ASM: gl.constexpr = multiply_asm(DTYPE, BN, REPEATS, N_MAJOR, IN_FLIGHT)
    INPUTS: gl.constexpr = (8 + (2 if DTYPE == "e4m3" else 1)) * REPEATS + 1
    return gl.inline_asm(ASM, tied(BN // 2 * REPEATS, INPUTS), [acc, values, metadata, tile], acc.type, is_pure=False)


# --- mbarriers: as in Gluon, but without its bar.sync, which would hold the two warpgroups together ---


@gluon.jit
def shared_address(memory, LEAD: gl.constexpr):
    """The address of `memory` in this CTA, or in the cluster's first one (inline_asm's own loses the CTA's rank)."""
    if gl.num_ctas() == 1:
        ASM: gl.constexpr = "mov.b32 $0, $1;"
    elif LEAD:
        ASM: gl.constexpr = "mapa.shared::cluster.u32 $0, $1, 0;"
    else:
        ASM: gl.constexpr = (
            "{\n.reg .b32 rank;\nmov.u32 rank, %cluster_ctarank;\nmapa.shared::cluster.u32 $0, $1, rank;\n}"
        )
    return gl.inline_asm(ASM, "=r,r", [memory], gl.int32, is_pure=False)


@gluon.jit
def wait(barrier, phase):
    gl.inline_asm(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n@!done bra.uni again;\n}",
        "r,r,~{memory}", [barrier, phase], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def arrive(barrier, skip):
    """One arrival of each warp; none where `skip` is not zero."""
    SPACE: gl.constexpr = "cta" if gl.num_ctas() == 1 else "cluster"
    gl.inline_asm(
        "{\n.reg .pred first;\n.reg .b32 lane;\nmov.u32 lane, %laneid;\nor.b32 lane, lane, $1;\n"
        "setp.eq.u32 first, lane, 0;\n@first mbarrier.arrive.shared::" + SPACE + ".b64 _, [$0];\n}",
        "r,r,~{memory}", [barrier, skip], (), is_pure=False,
    )  # fmt: skip


# --- the sparse matrix ---


@gluon.constexpr_function
def fragment_layout(tiles, warps, ctas, steps, registers):
    """[tiles of 16 rows, steps, 32 lanes, registers] (no last axis for 0): a warp holds whole tiles, a lane its own
    registers; CTAs take contiguous parts of the tiles, a warp every `warps`-th tile of its CTA's part."""
    rank = 4 if registers else 3

    def bases(axis, start, stop):
        return [[1 << bit if i == axis else 0 for i in range(rank)]
                for bit in range(start.bit_length() - 1, stop.bit_length() - 1)]  # fmt: skip

    return gl.DistributedLinearLayout(
        reg_bases=(bases(3, 1, registers) if registers else []) + bases(1, 1, steps) + bases(0, warps, tiles // ctas),
        lane_bases=bases(2, 1, 32),
        warp_bases=bases(0, 1, warps),
        block_bases=bases(0, tiles // ctas, tiles),
        shape=[tiles, steps, 32] + ([registers] if registers else []),
    )


@gluon.jit
def fragment_offsets(m, steps, BM: gl.constexpr, WORDS: gl.constexpr):
    """Within the tile (BM rows for each CTA), in 32-bit words; WORDS of metadata for 16 rows of a step."""
    TILES: gl.constexpr = BM * gl.num_ctas() // 16
    V: gl.constexpr = fragment_layout(TILES, gl.num_warps(), gl.num_ctas(), 2, 4)
    M: gl.constexpr = fragment_layout(TILES, gl.num_warps(), gl.num_ctas(), WORDS // 32, 0)
    row_v = gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, V))))
    half_v = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, V))))
    lane_v = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, V))))
    register_v = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, V))))
    row_m = gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, M)))
    half_m = gl.arange(0, WORDS // 32, gl.SliceLayout(0, gl.SliceLayout(2, M)))
    lane_m = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, M)))
    inner_v = half_v[None, :, None, None] * 128 + lane_v[None, None, :, None] * 4 + register_v[None, None, None, :]
    inner_m = half_m[None, :, None] * 32 + lane_m[None, None, :]
    # if m is less than a tile: the last rows again; what they give is not stored
    row_v = gl.minimum(row_v, m // 16 - 1) * steps
    row_m = gl.minimum(row_m, m // 16 - 1) * steps
    return row_v[:, None, None, None] * 256 + inner_v, row_m[:, None, None] * WORDS + inner_m


@gluon.jit
def load_fragments(values_ptr, metadata_ptr, offsets, metadata_offsets, row, step, steps, WORDS: gl.constexpr):
    """Of a step, for the tile that begins at `row`."""
    # beyond k: the last step again; TMA gives zeros for B there
    first = (row // 16).to(gl.int64) * steps + gl.minimum(step, steps - 1)
    values = gl.load(values_ptr + first * 256 + offsets, cache_modifier=".cg")
    metadata = gl.load(metadata_ptr + first * WORDS + metadata_offsets, cache_modifier=".cg")
    return values, metadata


@gluon.jit
def tile_origin(tile, m, n, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """Row and column of D where a tile begins: in columns of GROUP tiles along m, so that the tiles of one wave share
    A and B in L2. The last tile along m ends at m and overlaps with the one before."""
    tiles_m = gl.cdiv(m, BM)
    tiles_n = gl.cdiv(n, BN)
    group = tile // (GROUP * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile - group * GROUP * tiles_n
    return gl.minimum((group * GROUP + inside % height) * BM, gl.maximum(m, BM) - BM), inside // height * BN


@gluon.constexpr_function
def cluster_bases(ctas, axis):
    """How a 2-D tile is divided among the CTAs: along an axis, or (None) a copy for each."""
    return [[1 << bit if i == axis else 0 for i in range(2)] for bit in range(ctas.bit_length() - 1)]


# --- producer and consumers ---


@gluon.jit
def producer(
    x_desc, ring, full, empty, m, n, rounds,
    TILE_M: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    N_MAJOR: gl.constexpr
):  # fmt: skip
    """One warp. In a cluster only the first CTA's does anything: it waits until all CTAs have freed the slot, tells
    all of them what to expect, and copies the tile to all of them."""
    count = 0
    for tile in range(gl.program_id(0), gl.cdiv(m, TILE_M) * gl.cdiv(n, BN), gl.num_programs(0)):
        _, column = tile_origin(tile, m, n, TILE_M, BN, GROUP)
        for step in range(rounds * UNROLL):
            slot = count & (STAGES - 1)
            mbarrier.wait(empty.index(slot), ((count >> STAGES.bit_length() - 1) & 1) ^ 1)
            mbarrier.expect(full.index(slot), x_desc.nbytes_per_cta, from_cta=0)
            at = [step * BK, column] if N_MAJOR else [column, step * BK]
            tma.async_load(x_desc, at, full.index(slot), ring.index(slot), multicast=gl.num_ctas() > 1)
            count += 1


@gluon.jit
def advance(
    acc, values, metadata, values_ptr, metadata_ptr, offsets, metadata_offsets, row, step, steps,
    ring, full, empty, slot, before, phase, first,
    DTYPE: gl.constexpr, BN: gl.constexpr, REPEATS: gl.constexpr, N_MAJOR: gl.constexpr, WORDS: gl.constexpr
):  # fmt: skip
    """Multiply one step. On return the step before is finished: its slot is handed back, and its registers take the
    fragments that are loaded, of `step` of the tile at `row`."""
    wait(full + 8 * slot, phase)
    acc = multiply(acc, values, metadata, ring.index(slot), DTYPE, BN, REPEATS, N_MAJOR, 1)
    arrive(empty + 8 * before, first)
    values, metadata = load_fragments(values_ptr, metadata_ptr, offsets, metadata_offsets, row, step, steps, WORDS)
    return acc, values, metadata


@gluon.jit
def consumers(
    y_desc, y_shared, out_ptr, values_ptr, metadata_ptr, bias_ptr, scale_ptr, has_bias, ring, full, empty,
    m, n, steps, rounds,
    DTYPE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    OUTER: gl.constexpr
):  # fmt: skip
    """Two warpgroups, each BM/2 rows."""
    TILE_M: gl.constexpr = BM * gl.num_ctas()
    REPEATS: gl.constexpr = BM // (16 * gl.num_warps())  # times 64 rows of a warpgroup
    WORDS: gl.constexpr = 64 if DTYPE == "e4m3" else 32
    SCALED: gl.constexpr = DTYPE == "e4m3"
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, BN, 16], cluster_bases(gl.num_ctas(), 0)
    )
    full = shared_address(full.index(0), LEAD=False)
    empty = shared_address(empty.index(0), LEAD=True)
    ov, om = fragment_offsets(m, steps, BM, WORDS)
    tiles = gl.cdiv(m, TILE_M) * gl.cdiv(n, BN)
    row, column = tile_origin(gl.minimum(gl.program_id(0), tiles - 1), m, n, TILE_M, BN, GROUP)
    v0, m0 = load_fragments(values_ptr, metadata_ptr, ov, om, row, 0, steps, WORDS)
    v1, m1 = load_fragments(values_ptr, metadata_ptr, ov, om, row, 1, steps, WORDS)
    v2, m2 = load_fragments(values_ptr, metadata_ptr, ov, om, row, 2, steps, WORDS)
    count = 0  # rounds of UNROLL steps, over all tiles
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        next_row, next_column = tile_origin(gl.minimum(tile + gl.num_programs(0), tiles - 1), m, n, TILE_M, BN, GROUP)
        rows = gl.arange(0, TILE_M, gl.SliceLayout(1, ACC))
        acc = gl.full([TILE_M, BN], 0.0, gl.float32, ACC)
        if not OUTER:
            bias = gl.load(bias_ptr + row + rows, mask=(rows < m) & (has_bias != 0), other=0.0).to(gl.float32)
            if SCALED:
                scale = gl.load(scale_ptr)
            else:
                acc += bias[:, None]
        for round in range(rounds):
            slot = (count & (STAGES // UNROLL - 1)) * UNROLL
            last = (slot + STAGES - 1) & (STAGES - 1)
            phase = (count >> (STAGES // UNROLL).bit_length() - 1) & 1
            k = round * UNROLL
            first = (round == 0).to(gl.int32)
            acc, v3, m3 = advance(acc, v0, m0, values_ptr, metadata_ptr, ov, om, row, k + 3, steps,
                                  ring, full, empty, slot, last, phase, first,
                                  DTYPE, BN, REPEATS, OUTER, WORDS)  # fmt: skip
            # the last round loads the first fragments of the next tile
            final = round == rounds - 1
            ahead_row = gl.where(final, next_row, row)
            ahead = gl.where(final, 0, k + 4)
            acc, v0, m0 = advance(acc, v1, m1, values_ptr, metadata_ptr, ov, om, ahead_row, ahead, steps,
                                  ring, full, empty, slot + 1, slot, phase, 0,
                                  DTYPE, BN, REPEATS, OUTER, WORDS)  # fmt: skip
            acc, v1, m1 = advance(acc, v2, m2, values_ptr, metadata_ptr, ov, om, ahead_row, ahead + 1, steps,
                                  ring, full, empty, slot + 2, slot + 1, phase, 0,
                                  DTYPE, BN, REPEATS, OUTER, WORDS)  # fmt: skip
            acc, v2, m2 = advance(acc, v3, m3, values_ptr, metadata_ptr, ov, om, ahead_row, ahead + 2, steps,
                                  ring, full, empty, slot + 3, slot + 2, phase, 0,
                                  DTYPE, BN, REPEATS, OUTER, WORDS)  # fmt: skip
            count += 1
        acc = gl.inline_asm(
            "wgmma.wait_group.sync.aligned 0;", tied(BN // 2 * REPEATS, 0), [acc], acc.type, is_pure=False
        )
        arrive(empty + 8 * ((count * UNROLL - 1) & (STAGES - 1)), 0)

        if OUTER:
            columns = column + gl.arange(0, BN, gl.SliceLayout(0, ACC))
            # four lanes write 32 contiguous bytes, a whole sector
            gl.store(out_ptr + (row + rows).to(gl.int64)[:, None] * n + columns[None, :], acc,
                     mask=(rows < m)[:, None] & (columns < n)[None, :])  # fmt: skip
        else:
            if SCALED:
                acc = gl.fma(acc, scale, bias[:, None])
            y = acc.to(y_desc.dtype)
            tma.store_wait(0)  # the tile before has left y_shared
            gl.barrier()
            y_shared.permute([1, 0]).store(y)
            fence_async_shared()
            gl.barrier()
            tma.async_store(y_desc, [column, row], y_shared)
        row, column = next_row, next_column
    if not OUTER:
        tma.store_wait(0)


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """full: in each CTA, one arrival and the tile's bytes. empty: in the cluster's first CTA, every consumer warp."""
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    ONE: gl.constexpr = mbarrier.MBarrierLayout([[0]] * (gl.num_ctas().bit_length() - 1))
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=gl.num_warps())  # of each CTA
    return full, empty


@gluon.jit
def wgmma_sp_linear(
    x_desc, y_desc, values_ptr, metadata_ptr, bias_ptr, scale_ptr, m, n, k, has_bias,
    DTYPE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """y (n, m) = scale * x Âᵀ + bias. The grid is as many clusters as are resident at once, or fewer.

    x_desc: x (n, k), box (BN, 128 bytes). y_desc: y (n, m), box (BN, 64). Both 128-byte swizzle; rows 16-byte
    aligned. bias_ptr: (m,) in y's dtype, read if has_bias is not 0. scale_ptr: one float32, read for e4m3.
    """
    BK: gl.constexpr = 128 if DTYPE == "e4m3" else 64
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BN, BK], x_desc.layout)
    y_shared = gl.allocate_shared_memory(y_desc.dtype, [BN, BM * gl.num_ctas()], y_desc.layout)
    full, empty = barriers(STAGES)
    steps = k // BK
    rounds = gl.cdiv(steps, UNROLL)
    gl.warp_specialize([
        (consumers, (y_desc, y_shared, None, values_ptr, metadata_ptr, bias_ptr, scale_ptr, has_bias, ring, full, empty,
                     m, n, steps, rounds, DTYPE, BM, BN, STAGES, GROUP, False)),
        (producer, (x_desc, ring, full, empty, m, n, rounds, BM * gl.num_ctas(), BN, BK, STAGES, GROUP, False)),
    ], [1], [24])  # fmt: skip


@gluon.jit
def wgmma_sp_outer(
    x_desc, values_ptr, metadata_ptr, out_ptr, m, n, k,
    DTYPE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """out (m, n) float32 = Â x; k is that of A. The grid as for `wgmma_sp_linear`.

    x_desc: x (its rows, n), box (64, 64), 128-byte swizzle; rows 16-byte aligned; rows beyond x's own count as zero.
    out_ptr: contiguous rows, n even.
    """
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 64, BN], x_desc.layout)
    full, empty = barriers(STAGES)
    steps = k // 64
    rounds = gl.cdiv(steps, UNROLL)
    gl.warp_specialize([
        (consumers, (None, None, out_ptr, values_ptr, metadata_ptr, None, None, 0, ring, full, empty,
                     m, n, steps, rounds, DTYPE, BM, BN, STAGES, GROUP, True)),
        (producer, (x_desc, ring, full, empty, m, n, rounds, BM * gl.num_ctas(), BN, 64, STAGES, GROUP, True)),
    ], [1], [24])  # fmt: skip


@gluon.jit
def wgmma_sp_simple(
    x_ptr, values_ptr, metadata_ptr, bias_ptr, y_ptr, m, n, k, has_bias,
    DTYPE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """y (n, m) = x Âᵀ + bias, 16-bit types; one program for each tile. x (n, k) and y contiguous."""
    BK: gl.constexpr = 64
    REPEATS: gl.constexpr = BM // (16 * gl.num_warps())
    DT: gl.constexpr = x_ptr.dtype.element_ty
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])  # 16 bytes a lane
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, gl.num_warps()], [0, 1])
    row, column = tile_origin(gl.program_id(0), m, n, BM, BN, GROUP)
    steps = k // BK
    ring = gl.allocate_shared_memory(DT, [STAGES, BN, BK], gl.NVMMASharedLayout(128, 16, 2))
    x_row = column + gl.arange(0, BN, gl.SliceLayout(1, COPY))
    x_ptrs = x_ptr + x_row.to(gl.int64)[:, None] * k + gl.arange(0, BK, gl.SliceLayout(0, COPY))[None, :]
    for s in gl.static_range(STAGES - 1):
        async_copy.async_load(ring.index(s), x_ptrs + s * BK, mask=(x_row < n)[:, None] & (s < steps))
        async_copy.commit_group()
    ov, om = fragment_offsets(m, steps, BM, 32)
    values, metadata = load_fragments(values_ptr, metadata_ptr, ov, om, row, 0, steps, 32)
    acc = gl.full([BM, BN], 0.0, gl.float32, ACC)
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        gl.barrier()
        ahead = step + STAGES - 1
        async_copy.async_load(
            ring.index(ahead % STAGES), x_ptrs + ahead * BK, mask=(x_row < n)[:, None] & (ahead < steps)
        )
        async_copy.commit_group()
        next_values, next_metadata = load_fragments(values_ptr, metadata_ptr, ov, om, row, step + 1, steps, 32)
        acc = multiply(acc, values, metadata, ring.index(step % STAGES), DTYPE, BN, REPEATS, False, 0)
        values, metadata = next_values, next_metadata
    async_copy.wait_group(0)
    bias = gl.load(bias_ptr + row + gl.arange(0, BM, gl.SliceLayout(1, ACC)), mask=has_bias != 0, other=0.0)
    y = gl.convert_layout((acc + bias.to(gl.float32)[:, None]).to(DT), STORE)
    rows = row + gl.arange(0, BM, gl.SliceLayout(1, STORE))
    columns = column + gl.arange(0, BN, gl.SliceLayout(0, STORE))
    gl.store(y_ptr + columns.to(gl.int64)[None, :] * m + rows[:, None], y, mask=(columns < n)[None, :])


# --- what is built ---


def _variant(
    kernel: gluon.GluonJITFunction, form: str, dtype: str, bm: int, bn: int, stages: int, ctas: int
) -> Variant:
    bits, element = (8, "fp8e4nv") if dtype == "e4m3" else (16, dtype)
    result = "fp16" if dtype == "fp16" else "bf16"
    bk = 1024 // bits
    every = gl.NVMMASharedLayout(128, bits, 2, cga_layout=cluster_bases(ctas, None))
    along_m = gl.NVMMASharedLayout(128, 16, 2, cga_layout=cluster_bases(ctas, 1))
    matrix = {"values_ptr": "*i32", "metadata_ptr": "*i32"}
    sizes = {"m": "i32", "n": "i32", "k": "i32"}
    if kernel is wgmma_sp_linear:
        signature = {
            "x_desc": f"tensordesc<{element}[{bn},{bk}],{every!r}>",
            "y_desc": f"tensordesc<{result}[{bn},{bm * ctas}],{along_m!r}>",
            **matrix, "bias_ptr": f"*{result}", "scale_ptr": "*fp32", **sizes, "has_bias": "i32",
        }  # fmt: skip
    elif kernel is wgmma_sp_outer:
        x_desc = f"tensordesc<{element}[64,{bn}],{every!r}>"
        signature = {"x_desc": x_desc, **matrix, "out_ptr": "*fp32", **sizes}
    else:
        x_ptr, bias_ptr, y_ptr = f"*{dtype}", f"*{dtype}", f"*{dtype}"
        signature = {"x_ptr": x_ptr, **matrix, "bias_ptr": bias_ptr, "y_ptr": y_ptr, **sizes, "has_bias": "i32"}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") and name != "scale_ptr"]
    group = max(1, 2048 // (bm * ctas))  # a column of tiles is 2048 rows: about as tall as one wave is wide
    constexprs = {"DTYPE": dtype, "BM": bm, "BN": bn, "STAGES": stages, "GROUP": group}
    return Variant(
        name=f"{kernel.__name__}_{dtype}_{bm}x{bn}_c{ctas}",
        form=form,
        dtype=dtype,
        capability=90,
        kernel=kernel,
        signature={**signature, **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        num_warps=8,
        num_ctas=ctas,
        block=(bm, bn, bk),
        attrs={**dict.fromkeys(aligned, 16), "m": 16, "k": 16, **({"n": 8} if kernel is wgmma_sp_outer else {})},
    )


# Tiles (BM, BN, stages, CTAs of a cluster). 128x128 is for few tokens.
_TILES = ((128, 128, 8, 1), (128, 256, 4, 1), (128, 256, 4, 2), (256, 128, 8, 2), (256, 128, 8, 4))

VARIANTS: tuple[Variant, ...] = (
    *(_variant(wgmma_sp_simple, "linear", dtype, 128, 128, 4, 1) for dtype in ("bf16", "fp16")),
    *(_variant(wgmma_sp_linear, "linear", dtype, *tile) for dtype in ("bf16", "fp16", "e4m3") for tile in _TILES),
    *(_variant(wgmma_sp_outer, "outer", dtype, *tile) for dtype in ("bf16", "fp16") for tile in _TILES),
)
