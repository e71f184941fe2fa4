import subprocess
import sys

import numpy as np
import pytest

from sparse_pretrain import runs
from sparse_pretrain.errors import UserError
from sparse_pretrain.reporting.run_data import dense_counterpart, labels, read_run
from sparse_pretrain.reporting.table import compare, comparison_table, duration, rate


def cells(*folders):
    """run -> column -> text"""
    header = ("val loss", "perplexity", "vs dense", "tokens/s", "x dense", "flip rate", "sparse", "time")
    table = compare([read_run(folder) for folder in folders]).cells
    return {row[0]: dict(zip(header, row[1:], strict=True)) for row in table}


def test_figures_of_a_comparison(make_run):
    table = cells(make_run("ste", 4.2), make_run("dense", 4.0), make_run("fst", 3.98))
    assert list(table) == ["dense", "ste", "fst"]
    assert table["dense"] == {
        "val loss": "4.0000",
        "perplexity": "54.60",  # e^4
        "vs dense": "-",
        "tokens/s": "10,000",
        "x dense": "-",
        "flip rate": "-",
        "sparse": "-",
        "time": "1m 22s",  # 400 steps of 8 x 256 tokens at 10,000 tokens/s
    }
    assert table["ste"]["vs dense"] == "+5.00%"
    assert table["fst"]["vs dense"] == "-0.50%"
    assert (table["ste"]["x dense"], table["fst"]["x dense"]) == ("0.80x", "0.50x")
    assert table["fst"]["sparse"] == "25%"  # 8 layers of 512 x 128, of 2^21 parameters
    assert table["ste"]["flip rate"].endswith(" / 1 step")
    assert table["fst"]["flip rate"].endswith(" / 40 steps")


def test_flip_rate_is_the_last_one(make_run):
    folder = make_run("fst")
    lines = (folder / runs.METRICS_FILE).read_text().splitlines()
    last = dict(zip(runs.METRICS_COLUMNS, lines[-1].split(","), strict=True))
    assert cells(folder)["fst"]["flip rate"] == f"{float(last['sparsity/flip_rate']):.4f} / 40 steps"


def test_without_a_comparable_dense_run(make_run):
    folders = [make_run("dense", seed=2), make_run("ste")]
    assert cells(*folders)["ste"]["vs dense"] == cells(*folders)["ste"]["x dense"] == "-"
    assert "no dense run with the same other options" in comparison_table([read_run(f) for f in folders])


def test_another_corpus_of_the_same_name_is_not_comparable(make_run):
    dense, sparse = make_run("dense"), make_run("ste")
    facts = runs.read_json(dense / runs.RUN_FILE)
    runs.write_json(dense / runs.RUN_FILE, {**facts, "corpus": {**facts["corpus"], "digest": "other"}})
    assert dense_counterpart(read_run(sparse), [read_run(dense)]) is None


def test_speeds_of_two_devices_are_not_compared(make_run):
    table = cells(make_run("dense", 4.0, device="NVIDIA H100"), make_run("ste", 4.2))
    assert (table["ste"]["vs dense"], table["ste"]["x dense"]) == ("+5.00%", "-")


def test_unfinished_run_says_where_it_is(make_run):
    folders = [make_run("dense"), make_run("fst", until=230)]
    assert cells(*folders)["fst"]["vs dense"] == "-"
    assert "fst: not complete, at step 230 of 400." in comparison_table([read_run(f) for f in folders])


def test_before_the_first_validation(make_run):
    row = cells(make_run("ste", until=20))["ste"]
    assert (row["val loss"], row["perplexity"]) == ("-", "-")


def test_labels_are_recipes_where_they_tell_runs_apart(make_run):
    folders = [make_run("dense"), make_run("fst"), make_run("fst", seed=2), make_run("fst", seed=3)]
    assert labels([read_run(f) for f in folders]) == ["dense", "00000001", "00000002", "00000003"]


@pytest.mark.parametrize("length", [3, 21, 120])
def test_text_table_fits_a_terminal(make_run, length):
    folders = [make_run("fst", name="a" * length, seed=1), make_run("fst", 13.0, name="b" * length, seed=2)]
    text = comparison_table([read_run(f) for f in [*folders, make_run("dense")]])
    table = text.splitlines()
    assert all(len(line) <= 100 or set(line) <= set("ab") for line in table)
    assert "a" * length in table[3]
    assert text.isascii()
    assert len({len(line) for line in table if line.endswith(("s", "time"))} - {length}) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.14, "3.1s"),
        (59.4, "59s"),
        (59.7, "1m 00s"),
        (112, "1m 52s"),
        (3599.8, "1h 00m"),
        (11100, "3h 05m"),
        (187200, "2d 04h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_rate_keeps_two_digits():
    assert [rate(value) for value in (0.0, 0.00312, 0.000042)] == ["0.0000", "0.0031", "4.2e-05"]


def test_run_is_read_as_numbers(make_run):
    run = read_run(make_run("fst", 4.0))
    assert run.step == 400
    assert run.val_loss == 4.0
    assert np.isnan(run.rows["val/loss"]).sum() == 32  # 40 rows, 8 validations
    assert (run.phases[0], run.phases[-1]) == ("sparse", "dense fine-tune")
    assert list(run.snapshots) == [50, 250, 400]
    corner = run.snapshots[400]["blocks.0.ffn.up"]
    assert corner.dtype == bool
    assert (corner.reshape(-1, 4).sum(1) == 2).all()


def test_damaged_snapshot_is_left_out(make_run):
    folder = make_run("fst")
    (folder / "masks" / "step-00000400.npz").write_bytes(b"PK\x03\x04 cut short")
    assert list(read_run(folder).snapshots) == [50, 250]


def test_folders_that_cannot_be_shown(make_run, tmp_path):
    with pytest.raises(UserError, match=r"a run folder, one that holds config\.yaml"):
        read_run(tmp_path)
    folder = make_run("fst")
    (folder / runs.CONFIG_FILE).write_text("modle: 1")
    with pytest.raises(UserError, match=r"gpt_nano-fst-00000001, whose config has modle: found no such option"):
        read_run(folder)
    folder = make_run("ste")
    (folder / runs.METRICS_FILE).unlink()
    with pytest.raises(UserError, match="no metrics yet"):
        read_run(folder)


def test_the_table_needs_neither_matplotlib_nor_torch():
    code = "import sys, sparse_pretrain.report; print({'matplotlib', 'torch', 'hydra'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
