"""Timing several functions against each other: in turns, over inputs that no cache holds, with the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[int], Any]  # runs on the i-th set of inputs

SAMPLE_MS = 2.0  # a sample is as many calls as take this long
ARM_MS = 400.0  # and an arm gets about this long altogether
ROUNDS = (5, 21)  # fewest and most samples
CACHES = 4  # between two uses of the same memory at least this many times the L2 cache is read or written
MOST_SETS = 64


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile in milliseconds of a call."""

    ms: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[-1])


@dataclass(frozen=True)
class Timed:
    """What is timed. calls: of the function in one run; sets: runs go through this many sets of inputs."""

    run: Call
    sets: int = 1
    calls: int = 1


def sets_needed(bytes_per_call: float, device: torch.device) -> int:
    """How many sets of inputs to rotate among, so that a call does not find its own in the cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(1, -(-CACHES * cache // max(1, int(bytes_per_call)))))


def interleaved(
    arms: Mapping[str, Timed],
    device: torch.device,
    quick: bool = False,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time the arms in turns, in an order that moves on by one every round.

    Args:
        arms: what to time.
        device: where they run.
        quick: one sample of one call: for rehearsals.
        failed: told of an arm that raised; it is left out. None: the exception is passed on.

    Returns:
        the arms that did not fail.
    """
    running = dict(arms)
    calls: dict[str, int] = {}
    rounds = 1 if quick else ROUNDS[1]
    for name, arm in arms.items():
        try:
            for i in range(arm.sets):  # warm up: compile, allocate, load
                arm.run(i)
            once = _sample(arm, arm.sets, device)
            if not quick and once < ARM_MS / ROUNDS[0]:
                once = min(once, _sample(arm, arm.sets, device))
        except Exception as error:
            if failed is None:
                raise
            del running[name]
            failed(name, error)
            continue
        calls[name] = arm.sets * max(1, round(SAMPLE_MS / max(once, 1e-4) / arm.sets)) if not quick else 1
        if not quick:
            rounds = min(rounds, max(ROUNDS[0], int(ARM_MS / (once * calls[name]))))
    samples: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        order = list(running)
        shift = number % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            try:
                samples[name].append(_sample(running[name], calls[name], device))
            except Exception as error:
                if failed is None:
                    raise
                del running[name]
                failed(name, error)
    return {name: Timing.of([s / running[name].calls for s in samples[name]]) for name in running}


def _sample(arm: Timed, calls: int, device: torch.device) -> float:
    """Milliseconds of a run, the mean over some that were queued one after another."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(calls):
            arm.run(i % arm.sets)
        return (time.perf_counter() - start) * 1e3 / calls
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for i in range(calls):
        arm.run(i % arm.sets)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / calls


def captured(arm: Timed) -> Timed:
    """The same work as one CUDA graph that goes through all sets of inputs.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(arm.sets):
            arm.run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(arm.sets):
            arm.run(i)
    return Timed(lambda _: graph.replay(), calls=arm.sets * arm.calls)
