"""The loop of a sweep's process: claims trials, runs some at once, and tells how they end."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from optuna.trial import TrialState

from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import SIGNALS, Interrupted
from sparse_pretrain.reporting.table import duration
from sparse_pretrain.sweeping import space as spaces
from sparse_pretrain.sweeping.runner import Ended, Runner
from sparse_pretrain.sweeping.study import Trials

POLL_SECONDS = 0.2
ASK_SECONDS = 1.0  # until a worker that found no trial asks again
LINGER_SECONDS = 10  # for the trials of a killed sweep to come free, where nothing else is left to do


class Pool:
    """Runs trials until all have been begun and this process's have ended.

    Args:
        workers: trials at once.
        base: the command that the options of a trial come after.
        devices: the GPUs of each worker, for CUDA_VISIBLE_DEVICES; empty = none are told apart.
        max_failures: runs that may fail in a row.
    """

    def __init__(
        self, trials: Trials, workers: int, base: Sequence[str], devices: Sequence[str], max_failures: int
    ) -> None:
        self.trials = trials
        self.workers = workers
        self.base = base
        self.devices = devices
        self.max_failures = max_failures
        self.active: dict[int, Runner] = {}  # by worker
        self._failed = 0  # in a row
        self._ask = 0.0  # when to ask for a trial again

    def run(self) -> None:
        """Run them all.

        Raises:
            UserError: too many failed in a row, or storage or folder cannot be written; the same command continues.
            Interrupted: a signal; running trials have saved their checkpoints.
        """
        with _signals() as received:
            try:
                idle_since = time.monotonic()
                while not received:
                    for worker, runner in list(self.active.items()):
                        end = runner.poll()
                        if end is not None:
                            runner.tell(end)
                            del self.active[worker]
                            self._say(runner, end)
                    self._fill()
                    if self.active:
                        idle_since = time.monotonic()
                    elif not self.trials.running() or time.monotonic() - idle_since > LINGER_SECONDS:
                        return
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop()
            name = signal.Signals(received[0]).name
            raise Interrupted(f"{name}: the sweep has stopped, its running trials too; the same command continues it")

    def _fill(self) -> None:
        """Give every worker a trial, as far as there are any."""
        for worker in range(self.workers):
            if worker in self.active or time.monotonic() < self._ask:
                continue
            claim = self.trials.claim()
            if claim is None:
                self._ask = time.monotonic() + ASK_SECONDS
                return
            options = spaces.overrides(self.trials.space, claim.params)
            command = shlex.join([*self.base, *options])
            self.active[worker] = Runner(self.trials, claim, command, self._environment(worker))
            again = " (goes on)" if claim.resumed else ""
            print(f"trial {claim.number}{again}: {self.trials.describe(claim.params)}", flush=True)

    def _environment(self, worker: int) -> dict[str, str]:
        """Workers share the GPUs, or else the cores: torch takes them all for each process."""
        if self.devices:
            return {"CUDA_VISIBLE_DEVICES": self.devices[worker]}
        if self.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
            return {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // self.workers, 1))}
        return {}

    def _say(self, runner: Runner, end: Ended) -> None:
        """How a trial ended.

        Raises:
            UserError: it was one failure too many.
        """
        number, step = runner.claim.number, runner.step or 0
        if end.state == TrialState.FAIL:
            print(f"trial {number}: failed: {end.reason}", flush=True)
            self._failed += 1
            if self._failed >= self.max_failures:
                raise UserError(
                    "max_failures",
                    f"{self._failed} trials that failed in a row, the last with: {end.reason}",
                    "a space in which runs can train; the same command goes on with the next trials",
                )
            return
        self._failed = 0
        if end.state == TrialState.PRUNED:
            print(f"trial {number}: pruned at step {step:,}, loss {end.loss:.4f}", flush=True)
            return
        best = self.trials.best()
        mark = ", the best so far" if best is not None and best.number == number else ""
        time_taken = duration(runner.seconds or 0.0)
        print(f"trial {number}: loss {end.loss:.4f} after {step:,} steps, {time_taken}{mark}", flush=True)

    def _stop(self) -> None:
        """End the runs that go on, each with a checkpoint; their trials are claimed again."""
        for runner in self.active.values():
            runner.interrupt()
        for runner in self.active.values():
            runner.wait()
            runner.claim.lock.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Those received meanwhile that ask to end."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
