"""The example store: prepared examples of a labelled data set, as memory-mapped columns.

A store is a folder with a file SPLIT.COLUMN.bin for each column (and SPLIT.COLUMN.offsets.bin where the entries have
different lengths), tokenizer.json where there are texts, and manifest.json. The manifest is written last: a folder
without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sparse_pretrain.data.corpus import Split, digest_of
from sparse_pretrain.data.files import cache_errors, locked, make_folder, remembered_sha256, sha256_file, write_atomic
from sparse_pretrain.data.tokenizer import load_tokenizer, tokenizer_sha256, vocab_size
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import cache_dir

FORMAT = 1
KIND = "examples"  # in the manifest: what tells this store from a token store
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Column:
    """What the entries of a column are.

    dtype: of an entry's values; "json" = an entry is any JSON value. shape: of an entry; one of `ragged` columns has
    one dimension more, of any length, in front.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False

    @property
    def has_offsets(self) -> bool:
        return self.ragged or self.dtype == "json"

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.dtype == "json" else self.dtype)

    def to_array(self, entry: Any) -> np.ndarray:
        """An entry as it is stored: the bytes of its JSON text, or an array of the column's dtype and shape."""
        if self.dtype == "json":
            return np.frombuffer(json.dumps(entry, ensure_ascii=False).encode(), np.uint8)
        return np.asarray(entry, self.numpy).reshape((-1, *self.shape) if self.ragged else self.shape)


Entries = dict[str, Any]  # by column, at most one entry each


@dataclass(frozen=True)
class Ragged:
    """Entries of different lengths: values (all, …) one after the other, offsets (entries + 1,) where each begins."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class JsonEntries:
    """Entries that are JSON values."""

    encoded: Ragged

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Any:
        return json.loads(self.encoded[index].tobytes())


@dataclass(frozen=True)
class ExampleStore:
    """An opened example store. Small and picklable: the examples stay on disk.

    Args:
        folder: where it is.
        manifest: the content of its manifest.json.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> ExampleStore:
        """Open a finished store, checking its manifest, its tokenizer and the sizes of its files.

        Raises:
            UserError: if something is missing or damaged, saying what to delete.
        """
        try:
            store = cls(folder, json.loads((folder / "manifest.json").read_text()))
            if (store.manifest["kind"], store.manifest["format"]) != (KIND, FORMAT):
                raise _damaged(folder, f"{store.manifest['kind']} of format {store.manifest['format']}")
            if store.tokenizer_path and sha256_file(store.tokenizer_path) != store.manifest["tokenizer_sha256"]:
                raise _damaged(folder, "tokenizer.json with a wrong checksum")
            for name, file in store._files():
                size = (folder / name).stat().st_size
                if size != file["bytes"]:
                    raise _damaged(folder, f"{name} of {size} bytes instead of {file['bytes']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"{type(error).__name__}: {error}") from error
        return store

    def verify(self) -> None:
        """Compare all files with their checksums (reads all of them, large ones once).

        Raises:
            UserError: naming the first damaged file.
        """
        for name, file in self._files():
            if remembered_sha256(self.folder / name) != file["sha256"]:
                raise _damaged(self.folder, f"{name} with a wrong checksum")

    def column(self, split: Split, name: str) -> Any:
        """A column, memory-mapped and read-only: an array (entries, …), or Ragged, or JsonEntries."""
        column = Column(**self.manifest["columns"][name])
        path = self.folder / f"{split}.{name}.bin"
        values = _mapped(path, column.numpy).reshape(-1, *(() if column.dtype == "json" else column.shape))
        if not column.has_offsets:
            return values
        ragged = Ragged(values, _mapped(_offsets_path(path), np.dtype(np.int64)))
        return JsonEntries(ragged) if column.dtype == "json" else ragged

    def num_examples(self, split: Split) -> int:
        return int(self.manifest["splits"][split]["examples"])

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's real size: one more than the highest id. None without texts."""
        return self.manifest["vocab_size"]

    @property
    def num_classes(self) -> int | None:
        """1 where the label is a score; None where there are no labels."""
        return self.manifest["num_classes"]

    @property
    def label_names(self) -> list[str] | None:
        return self.manifest["label_names"]

    @property
    def tokenizer_path(self) -> Path | None:
        return self.folder / "tokenizer.json" if self.manifest["tokenizer_sha256"] else None

    @property
    def digest(self) -> str:
        """Hex sha256 of what a model sees: tokenizer and both splits. To be shown with every result."""
        return digest_of([self.manifest["tokenizer_sha256"]] + [[name, file["sha256"]] for name, file in self._files()])

    def _files(self) -> list[tuple[str, dict[str, Any]]]:
        return [item for split in SPLITS for item in self.manifest["splits"][split]["files"].items()]


class Columns:
    """The columns of a split, each mapped when first asked for, in the process that asks. Picklable."""

    def __init__(self, store: ExampleStore, split: Split) -> None:
        self.store, self.split = store, split
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self.store.column(self.split, name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # pickling a memory map would copy the whole file


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if not path.stat().st_size:  # numpy cannot map an empty file
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a plain array on the same map: slices of it are cheaper


def _offsets_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".bin") + ".offsets.bin")


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"example store {folder}", what, "a complete store", "Delete the folder to have it built anew")


@dataclass(frozen=True)
class Plan:
    """What a store is to hold.

    Args:
        name: of the data set.
        settings: plain values that decide what comes out: two plans with the same make the same store.
        columns: of each split; the first has an entry for each example.
        entries: starts reading; examples, or parts of them, each with its split.
        facts: read once all entries are: num_classes, label_names and whatever else is known.
        tokenizer: the tokenizer.json, if there are texts.
    """

    name: str
    settings: dict[str, Any]
    columns: dict[str, Column]
    entries: Callable[[], Iterable[tuple[Split, Entries]]]
    facts: Callable[[], dict[str, Any]]
    tokenizer: bytes | None = None


def prepare(plan: Plan) -> ExampleStore:
    """The store that `plan` describes: opened if it is in the cache, else built there. Of several processes one builds
    and the others wait for it; a damaged store is built anew.

    Raises:
        UserError: from reading the examples, naming the option at fault; or no examples in a split; or
            SPARSE_PRETRAIN_CACHE if the cache cannot be written.
    """
    key = digest_of([FORMAT, plan.settings, plan.tokenizer and tokenizer_sha256(plan.tokenizer)])[:16]
    folder = cache_dir() / "examples" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', plan.name)}-{key}"
    store = _open_finished(folder, say=False)
    if store is None:
        make_folder(folder.parent)
        with locked(folder.with_name(folder.name + ".lock")):
            # another process may have built it meanwhile
            store = _open_finished(folder, say=True) or _build(folder, plan)
    return store


def _open_finished(folder: Path, say: bool) -> ExampleStore | None:
    """The store, or None if it is unfinished or damaged; the latter is printed if `say`."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        store = ExampleStore.open(folder)
        store.verify()
        return store
    except UserError as error:
        if say:
            print(f"{folder} is damaged, building it anew: {error}", file=sys.stderr, flush=True)
        return None


def _build(folder: Path, plan: Plan) -> ExampleStore:
    make_folder(folder)
    try:
        splits = _write_columns(folder, plan)
    except BaseException:  # bad input, or a signal: nothing of it is of use
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if plan.tokenizer is not None:
        write_atomic(folder / "tokenizer.json", [plan.tokenizer])
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "name": plan.name,
        "columns": {name: asdict(column) for name, column in plan.columns.items()},
        "tokenizer_sha256": None if plan.tokenizer is None else tokenizer_sha256(plan.tokenizer),
        "vocab_size": None if plan.tokenizer is None else vocab_size(load_tokenizer(plan.tokenizer, "data.tokenizer")),
        "num_classes": None,
        "label_names": None,
        **plan.facts(),
        "splits": splits,
    }
    write_atomic(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    return ExampleStore.open(folder)


def _write_columns(folder: Path, plan: Plan) -> dict[str, Any]:
    """The manifest's facts of each split: how many examples, and the files with their sizes and checksums."""
    with cache_errors(folder):
        for path in folder.iterdir():  # of a build that was killed
            path.unlink()
        writers = {
            (s, n): _Writer(folder / f"{s}.{n}.bin", column) for s in SPLITS for n, column in plan.columns.items()
        }
    # On a terminal the bar moves all the time; in a log file it is a line now and then.
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(desc=f"preparing {plan.name}", unit="example", unit_scale=True, mininterval=interval) as bar:
        for split, entries in plan.entries():
            with cache_errors(folder):
                for name, entry in entries.items():
                    writers[split, name].append(entry)
            bar.update()
    splits: dict[str, Any] = {split: {"examples": 0, "files": {}} for split in SPLITS}
    first = next(iter(plan.columns))
    with cache_errors(folder):
        for (split, name), writer in writers.items():
            splits[split]["files"].update(writer.close())
            if name == first:
                splits[split]["examples"] = writer.entries
    for split in SPLITS:
        if not splits[split]["examples"]:
            hint = "" if split == "train" else "Without data.validation, data.validation_share decides how many it gets"
            raise UserError(f"data.{split}", f"no examples for the {split} split of {plan.name}", "at least one", hint)
    return splits


class _Writer:
    """Writes a column entry by entry."""

    def __init__(self, path: Path, column: Column) -> None:
        self.path, self.column = path, column
        self.file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by `close`)
        self.digest = hashlib.sha256()
        self.ends = array("q", [0])  # where each entry ends, as in the file of offsets

    @property
    def entries(self) -> int:
        return len(self.ends) - 1

    def append(self, entry: Any) -> None:
        values = self.column.to_array(entry)
        content = values.tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.ends.append(self.ends[-1] + (len(values) if self.column.has_offsets else 1))

    def close(self) -> dict[str, dict[str, Any]]:
        """Makes the files last; by name their sizes and checksums."""
        files = {self.path.name: {"bytes": self.file.tell(), "sha256": self.digest.hexdigest()}}
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.column.has_offsets:
            content, path = self.ends.tobytes(), _offsets_path(self.path)
            write_atomic(path, [content])
            files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return files
