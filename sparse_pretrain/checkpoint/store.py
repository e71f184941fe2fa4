"""A checkpoint on disk: `step-00000100/` with `checkpoint.pt` and `manifest.json` (its size and SHA-256).

It is written beside under another name, synced to disk, and renamed: a reader finds it whole or not at all. What a disk
damages later, the checksum tells. Loading never runs code from the file (`weights_only=True`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import IO, Any, cast

import torch

from sparse_pretrain.errors import UserError

STATE_FILE, MANIFEST_FILE = "checkpoint.pt", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer steps done at a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def save(state: dict[str, Any], folder: Path) -> None:
    """Write `state` (tensors and plain containers) as the checkpoint `folder`, atomically.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with open(partial / STATE_FILE, "wb") as file:
            writer = _HashingWriter(file)
            torch.save(state, cast("IO[bytes]", writer))
            _sync(file)
        manifest = {"format": 1, "bytes": writer.bytes, "sha256": writer.sha256.hexdigest()}
        with open(partial / MANIFEST_FILE, "w") as file:
            json.dump(manifest, file)
            _sync(file)
        _sync_folder(partial)
        if folder.exists():  # a damaged one that was resumed from before
            shutil.rmtree(folder)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
            raise
        raise UserError(
            str(folder),
            "no space left on the disk" if full else f"that it cannot be written ({error})",
            "a folder with room for it",
            hint="Earlier checkpoints are untouched",
        ) from error


def load(folder: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, without running any code from it.

    Raises:
        UserError: it is damaged or incomplete, or is no checkpoint.
    """
    problem = damage(folder)
    if problem:
        raise UserError(str(folder), problem, "a whole checkpoint folder, as RUN_DIR/checkpoints/step-00000100")
    return torch.load(folder / STATE_FILE, map_location=map_location, weights_only=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if its file is what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        size, digest = manifest["bytes"], manifest["sha256"]
    except FileNotFoundError:
        return "no manifest.json"
    except (ValueError, KeyError, TypeError, OSError):
        return "an unreadable manifest.json"
    state = folder / STATE_FILE
    if not state.is_file():
        return f"no {STATE_FILE}"
    if state.stat().st_size != size:
        return f"{STATE_FILE} of {state.stat().st_size} bytes where the manifest says {size}"
    with open(state, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            return f"a wrong checksum of {STATE_FILE}"
    return None


def list_steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint folder, oldest first, damaged ones included."""
    if not checkpoints.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in checkpoints.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if any, and a sentence for each newer one that is damaged."""
    notes: list[str] = []
    for step in reversed(list_steps(checkpoints)):
        folder = checkpoint_folder(checkpoints, step)
        problem = damage(folder)
        if problem is None:
            return folder, notes
        notes.append(f"checkpoint {folder.name} is damaged ({problem}): not used")
    return None, notes


def resolve(path: Path, option: str) -> Path:
    """The whole checkpoint that a user's path means: a checkpoint folder, or a run folder's newest.

    Raises:
        UserError: naming `option`, when there is none or the one named is damaged.
    """
    path = path.expanduser().resolve()
    if _NAME.fullmatch(path.name):
        problem = damage(path) if path.is_dir() else "no such folder"
        if problem is None:
            return path
        raise UserError(option, f"{path} ({problem})", "a whole checkpoint, or a run folder")
    newest, notes = newest_valid(path / "checkpoints")
    for note in notes:
        print(note, file=sys.stderr)
    if newest is None:
        raise UserError(option, f"{path}, which holds no whole checkpoint", "a run folder or a checkpoint folder")
    return newest


def set_aside_damaged(checkpoints: Path) -> list[str]:
    """Rename the checkpoints newer than the newest whole one to `damaged-step-…`, so that nothing takes them for the
    newest any more; returns a sentence for each."""
    newest, notes = newest_valid(checkpoints)
    for step in list_steps(checkpoints):
        folder = checkpoint_folder(checkpoints, step)
        if newest is None or step > step_of(newest):
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
    return notes


def prune(checkpoints: Path, kept: int) -> None:
    """Delete all but the `kept` newest checkpoints, and what killed writers left behind."""
    for step in list_steps(checkpoints)[:-kept]:
        shutil.rmtree(checkpoint_folder(checkpoints, step), ignore_errors=True)
    for leftover in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


class _HashingWriter:
    """A binary file that hashes and counts what is written to it, so that the file need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
