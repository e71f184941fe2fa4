"""SQuAD v1.1 (Rajpurkar et al. 2016): questions whose answers are spans of a context, in windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from sparse_pretrain.data.corpus import Split
from sparse_pretrain.data.example_store import Column, Entries, ExampleStore, Plan
from sparse_pretrain.data.example_store import prepare as prepare_store
from sparse_pretrain.data.rows import Row, Rows, lines, open_rows, text
from sparse_pretrain.data.special_tokens import frame, special_tokens
from sparse_pretrain.data.tokenizer import given_tokenizer_json, load_tokenizer, token_dtype
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.config_data import QuestionsConfig

VERSION = 1
ALLOWED = "SQuAD v1.1: {data: [{paragraphs: [{context, qas: [{id, question, answers: [{text, answer_start}]}]}]}]}"
OUTSIDE = -1  # instead of the offsets of a token that is not of the context


@dataclass(frozen=True)
class Question:
    """A question of the validation split.

    id: its own. context, answers: the texts. windows: the examples of the split that read its context.
    """

    id: str
    context: str
    answers: list[str]
    windows: range


def prepare(cfg: QuestionsConfig) -> ExampleStore:
    """The store of questions, an example a window: tokens and token_types (ragged), start and end (int32) of the answer
    in tokens, both 0 ([CLS]) where it is not wholly in this window. Of validation also context_offsets (ragged, (n, 2)
    int32: the characters of the context that a token stands for, OUTSIDE for all others) and question: {id, context,
    answers, first} for each question, the first of its windows.

    As BERT's run_squad and transformers' run_qa do it: windows of `data.seq_len` share `data.stride` tokens of context;
    white space in front of a question is dropped and questions are cut to `data.max_query_len`.

    Raises:
        UserError: naming the option at fault.
    """
    rows = open_rows(cfg, squad_rows)
    content = given_tokenizer_json(cfg.tokenizer)
    tokenizer = load_tokenizer(content, str(cfg.tokenizer))
    frame(tokenizer)
    room = cfg.seq_len - cfg.max_query_len - tokenizer.num_special_tokens_to_add(True)  # for the context
    if room < 2:
        raise UserError(
            "data.seq_len", cfg.seq_len, f"at least {cfg.seq_len - room + 2}: data.max_query_len and a context"
        )
    if cfg.stride >= room:
        raise UserError("data.stride", cfg.stride, f"below {room}: data.seq_len without question and special tokens")
    facts = {"fill": special_tokens(tokenizer).fill}
    settings = {"task": cfg.task, "version": VERSION, **rows.settings}
    return prepare_store(
        Plan(
            cfg.name,
            {**settings, "lengths": [cfg.seq_len, cfg.stride, cfg.max_query_len]},
            {
                "start": Column("int32"),
                "end": Column("int32"),
                "tokens": Column(token_dtype(tokenizer).name, ragged=True),
                "token_types": Column("uint8", ragged=True),
                "context_offsets": Column("int32", (2,), ragged=True),
                "question": Column("json"),
            },
            lambda: _windows(cfg, rows, tokenizer),
            lambda: facts,
            content,
        )
    )


def questions(store: ExampleStore) -> list[Question]:
    """The questions of the validation split, with the windows that belong to each."""
    column = store.column("validation", "question")
    entries = [column[i] for i in range(len(column))]
    ends = [entry["first"] for entry in entries[1:]] + [store.num_examples("validation")]
    return [
        Question(entry["id"], entry["context"], entry["answers"], range(entry["first"], end))
        for entry, end in zip(entries, ends, strict=True)
    ]


def window_offsets(store: ExampleStore, index: int) -> list[tuple[int, int] | None]:
    """Of each token of a validation window: which characters of the context it stands for, None = no part of it."""
    offsets = store.column("validation", "context_offsets")[index].tolist()
    return [None if start == OUTSIDE else (start, end) for start, end in offsets]


def squad_rows(paths: list[Path], option: str) -> Iterator[Row]:
    """The questions of SQuAD's json files, as Hugging Face's copy has them: {id, question, context, answers: {text,
    answer_start}}.

    Raises:
        UserError: naming `option` and the file, if it is not of that format.
    """
    for path in paths:
        try:
            articles = json.loads("".join(lines(path, option)))["data"]
            for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
                for question in paragraph["qas"]:
                    answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
                    own = {key: question[key] for key in ("id", "question")}
                    yield {**own, "context": paragraph["context"], "answers": answers}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(option, f"{path} ({type(error).__name__}: {error})", ALLOWED) from error


def _windows(cfg: QuestionsConfig, rows: Rows, tokenizer: Tokenizer) -> Iterator[tuple[Split, Entries]]:
    made = 0  # windows of validation
    for split, row in rows.split(lambda row: text(row, "context", rows.option("train"))):  # a context's together
        option = rows.option(split)
        try:
            question, context = row["question"].lstrip(), row["context"]
            texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
            for answer, start in zip(texts, starts, strict=True):
                if context[start : start + len(answer)] != answer:
                    raise UserError(
                        option, f"question {row['id']}: {answer!r} is not at {start} of its context", ALLOWED
                    )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(option, f"a row of another form ({error!r})", ALLOWED) from error
        if not texts:
            raise UserError(option, f"question {row['id']} without an answer", "answers to all questions (SQuAD v1.1)")
        tokenizer.no_truncation()
        words = tokenizer.encode(question, add_special_tokens=False)
        if len(words) > cfg.max_query_len:
            question = question[: words.offsets[cfg.max_query_len - 1][1]]
        tokenizer.enable_truncation(cfg.seq_len, stride=cfg.stride, strategy="only_second")
        encoding = tokenizer.encode(question, context)
        if split == "validation":
            yield split, {"question": {"id": row["id"], "context": context, "answers": texts, "first": made}}
        for window in (encoding, *encoding.overflowing):
            start, end = answer_tokens(window, starts[0], starts[0] + len(texts[0]))
            entries: Entries = {"start": start, "end": end, "tokens": window.ids, "token_types": window.type_ids}
            if split == "validation":
                entries["context_offsets"] = _context_offsets(window)
                made += 1
            yield split, entries


def answer_tokens(window: Encoding, first: int, last: int) -> tuple[int, int]:
    """The first and the last token of the answer in the characters `first` to `last` (excluded) of the context; (0, 0)
    if the window does not hold all of it."""
    offsets = _context_offsets(window)
    of_context = np.flatnonzero(offsets[:, 0] != OUTSIDE)
    if not len(of_context) or offsets[of_context[0], 0] > first or offsets[of_context[-1], 1] < last:
        return 0, 0
    start = of_context[offsets[of_context, 0] <= first][-1]
    end = of_context[offsets[of_context, 1] >= last][0]
    return int(start), int(end)


def _context_offsets(window: Encoding) -> Any:
    of_context = np.array([sequence == 1 for sequence in window.sequence_ids])
    return np.where(of_context[:, None], np.array(window.offsets, np.int32), OUTSIDE)
