"""What a case is, and how its arms are checked, timed and set against each other and against the floor."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.rows import EAGER, FAILED, GRAPH, OK, UNAVAILABLE, WRONG, Row

# ‖result - reference‖ / ‖reference‖ of one product or operator
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-12}


class Unavailable(Exception):
    """This device, version or shape cannot do what an arm wants."""


class DeviceLost(Exception):
    """The GPU gives errors whatever is asked of it: only a new process helps."""


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured. 0 = not known.

    copy_gb_s: bytes read and written by a large copy per second. tflops: a large dense product, by dtype.
    """

    copy_gb_s: float = 0.0
    tflops: dict[str, float] = field(default_factory=dict)

    def floor(self, bytes: float, flop: float, dtype: torch.dtype) -> tuple[float | None, str]:
        """The shortest time in ms for this many bytes and operations, and the ceiling that sets it."""
        rate = self.tflops.get(dtype_name(dtype), 0.0)
        times = []
        if bytes and self.copy_gb_s:
            times.append((bytes / self.copy_gb_s / 1e6, "copy bandwidth"))
        if flop and rate:
            times.append((flop / rate / 1e9, "matmul rate"))
        return max(times) if times else (None, "")


@dataclass
class Arm:
    """One of the things that a case compares.

    make: prepares, and returns what is timed; called once, so that the memory of an arm is only held if it works.
    check: ‖result - reference‖ / ‖reference‖, before anything is timed; an arm that is off by more than `tolerance` is
        never timed. None for the reference itself.
    bytes, flop: that it must at least move and compute, for the floor.
    ours: see `Row`.
    """

    name: str
    make: Callable[[], timing.Call]
    check: Callable[[timing.Call], float] | None = None
    tolerance: float = 1e-2
    bytes: float = 0.0
    flop: float = 0.0
    ours: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    added_ms: float = 0.0  # work that is due only now and then, spread over calls
    blame: str = ""  # what not to use any more if this arm brings the process down: BACKEND/PRODUCT/VARIANT


@dataclass
class Bench:
    """What cases run under: the device, where rows go, and whether this is only a rehearsal (tiny, meaningless)."""

    device: torch.device
    rehearse: bool
    emit: Callable[[Row], None]
    report_at: Callable[[str, str], None]  # told what is about to run, so that a crash or a hang can be blamed on it
    cache: Path  # where dispatch keeps its measurements
    keep: Callable[[str, Any], None] = lambda kind, value: None  # for results that are no rows
    ceilings: Ceilings = field(default_factory=Ceilings)
    end: float = math.inf  # `time.time()` at which the part must be over

    def at(self, what: str, blame: str = "") -> None:
        self.report_at(what, blame)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products: what training uses here by default."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def compare(
        self,
        part: str,
        case: str,
        arms: list[Arm],
        baseline: str,
        sets: int = 1,
        graph: bool = True,
        dtype: torch.dtype | None = None,
    ) -> list[Row]:
        """Check and time arms against each other, eagerly and, on a GPU, as CUDA graphs; emits and returns the rows.

        Args:
            part, case: of the rows.
            arms: the baseline first; one that fails or is wrong gets a row that says so and does not stop the others.
            baseline: the arm that ratios are to.
            sets: sets of inputs that the arms rotate among.
            graph: whether to try CUDA graphs too.
            dtype: whose matmul rate is the ceiling; default: `self.dtype`.
        """
        rows: list[Row] = []
        by_name = {arm.name: arm for arm in arms}
        errors: dict[str, float] = {}
        calls: dict[str, timing.Timed] = {}

        def fail(name: str, error: Exception, mode: str = "") -> None:
            rows.append(self._failure(Row(part, case, name, by_name[name].ours, mode=mode), error))

        for arm in arms:
            self.at(f"{case}: {arm.name}", arm.blame)
            try:
                with forgetting(self.device):
                    call = arm.make()
                    error = arm.check(call) if arm.check else 0.0
                    self.synchronize()
            except Exception as exception:
                fail(arm.name, exception)
                self.still_there()
                continue
            if not error <= arm.tolerance:
                note = f"off by {error:.2g}, allowed {arm.tolerance:.2g}; not timed"
                rows.append(self._emit(Row(part, case, arm.name, arm.ours, WRONG, note, error=error, extra=arm.extra)))
                continue
            errors[arm.name] = error
            calls[arm.name] = timing.Timed(call, sets)

        self.at(f"{case}: timing {', '.join(calls)}")
        timings = timing.interleaved(calls, self.device, self.rehearse, fail)
        self.still_there()
        modes = {EAGER: timings}
        if graph and self.device.type == "cuda" and not self.rehearse:
            graphs: dict[str, timing.Timed] = {}
            for name in timings:
                self.at(f"{case}: capturing {name}")
                try:
                    graphs[name] = timing.captured(calls[name])
                except Exception as exception:
                    fail(name, exception, GRAPH)
                    self.still_there()
            modes[GRAPH] = timing.interleaved(
                graphs, self.device, self.rehearse, lambda name, error: fail(name, error, GRAPH)
            )
            self.still_there()
        for mode, found in modes.items():
            base = found[baseline].ms + by_name[baseline].added_ms if baseline in found else None
            for name, t in found.items():
                arm = by_name[name]
                ms, low, high = (x + arm.added_ms for x in (t.ms, t.low, t.high))
                floor_ms, floor = self.ceilings.floor(arm.bytes, arm.flop, dtype or self.dtype)
                row = Row(
                    part, case, name, arm.ours, OK, mode=mode, ms=ms, low=low, high=high, error=errors[name],
                    ratio=base / ms if base else None, floor_ms=floor_ms, floor=floor, extra=arm.extra,
                )  # fmt: skip
                rows.append(self._emit(row))
        return rows

    def _failure(self, row: Row, error: Exception) -> Row:
        # a library that cannot do something here is a fact about it; ours is a fault
        usual = isinstance(error, (Unavailable, torch.OutOfMemoryError)) or not row.ours or row.mode == GRAPH
        note = first_line(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {first_line(error)}"
        return self._emit(replace(row, status=UNAVAILABLE if usual else FAILED, note=note))

    def _emit(self, row: Row) -> Row:
        self.emit(row)
        return row

    def still_there(self) -> None:
        """Whether the device still works, after what may have broken it.

        Raises:
            DeviceLost: it does not.
        """
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device).add_(1).item()
        except RuntimeError as error:
            raise DeviceLost(f"the CUDA context is lost: {first_line(error)}") from error

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Gaussian values: products of zeros or of equal values use less power and run faster than real ones."""
        values = torch.randn(shape, generator=self.generator(seed), device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(dtype)


@dataclass(frozen=True)
class Case:
    """A unit of work that may fail, crash or hang alone.

    seconds: a guess of how long it takes on a large GPU; it is skipped when less is left.
    """

    part: str
    name: str
    run: Callable[[Bench], object]
    seconds: float = 10.0

    @property
    def id(self) -> str:
        return f"{self.part}/{self.name}"


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result - expected‖ / ‖expected‖ in fp32, some rows at a time to need little memory; NaN if any is."""
    if result.shape != expected.shape:
        raise ValueError(f"result must be {tuple(expected.shape)}; found {tuple(result.shape)}")
    off = norm = 0.0
    for a, b in zip(result.detach().split(4096), expected.detach().split(4096), strict=True):
        off += (a.float() - b.float()).square().sum(dtype=torch.float64).item()
        norm += b.float().square().sum(dtype=torch.float64).item()
    if math.isnan(off) or math.isinf(off) or norm == 0:
        return 0.0 if off == 0 else math.nan
    return math.sqrt(off / norm)


def exact(result: Tensor, expected: Tensor) -> float:
    """0 if every bit agrees, else the share of elements that do not."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        raise ValueError(
            f"result must be {expected.dtype} {tuple(expected.shape)}; found {result.dtype} {tuple(result.shape)}"
        )
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.element_size()]
    return (result.contiguous().view(bits) != expected.contiguous().view(bits)).float().mean().item()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def forgetting(device: torch.device) -> Iterator[None]:
    """Give memory back after an exception, whose traceback would hold it."""
    try:
        yield
    except Exception as error:
        error.__traceback__ = None
        free(device)
        raise


def free(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()  # what one case compiled must not count against the next one's recompilations
    if device.type == "cuda":
        torch.cuda.empty_cache()
