"""Follows the validation losses in a run's metrics file while it is written."""

from __future__ import annotations

import csv
from pathlib import Path

LOSS = "val/loss"


class MetricsTail:
    """Reads each row once; from the start again where the file has been replaced, as a resumed run does.

    Attributes:
        step, seconds: of the last row read, of whichever kind: how far the run is; None before the first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step: int | None = None
        self.seconds: float | None = None
        self._file = 0  # its inode
        self._position = 0
        self._columns: list[str] = []

    def read(self) -> list[tuple[int, float]]:
        """The steps and validation losses of the rows written since the last call."""
        try:
            with open(self.path, "rb") as file:
                status = self.path.stat()
                if status.st_ino != self._file or status.st_size < self._position:
                    self._file, self._position, self._columns = status.st_ino, 0, []
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return []
        text = text[: text.rfind(b"\n") + 1]  # without a row that is being written
        self._position += len(text)
        losses = []
        for row in csv.reader(text.decode("utf-8").splitlines()):
            if not self._columns:
                self._columns = row
                continue
            values = dict(zip(self._columns, row, strict=False))
            self.step, self.seconds = int(values["step"]), float(values["seconds"])
            if values.get(LOSS):
                losses.append((self.step, float(values[LOSS])))
        return losses
