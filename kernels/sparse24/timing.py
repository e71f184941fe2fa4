"""Timing on the device: events on a GPU, the clock on a CPU; the median of repetitions."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch


def median_ms(function: Callable[[], object], device: torch.device, repeats: int = 10, warmup: int = 2) -> float:
    """Median time of one call in milliseconds.

    Calls are queued one after another and timed one by one, so launch overhead is hidden behind the call before it
    as it is in training; the inputs stay the same, so what fits a cache is found there.
    """
    for _ in range(warmup):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
