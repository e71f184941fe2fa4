"""Texts and what they become: translation, and generation from a description."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from sparse_pretrain.data import wikisql
from sparse_pretrain.data.corpus import Corpus, Split, digest_of
from sparse_pretrain.data.example_store import Column, Entries, ExampleStore, Plan
from sparse_pretrain.data.example_store import prepare as prepare_store
from sparse_pretrain.data.files import remembered_sha256
from sparse_pretrain.data.rows import Row, json_rows, lines, open_rows, table_rows, text
from sparse_pretrain.data.sources import find_files
from sparse_pretrain.data.special_tokens import end_of_text_id, frame_of, special_tokens
from sparse_pretrain.data.tokenizer import load_tokenizer, token_dtype, tokenizer_json
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.config_data import PairsConfig

VERSION = 1
CHUNK = 1000  # pairs handed to the tokenizer's threads at once
Pair = tuple[str, str]


def prepare(cfg: PairsConfig) -> ExampleStore:
    """The store of `cfg`'s pairs: columns source and target (ragged token ids, without special tokens, cut to the
    longest that fits), and of validation text: {source, target}. Pairs of which a side is empty are skipped.

    Raises:
        UserError: naming the option at fault.
    """
    readers = {"lines": _line_pairs, "csv": _tables, "jsonl": _json_lines, "wikisql": wikisql.wikisql_rows}
    rows = open_rows(cfg, readers[cfg.format])
    as_pair = _as_pair(cfg, rows.from_files)

    def pairs() -> Iterator[tuple[Split, Pair]]:
        for split, row in rows.split(lambda row: as_pair(row)[0]):
            pair = as_pair(row)
            if all(side.strip() for side in pair):
                yield split, pair

    settings = {
        "task": cfg.task,
        "version": VERSION,
        **rows.settings,
        "columns": "wikisql" if cfg.format == "wikisql" else [cfg.format, cfg.source_column, cfg.target_column],
        **({"tables": _tables_of_wikisql(cfg)} if cfg.format == "wikisql" and rows.from_files else {}),
    }
    corpus = Corpus(digest_of(settings), lambda: ((split, side) for split, pair in pairs() for side in pair))
    content = tokenizer_json(cfg, corpus)
    tokenizer = load_tokenizer(content, str(cfg.tokenizer))
    lengths = (cfg.max_source_len, cfg.max_target_len)
    before, after = frame_of(tokenizer)
    if cfg.max_source_len <= len(before) + len(after):
        raise UserError("data.max_source_len", cfg.max_source_len, f"more than {len(before) + len(after)}")
    special = special_tokens(tokenizer)
    facts = {
        "source_before": before,
        "source_after": after,
        "target_start": special.fill if special.start is None else special.start,
        "target_end": end_of_text_id(tokenizer),
        "fill": special.fill,
    }
    ids = Column(token_dtype(tokenizer).name, ragged=True)
    return prepare_store(
        Plan(
            cfg.name,
            {**settings, "lengths": lengths},
            {"source": ids, "target": ids, "text": Column("json")},
            lambda: _encoded(pairs(), tokenizer, lengths),
            lambda: facts,
            content,
        )
    )


@dataclass(frozen=True)
class ToGenerate:
    """A source of the validation split with all that was written for it.

    index: of the (first) example with this source.
    """

    index: int
    source: str
    references: list[str]


def to_generate(cfg: PairsConfig, store: ExampleStore) -> list[ToGenerate]:
    """The distinct sources of the validation split, in the order in which they first appear; of parallel texts
    (data.format=lines) all of them, as scores of translations are defined."""
    texts = store.column("validation", "text")
    found: dict[str | int, ToGenerate] = {}
    for index in range(len(texts)):
        pair = texts[index]
        key = index if cfg.format == "lines" else pair["source"]
        found.setdefault(key, ToGenerate(index, pair["source"], [])).references.append(pair["target"])
    return list(found.values())


def _encoded(
    pairs: Iterator[tuple[Split, Pair]], tokenizer: Tokenizer, lengths: tuple[int, int]
) -> Iterator[tuple[Split, Entries]]:
    while chunk := list(itertools.islice(pairs, CHUNK)):
        sides = [
            tokenizer.encode_batch_fast([pair[side] for _, pair in chunk], add_special_tokens=False) for side in (0, 1)
        ]
        for (split, pair), source, target in zip(chunk, *sides, strict=True):
            entries = {"source": source.ids[: lengths[0]], "target": target.ids[: lengths[1]]}
            if split == "validation":
                entries["text"] = dict(zip(("source", "target"), pair, strict=True))
            yield split, entries


def _tables_of_wikisql(cfg: PairsConfig) -> list[str]:
    """What identifies the tables beside its files."""
    options = {"data.train": cfg.train, "data.validation": cfg.validation}
    return [
        remembered_sha256(wikisql.tables_of(path, option))
        for option, entries in options.items()
        for path in find_files(entries, option)
    ]


def _as_pair(cfg: PairsConfig, from_files: bool) -> Callable[[Row], Pair]:
    if cfg.format == "wikisql":
        return wikisql.as_texts
    if cfg.format == "lines" and from_files:
        return lambda row: (row["source"], row["target"])
    return lambda row: (
        text(row, cfg.source_column, "data.source_column"),
        text(row, cfg.target_column, "data.target_column"),
    )


def _line_pairs(paths: list[Path], option: str) -> Iterator[Row]:
    """Lines of a source file and of the target file after it, side by side.

    Raises:
        UserError: naming `option`, if a file has no partner or another number of lines than it.
    """
    if len(paths) % 2:
        raise UserError(option, f"{len(paths)} files", "pairs of files, as [train.en,train.de]")
    for source, target in zip(paths[::2], paths[1::2], strict=True):
        both = itertools.zip_longest(lines(source, option), lines(target, option))
        for number, (a, b) in enumerate(both, 1):
            if a is None or b is None:
                ends = source if a is None else target
                raise UserError(
                    option,
                    f"{source.name} and {target.name}, of which {ends.name} ends before line {number}",
                    "files with as many lines",
                )
            yield {"source": a.rstrip("\r\n"), "target": b.rstrip("\r\n")}


def _tables(paths: list[Path], option: str) -> Iterator[Row]:
    return itertools.chain.from_iterable(table_rows(path, option) for path in paths)


def _json_lines(paths: list[Path], option: str) -> Iterator[Row]:
    return itertools.chain.from_iterable(json_rows(path, option) for path in paths)
