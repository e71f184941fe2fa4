"""A run's checkpoints on disk, `step-00000100/` and so on: writing, verifying, finding, keeping the newest.

A reader finds one whole or not at all; what a disk damages later, the checksums of its manifest tell. What is read may
also be one file, see `single_file`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain.checkpoint import files, single_file
from sparse_pretrain.checkpoint.files import MANIFEST_FILE
from sparse_pretrain.errors import UserError

_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done at a checkpoint."""
    if checkpoint.is_file():
        return int(single_file.facts(checkpoint)["step"])
    return int(checkpoint.name.removeprefix("step-"))


def save(
    state: dict[str, Any], folder: Path, together: bool = False, group: Any = None, copies: Sequence[Path] = ()
) -> None:
    """Write `state` (tensors and plain containers) as the checkpoint `folder`, atomically.

    Args:
        together: whether all ranks write, each its parts of `DTensor`s; else this one alone.
        group: of processes, for what the ranks tell each other meanwhile; default: all.
        copies: files to put a copy of into it, as far as they are there.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    try:
        files.write(state, folder, together, group, copies)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            str(folder),
            "no space left on the disk" if full else f"that it cannot be written ({error})",
            "a folder with room for it",
            hint="Earlier checkpoints are untouched",
        ) from error


def load(checkpoint: Path) -> dict[str, Any]:
    """Verify a checkpoint, then `read` it.

    Raises:
        UserError: it is damaged or incomplete, or is no checkpoint.
    """
    problem = damage(checkpoint)
    if problem:
        raise UserError(str(checkpoint), problem, "a whole checkpoint folder, as RUN_DIR/checkpoints/step-00000100")
    return read(checkpoint)


def read(checkpoint: Path, place: files.Place | None = None) -> dict[str, Any]:
    """Read a checkpoint that has been verified, without running any code from it: to the CPU, or where `place` says,
    see `files.read`."""
    return (single_file if checkpoint.is_file() else files).read(checkpoint, place)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if its files are what its manifest says."""
    if checkpoint.is_file():
        return single_file.damage(checkpoint)
    folder = checkpoint
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
    return steps_named(path.name for path in checkpoints.iterdir())


def steps_named(names: Iterable[str]) -> list[int]:
    """The steps of those names that are checkpoints' names, oldest first."""
    matches = (_NAME.fullmatch(name) for name in names)
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


def resolve(path: Path, option: str, one_file: bool = False) -> Path:
    """The whole checkpoint that a user's path means: a checkpoint folder, or a run folder's newest.

    Args:
        one_file: whether it may be a file that `consolidate` wrote, which has no run folder around it.

    Raises:
        UserError: naming `option`, when there is none or the one named is damaged.
    """
    path = path.expanduser().resolve()
    if path.is_file() and not one_file:
        hint = "What `consolidate` writes is for init_from= and resume= of train"
        raise UserError(option, f"{path}, a file", "a run folder or a checkpoint folder", hint)
    if _NAME.fullmatch(path.name) or path.is_file():
        problem = damage(path) if path.exists() else "no such folder"
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
            _remove(aside)
            os.rename(folder, aside)
    return notes


def prune(checkpoints: Path, kept: int) -> None:
    """Delete all but the `kept` newest checkpoints, and what killed writers left behind."""
    for step in list_steps(checkpoints)[:-kept]:
        _remove(checkpoint_folder(checkpoints, step))
    for leftover in checkpoints.glob(".step-*.partial"):
        _remove(leftover)


def _remove(path: Path) -> None:
    """Delete a folder, or what a damaged disk has made of it, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
