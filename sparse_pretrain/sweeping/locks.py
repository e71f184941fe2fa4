"""File locks that the kernel takes back when their holder is gone, however it went."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def try_lock(path: Path) -> IO[str] | None:
    """Held until the file returned, and every copy of it in other processes, is closed; None = another holds it."""
    file = open(path, "a")  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for the lock, and hold it."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JournalLock:
    """Of a journal's writers. Optuna's own locks are files that a killed writer leaves behind, and others wait half a
    minute for.

    A line that a writer was killed in, or a full disk cut short, is taken away: a line after it would make one of both,
    and the journal unreadable.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._file = open(self.journal, "r+b")  # noqa: SIM115 (until release)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        end = self._file.seek(0, os.SEEK_END)
        whole = end
        while whole and self._byte(whole - 1) != b"\n":
            whole -= 1
        if whole < end:
            self._file.truncate(whole)
        return True

    def _byte(self, position: int) -> bytes:
        assert self._file is not None
        self._file.seek(position)
        return self._file.read(1)

    def release(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
