"""Rows of a labelled data set, as dicts: from text files, or from a Hugging Face dataset; and which are held out."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_pretrain.data import huggingface
from sparse_pretrain.data.corpus import Split, is_held_out
from sparse_pretrain.data.files import remembered_sha256
from sparse_pretrain.data.sources import DECOMPRESS, UNREADABLE, find_files
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.config_data import ExamplesConfig

Row = dict[str, Any]
ReadFiles = Callable[[list[Path], str], Iterator[Row]]  # the rows of some files, and the option that names them


@dataclass(frozen=True)
class Rows:
    """The rows of a data set.

    Args:
        settings: plain values that identify them.
        from_files: whether they come from files, or from a Hugging Face dataset.
        read: starts reading the rows that the options name as a split.
        held_out: there are no rows of validation but those held out from train.
        share: of the rows to hold out.
    """

    settings: dict[str, Any]
    from_files: bool
    read: Callable[[Split], Iterator[Row]]
    held_out: bool
    share: float

    def option(self, split: Split) -> str:
        """Which the rows of a split come from, for messages."""
        if not self.from_files:
            return "data.hf_path"
        return "data.train" if self.held_out else f"data.{split}"

    def split(self, key: Callable[[Row], str]) -> Iterator[tuple[Split, Row]]:
        """All rows with their splits. Those to hold out are chosen by the hash of `key`: whatever the order, and rows
        with the same key together."""
        for row in self.read("train"):
            held_out = self.held_out and is_held_out(key(row), self.share)
            yield ("validation" if held_out else "train"), row
        if not self.held_out:
            for row in self.read("validation"):
                yield "validation", row


def open_rows(cfg: ExamplesConfig, read_files: ReadFiles) -> Rows:
    """The rows that `cfg` describes: of `data.train` and `data.validation`, which `read_files` reads, or where there
    are none of `data.hf_path`. At most `max_examples` of each split, the first ones. Nothing but the digest of files
    is read yet.

    Raises:
        UserError: naming the option: files that are not there, or nothing to read at all.
    """
    if cfg.validation and not cfg.train:
        raise UserError("data.train", "nothing, beside files of data.validation", "a list of files")
    if not cfg.train and not cfg.hf_path:
        raise UserError("data.train", "nothing", "a list of files, or data.hf_path: a Hugging Face dataset")
    if not cfg.train:
        held_out = cfg.hf_validation_split is None
        source: dict[str, Any] = {**huggingface.requested(cfg), "revision": cfg.hf_revision}

        def read(split: Split) -> Iterator[Row]:
            name, option = (
                (cfg.hf_train_split, "data.hf_train_split")
                if split == "train"
                else (cfg.hf_validation_split or "", "data.hf_validation_split")
            )
            rows = huggingface.load(cfg, name, option, revision=cfg.hf_revision)
            return itertools.islice(rows, cfg.max_examples)
    else:
        held_out = not cfg.validation
        files = {
            "train": find_files(cfg.train, "data.train"),
            "validation": find_files(cfg.validation, "data.validation"),
        }
        source = {split: [remembered_sha256(path) for path in paths] for split, paths in files.items()}

        def read(split: Split) -> Iterator[Row]:
            return itertools.islice(read_files(files[split], f"data.{split}"), cfg.max_examples)

    settings = {**source, "share": cfg.validation_share if held_out else None, "max_examples": cfg.max_examples}
    return Rows(settings, bool(cfg.train), read, held_out, cfg.validation_share)


def value(row: Row, column: str, option: str) -> Any:
    """What `row` has in `column`; a dot reaches into a column that holds a dict.

    Raises:
        UserError: naming `option` and the columns there are.
    """
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    if isinstance(row.get(outer), dict) and inner in row[outer]:
        return row[outer][inner]
    names = [
        name
        for key, entry in row.items()
        for name in ([f"{key}.{part}" for part in entry] if isinstance(entry, dict) else [key])
    ]
    raise UserError(option, column, names)


def text(row: Row, column: str, option: str) -> str:
    """As `value`, of a column that must hold text."""
    found = value(row, column, option)
    if not isinstance(found, str):
        raise UserError(option, f"{column}, a column of {type(found).__name__}", "a column of text")
    return found


def lines(path: Path, option: str) -> Iterator[str]:
    """The lines of a UTF-8 file, plain or .gz or .xz, with their ends as they are.

    Raises:
        UserError: naming `option` and the file, if it is not that.
    """
    try:
        with DECOMPRESS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:  # type: ignore[operator]
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(
            option,
            f"{path}, which is not UTF-8 ({error.reason} at byte {error.start})",
            "UTF-8 text, plain or .gz or .xz",
        ) from error
    except UNREADABLE as error:
        raise UserError(option, f"{path}, which cannot be read ({error})", "UTF-8 text, plain or .gz or .xz") from error


def table_rows(
    path: Path, option: str, columns: Callable[[list[str]], list[str] | None] = lambda first: None
) -> Iterator[Row]:
    """The rows of a table with a header: comma-separated, or in .tsv files tab-separated without quotes. In the latter
    a row with another number of fields is skipped, and said so: published ones have a few of them.

    Args:
        columns: from the fields of the first line, the names of the columns of a table without a header; None = they
            are the header.

    Raises:
        UserError: naming `option`, the file and the line.
    """
    tabs = path.with_suffix("").suffix == ".tsv" if path.suffix in DECOMPRESS else path.suffix == ".tsv"
    skipped = 0
    split = (line.rstrip("\r\n").split("\t") for line in lines(path, option))
    table: Iterator[list[str]] = split if tabs else csv.reader(lines(path, option), strict=True)
    try:
        first = next(table, None)
        if first is None:
            return
        header = columns(first)
        rows = table if header is None else itertools.chain([first], table)
        header = header or first
        for number, fields in enumerate(rows, 2):
            if len(fields) == len(header):
                yield dict(zip(header, fields, strict=True))
            elif tabs:
                skipped += 1
            elif fields:
                raise UserError(
                    option, f"{path}, row {number} with {len(fields)} fields", f"{len(header)} fields, as in row 1"
                )
    except csv.Error as error:
        raise UserError(option, f"{path} ({error})", "a table with comma-separated fields") from error
    if skipped:
        print(
            f"{path}: skipped {skipped} rows with another number of fields than the first", file=sys.stderr, flush=True
        )


def json_rows(path: Path, option: str) -> Iterator[Row]:
    """The objects of a file with one on each line.

    Raises:
        UserError: naming `option`, the file and the line.
    """
    for number, line in enumerate(lines(path, option), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(option, f"{path}, line {number} ({error})", "a JSON object on each line") from error
            if not isinstance(row, dict):
                raise UserError(option, f"{path}, line {number}: {line.strip()[:40]}", "a JSON object on each line")
            yield row
