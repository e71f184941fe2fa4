"""What this device does at best: the copy bandwidth and the rate of large dense products, by which floors are set."""

from __future__ import annotations

import torch

from benchmarks.bench import Arm, Bench, Case, Ceilings, Unavailable, dtype_name, free
from benchmarks.rows import EAGER, OK, Row
from benchmarks.timing import Call

PART = "ceilings"


def cases(device: torch.device, rehearse: bool) -> list[Case]:
    found = [Case(PART, "copy", _copy, 3)]
    dtypes = (torch.bfloat16, torch.float16, torch.float8_e4m3fn) if device.type == "cuda" else (torch.float32,)
    return found + [
        Case(PART, f"matmul {dtype_name(d)}", lambda bench, d=d: _matmul(bench, d), 3)  # type: ignore[misc]
        for d in dtypes
    ]


def from_rows(rows: list[Row]) -> Ceilings:
    """The ceilings that these rows measured; the best of both modes."""
    copy = 0.0
    tflops: dict[str, float] = {}
    for row in rows:
        if row.part != PART or row.status != OK:
            continue
        if "gb_per_s" in row.extra:
            copy = max(copy, row.extra["gb_per_s"])
        elif "tflops" in row.extra:
            name = row.case.removeprefix("matmul ")
            tflops[name] = max(tflops.get(name, 0.0), row.extra["tflops"])
    return Ceilings(copy, tflops)


def _copy(bench: Bench) -> None:
    size = 2**16 if bench.rehearse else 2**31 if bench.device.type == "cuda" else 2**27
    source = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rows = _measure(bench, "copy", lambda _: target.copy_(source))
    for row in rows:
        row.extra["gb_per_s"] = 2 * size / row.ms / 1e6  # type: ignore[operator]
        bench.emit(row)


def _matmul(bench: Bench, dtype: torch.dtype) -> None:
    n = 64 if bench.rehearse else 8192 if bench.device.type == "cuda" else 1024
    if dtype == torch.float8_e4m3fn:
        if torch.cuda.get_device_capability(bench.device) < (8, 9):
            raise Unavailable("fp8 products need sm_89 or newer")
        a, b = (bench.randn(n, n, dtype=torch.float32, seed=i).to(dtype) for i in range(2))
        one = torch.ones((), device=bench.device)
        call: Call = lambda _: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        x, y = (bench.randn(n, n, dtype=dtype, seed=i) for i in range(2))
        call = lambda _: x @ y.t()  # noqa: E731
    for row in _measure(bench, f"matmul {dtype_name(dtype)}", call):
        row.extra["tflops"] = 2 * n**3 / row.ms / 1e9  # type: ignore[operator]
        bench.emit(row)


def _measure(bench: Bench, case: str, call: Call) -> list[Row]:
    """Rows that are not emitted yet."""
    quiet = Bench(bench.device, bench.rehearse, lambda row: None, bench.report_at, bench.cache)
    arm = Arm("torch", lambda: call, ours=False)
    rows = quiet.compare(PART, case, [arm], "torch", graph=False)
    free(bench.device)
    if any(row.status != OK for row in rows):
        raise Unavailable(rows[0].note)
    return [Row(PART, case, "torch", False, OK, mode=EAGER, ms=r.ms, low=r.low, high=r.high, extra={}) for r in rows]
