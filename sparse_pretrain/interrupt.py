"""Signals that ask a run to end: what they raise, and which they are; and processes that end with another."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[int] = []  # before the first step


class Interrupted(Exception):
    """A signal asked the run to end; nothing is lost, and running it again continues it.

    exit_code 75 is EX_TEMPFAIL of sysexits.h: try again later.
    """

    exit_code = 75


@contextmanager
def before_the_first_step() -> Iterator[None]:
    """While a run is being prepared, and has nothing to save yet, a signal raises `Interrupted` at once."""

    def stop(number: int, _: FrameType | None) -> None:
        _received.append(number)
        raise_if_received()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    _received.clear()
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_if_received() -> None:
    """Raise `Interrupted` for a signal of before, whose exception may have come where any exception is ignored: inside
    an import that tries, or a finaliser."""
    if _received:
        raise Interrupted(f"{signal.Signals(_received[0]).name} before the first step; the same command starts again")


def ignore_signals(_: int = 0) -> None:
    """For data workers: a signal to the whole process group is the trainer's to answer; they end with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with(parent: int) -> Callable[[], None]:
    """For a new process, as `preexec_fn`: on Linux SIGKILL it when the process `parent`, which starts it, is gone, so
    that nothing trains on unattended."""

    def prepare() -> None:
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
            if os.getppid() != parent:  # gone before that
                os.kill(os.getpid(), signal.SIGKILL)

    return prepare
