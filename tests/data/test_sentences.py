"""GLUE: every task from its own files and from datasets, and the batches that come of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer
from toy_corpora import document

from sparse_pretrain.config_data import SentencesConfig
from sparse_pretrain.data.batches import SentenceBatches
from sparse_pretrain.data.build import prepare
from sparse_pretrain.data.sentences import GLUE_TASKS, SCORES
from sparse_pretrain.data.tokenizer import train_bpe, train_wordpiece
from sparse_pretrain.errors import UserError
from sparse_pretrain.limits import CHOICES
from tests.shared_data import shared_data

# the first lines of GLUE's own files
HEADERS = {
    "sst2": "sentence\tlabel",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
WRITTEN_AS_NUMBERS = ("cola", "sst2", "mrpc", "qqp", "wnli")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_wordpiece((document(seed) for seed in range(50)), 200))
    return path


def examples(name: str, count: int = 30) -> list[tuple[list[str], int | float]]:
    task = GLUE_TASKS[name]
    rng = np.random.default_rng(3)
    return [
        (
            [f'{document(i * 2 + k, 5).strip()} "quoted" {i}'.replace("\n", " ") for k in range(len(task.columns))],
            int(rng.integers(len(task.labels))) if task.labels else round(float(rng.random() * 5), 3),
        )
        for i in range(count)
    ]


def as_file(name: str, rows) -> str:
    task = GLUE_TASKS[name]
    columns = HEADERS[name].split("\t") if name in HEADERS else list(task.headerless)
    out = [HEADERS[name]] if name in HEADERS else []
    for texts, label in rows:
        written = str(label) if not task.labels or name in WRITTEN_AS_NUMBERS else task.labels[label]
        values = dict(zip(task.in_files, [*texts, written], strict=True))
        out.append("\t".join(values.get(column, "x") for column in columns))
    return "\n".join(out) + "\n"


def config(name, tokenizer, folder=None, **options) -> SentencesConfig:
    values = {"name": f"glue_{name}", "glue_task": name, "tokenizer": str(tokenizer), "seq_len": 24, "num_workers": 0}
    if folder is not None:
        values |= {"train": [str(folder / "train.tsv")], "validation": [str(folder / "dev.tsv")]}
    return SentencesConfig(**{**values, **options})


def check(store, name, tokenizer, train, validation) -> None:
    task, theirs = GLUE_TASKS[name], Tokenizer.from_file(str(tokenizer))
    theirs.enable_truncation(24)
    assert (store.num_classes, store.label_names) == (len(task.labels) or 1, list(task.labels) or None)
    for split, rows in (("train", train), ("validation", validation)):
        assert store.num_examples(split) == len(rows)
        batch = SentenceBatches(store, split, 24)(np.arange(len(rows)), None)
        labels = batch["labels"].tolist()
        assert labels == pytest.approx([label for _, label in rows], rel=1e-6)
        assert str(batch["labels"].dtype) == ("torch.int64" if task.labels else "torch.float32")
        for i, (texts, _) in enumerate(rows):
            expected = theirs.encode(*texts)
            fill = [0] * (24 - len(expected.ids))
            assert batch["tokens"][i].tolist() == expected.ids + fill
            assert batch["token_types"][i].tolist() == expected.type_ids + fill
            assert batch["mask"][i].tolist() == [bool(m) for m in expected.attention_mask] + [False] * len(fill)


def test_the_table_and_the_option_name_the_same_tasks():
    assert sorted(GLUE_TASKS) == sorted(CHOICES["data.glue_task"])


def test_labels_are_numbered_as_on_the_hub():
    assert {name: " ".join(task.labels) for name, task in GLUE_TASKS.items()} == {
        "cola": "unacceptable acceptable",
        "sst2": "negative positive",
        "mrpc": "not_equivalent equivalent",
        "stsb": "",
        "qqp": "not_duplicate duplicate",
        "mnli": "entailment neutral contradiction",
        "qnli": "entailment not_entailment",
        "rte": "entailment not_entailment",
        "wnli": "not_entailment entailment",
    }


@pytest.mark.parametrize("name", sorted(GLUE_TASKS))
def test_glue_s_own_files(tmp_path, tokenizer, name):
    rows = examples(name)
    (tmp_path / "train.tsv").write_text(as_file(name, rows[:20]), encoding="utf-8-sig")
    (tmp_path / "dev.tsv").write_text(as_file(name, rows[20:]))
    check(prepare(config(name, tokenizer, tmp_path)), name, tokenizer, rows[:20], rows[20:])


@pytest.mark.parametrize("name", sorted(GLUE_TASKS))
def test_datasets(tmp_path, tokenizer, name):
    datasets = pytest.importorskip("datasets")
    task, rows = GLUE_TASKS[name], examples(name)
    folder = tmp_path / "dataset"
    folder.mkdir()
    features = {column: datasets.Value("string") for column in task.columns}
    features["label"] = datasets.ClassLabel(names=list(task.labels)) if task.labels else datasets.Value("float32")
    for split, part in (("train", rows[:20]), ("validation", rows[20:])):
        columns = {column: [texts[i] for texts, _ in part] for i, column in enumerate(task.columns)}
        columns["label"] = [label for _, label in part]
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(
            folder / f"{split}.parquet"
        )
    cfg = config(name, tokenizer, hf_path=str(folder), hf_validation_split="validation")
    check(prepare(cfg), name, tokenizer, rows[:20], rows[20:])


def test_tables_with_commas_and_without_a_header(tmp_path, tokenizer):
    lines = ['"A man, old",A man.,4.5\r\n', 'A dog.,"The ""dog""",0\r\n']
    (tmp_path / "train.csv").write_text("".join(lines * 3), newline="")
    store = prepare(
        config("stsb", tokenizer, train=[str(tmp_path / "train.csv")], validation=[str(tmp_path / "train.csv")])
    )
    theirs = Tokenizer.from_file(str(tokenizer))
    assert store.column("train", "tokens")[0].tolist() == theirs.encode("A man, old", "A man.").ids
    assert store.column("train", "tokens")[1].tolist() == theirs.encode("A dog.", 'The "dog"').ids
    assert store.column("train", "label").tolist() == [4.5, 0] * 3


def test_longer_texts_are_cut_first(tmp_path, tokenizer):
    (tmp_path / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tmask\t" + "weight " * 50 + "\t0\n")
    store = prepare(
        config("wnli", tokenizer, train=[str(tmp_path / "train.tsv")], validation=[str(tmp_path / "train.tsv")])
    )
    batch = SentenceBatches(store, "train", 24)(np.arange(1), None)
    assert batch["mask"].all()
    assert batch["token_types"].sum() == 24 - 2 - len(
        Tokenizer.from_file(str(tokenizer)).encode("mask", add_special_tokens=False)
    )


def test_a_decoder_s_tokenizer_does_too(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_bpe((document(seed) for seed in range(50)), 300))
    rows = examples("rte", 4)
    (tmp_path / "train.tsv").write_text(as_file("rte", rows))
    (tmp_path / "dev.tsv").write_text(as_file("rte", rows))
    store = prepare(config("rte", path, tmp_path, seq_len=200))
    batch = SentenceBatches(store, "train", 200)(np.arange(4), None)
    for i, (texts, _) in enumerate(rows):
        theirs = Tokenizer.from_file(str(path))
        expected = [token for text in texts for token in [*theirs.encode(text).ids, 0]]
        assert batch["tokens"][i][batch["mask"][i]].tolist() == expected


def test_malformed_rows_are_counted(tmp_path, tokenizer, capsys):
    rows = as_file("qqp", examples("qqp", 10)) + "a line\nbroken in\ttwo\n"
    (tmp_path / "train.tsv").write_text(rows)
    (tmp_path / "dev.tsv").write_text(rows)
    assert prepare(config("qqp", tokenizer, tmp_path)).num_examples("train") == 10
    assert "train.tsv: skipped 2 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sst2", "text\tlabel\na\t0\n", r"data\.train: found .*train\.tsv with the columns text, label; allowed: sst2: the columns sentence, label"),
        ("cola", "a\tb\n", r"with the columns a, b; allowed: cola: the columns sentence, label"),
        ("sst2", "sentence\tlabel\na\t2\n", r"data\.train: found the label '2'; allowed: negative, positive"),
        ("sst2", "sentence\tlabel\na\tpositiv\n", "the label 'positiv'.*did you mean|the label 'positiv'; allowed: negative, positive"),
        ("sst2", "sentence\tlabel\na\t0.7\n", "the label '0.7'; allowed: negative, positive"),
        ("sst2", "sentence\tlabel\na\t-1\n", "the label '-1'.*test splits have no labels"),
        ("stsb", "a\tb\t5.1\n", "the label '5.1'; allowed: a score from 0 to 5"),
        ("stsb", "a\tb\tnan\n", "the label 'nan'"),
        ("stsb", "a\tb\tc\n", "the label 'c'"),
        ("sst2", "", r"data\.train: found no examples for the train split"),
        ("sst2", "sentence\tlabel\n", r"data\.train: found no examples for the train split"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, tokenizer, name, content, message):
    (tmp_path / "train.tsv").write_text(content)
    (tmp_path / "dev.tsv").write_text(as_file(name, examples(name)))
    with pytest.raises(UserError, match=message):
        prepare(config(name, tokenizer, tmp_path))


def test_a_bad_validation_file_is_named(tmp_path, tokenizer):
    (tmp_path / "train.tsv").write_text(as_file("sst2", examples("sst2")))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t2\n")
    with pytest.raises(UserError, match=r"data\.validation: found the label '2'"):
        prepare(config("sst2", tokenizer, tmp_path))


def test_bad_options_are_named(tmp_path, tokenizer):
    (tmp_path / "train.tsv").write_text(as_file("rte", examples("rte")))
    (tmp_path / "dev.tsv").write_text(as_file("rte", examples("rte")))
    with pytest.raises(UserError, match=r"data\.glue_task: found rta; .*did you mean rte"):
        prepare(config("rte", tokenizer, tmp_path, glue_task="rta"))
    with pytest.raises(UserError, match=r"data\.tokenizer: found null.*checkpoint"):
        prepare(dataclasses.replace(config("rte", tokenizer, tmp_path), tokenizer=None))
    with pytest.raises(UserError, match=r"data\.seq_len: found 4; allowed: at least 5"):
        prepare(config("rte", tokenizer, tmp_path, seq_len=4))


def test_an_unlabelled_split_of_a_dataset(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [-1, -1]}).to_parquet(folder / "train.parquet")
    with pytest.raises(UserError, match=r"data\.hf_path: found the label -1"):
        prepare(config("sst2", tokenizer, hf_path=str(folder)))
    datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0.7, 1.0]}).to_parquet(folder / "train.parquet")
    with pytest.raises(UserError, match=r"data\.hf_path: found the label 0.7"):
        prepare(config("sst2", tokenizer, hf_path=str(folder)))
    with pytest.raises(UserError, match=r"data\.hf_path: found sentence1; allowed: sentence, label"):
        prepare(config("rte", tokenizer, hf_path=str(folder)))


@pytest.mark.parametrize(
    ("name", "folder", "files", "counts"),
    [
        ("cola", "CoLA", ("in_domain_train.tsv", "in_domain_dev.tsv"), (8_551, 527)),
        ("sst2", "SST-2", ("train.tsv", "dev.tsv"), (67_349, 872)),
        ("rte", "RTE", ("train.tsv", "dev.tsv"), (2_490, 277)),
        ("stsb", "STS-B", ("stsb-en-train.csv", "stsb-en-dev.csv"), (5_749, 1_500)),
    ],
)
def test_real_data(name, folder, files, counts):
    paths = [str(shared_data(f"glue/{folder}") / file) for file in files]
    vocab = shared_data("tokenizers/bert-base-uncased/vocab.txt")
    few = 3_000 if name == "sst2" else None  # all of it takes half a minute
    store = prepare(config(name, vocab, train=[paths[0]], validation=[paths[1]], max_examples=few))
    assert store.num_examples("train") == (few or counts[0])
    assert store.num_examples("validation") == counts[1]
    labels = store.column("train", "label")
    if GLUE_TASKS[name].labels:
        assert sorted(np.unique(labels)) == [0, 1]
    else:
        assert (labels.min(), labels.max()) == SCORES
