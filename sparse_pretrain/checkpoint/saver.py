"""Saving a run's checkpoints, beside training if asked for: a copy is written while the next steps are made."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_pretrain.checkpoint import store
from sparse_pretrain.checkpoint.mirror import Mirror
from sparse_pretrain.errors import UserError

RETRY_SECONDS = 5


class Saver:
    """Saves with `store.save`, one checkpoint at a time, and deletes old ones.

    Args:
        kept: how many stay.
        mirror: gets a copy of each.
        background: whether `save` returns as soon as the state is copied, to the CPU. What goes wrong then is raised by
            the next `save` or `wait`.
        timeout: how long a rank waits for another there.
        copies: files that each holds a copy of.
    """

    def __init__(
        self,
        kept: int,
        background: bool = False,
        mirror: Mirror | None = None,
        timeout: timedelta | None = None,
        copies: Sequence[Path] = (),
    ) -> None:
        self.kept, self.mirror, self.timeout, self.copies = kept, mirror, timeout, copies
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None
        self._group: Any = None

    def save(self, state: dict[str, Any], folder: Path, together: bool = False) -> None:
        """Write a checkpoint, once the one before it is written.

        Args:
            together: see `store.save`; all ranks call this then.

        Raises:
            UserError: see `store.save`.
        """
        self.wait()
        if self._thread is None:
            self._save(state, folder, together)
            return
        if together and self._group is None:  # of its own: its messages must not meet those of training
            self._group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        self._pending = self._thread.submit(self._save, _copy(state), folder, together)

    def _save(self, state: dict[str, Any], folder: Path, together: bool) -> None:
        try:
            store.save(state, folder, together, self._group, self.copies)
        except UserError as error:  # a network file system may be back soon
            if not together or torch.distributed.get_rank() == 0:
                print(f"{error}; once more in {RETRY_SECONDS} s", file=sys.stderr, flush=True)
            time.sleep(RETRY_SECONDS)
            store.save(state, folder, together, self._group, self.copies)
        if not together or torch.distributed.get_rank() == 0:
            store.prune(folder.parent, self.kept)
            if self.mirror is not None:
                self.mirror.upload(folder, self.kept)

    def wait(self) -> None:
        """Until everything is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copy(value: Any) -> Any:
    """A copy that the next step does not change, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
