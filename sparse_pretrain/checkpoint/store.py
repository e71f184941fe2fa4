"""A run's checkpoints on disk, `step-00000100/` and so on: writing, verifying, finding, keeping the newest.

A reader finds one whole or not at all; what a disk damages later, the checksums of its manifest tell.
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
from typing import Any

from sparse_pretrain.checkpoint import files
from sparse_pretrain.checkpoint.files import MANIFEST_FILE
from sparse_pretrain.errors import UserError

_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer steps done at a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def save(state: dict[str, Any], folder: Path, together: bool = False, group: Any = None) -> None:
    """Write `state` (tensors and plain containers) as the checkpoint `folder`, atomically.

    Args:
        together: whether all ranks write, each its parts of `DTensor`s; else this one alone.
        group: of processes, for what the ranks tell each other meanwhile; default: all.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    try:
        files.write(state, folder, together, group)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            str(folder),
            "no space left on the disk" if full else f"that it cannot be written ({error})",
            "a folder with room for it",
            hint="Earlier checkpoints are untouched",
        ) from error


def load(folder: Path) -> dict[str, Any]:
    """Read a whole checkpoint to the CPU, without running any code from it.

    Raises:
        UserError: it is damaged or incomplete, or is no checkpoint.
    """
    problem = damage(folder)
    if problem:
        raise UserError(str(folder), problem, "a whole checkpoint folder, as RUN_DIR/checkpoints/step-00000100")
    return files.read(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if its files are what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        return f"no {MANIFEST_FILE}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"an unreadable {MANIFEST_FILE}"
    for name, (size, _) in expected.items():
        if not (folder / name).is_file():
            return f"no {name}"
        if (folder / name).stat().st_size != size:
            return f"{name} of {(folder / name).stat().st_size} bytes where the manifest says {size}"
    for name, (_, digest) in expected.items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"a wrong checksum of {name}"
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
