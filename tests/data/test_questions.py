"""SQuAD: windows and answers against a walk over the characters, from files and datasets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from toy_corpora import document

from sparse_pretrain.config_data import QuestionsConfig
from sparse_pretrain.data.batches import QuestionBatches
from sparse_pretrain.data.build import prepare
from sparse_pretrain.data.questions import questions, window_offsets
from sparse_pretrain.data.tokenizer import train_bpe, train_wordpiece
from sparse_pretrain.errors import UserError
from tests.shared_data import shared_data

SEQ_LEN, STRIDE, QUERY = 40, 12, 10
WORDS = ["sparse", "dense", "mask", "weight", "prune", "über", "tensor", "decay"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_wordpiece((document(seed) for seed in range(50)), 120))
    return path


def paragraph(i: int) -> dict:
    rng = np.random.default_rng(i)
    context = f"Number {i}: " + ", ".join(rng.choice(WORDS, int(rng.integers(5, 80)))) + "."
    qas = []
    for k in range(3):
        answers = []
        for _ in range(1 + k):
            start = int(rng.integers(0, len(context) - 2))
            start = context.rfind(" ", 0, start) + 1
            end = context.find(" ", start + 1 + int(rng.integers(0, 20)))
            answers.append({"text": context[start : end if end > 0 else len(context)], "answer_start": start})
        text = "  " * (k == 1) + " ".join(rng.choice(WORDS, 2 + 9 * (k == 2))) + "?"
        qas.append({"id": f"{i}-{k}", "question": text, "answers": answers})
    return {"context": context, "qas": qas}


def squad(numbers) -> dict:
    return {"version": "1.1", "data": [{"title": str(i), "paragraphs": [paragraph(i)]} for i in numbers]}


def config(tokenizer, **options) -> QuestionsConfig:
    values = {
        "name": "squad",
        "tokenizer": str(tokenizer),
        "seq_len": SEQ_LEN,
        "stride": STRIDE,
        "max_query_len": QUERY,
        "num_workers": 0,
    }
    return QuestionsConfig(**{**values, **options})


@pytest.fixture
def files(tmp_path):
    for name, numbers in (("train", range(12)), ("dev", range(12, 20))):
        (tmp_path / f"{name}.json").write_text(json.dumps(squad(numbers)))
    return {"train": [str(tmp_path / "train.json")], "validation": [str(tmp_path / "dev.json")]}


def expected_windows(path, numbers):
    """(question id, tokens, types, start, end, offsets) by hand: tokenize both texts, slide over the context."""
    tokenizer = Tokenizer.from_file(str(path))
    for i in numbers:
        entry = paragraph(i)
        context = tokenizer.encode(entry["context"], add_special_tokens=False)
        for question in entry["qas"]:
            query = tokenizer.encode(question["question"].strip(), add_special_tokens=False).ids[:QUERY]
            room = SEQ_LEN - len(query) - 3
            first = 0
            while True:
                ids, offsets = context.ids[first : first + room], context.offsets[first : first + room]
                answer = question["answers"][0]
                low, high = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                inside = [
                    len(query) + 2 + k for k, (a, b) in enumerate(offsets) if a < high and b > low
                ]  # the tokens that touch the answer
                whole = bool(ids) and offsets[0][0] <= low and offsets[-1][1] >= high
                start, end = (inside[0], inside[-1]) if whole else (0, 0)
                tokens = [2, *query, 3, *ids, 3]
                types = [0] * (len(query) + 2) + [1] * (len(ids) + 1)
                yield question["id"], tokens, types, start, end, [None] * (len(query) + 2) + offsets + [None]
                if first + room >= len(context.ids):
                    break
                first += room - STRIDE


def test_windows(tokenizer, files):
    store = prepare(config(tokenizer, **files))
    for split, numbers in (("train", range(12)), ("validation", range(12, 20))):
        expected = list(expected_windows(tokenizer, numbers))
        assert store.num_examples(split) == len(expected) > len(numbers) * 3
        batch = QuestionBatches(store, split, SEQ_LEN)(np.arange(len(expected)), None)
        assert batch["index"].tolist() == list(range(len(expected)))
        for i, (_, tokens, types, start, end, offsets) in enumerate(expected):
            fill = [0] * (SEQ_LEN - len(tokens))
            assert batch["tokens"][i].tolist() == tokens + fill
            assert batch["token_types"][i].tolist() == types + fill
            assert batch["mask"][i].tolist() == [True] * len(tokens) + [False] * len(fill)
            assert (int(batch["start"][i]), int(batch["end"][i])) == (start, end)
            if split == "validation":
                assert window_offsets(store, i) == offsets
        answered = (batch["start"] > 0).sum()
        assert 0 < answered < len(expected)


def test_questions_know_their_windows(tokenizer, files):
    store = prepare(config(tokenizer, **files))
    expected = list(expected_windows(tokenizer, range(12, 20)))
    found = questions(store)
    assert [question.id for question in found] == list(dict.fromkeys(row[0] for row in expected))
    assert found[0].windows.start == 0
    assert found[-1].windows.stop == len(expected)
    asked = {
        q["id"]: (p["context"], [a["text"] for a in q["answers"]])
        for p in map(paragraph, range(12, 20))
        for q in p["qas"]
    }
    for question in found:
        assert {expected[window][0] for window in question.windows} == {question.id}
        assert (question.context, question.answers) == asked[question.id]


def test_the_answer_comes_back_from_the_offsets(tokenizer, files):
    store = prepare(config(tokenizer, **files))
    batch = QuestionBatches(store, "validation", SEQ_LEN)(np.arange(store.num_examples("validation")), None)
    found = 0
    for question in questions(store):
        for window in question.windows:
            start, end = int(batch["start"][window]), int(batch["end"][window])
            if start:
                offsets = window_offsets(store, window)
                text = question.context[offsets[start][0] : offsets[end][1]]
                assert text.rstrip(",.:") == question.answers[0].rstrip(",.:")
                found += 1
    assert found > 10


def test_datasets(tokenizer, files, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, numbers in (("train", range(12)), ("validation", range(12, 20))):
        rows = [
            {"id": q["id"], "title": "t", "context": p["context"], "question": q["question"],
             "answers": {key: [a[key] for a in q["answers"]] for key in ("text", "answer_start")}}
            for p in map(paragraph, numbers) for q in p["qas"]
        ]  # fmt: skip
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    ours = prepare(config(tokenizer, hf_path=str(folder), hf_validation_split="validation"))
    theirs = prepare(config(tokenizer, **files))
    assert ours.digest == theirs.digest


def test_held_out_questions_have_contexts_of_their_own(tokenizer, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(squad(range(60))))
    store = prepare(config(tokenizer, train=[str(tmp_path / "all.json")], validation_share=0.3))
    contexts = [question.context for question in questions(store)]
    assert 3 <= len(set(contexts)) < 40
    assert len(contexts) == 3 * len(set(contexts))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"data\.train: found .*train\.json \(TypeError.*SQuAD v1\.1"),
        ("{", r"train\.json \(JSONDecodeError"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', None),
        ('{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}', r"train\.json \(KeyError: 'answers'"),
        (json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [{"id": "7", "question": "?", "answers": [{"text": "c", "answer_start": 0}]}]}]}]}), r"question 7: no 'c' at 0|question 7: 'c' is not at 0"),
        (json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [{"id": "7", "question": "?", "answers": []}]}]}]}), "question 7 without an answer"),
        (json.dumps({"data": [{"paragraphs": [{"context": None, "qas": [{"id": "7", "question": "?", "answers": [{"text": "c", "answer_start": 0}]}]}]}]}), r"data\.train: found a row of another form \(TypeError"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tokenizer, tmp_path, files, content, message):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=message or r"data\.train: found no examples"):
        prepare(config(tokenizer, **files))


def test_bad_rows_to_hold_out_or_of_validation_are_named(tokenizer, tmp_path, files):
    bad = {"data": [{"paragraphs": [{"context": None, "qas": [{"id": "7", "question": "?", "answers": []}]}]}]}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(UserError, match=r"data\.train: found context, a column of NoneType; allowed: a column of text"):
        prepare(config(tokenizer, train=[str(tmp_path / "bad.json")]))
    bad["data"][0]["paragraphs"][0]["context"] = "a b"
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(UserError, match=r"data\.validation: found question 7 without an answer"):
        prepare(config(tokenizer, **{**files, "validation": [str(tmp_path / "bad.json")]}))


def test_bad_lengths_are_named(tokenizer, files):
    with pytest.raises(UserError, match=r"data\.stride: found 27; allowed: below 27"):
        prepare(config(tokenizer, stride=27, **files))
    with pytest.raises(UserError, match=r"data\.seq_len: found 14; allowed: at least 15"):
        prepare(config(tokenizer, seq_len=14, stride=1, **files))


def test_white_space_before_a_question_is_dropped(tmp_path):
    """To a byte-level tokenizer it would be a token."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_bpe((document(seed) for seed in range(50)), 300))
    answers = [{"text": "dense", "answer_start": 7}]
    qas = [{"id": str(i), "question": "  " * i + "mask?", "answers": answers} for i in range(2)]
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "sparse dense", "qas": qas}]}]}))
    files = [str(tmp_path / "a.json")]
    tokens = prepare(config(path, train=files, validation=files)).column("train", "tokens")
    assert tokens[0].tolist() == tokens[1].tolist()


def test_against_transformers_on_xquad():
    transformers = pytest.importorskip("transformers")
    path, vocab = shared_data("qa/xquad.en.shared.json"), shared_data("tokenizers/bert-base-uncased/vocab.txt")
    cfg = QuestionsConfig(
        name="xquad",
        train=[str(path)],
        validation=[str(path)],
        tokenizer=str(vocab),
        seq_len=128,
        stride=32,
        max_examples=60,
    )
    store = prepare(cfg)
    theirs = transformers.BertTokenizerFast(vocab=str(vocab))
    articles = json.loads(path.read_text())["data"]
    rows = [(q, p["context"]) for a in articles for p in a["paragraphs"] for q in p["qas"]][:60]
    encoded = theirs(
        [q["question"].lstrip() for q, _ in rows], [context for _, context in rows], truncation="only_second", max_length=128, stride=32,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert store.num_examples("train") == len(encoded["input_ids"])
    starts, ends = store.column("train", "start"), store.column("train", "end")
    for i, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        assert store.column("train", "tokens")[i].tolist() == ids
        row, sequences = encoded["overflow_to_sample_mapping"][i], encoded.sequence_ids(i)
        assert window_offsets(store, i) == [
            tuple(o) if s == 1 else None for o, s in zip(offsets, sequences, strict=True)
        ]
        # the answer's tokens as the run_qa example finds them: from both ends inwards
        answer = rows[row][0]["answers"][0]
        first, last = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        low, high = sequences.index(1), len(ids) - 1 - sequences[::-1].index(1)
        if offsets[low][0] > first or offsets[high][1] < last:
            assert (starts[i], ends[i]) == (0, 0)
            continue
        while low < len(offsets) and offsets[low][0] <= first:
            low += 1
        while offsets[high][1] >= last:
            high -= 1
        assert (starts[i], ends[i]) == (low - 1, high + 1)
    assert len(questions(store)) == 60
