"""Starts the ranks of a run: in this process for one device, one process each for several on this machine. Where
torchrun or srun has started them, on one machine or more, rank 0 leads them.

The ranks on one machine are plain children with the environment that `torchrun` would give them. Not under `torchrun`:
it turns the signals that should save a checkpoint into a traceback and exit code 1, and leaves ranks behind when it is
killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_pretrain import cluster, meeting
from sparse_pretrain.cluster import LOST, Rank
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import SIGNALS, Interrupted, before_the_first_step, die_with
from sparse_pretrain.meeting import CONTINUES, Meeting, RankLost

if TYPE_CHECKING:
    from torch.distributed import Store

GRACE_SECONDS = 60  # for the other ranks to end after one has
LOST_SECONDS = 15  # for the same after one was lost: the others notice at once, unless they hang
_meeting: Meeting | None = None  # with the other ranks, where a launcher started them


class RanksFailed(Exception):
    """The ranks of a run ended with an error or an interruption, and have said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def launch(cfg: TrainConfig, run_dir: Path) -> None:
    """Train the run of `run_dir` (its config.yaml is written), or go on with it.

    Raises:
        UserError, Interrupted: as `worker.run`, with one device or as rank 0 of a launcher's.
        RankLost: as rank 0 of a launcher's.
        RanksFailed: with several devices.
    """
    cluster.check(cfg.trainer)
    if _meeting is not None:
        job = _meeting.announce({"run_dir": str(run_dir), "timeout": cfg.trainer.timeout})
        _train(_meeting, job, run_dir, cfg.trainer.timeout)
        return
    if cfg.trainer.devices == 1:
        from sparse_pretrain import worker

        worker.run(run_dir)
        return
    command = [sys.executable, "-m", "sparse_pretrain.worker", str(run_dir)]
    exit_code = run_ranks(command, cfg.trainer.devices, cfg.trainer.timeout)
    if exit_code:
        raise RanksFailed(exit_code)


def together(rank: Rank, command: Callable[[], None]) -> None:
    """Run `command` on rank 0, with the ranks that a launcher started training what it trains; the others exit as it
    does."""
    global _meeting
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # whether a store answers is told here; before torch comes
    _meeting = Meeting(rank)
    if rank.number > 0:
        meeting.exit_now(_follow(_meeting))
    exit_code = 1
    try:
        command()
        exit_code = 0
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except UserError as error:
        exit_code = error.exit_code
        raise
    finally:
        _meeting.end(exit_code)
        meeting.abort_communication()  # its threads would abort the process as it exits
        if exit_code == LOST:
            meeting.exit_now(LOST)


def _follow(ranks: Meeting) -> int:
    """Train what rank 0 announces; returns the exit code that it ends with, or that of this rank's own failure."""
    try:
        with before_the_first_step():
            from sparse_pretrain import worker  # noqa: F401  takes a while: now, not when rank 0 waits for it

            while True:
                message = ranks.next_message()
                if "exit_code" in message:
                    ranks.leave()
                    return int(message["exit_code"])
                job = ranks.announced
                try:
                    _train(ranks, job, Path(message["run_dir"]), message["timeout"])
                except RankLost:
                    raise
                except Exception as error:
                    if ranks.has_left(job, 0, meeting.ANSWER_SECONDS):
                        continue  # it happened on rank 0 too, which tells it
                    ranks.left(job, "failed")
                    if isinstance(error, UserError):
                        print(f"error: {error}", file=sys.stderr)
                    elif not isinstance(error, Interrupted):
                        traceback.print_exc()
                    return int(getattr(error, "exit_code", 1))
    except RankLost as lost:
        if str(lost):
            print(lost, file=sys.stderr)
        return lost.exit_code
    except Interrupted as end:  # while rank 0 prepares a run; it tells the same
        return end.exit_code


def _train(ranks: Meeting, job: int, run_dir: Path, timeout: int) -> None:
    """`worker.run`, as one rank of several.

    Raises:
        RankLost: another rank is gone or does not answer.
    """
    from sparse_pretrain import worker

    try:
        worker.run(run_dir)
    except Exception as error:
        cause = meeting.communication_error(error)
        if cause is None:
            ranks.left(job, "ended")
            raise
        for number in SIGNALS:  # torchrun sends one to the others as soon as a rank is gone
            signal.signal(number, signal.SIG_IGN)
        raise ranks.lost(job, cause, timeout) from None
    ranks.left(job, "ended")


def run_ranks(command: list[str], count: int, timeout: int = 0) -> int:
    """Run `count` ranks of `command` to their end, passing signals on; tells which of them was lost.

    Args:
        timeout: `trainer.timeout`, for what is told.

    Returns:
        The lowest rank's code that is not 0 nor follows from another one's end; `LOST` if a rank was lost.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a free port
    checkout = str(Path(__file__).resolve().parent.parent)  # for ranks of a program that is not installed
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), checkout))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        for number in range(count):
            mine = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
            # A session of their own: Ctrl-C reaches them once, through `forward`.
            ranks.append(subprocess.Popen(command, env=mine, start_new_session=True, preexec_fn=die_with(os.getpid())))
        return _verdict(_wait(ranks), received, store, timeout)
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """The ranks' exit codes, once all have ended, or the time to follow the first is over (None = it runs on)."""
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if None not in codes or time.monotonic() > deadline:
            return codes
        if any(codes):
            lost = any(code and (code < 0 or code == LOST) for code in codes)
            deadline = min(deadline, time.monotonic() + (LOST_SECONDS if lost else GRACE_SECONDS))
        time.sleep(0.05)


def _verdict(codes: list[int | None], received: list[int], store: Store, timeout: int) -> int:
    """The exit code that these make together, once it is told what no rank could tell itself."""
    own = [number for number, code in enumerate(codes) if code is not None and code > 0 and code != LOST]
    if own:
        if own[0] != 0 and store.check([f"words/{own[0]}"]):  # rank 0 tells what happens on all ranks
            print(store.get(f"words/{own[0]}").decode(), file=sys.stderr)
        return int(codes[own[0]] or 1)
    if not any(codes):
        return 0
    # a rank that waited in vain ends with LOST, or by SIGABRT of NCCL's watchdog
    killed = {
        number: code for number, code in enumerate(codes) if code is not None and code < 0 and code != -signal.SIGABRT
    }
    if killed and all(-code in received for code in killed.values()):  # before the rank could handle it
        return Interrupted.exit_code
    stuck = {number for number, code in enumerate(codes) if code is None}
    if killed:
        number, code = next(iter(killed.items()))
        name = signal.Signals(-code).name
        why = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        print(f"rank {number} was killed by {name}{why}; {CONTINUES}", file=sys.stderr)
    else:
        error = RuntimeError("timed out") if stuck else None
        print(meeting.describe_missing(stuck, error, timeout), file=sys.stderr)
    return LOST
