"""Checkpoints in a Lightning run: when they are written, and through what."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.plugins import CheckpointIO

from sparse_pretrain.checkpoint import store
from sparse_pretrain.checkpoint.saver import Saver
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import SIGNALS, Interrupted, raise_if_received


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through `store`: atomic, checksummed, loaded without running code."""

    def __init__(self, saver: Saver) -> None:
        self.saver = saver

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.saver.save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return store.read(Path(path))  # verified before the ranks started

    def remove_checkpoint(self, path: str | Path) -> None:
        raise NotImplementedError("the saver removes checkpoints")


class CheckpointCallback(lightning.Callback):
    """Saves every `every` steps, at the last step, after step `stop_after`, and when a signal asks the run to end.

    After step `stop_after` it ends the run too, quietly; a signal does so with `Interrupted`.

    The module must count its optimizer steps in `steps_done`. Add this callback last: what other callbacks do after a
    step (validation, metrics) is then part of the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        saver: Saver,
        every: int,
        total_steps: int,
        poll_every: int,
        stop_after: int | None = None,
    ) -> None:
        self.folder, self.saver = folder, saver
        self.every, self.total_steps, self.stop_after = every, total_steps, stop_after
        self.poll_every = poll_every  # steps between asking the other ranks whether they got a signal
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Only now, after Lightning has registered its own handler, which would end a run without a checkpoint.
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        raise_if_received()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = int(pl_module.steps_done)  # type: ignore[arg-type]
        interrupted = self.received is not None
        if trainer.world_size > 1:  # a signal may reach one rank only; asking each step would cost a sync
            interrupted = step % self.poll_every == 0 and trainer.strategy.reduce_boolean_decision(
                interrupted, all=False
            )
        if step % self.every == 0 or step in (self.total_steps, self.stop_after) or interrupted:
            trainer.save_checkpoint(store.checkpoint_folder(self.folder, step))
        if interrupted and step < self.total_steps:
            self.saver.wait()
            name = signal.Signals(self.received).name if self.received is not None else "a signal to another rank"
            raise Interrupted(
                f"{name}: checkpoint saved at step {step} of {self.total_steps}; the same command continues it"
            )
        if step == self.stop_after:
            trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.saver.wait()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        with contextlib.suppress(UserError):  # after an exception, which is told, not what follows from it
            self.saver.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
