"""Which backend computes a layer's products: measured, checked, remembered.

For each of the three products every backend that can serve it is run on random data of the layer's own size, compared
with the dense product, and timed, packing included and spread over the micro-batches that share it. The fastest that
is right is chosen, if it saves 2 % of dense's time at least: so a choice is never slower than dense products. A wrong
result is reported with a warning, never chosen and never timed.

On a CPU there is nothing to measure: everything is dense there.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse24 import ops, reference
from sparse24.autograd import fp8_weight
from sparse24.backends import BACKENDS
from sparse24.backends.base import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Backend, Product
from sparse24.reference import TRANSPOSABLE_PATTERNS
from sparse24.timing import median_ms

# ‖sparse - dense‖ / ‖dense‖ over the whole result: rounding of a 16-bit result gives about 3e-3 in bf16; a product
# with a wrong element order or a missing tile is far above.
# In e4m3 too the result is bf16, and what it is compared with is the emulated product of the same values.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float8_e4m3fn: 1e-2}
MARGIN = 0.02  # of dense's time that another backend must save
FINALISTS = 3  # variants of a backend that are timed again with more repetitions
AUTO = "auto"
OUT_OF_MEMORY = "out of memory"  # part of the note of what may be measured another time


@dataclass(frozen=True)
class LayerShape:
    """What a choice depends on.

    tokens: of one micro-batch on one device.
    transposable: whether the mask is 2:4 along the columns too, so that dX may be sparse.
    mvue: whether dY is pruned, so that dW may be.
    micro_batches: products per packing, i.e. the accumulation.
    fp8: whether products are of fp8 values; sparse backends then serve the forward one, in e4m3.
    """

    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    transposable: bool
    mvue: bool
    micro_batches: int = 1
    fp8: bool = False

    def product(self, kind: str) -> Product:
        dtype = torch.float8_e4m3fn if self.fp8 else self.dtype
        return Product(kind, self.tokens, self.out_features, self.in_features, dtype)

    def sparse_kinds(self) -> list[str]:
        """The products that a sparse backend may serve."""
        kinds = [FORWARD]
        if self.fp8:
            return kinds
        if self.transposable:
            kinds.append(INPUT_GRADIENT)
        if self.mvue:
            kinds.append(WEIGHT_GRADIENT)
        return kinds


class Plan(NamedTuple):
    """The choice (`backend` or `backend:variant`) for each product."""

    forward: str = "dense"
    input_gradient: str = "dense"
    weight_gradient: str = "dense"


@dataclass(frozen=True)
class Row:
    """One line of the table: what a backend does with a product.

    product_ms, packing_ms: medians; packing is for all micro-batches of a step together, and for dW, where it is
        part of the product, 0. None if not measured.
    note: why not, if not.
    """

    kind: str
    choice: str
    product_ms: float | None = None
    packing_ms: float | None = None
    note: str = ""

    def step_ms(self, micro_batches: int) -> float:
        """Time in one optimizer step."""
        assert self.product_ms is not None
        assert self.packing_ms is not None
        return self.product_ms * micro_batches + self.packing_ms


class UnsupportedError(ValueError):
    """A backend was asked for by name and cannot serve a product."""


def choose(
    shape: LayerShape, device: torch.device, backend: str = AUTO, cache: Path | None = None
) -> tuple[Plan, list[Row]]:
    """The plan for a layer, and the measurements behind it.

    Args:
        shape: of the layer.
        device: where it will run; with an index if it is a GPU.
        backend: `auto`, or a backend's name to use wherever the recipe makes a product sparse: then it never falls
            back (its fastest correct variant is used).
        cache: a JSON file that remembers measurements by GPU, versions and shape; None = measure anew.

    Raises:
        UnsupportedError: the backend asked for cannot serve a product, or computes it wrongly.
        ValueError: there is no backend of that name.
        RuntimeError: a kernel broke the CUDA context, so that nothing can run any more.
    """
    if backend != AUTO and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {[AUTO, *BACKENDS]}; found {backend!r}")
    if backend == "dense" or (backend == AUTO and device.type != "cuda"):
        return Plan(), []
    key = _cache_key(shape, device, backend)
    if cache is not None and (found := _read_cache(cache).get(key)):
        return Plan(*found["plan"]), [Row(**row) for row in found["rows"]]

    rows: list[Row] = []
    plan = Plan()
    for kind in shape.sparse_kinds():
        measured = measure(shape, kind, device, None if backend == AUTO else backend)
        rows += measured
        right = [row for row in measured if row.product_ms is not None]
        if not right and backend == AUTO:  # not even the dense product could be measured: no memory for it
            continue
        if not right:
            raise UnsupportedError("; ".join(f"{kind} by {row.choice}: {row.note}" for row in measured))
        best = _fastest(right, shape.micro_batches)
        plan = plan._replace(**{kind: best.choice})
    if cache is not None and not any(OUT_OF_MEMORY in row.note for row in rows):
        _write_cache(cache, key, {"plan": list(plan), "rows": [asdict(row) for row in rows]})
    return plan, rows


def _fastest(rows: list[Row], micro_batches: int) -> Row:
    """The fastest; `dense` if nothing beats it by `MARGIN`: the best of many variants looks faster than it is."""
    best = min(rows, key=lambda row: row.step_ms(micro_batches))
    dense = [row for row in rows if row.choice == "dense"]
    if dense and best.step_ms(micro_batches) > (1 - MARGIN) * dense[0].step_ms(micro_batches):
        return dense[0]
    return best


def measure(shape: LayerShape, kind: str, device: torch.device, only: str | None = None) -> list[Row]:
    """Every backend (or one) on one product: the best variant of each, or why there is none."""
    product = shape.product(kind)
    backends = {name: backend for name, backend in BACKENDS.items() if only is None or name == only}
    try:
        problem = _Problem(shape, kind, device)
    except torch.OutOfMemoryError as error:
        warnings.warn(
            f"sparse24: {kind} of {product.m}x{product.k}x{product.n} was not measured: {error}", stacklevel=2
        )
        return [Row(kind, name, note=f"{OUT_OF_MEMORY}: {_first_line(error)}") for name in backends]
    rows = []
    for name, backend in backends.items():
        able, reason = backend.supports(product, device)
        rows.append(_best_variant(backend, product, problem, device) if able else Row(kind, name, note=reason))
    if len(rows) > 1 and rows[0].choice == "dense" and rows[0].product_ms is not None:
        # again: the first to be timed may have found the clocks down
        again = _best_variant(BACKENDS["dense"], product, problem, device)
        if again.product_ms is not None:
            rows[0] = replace(rows[0], product_ms=min(rows[0].product_ms, again.product_ms))
    return rows


class _Problem:
    """Random inputs of one product, and its dense result."""

    def __init__(self, shape: LayerShape, kind: str, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(rows, cols, generator=generator, device=device, dtype=torch.float32).to(dtype)

        self.kind = kind
        self.weight = randn(shape.out_features, shape.in_features, torch.float32) * shape.in_features**-0.5
        self.mask = _random_mask(shape.out_features, shape.in_features, generator)
        self.x = randn(shape.tokens, shape.in_features, shape.dtype)
        self.dy = randn(shape.tokens, shape.out_features, shape.dtype)
        self.position = torch.tensor([1, 0, 0, 0], device=device)
        self.dtype = shape.dtype
        self.micro_batches = shape.micro_batches
        self.fp8 = shape.fp8
        if self.fp8:  # not by the dense backend, whose own fp8 product is to be checked too
            self.expected = reference.fp8_forward(self.x, self.weight * self.mask).to(self.dtype)
            return
        operand = self.pack(BACKENDS["dense"]) if kind != WEIGHT_GRADIENT else []
        self.expected = self.run(BACKENDS["dense"], operand, "")

    def pack(self, backend: Backend) -> list[Tensor]:
        if self.fp8:
            return fp8_weight(self.weight * self.mask, backend.name).forward.tensors
        forward = self.kind == FORWARD
        return backend.pack_weight(self.weight, self.mask, None, self.dtype, forward, not forward)[0 if forward else 1]

    def run(self, backend: Backend, operand: list[Tensor], variant: str) -> Tensor:
        """As a layer does, so that the operator's own time counts."""
        choice = f"{backend.name}:{variant}" if variant else backend.name
        if self.kind == WEIGHT_GRADIENT:
            return ops.weight_gradient(choice, self.dy, self.x, 0, self.position)
        if self.fp8:
            return ops.fp8_linear(choice, operand, self.x, torch.float8_e4m3fn, None, self.weight.shape[0])
        features = self.weight.shape[0 if self.kind == FORWARD else 1]
        return ops.linear(choice, operand, self.x if self.kind == FORWARD else self.dy, None, features)

    def error(self, result: Tensor) -> float:
        """‖result - dense‖ / ‖dense‖; NaN if anything is."""
        # without copies in float32, which for a large layer would be the most memory of all
        norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
        return (norm(result - self.expected) / norm(self.expected)).item()


def _random_mask(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A transposable mask without a search; ragged edges of a shape that has none keep the first two of four."""
    device = generator.device
    blocks = torch.randint(90, (-(-rows // 4), -(-cols // 4)), generator=generator, device=device)
    mask = TRANSPOSABLE_PATTERNS.to(device)[blocks].transpose(1, 2).reshape(4 * blocks.shape[0], 4 * blocks.shape[1])
    return mask[:rows, :cols].contiguous()


def _best_variant(backend: Backend, product: Product, problem: _Problem, device: torch.device) -> Row:
    kind, name = product.kind, backend.name
    packing_ms, operand = 0.0, []
    try:
        if kind != WEIGHT_GRADIENT:
            operand = problem.pack(backend)
            packing_ms = median_ms(lambda: problem.pack(backend), device)
    except Exception as error:  # of any kind: those of Triton's compiler are no RuntimeErrors
        _raise_if_lost(device, f"packing for {name}", error)
        return Row(kind, name, note=f"packing failed: {_first_line(error)}")
    times: list[tuple[float, str]] = []
    wrong, failed = [], ""
    broken = backend.broken(device)
    notes = []
    for variant in backend.variants(product, device):
        if variant in broken:
            notes.append(f"{variant}: {broken[variant]}")
            continue
        try:
            off = problem.error(problem.run(backend, operand, variant))
        except Exception as error:  # an algorithm that the library does not have, or a kernel that does not compile
            _raise_if_lost(device, f"{name}:{variant}" if variant else name, error)
            failed = _first_line(error)
            continue
        if not off <= TOLERANCE[product.dtype]:
            wrong.append(f"{variant or name} is off by {off:.2g}")
            continue
        times.append((median_ms(lambda v=variant: problem.run(backend, operand, v), device, 5, 1), variant))  # type: ignore[misc]
    if wrong:
        notes.append(f"wrong: {', '.join(wrong)}")
        warnings.warn(f"sparse24: {name}, {kind} of {product.m}x{product.k}x{product.n}, {notes[-1]}", stacklevel=2)
    note = ", ".join(notes)
    if not times:
        return Row(kind, name, note=note or failed or "no variant")
    finals = [
        (median_ms(lambda v=variant: problem.run(backend, operand, v), device, 20), variant)  # type: ignore[misc]
        for _, variant in sorted(times)[:FINALISTS]
    ]
    product_ms, variant = min(finals)
    return Row(kind, f"{name}:{variant}" if variant else name, product_ms, packing_ms, note)


def _raise_if_lost(device: torch.device, what: str, error: Exception) -> None:
    """An illegal access breaks the CUDA context for good: falling back would only hide what did it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise RuntimeError(
            f"sparse24: {what} broke the CUDA context ({_first_line(error)}); another backend can be asked for"
        ) from lost


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- the cache ---


def device_key(device: torch.device) -> dict[str, str]:
    """The hardware and versions under which a measurement holds."""
    key = {"torch": torch.__version__, "triton": "none"}
    with contextlib.suppress(PackageNotFoundError):
        key["triton"] = version("triton")
    if device.type == "cuda":
        key["gpu"] = torch.cuda.get_device_name(device)
        key["cuda"] = str(torch.version.cuda)
        cusparselt = torch.backends.cusparselt
        key["cusparselt"] = str(cusparselt.version()) if cusparselt.is_available() else "none"
    manifest = Path(__file__).parent / "cubins" / "manifest.json"
    if manifest.is_file():
        key["cubins"] = json.loads(manifest.read_text())["digest"]
    return key


def _cache_key(shape: LayerShape, device: torch.device, backend: str) -> str:
    fields = {**device_key(device), **asdict(shape), "dtype": str(shape.dtype), "backend": backend, "format": 1}
    return json.dumps(fields, sort_keys=True)


def _read_cache(path: Path) -> dict[str, dict[str, list]]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        warnings.warn(f"sparse24: {path} is not readable; measuring again", stacklevel=3)
        return {}


def _write_cache(path: Path, key: str, value: dict[str, list]) -> None:
    """Add one entry; another process may do so too, then the last one to finish wins and nothing is torn."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read_cache(path), key: value}, file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"sparse24: could not remember measurements in {path}: {error}", stacklevel=3)


# --- the table ---


def table(shape: LayerShape, plan: Plan, rows: list[Row]) -> str:
    """The measurements as text, one line per product and backend, the chosen ones marked."""
    lines = [
        f"{shape.out_features}x{shape.in_features}, {shape.tokens} tokens, {str(shape.dtype).removeprefix('torch.')}"
        + (", fp8" if shape.fp8 else "")
        + (f", {shape.micro_batches} micro-batches" if shape.micro_batches > 1 else "")
    ]
    dense = {
        row.kind: row.step_ms(shape.micro_batches)
        for row in rows
        if row.choice == "dense" and row.product_ms is not None
    }
    for row in rows:
        mark = "*" if getattr(plan, row.kind) == row.choice else " "
        if row.product_ms is None or row.packing_ms is None:
            lines.append(f"  {mark} {row.kind:16}{row.choice:12} {row.note}")
            continue
        step = row.step_ms(shape.micro_batches)
        ratio = f"{dense[row.kind] / step:5.2f}x dense" if row.kind in dense else ""
        times = f"{row.product_ms:8.3f} ms + packing {row.packing_ms:7.3f} ms"
        note = f"  ({row.note})" if row.note else ""
        lines.append(f"  {mark} {row.kind:16}{row.choice:12} {times}  {ratio}{note}")
    return "\n".join(lines)
