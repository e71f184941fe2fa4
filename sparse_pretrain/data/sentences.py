"""GLUE (Wang et al. 2019): sentences, or pairs of them, and their classes or scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from sparse_pretrain.data.corpus import Split
from sparse_pretrain.data.example_store import Column, Entries, ExampleStore, Plan
from sparse_pretrain.data.example_store import prepare as prepare_store
from sparse_pretrain.data.rows import Row, Rows, open_rows, table_rows, text, value
from sparse_pretrain.data.special_tokens import frame, special_tokens
from sparse_pretrain.data.tokenizer import given_tokenizer_json, load_tokenizer, token_dtype
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.config_data import SentencesConfig

VERSION = 1
CHUNK = 1000  # examples handed to the tokenizer's threads at once
SCORES = (0.0, 5.0)  # of STS-B


@dataclass(frozen=True)
class GlueTask:
    """Where a task's texts and labels are.

    columns: of the texts, in Hugging Face's nyu-mll/glue; the label's is `label`. labels: their names in the order of
    their numbers; none = a score. in_files: the columns of texts and label in GLUE's own .tsv files. headerless: all
    columns of files without a header, by these names.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    in_files: tuple[str, ...]
    headerless: tuple[str, ...] = ()


_ENTAILMENT = ("entailment", "not_entailment")
_TWO = ("sentence1", "sentence2")
GLUE_TASKS = {
    "cola": GlueTask(
        ("sentence",), ("unacceptable", "acceptable"), ("sentence", "label"), ("source", "label", "mark", "sentence")
    ),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("sentence", "label")),
    "mrpc": GlueTask(_TWO, ("not_equivalent", "equivalent"), ("#1 String", "#2 String", "Quality")),
    "stsb": GlueTask(_TWO, (), ("sentence1", "sentence2", "score"), ("sentence1", "sentence2", "score")),
    "qqp": GlueTask(
        ("question1", "question2"), ("not_duplicate", "duplicate"), ("question1", "question2", "is_duplicate")
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("sentence1", "sentence2", "gold_label")
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, ("question", "sentence", "label")),
    "rte": GlueTask(_TWO, _ENTAILMENT, ("sentence1", "sentence2", "label")),
    "wnli": GlueTask(_TWO, ("not_entailment", "entailment"), ("sentence1", "sentence2", "label")),
}


def prepare(cfg: SentencesConfig) -> ExampleStore:
    """The store of a GLUE task: columns label (int32, or float32 scores), tokens and token_types (ragged), framed by
    the tokenizer and cut to `data.seq_len`, the longer of two texts first.

    Raises:
        UserError: naming the option at fault.
    """
    if cfg.glue_task not in GLUE_TASKS:
        raise UserError("data.glue_task", cfg.glue_task, sorted(GLUE_TASKS))
    task = GLUE_TASKS[cfg.glue_task]
    rows = open_rows(cfg, lambda paths, option: _file_rows(task, cfg.glue_task, paths, option))
    content = given_tokenizer_json(cfg.tokenizer)
    tokenizer = load_tokenizer(content, str(cfg.tokenizer))
    frame(tokenizer)
    smallest = tokenizer.num_special_tokens_to_add(len(task.columns) == 2) + len(task.columns)
    if cfg.seq_len < smallest:
        raise UserError("data.seq_len", cfg.seq_len, f"at least {smallest}: special tokens and one of each text")
    tokenizer.enable_truncation(cfg.seq_len, strategy="longest_first")
    facts = {
        "glue_task": cfg.glue_task,
        "num_classes": len(task.labels) or 1,
        "label_names": list(task.labels) or None,
        "fill": special_tokens(tokenizer).fill,
    }
    return prepare_store(
        Plan(
            cfg.name,
            {"task": cfg.task, "version": VERSION, **rows.settings, **asdict(task), "seq_len": cfg.seq_len},
            {
                "label": Column("int32" if task.labels else "float32"),
                "tokens": Column(token_dtype(tokenizer).name, ragged=True),
                "token_types": Column("uint8", ragged=True),
            },
            lambda: _encoded(task, rows, tokenizer),
            lambda: facts,
            content,
        )
    )


def _encoded(task: GlueTask, rows: Rows, tokenizer: Tokenizer) -> Iterator[tuple[Split, Entries]]:
    def texts_of(row: Row, split: Split) -> tuple[str, ...]:
        return tuple(text(row, column, rows.option(split)) for column in task.columns)

    examples = rows.split(lambda row: "\n".join(texts_of(row, "train")))
    while chunk := list(itertools.islice(examples, CHUNK)):
        texts: list[Any] = [texts_of(row, split) for split, row in chunk]
        encodings = tokenizer.encode_batch(texts if len(task.columns) == 2 else [text for (text,) in texts])
        for (split, row), encoding in zip(chunk, encodings, strict=True):
            label = label_of(task, value(row, "label", rows.option(split)), rows.option(split))
            yield split, {"label": label, "tokens": encoding.ids, "token_types": encoding.type_ids}


def label_of(task: GlueTask, found: Any, option: str) -> int | float:
    """The number of a label that is given by number, name or digits; or the score.

    Raises:
        UserError: naming `option`, for any other label: the unlabelled test splits have -1.
    """
    try:
        if not task.labels:
            score = float(found)
            if SCORES[0] <= score <= SCORES[1] and math.isfinite(score):
                return score
        elif found in task.labels:
            return task.labels.index(found)
        elif float(found) in range(len(task.labels)):
            return int(float(found))
    except (TypeError, ValueError):
        pass
    allowed = f"a score from {SCORES[0]:g} to {SCORES[1]:g}" if not task.labels else list(task.labels)
    raise UserError(option, f"the label {found!r}", allowed, "GLUE's test splits have no labels")


def _file_rows(task: GlueTask, name: str, paths: list[Path], option: str) -> Iterator[Row]:
    """The rows of GLUE's files, with the column names of Hugging Face's copy.

    A file may have GLUE's header, or Hugging Face's column names, or, of the tasks that were published so, none.

    Raises:
        UserError: naming `option` and the columns that were found.
    """
    for path in paths:
        names: dict[str, str] = {}  # column in the file -> its name here

        def header(first: list[str], path: Path = path, names: dict[str, str] = names) -> list[str] | None:
            ours = (*task.columns, "label")
            for theirs in (task.in_files, ours):
                if set(theirs) <= set(first):
                    names.update(zip(theirs, ours, strict=True))
                    return None
            if len(first) == len(task.headerless):
                names.update(zip(task.in_files, ours, strict=True))
                return list(task.headerless)
            either = " or ".join(dict.fromkeys(", ".join(names) for names in (task.in_files, ours)))
            wanted = f"the columns {either}, by tabs in a .tsv, else by commas"
            raise UserError(option, f"{path} with the columns {', '.join(first)[:200]}", f"{name}: {wanted}")

        for row in table_rows(path, option, header):
            yield {ours: row[theirs] for theirs, ours in names.items()}
