"""Each sparse GEMM alone, against the floor that its operations or bytes set, and against dense ones."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from sparse24 import reference
from sparse24.backends.base import FORWARD, WEIGHT_GRADIENT
from sparse24.fragments import to_fragments
from torch import Tensor

from benchmarks import shapes
from benchmarks.bench import TOLERANCE, Arm, Bench, Case, Unavailable, relative_error
from benchmarks.operators import PACKED, PART, TOKENS, WEIGHTS, make_case, timed
from benchmarks.products import kernels, random_mask
from benchmarks.timing import Call, sets_needed


def cases(device: torch.device, rehearse: bool) -> list[Case]:
    if device.type != "cuda" and not rehearse:
        return []  # kernels are for GPUs
    (rows, cols), tokens, few = (WEIGHTS[0], TOKENS, shapes.FEW_TOKENS) if not rehearse else ((128, 256), 128, (16,))
    found = [make_case(f"GEMM for {n} tokens, decompressing", _decompress, rows, cols, n) for n in few]
    if device.type == "cuda":
        found += [
            make_case(f"sparse GEMMs, linear, {dtype}", _linear, rows, cols, tokens, dtype, seconds=12)
            for dtype in ("bfloat16", "float8_e4m3fn", "float16")
        ]
        found += [make_case("sparse GEMMs, outer, bfloat16", _outer, rows, cols, tokens, seconds=12)]
        found += [make_case("cuSPARSELt, every algorithm", _algorithms, rows, cols, tokens, seconds=20)]
    return found


def _decompress(bench: Bench, case: str, rows: int, cols: int, tokens: int) -> None:
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float16
    sets = sets_needed(2 * rows * cols, bench.device)
    weights = [bench.randn(rows, cols, dtype=dtype, seed=i, scale=cols**-0.5) for i in range(sets)]
    mask = random_mask(rows, cols, bench.generator())
    xs = [bench.randn(tokens, cols, dtype=dtype, seed=100 + i) for i in range(sets)]

    def make() -> Call:
        from sparse24.decompress import decompress_linear

        packed = [reference.pack(weight, mask) for weight in weights]
        return lambda i: decompress_linear(xs[i], packed[i])

    def check(call: Call) -> float:
        return relative_error(call(0), F.linear(xs[0], weights[0] * mask))

    flop, other = 2.0 * rows * cols * tokens, 2.0 * tokens * (rows + cols)
    arms = [
        Arm(
            "dense",
            lambda: lambda i: F.linear(xs[i], weights[i]),
            bytes=2.0 * rows * cols + other,
            flop=flop,
            ours=False,
        ),
        Arm("decompressing", make, check, TOLERANCE[dtype], bytes=PACKED * rows * cols + other, flop=flop),
    ]
    timed(bench, case, arms, "dense", sets)


def _linear(bench: Bench, case: str, rows: int, cols: int, tokens: int, dtype_name: str) -> None:
    """Every kernel of `matmul.linear` for this dtype; the shape is large enough that no cache holds it."""
    dtype = getattr(torch, dtype_name)
    fp8 = dtype == torch.float8_e4m3fn
    mask = random_mask(rows, cols, bench.generator())
    weight = bench.randn(rows, cols, dtype=torch.float32, scale=cols**-0.5 * (16 if fp8 else 1)).to(dtype)
    x = bench.randn(tokens, cols, dtype=torch.float32, seed=1).to(dtype)
    one = torch.ones((), device=bench.device)
    masked = (weight.float() * mask).to(dtype)

    def dense(w: Tensor) -> Tensor:
        if fp8:
            return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)
        return x @ w.t()

    expected = dense(masked)

    def make(variant: str) -> Call:
        from sparse24 import matmul

        # packing moves bits only, and reference.pack cannot index fp8
        packed = reference.pack(weight.view(torch.uint8) if fp8 else weight, mask)
        fragments = to_fragments(packed._replace(values=packed.values.view(dtype)))
        scale = one if fp8 else None
        return lambda _: matmul.linear(fragments, x, variant=variant, scale=scale)

    size = dtype.itemsize
    flop, other = 2.0 * rows * cols * tokens, float(size * tokens * cols + 2 * tokens * rows)
    arms = [Arm("dense", lambda: lambda _: dense(weight), bytes=size * rows * cols + other, flop=flop, ours=False)]
    for variant in _variants(bench, FORWARD, dtype):
        check = lambda call: relative_error(call(0), expected)  # noqa: E731
        bytes = size * rows * cols * (0.625 if fp8 else 0.5625) + other
        # sums of fp8 products are held in fewer bits than fp32 has
        tolerance = 3e-2 if fp8 else TOLERANCE[dtype]
        blame = f"gluon//{variant}"
        made = Arm(variant, partial(make, variant), check, tolerance, bytes=bytes, flop=flop / 2, blame=blame)
        arms.append(made)
    bench.compare(PART, case, arms, "dense", dtype=dtype)


def _outer(bench: Bench, case: str, rows: int, cols: int, tokens: int) -> None:
    """Every kernel of `matmul.outer`: dW of a layer (rows, cols), without pruning dY."""
    dtype = torch.bfloat16
    dy_t = bench.randn(rows, tokens, dtype=dtype)
    x = bench.randn(tokens, cols, dtype=dtype, seed=1)
    mask = random_mask(rows, tokens, bench.generator())
    expected = (dy_t * mask) @ x

    def make(variant: str) -> Call:
        from sparse24 import matmul

        fragments = to_fragments(reference.pack(dy_t, mask))
        return lambda _: matmul.outer(fragments, x, variant=variant)

    flop, other = 2.0 * rows * cols * tokens, 2.0 * tokens * cols
    arms = [Arm("dense", lambda: lambda _: dy_t @ x, bytes=2.0 * rows * (tokens + cols) + other, flop=flop, ours=False)]
    for variant in _variants(bench, WEIGHT_GRADIENT, dtype):
        check = lambda call: relative_error(call(0), expected)  # noqa: E731
        bytes = rows * (PACKED * tokens + 4.0 * cols) + other
        blame = f"gluon//{variant}"
        made = Arm(variant, partial(make, variant), check, TOLERANCE[dtype], bytes=bytes, flop=flop / 2, blame=blame)
        arms.append(made)
    bench.compare(PART, case, arms, "dense")


def _variants(bench: Bench, kind: str, dtype: torch.dtype) -> list[str]:
    found = kernels(kind, dtype, bench.device)
    if not found:
        raise Unavailable(f"no kernel for {kind} with {dtype} on {torch.cuda.get_device_name(bench.device)}")
    return found


def _algorithms(bench: Bench, case: str, rows: int, cols: int, tokens: int) -> None:
    """Every algorithm of cuSPARSELt that this shape has, for one product: which are right, and how fast they are."""
    from sparse24.backends.cusparselt import ALGORITHMS

    if not torch.backends.cusparselt.is_available():
        raise Unavailable("this build of PyTorch has no cuSPARSELt, or the GPU is older than sm_80")
    dtype = torch.bfloat16
    weight = bench.randn(rows, cols, dtype=dtype, scale=cols**-0.5)
    mask = random_mask(rows, cols, bench.generator())
    x = bench.randn(tokens, cols, dtype=dtype, seed=1)
    compressed = torch._cslt_compress(weight * mask)
    expected = x @ (weight * mask).t()

    def product(algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(compressed, x.t(), transpose_result=True, alg_id=algorithm)

    def exists(algorithm: int) -> bool:
        try:
            product(algorithm)
        except RuntimeError:
            return False
        return True

    flop = 2.0 * rows * cols * tokens
    arms = [Arm("dense", lambda: lambda _: x @ weight.t(), flop=flop, ours=False)]
    for algorithm in filter(exists, range(ALGORITHMS)):
        check = lambda call: relative_error(call(0), expected)  # noqa: E731
        make = lambda a=algorithm: lambda _: product(a)  # noqa: E731
        arms.append(Arm(f"algorithm {algorithm}", make, check, TOLERANCE[dtype], flop=flop / 2, ours=False))
    bench.compare(PART, case, arms, "dense", graph=False)
