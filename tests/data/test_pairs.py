"""Pairs of texts: from every form of file and from datasets, and the batches that come of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma

import numpy as np
import pytest

from sparse_pretrain.config_data import PairsConfig
from sparse_pretrain.data.batches import ContinuationBatches, Seq2SeqBatches
from sparse_pretrain.data.build import data_module, open_store, prepare
from sparse_pretrain.data.pairs import _line_pairs, to_generate
from sparse_pretrain.data.rows import open_rows
from sparse_pretrain.data.tokenizer import load_tokenizer, train_bpe, train_wordpiece
from sparse_pretrain.data.wikisql import as_texts
from sparse_pretrain.errors import UserError
from tests.shared_data import shared_data

PAIRS = [
    (f"The {a} number {i} is {b}.", f"Die {b} Zahl {i} ist {a} über.")
    for i, (a, b) in enumerate([("red", "big"), ("blue", "small"), ("green", "tiny")] * 60)
]
HELD_OUT = [("A man.", "Ein Mann."), ("A dog runs.", "Ein Hund läuft."), ("A man.", "Ein Herr.")]


def lines(texts) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def table(pairs, delimiter=",") -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("n", "en", "de"), *((i, a, b) for i, (a, b) in enumerate(pairs))])
    return file.getvalue().encode()


def objects(pairs) -> bytes:
    return lines(json.dumps({"n": i, "translation": {"en": a, "de": b}}) for i, (a, b) in enumerate(pairs))


def config(folder, files: dict[str, bytes], **options) -> PairsConfig:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    train = [str(folder / name) for name in files if name.startswith("train")]
    validation = [str(folder / name) for name in files if name.startswith("val")]
    values = {
        "name": "toy",
        "train": train,
        "validation": validation,
        "vocab_size": 320,
        "max_source_len": 24,
        "max_target_len": 20,
        "num_workers": 0,
    }
    return PairsConfig(**{**values, **options})


def line_config(folder, **options) -> PairsConfig:
    files = {}
    for split, pairs in (("train", PAIRS), ("val", HELD_OUT)):
        files[f"{split}.en"], files[f"{split}.de"] = (lines(side) for side in zip(*pairs, strict=True))
    return config(folder, files, **options)


@pytest.fixture
def store(tmp_path):
    return prepare(line_config(tmp_path))


def texts_of(store, split="validation"):
    column = store.column(split, "text")
    return [(column[i]["source"], column[i]["target"]) for i in range(len(column))]


def test_what_a_store_holds(store):
    assert (store.num_examples("train"), store.num_examples("validation")) == (len(PAIRS), 3)
    assert store.vocab_size == 320
    assert store.num_classes is None
    assert texts_of(store) == HELD_OUT
    assert open_store(store.folder) == store
    tokenizer = load_tokenizer(store.tokenizer_path.read_bytes(), "test")
    for split, pairs in (("train", PAIRS), ("validation", HELD_OUT)):
        for i, pair in enumerate(pairs):
            for name, text, longest in zip(("source", "target"), pair, (24, 20), strict=True):
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                assert store.column(split, name)[i].tolist() == ids[:longest]


def test_every_form_of_files_gives_the_same(tmp_path, store):
    expected = [
        store.column("train", "source").values.tolist(),
        store.column("train", "target").values.tolist(),
        texts_of(store),
    ]
    english, german = ([pair[side] for pair in PAIRS] for side in (0, 1))
    halves = {
        "train.a.en": lines(english[:50]),
        "train.a.de": lines(german[:50]),
        "train.b.en": lines(english[50:]),
        "train.b.de": lines(german[50:]),
    }
    dotted = {"source_column": "translation.en", "target_column": "translation.de"}
    columns = {"source_column": "en", "target_column": "de"}
    held_out = {"val.en": lines(pair[0] for pair in HELD_OUT), "val.de": lines(pair[1] for pair in HELD_OUT)}
    forms = [
        ({**halves, **held_out}, {}),
        ({"train.en.gz": gzip.compress(lines(english)), "train.de.xz": lzma.compress(lines(german)), **held_out}, {}),
        ({"train.csv": table(PAIRS), "val.csv.gz": gzip.compress(table(HELD_OUT))}, {"format": "csv", **columns}),
        ({"train.tsv": table(PAIRS, "\t"), "val.csv": table(HELD_OUT)}, {"format": "csv", **columns}),
        ({"train.jsonl": objects(PAIRS), "val.jsonl": objects(HELD_OUT)}, {"format": "jsonl", **dotted}),
    ]
    for i, (files, options) in enumerate(forms):
        folder = tmp_path / str(i)
        folder.mkdir()
        other = prepare(config(folder, files, **options))
        assert [other.column("train", name).values.tolist() for name in ("source", "target")] == expected[:2]
        assert texts_of(other) == expected[2]


def test_seq2seq_batches(store):
    batch = Seq2SeqBatches(store, "train", 24, 20)(np.array([5, 0, 100]), 3)
    tokenizer = load_tokenizer(store.tokenizer_path.read_bytes(), "test")
    for i, row in enumerate((5, 0, 100)):
        source, target = (tokenizer.encode(text, add_special_tokens=False).ids for text in PAIRS[row])
        source, target = source[:23], target[:19]
        assert batch["source"][i].tolist() == [*source, 2] + [0] * (23 - len(source))
        assert batch["source_mask"][i].tolist() == [True] * (len(source) + 1) + [False] * (23 - len(source))
        assert batch["target"][i].tolist() == [1, *target, 2] + [0] * (19 - len(target))
        assert batch["labels"][i].tolist() == [*target, 2] + [-100] * (19 - len(target))
    assert {name: str(value.dtype) for name, value in batch.items()} == {
        "source": "torch.int64", "source_mask": "torch.bool", "target": "torch.int64", "labels": "torch.int64",
    }  # fmt: skip


def test_decoders_go_on_where_the_source_ends(store):
    batch = ContinuationBatches(store, "train", 24, 20)(np.array([5, 0]), 3)
    tokenizer = load_tokenizer(store.tokenizer_path.read_bytes(), "test")
    assert batch["tokens"].shape == (2, 44)
    for i, row in enumerate((5, 0)):
        source, target = (tokenizer.encode(text, add_special_tokens=False).ids for text in PAIRS[row])
        source, target = source[:23], target[:19]
        text = [*source, 1, *target, 2]
        assert batch["tokens"][i].tolist() == text + [0] * (44 - len(text))
        labels = [-100] * len(source) + [*target, 2]
        assert batch["labels"][i].tolist() == labels + [-100] * (43 - len(labels))


@pytest.mark.parametrize("kind", [Seq2SeqBatches, ContinuationBatches])
def test_long_texts_are_cut_to_fit(tmp_path, kind):
    cfg = line_config(tmp_path, max_source_len=5, max_target_len=4)
    batch = kind(prepare(cfg), "train", 5, 4)(np.arange(20), 0)
    if kind is Seq2SeqBatches:
        assert (batch["source"][:, 4] == 2).all()
        assert batch["source_mask"].all()
        assert (batch["target"][:, 4] == 2).all()
        assert (batch["labels"][:, 3] == 2).all()
    else:
        assert (batch["tokens"][:, 4] == 1).all()
        assert (batch["tokens"][:, 8] == 2).all()
        assert ((batch["labels"] == -100).sum(1) == 4).all()


def test_a_bert_tokenizer_frames_sources(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_wordpiece((a + b for a, b in PAIRS), 200))
    batch = Seq2SeqBatches(prepare(line_config(tmp_path, tokenizer=str(path))), "validation", 24, 20)(
        np.arange(3), None
    )
    for row in range(3):
        source = batch["source"][row][batch["source_mask"][row]].tolist()
        assert (source[0], source[-1]) == (2, 3)
        assert batch["target"][row, 0] == 2
    assert prepare(line_config(tmp_path, tokenizer="wordpiece")).manifest["source_before"] == [2]


def test_a_gpt_tokenizer_has_one_special_token(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_bpe((a + b for a, b in PAIRS), 300))
    store = prepare(line_config(tmp_path, tokenizer=str(path)))
    batch = ContinuationBatches(store, "validation", 24, 20)(np.arange(1), None)
    source, target = (store.column("validation", name)[0].tolist() for name in ("source", "target"))
    assert batch["tokens"][0].tolist() == [*source, 0, *target, 0] + [0] * (42 - len(source) - len(target))
    assert (batch["labels"][0] != -100).sum() == len(target) + 1


def test_references_are_kept_together(tmp_path):
    columns = {"source_column": "en", "target_column": "de"}
    cfg = config(tmp_path, {"train.csv": table(PAIRS), "val.csv": table(HELD_OUT)}, format="csv", **columns)
    found = to_generate(cfg, prepare(cfg))
    assert [(item.index, item.source, item.references) for item in found] == [
        (0, "A man.", ["Ein Mann.", "Ein Herr."]),
        (1, "A dog runs.", ["Ein Hund läuft."]),
    ]


def test_of_parallel_texts_every_line_is_translated(tmp_path, store):
    """As sacreBLEU scores a test set with a sentence twice."""
    found = to_generate(line_config(tmp_path), store)
    assert [(item.index, item.source, item.references) for item in found] == [
        (i, source, [target]) for i, (source, target) in enumerate(HELD_OUT)
    ]


def test_held_out_pairs_have_sources_of_their_own(tmp_path):
    twice = [pair for pair in PAIRS for _ in range(2)]
    files = {"train.en": lines(pair[0] for pair in twice), "train.de": lines(pair[1] for pair in twice)}
    store = prepare(config(tmp_path, files, validation_share=0.2))
    assert 20 < store.num_examples("validation") < 120
    assert store.num_examples("train") + store.num_examples("validation") == len(twice)
    sources = [source for source, _ in texts_of(store)]
    assert all(sources.count(source) == 2 for source in sources)


def test_empty_sides_are_skipped_and_max_examples_kept(tmp_path):
    pairs = [("", "leer"), *PAIRS[:5], (" ", ""), *PAIRS[5:]]
    files = {"train.csv": table(pairs), "val.csv": table(HELD_OUT)}
    options = {"format": "csv", "source_column": "en", "target_column": "de"}
    assert prepare(config(tmp_path, files, **options)).num_examples("train") == len(PAIRS)
    few = prepare(config(tmp_path, files, max_examples=2, **options))
    assert (few.num_examples("train"), few.num_examples("validation")) == (1, 2)


def test_the_joint_vocabulary_is_of_the_train_split(tmp_path):
    store = prepare(line_config(tmp_path))
    tokenizer = load_tokenizer(store.tokenizer_path.read_bytes(), "test")
    words = [tokenizer.encode(text, add_special_tokens=False).tokens for text in (" number", " Zahl", " läuft")]
    assert [len(word) for word in words[:2]] == [1, 1]
    assert len(words[2]) > 1


def bad(folder, files, **options):
    return lambda: prepare(config(folder, files, **options))


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"train.en": b"a\n"}, {}, r"data\.train: found 1 files; allowed: pairs of files"),
        ({"train.en": b"a\nb\n", "train.de": b"a\n"}, {}, r"data\.train: found train\.en and train\.de, of which train\.de ends before line 2"),
        ({"train.en": b"\xff\n", "train.de": b"a\n"}, {}, r"data\.train.*train\.en, which is not UTF-8"),
        ({"train.en.gz": b"no gzip", "train.de": b"a\n"}, {}, r"data\.train.*train\.en\.gz, which cannot be read"),
        ({"train.en": b"\n", "train.de": b"\n"}, {"tokenizer": "bpe"}, "without documents"),
        ({"train.csv": table(PAIRS)}, {"format": "csv"}, r"data\.source_column: found source; allowed: n, en, de"),
        ({"train.csv": table(PAIRS)}, {"format": "csv", "source_column": "en", "target_column": "ed"}, r"data\.target_column: found ed; allowed: n, en, de"),
        ({"train.csv": b"en,de\na,b,c\n"}, {"format": "csv", "source_column": "en", "target_column": "de"}, r"data\.train.*train\.csv, row 2 with 3 fields"),
        ({"train.csv": b'en,de\n"a,b\n'}, {"format": "csv", "source_column": "en", "target_column": "de"}, r"data\.train.*train\.csv \("),
        ({"train.jsonl": objects(PAIRS)}, {"format": "jsonl", "source_column": "translation.fr"}, r"data\.source_column: found translation\.fr; allowed: n, translation\.en, translation\.de"),
        ({"train.jsonl": objects(PAIRS)}, {"format": "jsonl", "source_column": "n"}, r"data\.source_column: found n, a column of int; allowed: a column of text"),
        ({"train.jsonl": b"{}\n[1]\n"}, {"format": "jsonl", "source_column": "n"}, r"data\.source_column"),
        ({"train.jsonl": b"[1]\n"}, {"format": "jsonl"}, r"data\.train.*train\.jsonl, line 1: \[1\]"),
        ({"train.jsonl": b"{\n"}, {"format": "jsonl"}, r"data\.train.*train\.jsonl, line 1 \("),
        ({}, {}, r"data\.train: found nothing"),
        ({"val.en": b"a", "val.de": b"b"}, {}, r"data\.train: found nothing, beside files of data\.validation"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, files, options, message):
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path, files, **options))


def test_bad_options_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.train: found .*nothing\.en, which is not there"):
        prepare(line_config(tmp_path, train=[str(tmp_path / "nothing.en"), str(tmp_path / "train.de")]))
    with pytest.raises(UserError, match=r"data\.tokenizer: found null"):
        prepare(line_config(tmp_path, tokenizer=None))
    with pytest.raises(UserError, match=r"data\.max_source_len: found 2; allowed: more than 2"):
        prepare(line_config(tmp_path, tokenizer="wordpiece", max_source_len=2))


# --- WikiSQL ---

TABLES = [
    {
        "id": "1-1",
        "header": ["Player", "No.", "Position"],
        "types": ["text", "real", "text"],
        "rows": [["A", 3, "guard"]],
    }
]
WIKISQL = [
    {"phase": 1, "table_id": "1-1", "question": "Who is a guard?", "sql": {"sel": 0, "conds": [[2, 0, "guard"]], "agg": 0}},
    {"phase": 1, "table_id": "1-1", "question": "How many guards above 3?", "sql": {"sel": 0, "conds": [[2, 0, "guard"], [1, 1, 3]], "agg": 3}},
    {"phase": 1, "table_id": "1-1", "question": "Highest number?", "sql": {"sel": 1, "conds": [], "agg": 1}},
]  # fmt: skip
AS_TEXTS = [
    ("Who is a guard? | Player | No. | Position", "SELECT Player FROM table WHERE Position = guard"),
    (
        "How many guards above 3? | Player | No. | Position",
        "SELECT COUNT Player FROM table WHERE Position = guard AND No. > 3",
    ),
    ("Highest number? | Player | No. | Position", "SELECT MAX No. FROM table"),
]


def wikisql(folder, rows=WIKISQL, tables=TABLES, **options) -> PairsConfig:
    files = {}
    for split in ("train", "val"):
        files[f"{split}.jsonl"] = lines(map(json.dumps, rows))
    for split in ("train", "val"):
        (folder / f"{split}.tables.jsonl").write_bytes(lines(map(json.dumps, tables)))
    return config(folder, files, format="wikisql", vocab_size=300, **options)


def test_wikisql(tmp_path):
    assert texts_of(prepare(wikisql(tmp_path))) == AS_TEXTS


def test_wikisql_s_numbers_are_those_of_its_own_query_class():
    """lib/query.py of the data set: agg_ops and cond_ops."""
    queries = [
        as_texts({"question": "?", "table": TABLES[0], "sql": {"sel": 1, "agg": agg, "conds": [[0, agg % 3, "A"]]}})[1]
        for agg in range(6)
    ]
    assert queries == [
        f"SELECT {agg}No. FROM table WHERE Player {operator} A"
        for agg, operator in zip(["", "MAX ", "MIN ", "COUNT ", "SUM ", "AVG "], "=><=><", strict=True)
    ]


def test_wikisql_s_tables_count(tmp_path):
    """Other names of columns: another store."""
    first = prepare(wikisql(tmp_path))
    renamed = [{**TABLES[0], "header": ["Name", "No.", "Position"]}]
    (tmp_path / "val.tables.jsonl").write_bytes(lines(map(json.dumps, renamed)))
    cfg = config(tmp_path, {}, format="wikisql", vocab_size=300)
    cfg.train, cfg.validation = [str(tmp_path / "train.jsonl")], [str(tmp_path / "val.jsonl")]
    second = prepare(cfg)
    assert first.folder != second.folder
    assert texts_of(second)[0][1] == "SELECT Name FROM table WHERE Position = guard"


def test_wikisql_from_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    names = ("column_index", "operator_index", "condition")
    rows = []
    for row in WIKISQL:
        conditions = dict(
            zip(names, ([str(c[i]) if i == 2 else c[i] for c in row["sql"]["conds"]] for i in range(3)), strict=True)
        )
        rows.append(
            {
                "question": row["question"],
                "table": {k: TABLES[0][k] for k in ("header", "id")},
                "sql": {**row["sql"], "conds": conditions},
            }
        )
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    cfg = config(tmp_path, {}, format="wikisql", hf_path=str(folder), hf_validation_split="validation", vocab_size=300)
    assert texts_of(prepare(cfg)) == AS_TEXTS


@pytest.mark.parametrize(
    ("rows", "tables", "message"),
    [
        ([{**WIKISQL[0], "table_id": "no"}], TABLES, r"data\.train: found .*train\.jsonl or its tables, without 'no'"),
        ([{"question": "?"}], TABLES, "without 'table_id'"),
        (
            [{**WIKISQL[0], "sql": {"sel": 9, "agg": 0, "conds": []}}],
            TABLES,
            r"data\.format: found wikisql, with a row that is not",
        ),
    ],
)
def test_bad_wikisql(tmp_path, rows, tables, message):
    with pytest.raises(UserError, match=message):
        prepare(wikisql(tmp_path, rows, tables))


def test_wikisql_without_tables(tmp_path):
    cfg = wikisql(tmp_path)
    (tmp_path / "train.tables.jsonl").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl, without train\.tables\.jsonl beside it"):
        prepare(cfg)


# --- Hugging Face ---


@pytest.mark.parametrize("nested", [False, True])
def test_a_dataset_gives_the_same_as_files(tmp_path, store, nested):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, pairs in (("train", PAIRS), ("validation", HELD_OUT)):
        rows = [{"translation": {"en": a, "de": b}} if nested else {"en": a, "de": b} for a, b in pairs]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    prefix = "translation." if nested else ""
    cfg = config(
        tmp_path,
        {},
        hf_path=str(folder),
        hf_validation_split="validation",
        source_column=f"{prefix}en",
        target_column=f"{prefix}de",
    )
    other = prepare(cfg)
    assert other.column("train", "target").values.tolist() == store.column("train", "target").values.tolist()
    assert texts_of(other) == HELD_OUT
    cfg.hf_validation_split = "validate"
    with pytest.raises(UserError, match=r"data\.hf_validation_split: found validate"):
        prepare(cfg)
    cfg.hf_validation_split, cfg.source_column = "validation", "fr"
    with pytest.raises(
        UserError, match=rf"data\.source_column: found fr; allowed: {prefix}de, {prefix}en|{prefix}en, {prefix}de"
    ):
        prepare(cfg)


# --- real data ---


def test_multi30k():
    folder = shared_data("mt/multi30k")
    split = [[str(folder / f"{split}.{side}.gz") for side in ("en", "de")] for split in ("train", "val")]
    cfg = PairsConfig(name="multi30k", train=split[0], validation=split[1], vocab_size=1000, max_source_len=48, max_target_len=48, num_workers=0)  # fmt: skip
    rows = open_rows(cfg, _line_pairs)
    assert sum(1 for _ in rows.read("train")) == 29_000
    cfg.max_examples = 3_000
    store = prepare(cfg)
    assert (store.num_examples("train"), store.num_examples("validation")) == (3_000, 1_014)
    data = data_module(cfg, store, batch_size=64, seed=1, total_steps=2, eval_batches=1000, objective="seq2seq")
    items = list(data.validation_loader())
    assert sum(len(item["source"]) for item in items) == 1_014
    tokenizer = load_tokenizer(store.tokenizer_path.read_bytes(), "test")
    for i, (source, target) in enumerate(texts_of(store)[:50]):
        assert target.startswith(tokenizer.decode(items[0]["target"][i].tolist()))
        assert source.startswith(tokenizer.decode(items[0]["source"][i].tolist()))


def test_e2e_counts_and_references():
    folder = shared_data("nlg/e2e")
    cfg = PairsConfig(
        name="e2e", format="csv", train=[str(folder / "trainset-tok.csv.gz")], validation=[str(folder / "devset.csv")],
        source_column="mr", target_column="ref", vocab_size=300, max_examples=4672,
    )  # fmt: skip
    store = prepare(cfg)
    assert (store.num_examples("train"), store.num_examples("validation")) == (4_672, 4_672)
    found = to_generate(cfg, store)
    assert len(found) == 547  # distinct meaning representations of the development set
    assert sum(len(item.references) for item in found) == 4_672
