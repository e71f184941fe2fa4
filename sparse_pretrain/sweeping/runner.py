"""One trial of a sweep: its process, what is told of it while it runs, and how it ends."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from optuna.trial import TrialState

from sparse_pretrain import cluster, runs
from sparse_pretrain.interrupt import Interrupted, die_with
from sparse_pretrain.sweeping.metrics_tail import MetricsTail
from sparse_pretrain.sweeping.study import REASON, SECONDS, STEPS, Claim, Trials, trial_file

PROGRAM = [sys.executable, "-m", "sparse_pretrain.sweeping.child"]
AGAIN = (Interrupted.exit_code, cluster.LOST)  # exit codes of a run that another start continues
GRACE_SECONDS = 120  # for a run to save its checkpoint
LOST = 3  # processes of a trial that may be killed without getting any further


@dataclass(frozen=True)
class Ended:
    """How a trial ended. `loss`: the last validation loss, of one that is complete or pruned."""

    state: TrialState
    loss: float | None = None
    reason: str = ""


class Runner:
    """Runs a claimed trial.

    Args:
        command: with which a user continues its run alone.
        environment: what its process sees besides this process's own variables.
    """

    def __init__(self, trials: Trials, claim: Claim, command: str, environment: dict[str, str]) -> None:
        self.trials = trials
        self.claim = claim
        self.run_dir = runs.resolve_run_dir(claim.config)
        self._command = command
        self._environment = {**os.environ, **environment}
        self._tail = MetricsTail(self.run_dir / runs.METRICS_FILE)
        self._log = trial_file(trials.folder, claim.number, ".log")
        self._process: subprocess.Popen[bytes] | None = None
        self._verdict: Ended | None = None  # what ends the trial before its run's end
        self._deadline = math.inf
        self._lost, self._lost_at = 0, -1

    def poll(self) -> Ended | None:
        """Start or follow the run; returns how the trial ended, once it has.

        Raises:
            UserError: the storage fails.
        """
        alive = self._alive()  # asked first: of a run that has ended all is read
        self._verdict = self._report() or self._verdict
        if alive:
            if self._verdict is not None and self._deadline == math.inf:
                self.interrupt()
            if time.monotonic() > self._deadline:
                self.kill()
            return None
        diverged = self._verdict is not None and self._verdict.state == TrialState.FAIL
        if runs.is_complete(self.run_dir) and not diverged:
            return Ended(TrialState.COMPLETE, runs.read_json(self.run_dir / runs.SUMMARY_FILE)["val_loss"])
        end = self._verdict
        if end is None and self._process is not None:
            end = self._after(self._process.returncode)
        if end is None:
            self._start()
        return end

    def tell(self, end: Ended) -> None:
        """Have the end of the trial in the study."""
        attrs = {REASON: end.reason or None, STEPS: self._tail.step, SECONDS: self._tail.seconds}
        loss = end.loss if end.state == TrialState.COMPLETE else None  # of a pruned one it is the last reported
        self.trials.tell(self.claim, end.state, loss, **attrs)

    @property
    def step(self) -> int | None:
        """Of the last logged row."""
        return self._tail.step

    @property
    def seconds(self) -> float | None:
        """Of training, up to the last logged row."""
        return self._tail.seconds

    def interrupt(self) -> None:
        """Ask the run to save a checkpoint and end."""
        if self._alive() and self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._deadline = time.monotonic() + GRACE_SECONDS

    def wait(self) -> None:
        """Until the run that was asked to end has, or its time is up."""
        if self._process is not None:
            try:
                self._process.wait(max(self._deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _report(self) -> Ended | None:
        """Tell what is new in the metrics; returns a verdict on a trial that is not to go on."""
        losses = self._tail.read()
        for step, loss in losses:
            if not math.isfinite(loss):
                return Ended(TrialState.FAIL, reason=f"diverged: the validation loss at step {step} is {loss}")
        first = self._process is None  # a trial may have been judged, and its process killed before it was told
        if (losses or first) and self.trials.report(self.claim, losses):
            return Ended(TrialState.PRUNED, losses[-1][1] if losses else 0.0)
        return None

    def _start(self) -> None:
        config = trial_file(self.trials.folder, self.claim.number, ".yaml")
        lock = self.claim.lock.fileno()
        with runs.writing(self._log), open(self._log, "ab") as log:
            # A session of its own: signals to the sweep's process group reach it once, through the sweep.
            self._process = subprocess.Popen(
                [*PROGRAM, str(config), self._command, str(lock)],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[lock], start_new_session=True, preexec_fn=die_with(os.getpid()),
            )  # fmt: skip
        self._deadline = math.inf

    def _after(self, code: int) -> Ended | None:
        """What the exit code of an unfinished run means; None = it is to be started again."""
        if code >= 0 and code not in AGAIN:
            return Ended(TrialState.FAIL, reason=self._last_words() or f"exit code {code}")
        step = -1 if self._tail.step is None else self._tail.step
        self._lost = self._lost + 1 if step <= self._lost_at else 1
        self._lost_at = max(step, self._lost_at)
        if self._lost < LOST:
            return None
        by = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return Ended(TrialState.FAIL, reason=f"its process ended {by} {LOST} times without getting any further")

    def _last_words(self) -> str:
        """The error that the process ended with, from its log."""
        text = self._log.read_bytes()[-20_000:].decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1]
