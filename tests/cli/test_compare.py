"""`sparse-pretrain compare`: a grid of ordinary runs, then what came out."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sparse_pretrain import cli, compare, runs
from sparse_pretrain.config import CompareConfig
from sparse_pretrain.paths import config_dir
from sparse_pretrain.reporting.comparison import PlannedRun

OPTIONS = [
    "data=text", "data.vocab_size=300", "trainer.accelerator=cpu", "trainer.peak_tflops=1", "model.max_seq_len=16", "model.d_model=16",
    "model.n_layer=2", "trainer.steps=60", "trainer.batch_size=4", "trainer.eval_every=20", "trainer.eval_batches=2", "trainer.checkpoint_every=10",
    "trainer.log_every=2", "scheduler.warmup_steps=2", "data.num_workers=0",
]  # fmt: skip


def request_of(*options):
    with cli._configs():
        return compare.parse(cli._parse(list(options)))


def grid(*options, seeds=(1, 2, 3)):
    (only,) = request_of(*options).grids(CompareConfig(None, None, None, seeds=list(seeds)))
    return only


def test_every_recipe_and_three_seeds_unless_others_are_asked_for():
    shipped = {path.stem for path in (config_dir() / "recipe").glob("*.yaml")}
    seeds, recipes = grid()
    assert seeds == "seed=1,2,3"
    first, *others = recipes.removeprefix("recipe=").split(",")
    assert first == "dense"
    assert {first, *others} == shipped
    assert len(others) == len(shipped) - 1


def test_dense_is_added_and_said(capsys):
    assert grid("recipe=ste,fst")[1] == "recipe=dense,ste,fst"
    assert "recipe=dense is added" in capsys.readouterr().out
    assert grid("recipe=ste,dense,ste")[1] == "recipe=dense,ste"
    assert not capsys.readouterr().out


def test_options_of_recipes_are_not_for_dense():
    request = request_of("recipe=ste,fst", "recipe.fp8=true", "trainer.steps=9")
    dense, sparse = request.grids(CompareConfig(None, None, None, seeds=[1, 2]))
    assert dense == ["seed=1,2", "recipe=dense", "trainer.steps=9"]
    assert sparse == ["seed=1,2", "recipe=ste,fst", "recipe.fp8=true", "trainer.steps=9"]


def test_hydras_grammar_holds():
    request = request_of("seeds=range(1,4)", "recipe=glob(s*)", "trainer.steps=5", "out=x", "+logger=csv")
    assert request.recipes == sorted(path.stem for path in (config_dir() / "recipe").glob("s*.yaml"))
    assert request.own == ["seeds=[1,2,3]", "out=x"]
    assert request.shared == ["trainer.steps=5", "+logger=csv"]
    assert request_of("seeds=[4,5]").own == ["seeds=[4,5]"]
    assert request_of("recipe=[ste,fst]").recipes == ["ste", "fst"]
    assert grid(seeds=(2, 1, 2))[0] == "seed=2,1"


@pytest.fixture(scope="module")
def command(tmp_path_factory, corpus):
    """A small comparison, as the options of its command line; its folder."""
    folder = tmp_path_factory.mktemp("comparison")
    options = ["recipe=ste", "seeds=1,2", *OPTIONS, f"data.train=[{corpus}]", f"runs_dir={folder}/runs", f"out={folder}/out"]  # fmt: skip
    return ["compare", *options], folder


@pytest.fixture(scope="module")
def interrupted(command):
    """SIGTERM in its second run."""
    options, folder = command
    environment = {**os.environ, "SPARSE_PRETRAIN_CACHE": str(folder / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_pretrain.cli", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    while not any(len(runs.read_rows(path)) > 5 for path in (folder / "runs").glob(f"*-ste-*/{runs.METRICS_FILE}")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    return process, *process.communicate(timeout=60)


def test_an_interrupted_comparison_ends_with_75_and_no_results(command, interrupted):
    process, output, errors = interrupted
    assert process.returncode == 75, errors
    assert "the same command continues it" in errors
    assert "run 1 of 4: dense, seed 1\n" in output
    assert "run 2 of 4: ste, seed 1; about " in output
    assert "run 3" not in output
    assert not list((command[1] / "out").iterdir())


def test_the_same_command_continues_it(command, interrupted, capsys, monkeypatch):
    options, folder = command
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(folder / "cache"))
    cli.main(options)
    output = capsys.readouterr().out
    assert "gpt_nano-dense-" in output.split("is complete")[0]
    assert "run 1 of 4" not in output
    assert "resuming at step" in output
    assert [f"run {number} of 4" in output for number in (2, 3, 4)] == [True] * 3
    table = output[output.index("val loss") :].splitlines()
    assert [line.split()[:2] for line in table[2:4]] == [["dense", "2"], ["ste", "2"]]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "comparison.json",
        "comparison.md",
        "comparison.png",
    ]
    values = runs.read_json(folder / "out" / "comparison.json")
    losses = {
        (run["recipe"], run["seed"]): runs.read_json(folder / "runs" / run["run"] / runs.SUMMARY_FILE)["val_loss"]
        for run in values["runs"]
    }
    assert set(losses) == {("dense", 1), ("dense", 2), ("ste", 1), ("ste", 2)}
    gaps = [100 * (losses["ste", seed] / losses["dense", seed] - 1) for seed in (1, 2)]
    assert [run["gap_percent"] for run in values["runs"] if run["recipe"] == "ste"] == pytest.approx(gaps)
    assert values["command"].startswith("sparse-pretrain compare recipe=ste seeds=1,2 data=text")


def test_nothing_runs_twice(command, interrupted, capsys, monkeypatch):
    """And its runs are those that `train` makes."""
    options, folder = command
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(folder / "cache"))
    cli.main(options)
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob(f"*/{runs.METRICS_FILE}")}
    assert len(before) == 4
    cli.main(options)
    shared = [option for option in options[3:] if not option.startswith("out=")]
    cli.main(["train", "recipe=ste", "seed=2", *shared])
    output = capsys.readouterr().out
    assert "run 1 of" not in output
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").glob(f"*/{runs.METRICS_FILE}")}


def test_a_run_that_fails_does_not_end_it(command, interrupted, capsys, monkeypatch):
    options, folder = command
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(folder / "cache"))
    cli.main(options)  # dense is there
    capsys.readouterr()
    cfgs = cli._preflight("train", ["-m", "recipe=fst", "seed=1,2", *[o for o in options[3:] if "out=" not in o]])
    blocked = runs.resolve_run_dir(cfgs[0])
    blocked.write_text("a file where the run wants its folder")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "recipe=fst", *options[2:]])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert f"{blocked}, which cannot be written" in printed.err
    assert "fst, seed 1: FAILED after step 0" in printed.out
    row = next(line.split() for line in printed.out.splitlines() if line.startswith("fst "))
    assert row[:3] == ["fst", "F", "1/2"]


def test_results_are_beside_the_runs_unless_said(tmp_path, command):
    jobs = cli._preflight("train", ["-m", "recipe=dense,ste", "seed=1,2", f"runs_dir={tmp_path}"])
    cfg = CompareConfig(None, None, None)
    first = compare.Comparison(cfg, jobs, ["recipe=ste"])
    assert first.out.parent == tmp_path
    assert first.out.name.startswith("compare-gpt_nano-")
    assert compare.Comparison(cfg, jobs[::-1], []).out == first.out
    assert compare.Comparison(cfg, jobs[1:], []).out != first.out


def test_time_left_is_that_of_the_runs_that_are_left(tmp_path):
    def run(recipe, seed, seconds=None):
        folder = tmp_path / f"{recipe}-{seed}"
        folder.mkdir()
        if seconds:
            runs.write_json(folder / runs.SUMMARY_FILE, {"seconds": seconds})
        return PlannedRun(recipe, seed, folder)

    planned = [run("dense", 3), run("ste", 3)]
    assert compare.seconds_left(planned) is None
    planned += [run("dense", 1, 10.0), run("dense", 2, 20.0), run("fst", 1, 60.0), run("fst", 2)]
    assert compare.seconds_left(planned) == pytest.approx(15 + 30 + 60)  # ste as all of them: (10 + 20 + 60) / 3


def test_help_and_the_config_of_its_runs():
    def output(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "sparse_pretrain.cli", "compare", *arguments], capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    assert "every recipe with seeds 1, 2 and 3" in output("--help")
    text = output("--cfg", "job", "recipe=ste", "seeds=4,5", "trainer.steps=7")
    assert "  steps: 7" in text
    assert "seeds:\n- 4\n- 5\nout: null" in text
    assert "  name: ste" in text
