"""The files of a checkpoint: torch's distributed checkpoint format, with JSON where torch has a pickle, and checksums.

Each rank writes the parts of tensors that it alone holds, one of them the rest, into `__RANK_0.distcp`; `metadata.json`
says where each part lies. `manifest.json`, the last file, has every other's size and SHA-256. All is written beside,
under another name, synced, and renamed when it is whole. Reading never runs code from a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sparse_pretrain.disk import sync_folder

METADATA_FILE, MANIFEST_FILE = "metadata.json", "manifest.json"
STRUCTURE = "structure"  # all that is no tensor, with names in the places of tensors
_NAME = "\0tensor:"  # how such a name begins

Place = Callable[[str, torch.Size, torch.dtype], Tensor]


def write(state: dict[str, Any], folder: Path, together: bool, group: Any = None, copies: Sequence[Path] = ()) -> None:
    """Write nested dicts and lists of tensors, `DTensor`s and plain values as the checkpoint `folder`.

    Args:
        together: whether all ranks write, each its parts; else this one alone, all of it.
        group: of processes, for what the ranks tell each other; default: all.
        copies: files to put a copy of into the checkpoint, as far as they are there.

    Raises:
        OSError, or what else went wrong first, on any rank. What was written so far is deleted.
    """
    tensors: dict[str, Any] = {}
    structure = take_tensors(state, "", tensors)
    writer = _Writer(folder, copies)
    try:
        with warnings.catch_warnings(action="ignore"):  # that it writes alone is what it is asked for
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.save(
                {**tensors, STRUCTURE: structure},
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=not together,
            )
    except CheckpointException as failed:
        shutil.rmtree(writer.partial, ignore_errors=True)
        error, _ = failed.failures[min(failed.failures)]
        raise error from failed


def read(folder: Path, place: Place | None = None) -> dict[str, Any]:
    """What `write` wrote, whole, or of each `DTensor` that `place` gives this rank's part.

    Args:
        place: (dotted name, size, dtype) -> the tensor to read into; default: a new one on the CPU.
    """
    reader, planner = _Reader(folder), _Planner()
    metadata = reader.read_metadata()
    tensors: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            size, dtype = entry.size, entry.properties.dtype
            tensors[name] = torch.empty(size, dtype=dtype) if place is None else place(name, size, dtype)
    tensors[STRUCTURE] = None
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return put_tensors(planner.state_dict[STRUCTURE], tensors)


def take_tensors(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    """The value with names in the places of its tensors, which go to `tensors`."""
    if isinstance(value, Tensor):
        assert name not in tensors, f"two tensors are called {name}"
        tensors[name] = value.detach()
        return _NAME + name
    if isinstance(value, dict):
        return {key: take_tensors(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value))
    return value


def put_tensors(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, str) and value.startswith(_NAME):
        return tensors[value.removeprefix(_NAME)]
    if isinstance(value, dict):
        return {key: put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(put_tensors(item, tensors) for item in value)
    return value


@dataclasses.dataclass
class _Stored(_StorageInfo):
    """Where an item lies, and size and checksum of the whole file that it lies in."""

    file_bytes: int = 0
    file_sha256: str = ""


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path, copies: Sequence[Path]) -> None:
        self.folder, self.partial = folder, folder.with_name(f".{folder.name}.partial")
        self.copies = copies
        super().__init__(self.partial)
        self.fs = self.hashing = _HashingFileSystem()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On one rank, before any writes."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:  # torch's writer of zip files ends the file, after a write has failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        written.set_result([self._with_checksum(result) for result in results])
        return written

    def _with_checksum(self, result: WriteResult) -> WriteResult:
        at = result.storage_data
        stored = _Stored(at.relative_path, at.offset, at.length, None, *self.hashing.written[at.relative_path])
        return dataclasses.replace(result, storage_data=stored)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On one rank, after all have written."""
        stored = {result.index: cast(_Stored, result.storage_data) for rank in results for result in rank}
        text = json.dumps(_to_json(metadata, stored)).encode()
        files = {at.relative_path: {"bytes": at.file_bytes, "sha256": at.file_sha256} for at in stored.values()}
        contents = {path.name: path.read_bytes() for path in self.copies if path.is_file()} | {METADATA_FILE: text}
        for name, content in contents.items():
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        digests = "".join(str(facts["sha256"]) for _, facts in sorted(files.items()))
        manifest = {"format": 2, "sha256": hashlib.sha256(digests.encode()).hexdigest(), "files": files}
        for name, content in (*contents.items(), (MANIFEST_FILE, json.dumps(manifest).encode())):
            with open(self.partial / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(self.partial)
        if self.folder.exists():  # a damaged one that was resumed from before
            shutil.rmtree(self.folder)
        os.rename(self.partial, self.folder)
        sync_folder(self.folder.parent)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _from_json(json.loads((Path(self.path) / METADATA_FILE).read_text()))


class _Planner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _to_json(metadata: Metadata, stored: dict[MetadataIndex, _Stored]) -> dict[str, Any]:
    """Tensor -> dtype, size and chunks, each with its place; `structure` -> its place."""
    places = {(index.fqn, index.offset): [at.relative_path, at.offset, at.length] for index, at in stored.items()}
    entries: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            entries[name] = {"place": places[name, None]}
            continue
        chunks = [
            {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "place": places[name, chunk.offsets]}
            for chunk in entry.chunks
        ]
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        entries[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
    return entries


def _from_json(entries: dict[str, Any]) -> Metadata:
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in entries.items():
        if "chunks" not in entry:
            described[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = _StorageInfo(*entry["place"])
            continue
        chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
        properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
        described[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        for chunk in entry["chunks"]:
            places[MetadataIndex(name, chunk["offsets"])] = _StorageInfo(*chunk["place"])
    return Metadata(described, storage_data=places)


class _HashingFileSystem(FileSystem):
    """Remembers size and SHA-256 of what it wrote, so that no file need be read again."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with open(path, mode) as file:
            stream = _HashingStream(cast("IO[bytes]", file))
            yield cast(io.IOBase, stream)
        self.written[Path(path).name] = (stream.bytes, stream.sha256.hexdigest())


class _HashingStream:
    """A binary file that is written from its beginning to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        self.file.flush()
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()
