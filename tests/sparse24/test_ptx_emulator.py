"""The emulator itself: hand-written PTX for what is easily got wrong, and Triton's own dense kernels for sm_90."""

import numpy as np
import pytest
from ptx_emulator import Deadlock, Emulator, EmulatorError, TensorMap

NAN = np.float32(np.nan)


def kernel(body, parameters=("u64",), threads=32, registers=16):
    """PTX of a kernel; %rd0, %rd1, … hold its pointers, %r0 the thread, %r1 the shared memory."""
    declared = ", ".join(
        f".param .align 64 .b8 p{i}[128]" if kind == "map" else f".param .{kind} p{i}"
        for i, kind in enumerate(parameters)
    )
    loads = "\n".join(f"ld.param.b64 %rd{i}, [p{i}];" for i, kind in enumerate(parameters) if kind == "u64")
    return f"""
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({declared})
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b32 %r<{registers}>;
    .reg .b64 %rd<16>;
    {loads}
    mov.u32 %r0, %tid.x;
    mov.b32 %r1, global_smem;
    {body}
    ret;
}}
"""


# --- warps, barriers ---


def test_lanes_diverge_and_meet():
    """Odd lanes take another way, and a loop ends at different times."""
    body = """
    and.b32 %r2, %r0, 1;
    setp.eq.b32 %p0, %r2, 0;
    mov.b32 %r3, 0;
    @%p0 bra even;
    mov.b32 %r3, 1000;
    even:
    add.s32 %r3, %r3, 1;
    add.s32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, %r0;
    @%p1 bra even;
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd1, %rd0, %rd1;
    st.global.b32 [%rd1], %r3;
    """.replace("mov.b32 %r3, 0;", "mov.b32 %r3, 0; mov.b32 %r4, 0;")
    out = np.zeros(32, np.int32)
    Emulator(kernel(body)).launch((1, 1, 1), [out])
    lane = np.arange(32)
    assert np.array_equal(out, np.maximum(lane, 1) + 1000 * (lane % 2))


def test_minimum_that_is_not_negative_and_a_label_for_each_block():
    body = """
    sub.s32 %r2, %r0, 8;
    min.relu.s32 %r3, %r2, 10;
    { .reg .pred done; again: setp.ge.s32 done, %r3, 3; @!done bra skip; add.s32 %r3, %r3, 100; skip: }
    { .reg .pred done; again: setp.ge.s32 done, %r3, 5; @!done bra skip; add.s32 %r3, %r3, 1000; skip: }
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd1, %rd0, %rd1;
    st.global.b32 [%rd1], %r3;
    """
    out = np.zeros(32, np.int32)
    Emulator(kernel(body)).launch((1, 1, 1), [out])
    least = np.clip(np.arange(32) - 8, 0, 10)
    assert np.array_equal(out, least + 1100 * (least >= 3))


NAMED_BARRIER = """
    shr.u32 %r2, %r0, 5;
    setp.ne.b32 %p0, %r2, 0;
    @%p0 bra consumer;
    shl.b32 %r3, %r0, 2;
    add.s32 %r3, %r3, %r1;
    st.shared.b32 [%r3], %r0;
    bar.arrive 3, 64;
    ret;
    consumer:
    bar.sync 3, COUNT;
    sub.s32 %r3, 63, %r0;
    shl.b32 %r3, %r3, 2;
    add.s32 %r3, %r3, %r1;
    ld.shared.b32 %r4, [%r3];
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd1, %rd0, %rd1;
    st.global.b32 [%rd1+-128], %r4;
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_named_barrier(seed):
    out = np.zeros(32, np.int32)
    Emulator(kernel(NAMED_BARRIER.replace("COUNT", "64"), threads=64)).launch((1, 1, 1), [out], seed=seed)
    assert np.array_equal(out, np.arange(31, -1, -1))


def test_named_barrier_that_is_not_reached():
    """Of three warps only two come, and one of them says that all three should."""
    emulator = Emulator(
        kernel(NAMED_BARRIER.replace("bar.arrive 3, 64", "bar.arrive 2, 96").replace("COUNT", "96"), threads=64)
    )
    with pytest.raises(Deadlock, match=r"warp 1 at \d+ `bar.sync 3, 96`: barrier 3: 1 of 3 warps are there"):
        emulator.launch((1, 1, 1), [np.zeros(32, np.int32)])


def test_without_the_barrier_the_read_is_refused():
    """In an order of the warps in which the reader is first; which seed that is does not matter."""
    emulator = Emulator(kernel(NAMED_BARRIER.replace("bar.sync 3, COUNT;", ""), threads=64))
    with pytest.raises(EmulatorError, match="read before it was written"):
        [emulator.launch((1, 1, 1), [np.zeros(32, np.int32)], seed=seed) for seed in range(20)]


# Warp 0 produces four numbers through a buffer of one; warp 1 sums them up. mbarriers: full at 64, empty at 72.
PING_PONG = """
    setp.eq.b32 %p2, %r0, 0;
    @%p2 mbarrier.init.shared::cta.b64 [%r1+64], 1;
    @%p2 mbarrier.init.shared::cta.b64 [%r1+72], 32;
    bar.sync 0;
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
    setp.ge.u32 %p0, %r0, 32;
    @%p0 bra consumer;
    producer:
    and.b32 %r4, %r2, 1;
    xor.b32 %r4, %r4, 1;
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1+72], %r4; @!done bra.uni again; }
    add.s32 %r5, %r2, 10;
    @%p2 st.shared.b32 [%r1], %r5;
    @%p2 mbarrier.arrive.shared::cta.b64 _, [%r1+64];
    add.s32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, 4;
    @%p1 bra producer;
    ret;
    consumer:
    and.b32 %r4, %r2, 1;
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1+64], %r4; @!done bra.uni again; }
    ld.shared.b32 %r5, [%r1];
    add.s32 %r3, %r3, %r5;
    mbarrier.arrive.shared::cta.b64 _, [%r1+72];
    add.s32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, 4;
    @%p1 bra consumer;
    st.global.b32 [%rd0], %r3;
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_mbarrier_phases(seed):
    out = np.zeros(1, np.int32)
    Emulator(kernel(PING_PONG, threads=64)).launch((1, 1, 1), [out], seed=seed)
    assert out[0] == 10 + 11 + 12 + 13


def test_mbarrier_deadlock_is_explained():
    """Waiting for the wrong parity at first: nobody fills, nobody empties."""
    ptx = kernel(PING_PONG.replace("xor.b32 %r4, %r4, 1;", ""), threads=64)
    with pytest.raises(Deadlock) as error:
        Emulator(ptx).launch((1, 1, 1), [np.zeros(1, np.int32)])
    assert "warp 0" in str(error.value)
    assert "mbarrier 72 parity 0: phase 0 lacks 32 of 32 arrivals" in str(error.value)
    assert "mbarrier 64 parity 0: phase 0 lacks 1 of 1 arrivals" in str(error.value)


# --- copies ---

COPY = """
    shl.b32 %r2, %r0, 4;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd0, %rd2;
    add.s32 %r3, %r1, %r2;
    cp.async.cg.shared.global [%r3], [%rd3], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];
    add.s64 %rd3, %rd1, %rd2;
    st.global.v4.b32 [%rd3], {%r4, %r5, %r6, %r7};
"""


def test_cp_async():
    x, out = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    for lazy in (True, False):
        out[:] = 0
        Emulator(kernel(COPY, ("u64", "u64"))).launch((1, 1, 1), [x, out], lazy=lazy)
        assert np.array_equal(x, out)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cp.async.wait_group 0;", "", "read while an asynchronous copy"),
        ("cp.async.cg.shared.global [%r3], [%rd3], 16;", "", "read before it was written"),
        (
            "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]",
            "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3+4]",
            "misaligned",
        ),
        ("add.s64 %rd3, %rd0, %rd2;", "add.s64 %rd3, %rd0, %rd2; add.s64 %rd3, %rd3, 16;", "outside of the arrays"),
        (
            "st.global.v4.b32 [%rd3], {%r4, %r5, %r6, %r7};",
            "st.global.b32 [%rd3], %r8;",
            "%r8 read while it is not written",
        ),
        (
            "cp.async.commit_group;",
            "st.shared.b32 [%r3], %r0; cp.async.commit_group;",
            "written while an asynchronous copy",
        ),
    ],
)
def test_mistakes_with_copies(old, new, message):
    assert old in COPY
    with pytest.raises(EmulatorError, match=message):
        Emulator(kernel(COPY.replace(old, new), ("u64", "u64"))).launch(
            (1, 1, 1), [np.zeros(128, np.int32), np.zeros(128, np.int32)]
        )


@pytest.mark.parametrize("lazy", [True, False])
def test_tma_swizzle_and_edges(lazy):
    """16-byte unit c of row r lies at unit c ^ (r mod 8) of the row; outside of the tensor are zeros."""
    body = """
    setp.eq.b32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r1+2048], 1;
    mov.b64 %rd1, p0;
    mov.b32 %r2, 64;
    mov.b32 %r3, -2;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+2048], 2048;
    @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r1+2048];
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1+2048], 0; @!done bra.uni again; }
    ld.param.b64 %rd0, [p1];
    shl.b32 %r4, %r0, 6;
    add.s32 %r5, %r1, %r4;
    cvt.u64.u32 %rd2, %r4;
    add.s64 %rd0, %rd0, %rd2;
    """ + "\n".join(
        f"ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r5+{16 * i}]; st.global.v4.b32 [%rd0+{16 * i}], {{%r8, %r9, %r10, %r11}};"
        for i in range(4)
    )
    x = np.arange(1, 40 * 120 + 1, dtype=np.uint16).reshape(40, 120)
    out = np.full((16, 64), 7, np.uint16)
    ptx = kernel(body, ("map", "u64"))
    Emulator(ptx).launch((1, 1, 1), [TensorMap(x, (40, 120), (16, 64)), out], lazy=lazy)
    expected = np.zeros((16, 64), np.uint16)
    expected[2:, :56] = x[:14, 64:]
    for row in range(16):
        for unit in range(8):
            place = unit ^ (row % 8)
            assert np.array_equal(out[row, 8 * place : 8 * place + 8], expected[row, 8 * unit : 8 * unit + 8])
    if lazy:
        with pytest.raises(EmulatorError, match="read while an asynchronous copy"):
            Emulator(ptx.replace("@!done bra.uni again;", "").replace("try_wait", "test_wait")).launch(
                (1, 1, 1), [TensorMap(x, (40, 120), (16, 64)), out]
            )


# CTA 0 of two waits until both have arrived at its mbarrier (at 1024), then loads a tile into both, whose mbarriers
# (at 1032) tell of it; each writes its own number plus the first element.
CLUSTER = """
    mov.u32 %r2, %cluster_ctarank;
    setp.eq.b32 %p0, %r0, 0;
    setp.eq.b32 %p1, %r2, 0;
    and.pred %p2, %p0, %p1;
    @%p0 mbarrier.init.shared::cta.b64 [%r1+1024], 2;
    @%p0 mbarrier.init.shared::cta.b64 [%r1+1032], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+1032], 1024;
    mapa.shared::cluster.u32 %r3, %r1, 0;
    @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3+1024];
    @!%p1 bra follow;
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1+1024], 0; @!done bra.uni again; }
    mov.b64 %rd1, p0;
    mov.b32 %r4, 0;
    { .reg .b16 both; mov.b16 both, 3;
    @%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r1], [%rd1, {%r4, %r4}], [%r1+1032], both; }
    follow:
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1+1032], 0; @!done bra.uni again; }
    ld.shared.b32 %r5, [%r1];
    add.s32 %r5, %r5, %r2;
    ld.param.b64 %rd0, [p1];
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd0, %rd0, %rd2;
    st.global.b32 [%rd0], %r5;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""


def run_cluster(body, **how):
    x, out = np.arange(100, 356, dtype=np.int32).reshape(8, 32), np.zeros(2, np.int32)
    Emulator(kernel(body, ("map", "u64"))).launch((2, 1, 1), [TensorMap(x, (8, 32), (8, 32)), out], cluster=2, **how)
    return out.tolist()


@pytest.mark.parametrize("lazy", [True, False])
def test_cluster(lazy):
    for seed in (None, *range(8)):
        assert run_cluster(CLUSTER, lazy=lazy, seed=seed) == [100, 101]
    barrier = "    barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;\n"
    assert CLUSTER.count(barrier) == 2
    # signals before the other CTA has made its mbarriers
    with pytest.raises(EmulatorError, match="no mbarrier was initialised"):
        [run_cluster(CLUSTER.replace(barrier, "", 1), lazy=lazy, seed=seed) for seed in range(8)]
    # CTA 1 ends without waiting for what CTA 0 has for it
    early = CLUSTER.removesuffix(barrier).replace("@!%p1 bra follow;", "@!%p1 bra end;") + "end:"
    with pytest.raises(EmulatorError, match="has ended"):
        [run_cluster(early, lazy=lazy, seed=seed) for seed in range(8)]
