"""A teacher's outputs on disk: computed by the first run that needs them, read by every other with the same teacher.

LOGITS_FOLDER/
    manifest.json  what they are of: teachers, corpus, seq_len, temperature, top_k, precision
    logits.bin     one record per training sequence, at its number in the corpus; the rest of the file is a hole

A sequence is the same tokens whatever the seed, the batch size or the number of ranks, so none of these matters here.
A record is whole or it does not count (it ends with a checksum), and once whole it never changes: whoever computes one
that another process has written meanwhile takes that one. So runs that write and runs that read train on the same bits,
several ranks and runs may use a folder at once, and SIGKILL costs at most the record in progress.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_pretrain import runs
from sparse_pretrain.errors import UserError
from sparse_pretrain.tasks.distillation import Targets

FORMAT = 1
MANIFEST, RECORDS = "manifest.json", "logits.bin"


class TeacherLogits:
    """The records of a folder that `prepare` has been called for.

    Raises:
        UserError: naming recipe.teacher.logits, here and in every method: the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = record_type(runs.read_json(folder / MANIFEST))
        with _writing(folder):
            self._file = os.open(folder / RECORDS, os.O_RDWR | os.O_CREAT, 0o666)

    def read(self, sequences: Sequence[int]) -> list[np.ndarray | None]:
        """The record of each sequence; None where there is no whole one yet."""
        with _writing(self.folder):
            return [self._read(number) for number in sequences]

    def add(self, sequences: Sequence[int], targets: Targets) -> list[np.ndarray]:
        """Write the records of sequences that had none, and return what is there then.

        targets: of the sequences' tokens, one sequence after the other.
        """
        records = np.zeros(len(sequences), self.record)
        records["log_probs"] = targets.log_probs.cpu().numpy().reshape(records["log_probs"].shape)
        if targets.indices is not None:
            records["indices"] = targets.indices.cpu().numpy().reshape(records["indices"].shape)
        with _writing(self.folder), self._locked():
            for number, record in zip(sequences, records, strict=True):
                if self._read(number) is None:
                    self._write(number, record)
            there = [self._read(number) for number in sequences]
        return [record for record in there if record is not None]

    def targets(self, records: Sequence[np.ndarray], device: torch.device) -> Targets:
        """Records as the targets of all their tokens."""
        log_probs = np.concatenate([record["log_probs"] for record in records])
        if "indices" not in (self.record.names or ()):
            return Targets(torch.from_numpy(log_probs).to(device))
        indices = np.concatenate([record["indices"] for record in records]).astype(np.int64)
        return Targets(torch.from_numpy(log_probs).to(device), torch.from_numpy(indices).to(device))

    def _read(self, number: int) -> np.ndarray | None:
        data = os.pread(self._file, self.record.itemsize, number * self.record.itemsize)
        if len(data) < self.record.itemsize:
            return None
        record = np.frombuffer(data, self.record)[0]
        return record if record["checksum"] == _checksum(data) else None

    def _write(self, number: int, record: np.ndarray) -> None:
        record["checksum"] = _checksum(record.tobytes())
        data = record.tobytes()
        if os.pwrite(self._file, data, number * self.record.itemsize) < len(data):
            raise OSError(0, "it is full")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def record_type(manifest: dict[str, Any]) -> np.dtype[Any]:
    """The NumPy dtype of a record: per token, log-probabilities (of the `top_k` likeliest and of the rest, or of the
    whole vocabulary) in fp32 and the likeliest tokens' ids; then a checksum."""
    length, vocabulary, top_k = manifest["seq_len"], manifest["vocab_size"], manifest["top_k"]
    if top_k is None:
        return np.dtype([("log_probs", "<f4", (length, vocabulary)), ("checksum", "<u8")])
    ids = "<u2" if vocabulary <= 2**16 else "<u4"
    return np.dtype([("log_probs", "<f4", (length, top_k + 1)), ("indices", ids, (length, top_k)), ("checksum", "<u8")])


def prepare(folder: Path, settings: dict[str, Any], sequences: int) -> None:
    """Make `folder` the one for these settings: create it, or check that it is.

    Args:
        settings: what the logits depend on; JSON values; `seq_len`, `vocab_size` and `top_k` among them.
        sequences: that the run will read or write.

    Raises:
        UserError: it holds others, is not writable, or has no room for them.
    """
    settings = {"format": FORMAT, **settings}
    path = folder / MANIFEST
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = folder / f".{MANIFEST}.{os.getpid()}.partial"
            partial.write_text(json.dumps(settings, indent=2) + "\n")
            with suppress(FileExistsError):  # another run was quicker: its settings count
                os.link(partial, path)
            partial.unlink()
        there = runs.read_json(path)
        for key, here in settings.items():
            if there.get(key) != here:
                raise UserError(
                    "recipe.teacher.logits",
                    f"{folder}, which holds logits of another {key}: {json.dumps(there.get(key))}",
                    f"logits of {key} {json.dumps(here)}, or a new folder",
                )
        records = folder / RECORDS
        written = records.stat().st_blocks * 512 if records.exists() else 0
        needed, free = sequences * record_type(settings).itemsize - written, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            "recipe.teacher.logits",
            f"{free / 1e9:,.2f} GB free on the disk of {folder}",
            f"at least {needed / 1e9:,.2f} GB, or a smaller recipe.teacher.top_k",
        )


def _checksum(record: bytes) -> int:
    """Of all but the checksum's own eight bytes; never 0, which is what a hole reads as."""
    return zlib.crc32(record[:-8]) | 1 << 32


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            "recipe.teacher.logits", f"{folder}, which cannot be used ({error.strerror})", "a writable folder with room"
        ) from error
