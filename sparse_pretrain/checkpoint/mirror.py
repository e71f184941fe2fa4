"""A copy of a run at an fsspec URL, as s3://bucket/runs or gs://bucket/runs, for when its disk is lost."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import fsspec

from sparse_pretrain.checkpoint import store
from sparse_pretrain.checkpoint.files import MANIFEST_FILE
from sparse_pretrain.errors import UserError

ATTEMPTS, SECONDS_BETWEEN = 3, 2.0
OPTION = "trainer.checkpoint_mirror"


class Mirror:
    """The folder of one run at a URL: its files (metrics and so on), for people, and `checkpoints/step-00000100/…`, in
    each of those the manifest last, so what has one is whole.

    Raises:
        UserError: naming trainer.checkpoint_mirror: the URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str, run: str) -> None:
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(OPTION, f"{url} ({error})", "a URL that fsspec can write to here") from error
        self.root = f"{root.rstrip('/')}/{run}"

    def upload(self, folder: Path, kept: int) -> None:
        """Copy a whole checkpoint and the run's files, and delete what is older than the `kept` newest checkpoints
        there, also what is left of a copy that was killed. A run does not end for a copy that fails, after some
        attempts: it says so."""
        for attempt in range(ATTEMPTS):
            try:
                self._upload(folder)
                oldest = self._steps()[-kept:][0]
                for step in self._begun():
                    if step < oldest:
                        self.fs.rm(self._path(step), recursive=True)
                return
            except Exception as error:  # of any of fsspec's file systems
                if attempt == ATTEMPTS - 1:
                    print(f"{OPTION}: {folder.name} was not copied ({error}); training goes on", file=sys.stderr)
                else:
                    time.sleep(SECONDS_BETWEEN)

    def _upload(self, folder: Path) -> None:
        target = self._path(store.step_of(folder))
        self.fs.makedirs(target, exist_ok=True)
        for path in _files(folder.parent.parent):
            self.fs.put_file(str(path), f"{self.root}/{path.name}")
        for path in sorted(_files(folder), key=lambda path: path.name == MANIFEST_FILE):
            self.fs.put_file(str(path), f"{target}/{path.name}")

    def fetch(self, run_dir: Path) -> Path | None:
        """Bring the newest whole checkpoint to `run_dir`, if it is newer than those there are; None = none is.

        Raises:
            UserError: the URL cannot be read.
        """
        there = store.list_steps(run_dir / "checkpoints")
        try:
            for step in reversed([step for step in self._steps() if step > max(there, default=-1)]):
                folder = store.checkpoint_folder(run_dir / "checkpoints", step)
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                self.fs.get(f"{self._path(step)}/", f"{partial}/", recursive=True)
                problem = store.damage(partial)
                if problem is None:
                    os.rename(partial, folder)
                    return folder
                print(f"the copy of {folder.name} is damaged ({problem}): not used", file=sys.stderr)
                shutil.rmtree(partial)
        except Exception as error:
            raise UserError(OPTION, f"{self.root}, which cannot be read ({error})", "a URL that can be read") from error
        return None

    def _steps(self) -> list[int]:
        """Of the copies that have a manifest, oldest first."""
        return [step for step in self._begun() if self.fs.exists(f"{self._path(step)}/{MANIFEST_FILE}")]

    def _begun(self) -> list[int]:
        """Of all copies, whole or not, oldest first."""
        self.fs.invalidate_cache()
        if not self.fs.exists(f"{self.root}/checkpoints"):
            return []
        there = self.fs.ls(f"{self.root}/checkpoints", detail=False)
        return store.steps_named(str(path).rstrip("/").rpartition("/")[2] for path in there)

    def _path(self, step: int) -> str:
        return f"{self.root}/checkpoints/{store.checkpoint_folder(Path(), step).name}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
