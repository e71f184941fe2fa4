"""The commands as a user runs them, one after the other, on one small run."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_pretrain import cli, runs
from sparse_pretrain.checkpoint import store
from tests.tasks.test_training import assert_same_run

OPTIONS = [
    "data=text", "data.vocab_size=300", "trainer.accelerator=cpu", "trainer.peak_tflops=1", "model.max_seq_len=16", "model.d_model=16",
    "model.n_layer=2", "trainer.steps=12", "trainer.batch_size=4", "trainer.eval_every=4", "trainer.eval_batches=2", "trainer.checkpoint_every=2",
    "trainer.log_every=1", "scheduler.warmup_steps=2", "data.num_workers=0", "recipe.schedule.refresh_every=3",
]  # fmt: skip


def run_cli(*arguments: str) -> None:
    cli.main(list(arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """A grid of dense, ste and fst runs: its runs folder and what was printed."""
    folder = tmp_path_factory.mktemp("grid")
    environment = {**os.environ, "SPARSE_PRETRAIN_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    result = subprocess.run(
        [sys.executable, "-m", "sparse_pretrain.cli", "train", "-m", "recipe=dense,ste,fst", *OPTIONS, f"data.train=[{corpus}]", f"runs_dir={folder}/runs"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "runs", result.stdout


def run_of(trained, recipe):
    (folder,) = trained[0].glob(f"gpt_nano-{recipe}-*")
    return folder


def test_train_ends_with_a_table_and_a_page(trained):
    folder, output = trained
    table = output[output.index("val loss") :]
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["dense", "ste", "fst"]
    assert f"Report: {folder}/report.html" in output
    assert (folder / "report.html").stat().st_size > 10_000
    assert "8 linear layers" not in output
    assert "4 linear layers 2:4 sparse" in output


def test_a_run_folder_says_everything(trained):
    facts = runs.read_json(run_of(trained, "fst") / runs.RUN_FILE)
    assert facts["packages"]["torch"]
    assert facts["git"] == runs.git_state(Path.cwd())
    assert facts["corpus"]["digest"]
    assert sum(row["sparse"] for row in facts["layers"]) == 4
    summary = runs.read_json(run_of(trained, "fst") / runs.SUMMARY_FILE)
    assert summary["steps"] == 12


def evaluate(capsys, *arguments) -> tuple[str, float]:
    run_cli("evaluate", "accelerator=cpu", *arguments)
    output = capsys.readouterr().out
    return output, float(re.search(r"loss +([\d.]+)", output).group(1))


def test_evaluate_gives_the_same_numbers_for_every_representation(trained, capsys):
    checkpoint = f"checkpoint={run_of(trained, 'ste')}"
    results = {
        weights: evaluate(capsys, checkpoint, f"weights={weights}") for weights in ("auto", "dense", "sparse", "packed")
    }
    assert len({loss for _, loss in results.values()}) == 1
    assert "packed: values and 2-bit metadata in 4 layers" in results["packed"][0]
    assert "with 2:4 zeros in 4 layers" in results["dense"][0]
    summary = runs.read_json(run_of(trained, "ste") / runs.SUMMARY_FILE)
    _, first_batches = evaluate(capsys, checkpoint, "batches=2", "batch_size=4")
    assert first_batches == pytest.approx(summary["val_loss"], abs=1e-5)


def test_evaluate_says_when_there_is_nothing_sparse(trained, capsys):
    checkpoint = f"checkpoint={run_of(trained, 'fst')}"  # ends with its dense fine-tune
    assert re.search(r"weights +dense\n", evaluate(capsys, checkpoint)[0])
    with pytest.raises(SystemExit):
        run_cli("evaluate", checkpoint, "weights=packed")
    assert "weights: found packed, but no layer of this checkpoint is in its sparse phase" in capsys.readouterr().err


def test_evaluate_on_other_text(trained, capsys, corpus, tmp_path):
    (tmp_path / "other.txt").write_text("a few other words " * 30)
    checkpoint = f"checkpoint={run_of(trained, 'dense')}"
    _, own = evaluate(capsys, checkpoint, f"text=[{corpus}]")
    output, other = evaluate(capsys, checkpoint, f"text=[{tmp_path}/other.txt]")
    assert "other.txt" in output
    assert other > own


def test_generate_repeats_itself_for_a_seed(trained, capsys):
    texts = []
    for seed in (1, 1, 2):
        run_cli("generate", f"checkpoint={run_of(trained, 'ste')}", "prompt=abc", "max_new_tokens=30", f"seed={seed}")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("abc")


def test_report_of_chosen_runs(trained, capsys, tmp_path):
    run_cli("report", f"runs=[{run_of(trained, 'dense')},{run_of(trained, 'ste')}]", f"out={tmp_path}/page.html")
    output = capsys.readouterr().out
    assert "ste" in output
    assert "fst" not in output
    assert (tmp_path / "page.html").is_file()


def test_doctor(capsys):
    run_cli("doctor")
    output = capsys.readouterr().out
    for word in ("torch", "device", "backend gluon", "W&B", "cache"):
        assert word in output


def test_version_and_overview(capsys):
    run_cli("--version")
    run_cli()
    output = capsys.readouterr().out
    assert output.startswith("sparse-pretrain 0.")
    assert "sparse-pretrain COMMAND --help" in output


def test_help_lists_groups_and_options():
    result = subprocess.run(
        [sys.executable, "-m", "sparse_pretrain.cli", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert "recipe: ast, dense, fst, maskllm, s_ste, slope, sr_ste, ste, step" in result.stdout
    assert "refresh_every: 40" in result.stdout


def start(folder, corpus, *options, **how):
    return subprocess.Popen(
        [sys.executable, "-m", "sparse_pretrain.cli", "train", *OPTIONS, f"data.train=[{corpus}]", f"run_dir={folder}", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how,
    )  # fmt: skip


def wait_for_step(folder, step, process):
    while not any(int(row["step"]) >= step for row in runs.read_rows(folder / runs.METRICS_FILE)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


LONG = ["trainer.steps=2000", "trainer.eval_every=500", "trainer.checkpoint_every=50", "trainer.log_every=5"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_75(tmp_path, corpus, number):
    process = start(tmp_path / "run", corpus, *LONG)
    wait_for_step(tmp_path / "run", 10, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    (step,) = re.findall(
        rf"{number.name}: checkpoint saved at step (\d+) of 2000; the same command continues it", errors
    )
    newest, notes = store.newest_valid(tmp_path / "run" / runs.CHECKPOINTS)
    assert newest.name == f"step-{int(step):08d}"
    assert not notes


@pytest.mark.slow
@pytest.mark.parametrize("options", [["data.num_workers=2"], ["trainer.devices=2"]], ids=["workers", "ranks"])
def test_a_signal_to_the_whole_process_group(tmp_path, corpus, options):
    """As SLURM and containers send it: data workers and ranks get it too."""
    process = start(tmp_path / "run", corpus, *LONG, *options, start_new_session=True)
    wait_for_step(tmp_path / "run", 10, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.count("SIGTERM: checkpoint saved at step") == 1
    assert "Traceback" not in errors
    assert store.newest_valid(tmp_path / "run" / runs.CHECKPOINTS)[0] is not None


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(tmp_path, corpus):
    process = start(tmp_path / "run", corpus, *LONG, "trainer.devices=2")
    wait_for_step(tmp_path / "run", 10, process)
    process.kill()
    process.wait()
    time.sleep(1)
    rows = len(runs.read_rows(tmp_path / "run" / runs.METRICS_FILE))
    time.sleep(1)
    assert len(runs.read_rows(tmp_path / "run" / runs.METRICS_FILE)) == rows


@pytest.mark.slow
def test_an_error_with_several_ranks_is_told_once(tmp_path, corpus):
    process = start(tmp_path / "run", corpus, "trainer.devices=2", "optimizer.lr=1e30", "trainer.guard.max_skipped=2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_signal_before_the_first_step(tmp_path, corpus):
    process = start(tmp_path / "run", corpus)
    status, term = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGTERM - 1)
    deadline = time.monotonic() + 60
    while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) & term:  # it is handled as soon as can be
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_sigkill_at_random_moments_never_changes_the_result(tmp_path, corpus):
    options = [
        "trainer.steps=200",
        "trainer.checkpoint_every=7",
        "trainer.eval_every=50",
        "trainer.log_every=3",
        "trainer.micro_batch_size=2",
    ]
    whole = start(tmp_path / "whole", corpus, *options)
    assert whole.wait(timeout=120) == 0
    draw = random.Random(0)
    kills = 0
    for _ in range(40):
        process = start(tmp_path / "killed", corpus, *options)
        rows = runs.read_rows(tmp_path / "killed" / runs.METRICS_FILE)
        done = int(rows[-1]["step"]) if rows else 0
        try:
            wait_for_step(tmp_path / "killed", done + draw.randint(10, 50), process)
        except AssertionError:
            break  # it came to its end
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait(timeout=120) == 0
    assert kills >= 4
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_records_the_command_that_continues_it(trained, corpus):
    command = runs.read_json(run_of(trained, "fst") / runs.RUN_FILE)["command"]
    assert command.startswith("sparse-pretrain train ")
    assert "recipe=fst" in command
    assert f"runs_dir={trained[0]}" in command


def test_the_git_state_of_a_run(tmp_path, monkeypatch):
    assert runs.git_state(tmp_path) is None
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "someone")
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    state = runs.git_state(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", state["commit"])
    assert not state["changed"]
    (tmp_path / "b").write_text("not tracked")
    assert runs.git_state(tmp_path) == state
    (tmp_path / "a").write_text("2")
    assert runs.git_state(tmp_path) == {**state, "changed": True}
