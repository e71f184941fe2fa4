"""The three products of a linear layer, by every backend: the best of its algorithms against the dense product."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from sparse24 import dispatch, ops
from sparse24.backends import BACKENDS, split_choice
from sparse24.backends.base import FORWARD, INPUT_GRADIENT, KINDS, WEIGHT_GRADIENT, Product
from sparse24.dispatch import LayerShape
from sparse24.reference import TRANSPOSABLE_PATTERNS
from torch import Tensor

from benchmarks import shapes
from benchmarks.bench import TOLERANCE, Arm, Bench, Case, relative_error
from benchmarks.rows import FAILED, UNAVAILABLE, WRONG, Row
from benchmarks.timing import Call, sets_needed

PART = "products"
PACKED_SHARE = 9 / 16  # of the dense bytes, in a 16-bit dtype
FEW = (FORWARD, INPUT_GRADIENT)  # what is measured with few tokens


def cases(device: torch.device, rehearse: bool) -> list[Case]:
    """Each of our kernels alone and small first, which shows what is broken; then the most valuable shapes."""
    if rehearse:
        return [*_cases("", shapes.TINY_TOKENS, 64, 128), *_cases("", 16, 64, 128, FEW)]
    if device.type != "cuda":
        return []  # everything is dense there
    found = [*_kernels(device), *_cases("", 1024, 1024, 1024)]
    for m in shapes.MODELS:
        found += _cases(f"{m.name} up", shapes.TOKENS, m.d_ff, m.d_model)
    found += _cases("", 8192, 8192, 8192)
    for m in shapes.MODELS:
        found += _cases(f"{m.name} down", shapes.TOKENS, m.d_model, m.d_ff)
    for m in (shapes.LLAMA_7B, shapes.GPT2_124M):
        for tokens in shapes.FEW_TOKENS:
            found += _cases(f"{m.name} up", tokens, m.d_ff, m.d_model, FEW)
    return found


def _cases(layer: str, tokens: int, out: int, into: int, kinds: tuple[str, ...] = KINDS) -> list[Case]:
    """A case for each product: a backend that crashes in one may do the others."""
    shape = f"{layer} ({out}x{into})" if layer else f"{out}x{into}"
    found = []
    for kind in kinds:
        name = f"{shape}, {tokens} tokens: {kind}"
        found.append(Case(PART, name, partial(_run, name, tokens, out, into, kind), 3))
    return found


def _run(case: str, tokens: int, out: int, into: int, kind: str, bench: Bench) -> None:
    _product(bench, case, LayerShape(tokens, out, into, bench.dtype, transposable=True, mvue=True), kind)


def _kernels(device: torch.device) -> list[Case]:
    """Our own GEMMs, one by one, at a size that does not fill their last tile."""
    return [
        Case(PART, f"{variant} at 1024x1024, 1000 tokens", partial(_kernel, variant, kind), 5)
        for kind in (FORWARD, WEIGHT_GRADIENT)
        for variant in kernels(kind, torch.bfloat16, device)
    ]


def kernels(kind: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Names of our own GEMMs for a product in this dtype, but those that have been left out."""
    return BACKENDS["gluon"].variants(Product(kind, 1024, 1024, 1024, dtype), device)


def _kernel(variant: str, kind: str, bench: Bench) -> None:
    case = f"{variant} at 1024x1024, 1000 tokens"
    shape = LayerShape(1000, 1024, 1024, bench.dtype, transposable=True, mvue=True)
    inputs = _Inputs(bench, shape, kind, sets=1)
    arms = [
        Arm("dense", inputs.dense, ours=False, extra={"check": True}),
        Arm(
            f"gluon:{variant}",
            partial(inputs.sparse, "gluon", variant),
            lambda call: relative_error(call(0), inputs.expected()),
            TOLERANCE[shape.dtype],
            extra={"check": True},
            blame=f"gluon//{variant}",
        ),
    ]
    bench.compare(PART, case, arms, "dense", graph=False)


def _product(bench: Bench, case: str, shape: LayerShape, kind: str) -> None:
    measured = _measure(bench, case, shape, kind)
    product = shape.product(kind)
    size = shape.dtype.itemsize
    sparse_bytes, other_bytes = product.m * product.k * size, product.k * product.n * size
    result_bytes = product.m * product.n * (4 if kind == WEIGHT_GRADIENT else size)
    sets = sets_needed(sparse_bytes + other_bytes + result_bytes, bench.device)
    inputs = _Inputs(bench, shape, kind, sets)
    expected: dict[str, Tensor] = {}

    def check(call: Call) -> float:
        if not expected:
            expected["result"] = inputs.expected()
        return relative_error(call(0), expected["result"])

    flop = 2.0 * product.m * product.k * product.n
    dense_bytes = sparse_bytes + other_bytes + product.m * product.n * size
    arms = [Arm("dense", inputs.dense, bytes=dense_bytes, flop=flop, ours=False)]
    for row in measured:
        backend, variant = split_choice(row.choice)
        if row.product_ms is None or (backend.name == "dense" and kind != WEIGHT_GRADIENT):
            continue
        name = "dense of MVUE" if backend.name == "dense" else row.choice
        variants = {name: variant}
        if backend.name == "cusparselt" and variant != "0":
            variants["cusparselt, default algorithm"] = "0"  # what PyTorch takes if not told otherwise
        for name, one in variants.items():
            arms.append(
                Arm(
                    name,
                    partial(inputs.sparse, backend.name, one),
                    check,
                    TOLERANCE[shape.dtype],
                    bytes=PACKED_SHARE * sparse_bytes + other_bytes + result_bytes,
                    flop=flop if backend.name == "dense" else flop / 2,
                    # a library's algorithm that is wrong is passed over, and is no fault of ours
                    ours=backend.name not in ("dense", "cusparselt", "cutlass"),
                    extra={"packing_ms": row.packing_ms, "note": row.note},
                    blame=f"{backend.name}/{kind}/",
                )
            )
    bench.compare(PART, case, arms, "dense", sets)


def _measure(bench: Bench, case: str, shape: LayerShape, kind: str) -> list[dispatch.Row]:
    """Every backend's best algorithm; those that have none get a row that says why."""
    found = []
    for name in BACKENDS:
        bench.at(f"{case}: trying {name}", f"{name}/{kind}/")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the note says the same
            found += dispatch.measure(shape, kind, bench.device, only=name)
        bench.still_there()
    for row in found:
        if row.product_ms is None:
            able, _ = BACKENDS[row.choice].supports(shape.product(kind), bench.device)
            status = WRONG if row.note.startswith("wrong") else FAILED if able else UNAVAILABLE
            ours = row.choice not in ("cusparselt", "cutlass")
            bench.emit(Row(PART, case, row.choice, ours, status, row.note))
    return found


class _Inputs:
    """Random operands of one product, `sets` of them, in the forms that dense products and backends want."""

    def __init__(self, bench: Bench, shape: LayerShape, kind: str, sets: int) -> None:
        self.shape, self.kind, self.sets = shape, kind, sets
        out, into, tokens = shape.out_features, shape.in_features, shape.tokens
        self.weights = [bench.randn(out, into, dtype=torch.float32, seed=i, scale=into**-0.5) for i in range(sets)]
        self.mask = random_mask(out, into, bench.generator())
        self.x = [bench.randn(tokens, into, dtype=shape.dtype, seed=100 + i) for i in range(sets)]
        self.dy = [bench.randn(tokens, out, dtype=shape.dtype, seed=200 + i) for i in range(sets)]
        self.position = torch.tensor([1, 0, 0, 0], device=bench.device)

    def dense(self) -> Call:
        """What dense training computes: with the whole weight, with dY as it is."""
        if self.kind == WEIGHT_GRADIENT:
            return lambda i: self.dy[i].t() @ self.x[i]
        weights = [weight.to(self.shape.dtype) for weight in self.weights]
        if self.kind == FORWARD:
            return lambda i: self.x[i] @ weights[i].t()
        return lambda i: self.dy[i] @ weights[i]

    def expected(self) -> Tensor:
        """The sparse product of the first set, computed densely."""
        if self.kind == WEIGHT_GRADIENT:
            return ops.mvue_prune(self.dy[0], 0, self.position).t() @ self.x[0]
        masked = ops.sparse_weight(self.weights[0], self.mask, None, self.shape.dtype)
        return self.x[0] @ masked.t() if self.kind == FORWARD else self.dy[0] @ masked

    def sparse(self, name: str, variant: str) -> Call:
        """A backend's product on operands that are packed already (dY is packed within the product)."""
        backend = BACKENDS[name]
        if self.kind == WEIGHT_GRADIENT:
            return lambda i: backend.weight_gradient(self.dy[i], self.x[i], 0, self.position, variant)
        forward = self.kind == FORWARD
        operands = [
            backend.pack_weight(weight, self.mask, None, self.shape.dtype, forward, not forward)[0 if forward else 1]
            for weight in self.weights
        ]
        features = self.shape.out_features if forward else self.shape.in_features
        dense = self.x if forward else self.dy
        return lambda i: backend.linear(operands[i], dense[i], None, features, variant)


def random_mask(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A random transposable mask: sides must be multiples of 4."""
    blocks = torch.randint(90, (rows // 4, cols // 4), generator=generator, device=generator.device)
    return TRANSPOSABLE_PATTERNS.to(generator.device)[blocks].transpose(1, 2).reshape(rows, cols).contiguous()
