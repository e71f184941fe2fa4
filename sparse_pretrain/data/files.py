"""Writing into the cache so that a file is there completely or not at all, whatever kills the process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparse_pretrain.disk import sync_folder
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import cache_dir

REMEMBERED_SIZE = 1 << 28  # bytes; hashing a file this large takes long enough to remember the result


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """`sha256_file`, remembered in the cache for large files while their size and time stamp stay."""
    status = path.stat()
    if status.st_size < REMEMBERED_SIZE:
        return sha256_file(path)
    key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    remembered = cache_dir() / "digests" / hashlib.sha256(key.encode()).hexdigest()
    make_folder(remembered.parent)
    with locked(remembered.with_suffix(".lock")):
        if not remembered.is_file():
            write_atomic(remembered, [sha256_file(path).encode()])
        return remembered.read_text()


@contextlib.contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError while writing under `folder` (disk full, no permission) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "SPARSE_PRETRAIN_CACHE",
            f"{folder}: {error.strerror or error}",
            "a folder that can be written to, with enough free space",
            "Set that environment variable to another folder, or make room",
        ) from error


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents.

    Raises:
        UserError: if that cannot be done.
    """
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` one after the other as the file `path`: written beside, fsynced, renamed.

    The caller holds the lock of `path`'s folder: the temporary name is fixed, so that leftovers are
    overwritten.

    Raises:
        UserError: if the disk is full or the folder cannot be written to.
    """
    beside = path.with_name(path.name + ".tmp")
    with cache_errors(path.parent):
        try:
            with open(beside, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # give the room back
                beside.unlink()
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; waits while another process does. It ends with its holder's process."""
    with cache_errors(path.parent):
        file = open(path, "ab")  # noqa: SIM115 (held open for as long as the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        file.close()
