"""Starts the ranks of a run: in this process for one device, one process each for several on this machine.

The ranks are plain children with the environment that `torchrun` would give them. Not under `torchrun`: it turns the
signals that should save a checkpoint into a traceback and exit code 1, and leaves ranks behind when it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.interrupt import SIGNALS

GRACE_SECONDS = 60  # for the other ranks to end after one has


class RanksFailed(Exception):
    """The ranks of a run ended with an error or an interruption, and have said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


def launch(cfg: TrainConfig, run_dir: Path) -> None:
    """Train the run of `run_dir` (its config.yaml is written), or go on with it.

    Raises:
        UserError, Interrupted: as `worker.run`, with one device.
        RanksFailed: with several.
    """
    if cfg.trainer.devices == 1:
        from sparse_pretrain import worker

        worker.run(run_dir)
        return
    exit_code = run_ranks([sys.executable, "-m", "sparse_pretrain.worker", str(run_dir)], cfg.trainer.devices)
    if exit_code:
        raise RanksFailed(exit_code)


def run_ranks(command: list[str], count: int) -> int:
    """Run `count` ranks of `command` to their end, passing signals on; returns the lowest rank's code that is not 0."""
    checkout = str(Path(__file__).resolve().parent.parent)  # for ranks of a program that is not installed
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), checkout))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        for number in range(count):
            mine = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
            # A session of their own: Ctrl-C reaches them once, through `forward`.
            ranks.append(subprocess.Popen(command, env=mine, start_new_session=True, preexec_fn=_die_with_parent))
        return _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The lowest rank's exit code that is not 0, once all have ended, or the time to follow the first is over."""
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code if code > 0 else 128 - code for code in codes if code]
        if None not in codes or time.monotonic() > deadline:
            return failed[0] if failed else 0
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _die_with_parent() -> None:
    """Linux: SIGKILL this rank when the launcher is gone, so that none trains on unattended."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
