import csv
import io
import json
import subprocess
import sys

import pytest

from sparse_pretrain import runs
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import config_dir
from sparse_pretrain.reporting.comparison import PlannedRun, loss_at, read_comparison
from sparse_pretrain.reporting.comparison_figure import COLOURS, spread_out, write_comparison_figure
from sparse_pretrain.reporting.comparison_table import (
    Provenance,
    comparison_json,
    comparison_markdown,
    comparison_text,
    reading_notes,
)
from sparse_pretrain.reporting.run_data import read_run

PROVENANCE = Provenance("sparse-pretrain compare recipe=dense,ste seeds=1,2,3", "2026-01-02")


@pytest.fixture
def plan(make_run):
    """plan({"ste": [4.1, None]}) -> planned runs of seeds 1, 2, … with these final losses; None: it failed."""

    def make(losses):
        return [
            PlannedRun(recipe, seed, make_run(recipe, loss or 4.0, until=None if loss else 230, seed=seed))
            for recipe, of_seeds in losses.items()
            for seed, loss in enumerate(of_seeds, start=1)
        ]

    return make


def change_rows(folder, change):
    path = folder / runs.METRICS_FILE
    rows = runs.read_rows(path)
    for row in rows:
        change(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, runs.METRICS_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())


def change_facts(folder, **facts):
    runs.write_json(folder / runs.RUN_FILE, {**runs.read_json(folder / runs.RUN_FILE), **facts})


def change_config(folder, old, new):
    path = folder / runs.CONFIG_FILE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def by_recipe(planned):
    return {result.recipe: result for result in read_comparison(planned).recipes}


def test_means_spreads_and_paired_gaps(plan):
    results = by_recipe(plan({"dense": [4.0, 4.2, 4.1], "ste": [4.04, 4.2, 4.1205]}))
    assert results["dense"].loss.mean == pytest.approx(4.1)
    assert results["dense"].loss.deviation == pytest.approx(0.1)
    assert [outcome.gap for outcome in results["ste"].outcomes] == pytest.approx([1.0, 0.0, 0.5])
    assert results["ste"].gap.mean == pytest.approx(0.5)
    assert results["ste"].gap.deviation == pytest.approx(0.5)  # the seeds' own spread is not in it
    assert results["ste"].loss.deviation == pytest.approx(0.0800, abs=1e-4)


def test_speeds_are_medians_and_paired_ratios(plan):
    planned = plan({"dense": [4.0] * 3, "ste": [4.1] * 3})

    def slower(row):
        row["seconds"] = float(row["seconds"]) * 4

    change_rows(planned[0].folder, slower)  # dense, seed 1
    change_rows(planned[3].folder, slower)  # ste, seed 1
    results = by_recipe(planned)
    assert results["dense"].tokens_per_second == pytest.approx(10_000)
    assert results["ste"].tokens_per_second == pytest.approx(8_000)
    assert [outcome.speed for outcome in results["ste"].outcomes] == pytest.approx([0.8] * 3)


def test_speed_counts_every_phase_but_not_the_first_interval(plan):
    planned = plan({"dense": [4.0]})

    def half_as_fast_in_the_second_half(row):
        step = int(row["step"])
        row["seconds"] = 1000 + step + max(0, step - 200)

    change_rows(planned[0].folder, half_as_fast_in_the_second_half)
    # rows from step 10 to 400, of 2048 tokens a step: 390 + 200 seconds
    assert by_recipe(planned)["dense"].tokens_per_second == pytest.approx(390 * 2048 / 590)


def test_loss_at_equal_wall_clock(plan):
    planned = plan({"dense": [4.0, 4.0], "ste": [4.1, 4.1], "fst": [4.05, 4.05]})
    comparison = read_comparison(planned)
    assert comparison.fastest == "dense"
    assert comparison.seconds == pytest.approx(400 * 8 * 256 / 10_000)  # 81.92 s: ste is at step 327.68 · 8/10 = 327.7
    ste = read_run(planned[2].folder)
    losses = dict(zip(*ste.logged("step", "val/loss"), strict=True))
    expected = losses[300] + (400 * 0.8 - 300) / 50 * (losses[350] - losses[300])
    results = {result.recipe: result for result in comparison.recipes}
    assert results["ste"].loss_at_time.mean == pytest.approx(expected)
    assert results["dense"].loss_at_time.mean == pytest.approx(4.0)
    assert results["fst"].loss_at_time.mean > results["ste"].loss_at_time.mean


def test_loss_at_a_time_outside_the_validations(plan):
    run = read_run(plan({"dense": [4.0]})[0].folder)
    first, last = run.logged("seconds", "val/loss")[0][[0, -1]]
    assert str(loss_at(run, first - 0.01)) == "nan"
    assert loss_at(run, last + 100) == 4.0


def test_a_failed_run_is_shown_and_not_counted(plan):
    planned = plan({"dense": [4.0, 4.0], "ste": [4.04, None], "fst": [None, None]})
    (planned[-1].folder / runs.METRICS_FILE).unlink()  # it did not even log a step
    comparison = read_comparison(planned)
    assert [result.recipe for result in comparison.recipes] == ["dense", "ste", "fst"]
    ste = comparison.recipes[1]
    assert (ste.gap.mean, str(ste.gap.deviation)) == (pytest.approx(1.0), "nan")
    text = comparison_text(comparison)
    assert "ste, seed 2: FAILED after step 230" in text
    assert "fst, seed 2: FAILED after step 0" in text
    lines = text.splitlines()
    assert lines[3].split()[:3] == ["ste", "1/2", "4.0400"]
    assert lines[4].split() == ["fst", "0/2", "FAILED", "-", "-", "-", "-", "-"]
    failed = comparison_json(comparison, PROVENANCE)["failed"]
    assert [(run["recipe"], run["seed"], run["last_step"]) for run in failed] == [
        *(("ste", 2, 230), ("fst", 1, 230), ("fst", 2, 0)),
    ]


def test_without_the_dense_run_of_a_seed_there_is_no_gap(plan):
    results = by_recipe(plan({"dense": [None, 4.0], "ste": [4.04, 4.08]}))
    assert str(results["ste"].outcomes[0].gap) == "nan"
    assert results["ste"].gap.mean == pytest.approx(2.0)
    assert results["ste"].loss.mean == pytest.approx(4.06)


def test_no_complete_run(plan):
    with pytest.raises(UserError, match="not one run that came to its end"):
        read_comparison(plan({"dense": [None], "ste": [None]}))


@pytest.mark.parametrize(
    ("change", "option", "found"),
    [
        (
            lambda f: change_facts(f, corpus={**runs.read_json(f / runs.RUN_FILE)["corpus"], "digest": "abc"}),
            "data",
            "abc",
        ),
        (lambda f: change_facts(f, precision="bfloat16"), "trainer.precision", "bfloat16"),
        (lambda f: change_config(f, "steps: 400", "steps: 500"), "trainer.steps", "500"),
        (lambda f: change_config(f, "eval_batches: 16", "eval_batches: 4"), "trainer.eval_batches", "4"),
        (lambda f: change_config(f, "seq_len: 256", "seq_len: 128"), "data.seq_len", "128"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(plan, change, option, found):
    planned = plan({"dense": [4.0, 4.0], "ste": [4.1, 4.1]})
    change(planned[-1].folder)
    with pytest.raises(
        UserError, match=rf"^{option}: found .* and {found} in gpt_nano-ste-00000002; allowed: the same"
    ):
        read_comparison(planned)


def test_speeds_of_different_machines_are_not_compared(plan):
    planned = plan({"dense": [4.0, 4.0], "ste": [4.04, 4.04]})
    change_facts(planned[-1].folder, device="NVIDIA H100")
    comparison = read_comparison(planned)
    text = comparison_text(comparison)
    assert "loss @" not in text
    assert "tokens/s: - because these runs are of different machines" in text
    assert text.splitlines()[3].split()[:5] == ["ste", "2", "4.0400", "+-0.0000", "+1.00"]
    assert text.splitlines()[2].split()[-2:] == ["-", "-"]
    assert comparison_json(comparison, PROVENANCE)["equal_time"] == {"fastest": None, "seconds": None}


def test_marks_say_what_else_a_recipe_does(plan):
    planned = plan({"dense": [4.0, 4.0], "fst": [4.1, 4.1]})
    for run in planned[2:]:
        change_config(run.folder, "models: []", "models: [self]")
        change_config(run.folder, "kind: none", "kind: lora")

    def warm_up(row):  # 30 % of one seed, 10 % of the other: STEP switches when it likes
        if int(row["step"]) <= (120 if later else 40):
            row["phase"] = "dense warm-up"

    later = True
    change_rows(planned[2].folder, warm_up)
    later = False
    change_rows(planned[3].folder, warm_up)
    comparison = read_comparison(planned)
    assert comparison.recipes[1].dense_start == pytest.approx(0.2)
    assert comparison.recipes[1].dense_end == pytest.approx(0.25)
    assert comparison_text(comparison).splitlines()[3].split()[:2] == ["fst", "WFTA"]
    notes = "\n".join(reading_notes(comparison))
    assert "W: begins with a dense warm-up, for this share of the run: fst 20%." in notes
    assert "F: ends with a dense fine-tune, so with dense weights, for this share of the run: fst 25%." in notes
    assert "T: also learns from a teacher: fst." in notes


def test_one_seed_has_no_spread(plan):
    text = comparison_text(read_comparison(plan({"dense": [4.0], "ste": [4.1]})))
    assert "+-" not in text
    assert "one seed says nothing about the spread" in text


def test_the_best_come_first_and_a_terminal_holds_them(plan):
    text = comparison_text(read_comparison(plan({"ste": [4.2, 4.3], "fst": [4.1, 4.0], "dense": [4.5, 4.4]})))
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["dense", "fst", "ste"]
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100


def test_numbers_for_other_programs(plan):
    planned = plan({"dense": [4.0, 4.2], "ste": [4.04, 4.2]})
    values = json.loads(json.dumps(comparison_json(read_comparison(planned), PROVENANCE), allow_nan=False))
    dense, ste = values["recipes"]
    assert dense["gap_percent"] == {"mean": None, "sample_standard_deviation": None}
    assert ste["gap_percent"]["mean"] == pytest.approx(0.5)
    assert ste["options"]["projection"] == "magnitude"
    assert [(run["recipe"], run["seed"]) for run in values["runs"]] == [
        *(("dense", 1), ("dense", 2), ("ste", 1), ("ste", 2)),
    ]
    last = values["runs"][2]
    assert last["validations"]["step"][-1] == 400
    assert last["validations"]["loss"][-1] == last["val_loss"] == 4.04
    assert last["flip_rate"] == read_run(planned[2].folder).flip_rate
    assert ste["flip_rate"]["mean"] == pytest.approx(sum(run["flip_rate"] for run in values["runs"][2:]) / 2)
    assert values["tokens"] == 400 * 8 * 256
    assert values["packages"]["torch"] == ["2.13.0"]


def test_page_can_be_repeated(plan):
    text = comparison_markdown(read_comparison(plan({"dense": [4.0, 4.2], "ste": [4.04, 4.2]})), PROVENANCE)
    assert f"```\n{PROVENANCE.command}\n```" in text
    for fact in ("2026-01-02", "CPU, 2 threads", "| torch | 2.13.0 |", "f6ab6f3ceb31", "2.10M parameters", "0.82M"):
        assert fact in text
    assert "| dense |  | 2 | 4.1000 ± 0.1414 | - | - | 10,000 | - |" in text
    assert "ran as dense products" in text
    assert "2 seeds at one size" in text


def test_on_a_gpu_products_are_not_excused(make_run):
    planned = [PlannedRun(recipe, 1, make_run(recipe, device="NVIDIA H100")) for recipe in ("dense", "ste")]
    assert "ran as dense products" not in comparison_markdown(read_comparison(planned), PROVENANCE)


def test_the_picture(plan, tmp_path):
    losses = {"dense": [4.0, 4.2, 4.1], "ste": [4.04, None, 4.1], "fst": [None] * 3}
    comparison = read_comparison(plan(losses))
    for name in ("a.png", "b.png"):
        write_comparison_figure(comparison, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [{"dense": [4.0]}, {"dense": [None], "ste": [4.1]}])
def test_the_picture_without_a_gap_to_show(plan, tmp_path, losses):
    write_comparison_figure(read_comparison(plan(losses)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_every_recipe_has_a_colour_of_its_own():
    assert set(COLOURS) == {path.stem for path in (config_dir() / "recipe").glob("*.yaml")}
    assert len(set(COLOURS.values())) == len(COLOURS)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.2, 0.5], [0.2, 0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        ([0.0, 0.01], [0.0, 0.1]),
        ([0.99, 1.0], [0.9, 1.0]),
        ([0.1, 0.5, 0.52, 0.9], [0.1, 0.46, 0.56, 0.9]),
    ],
)
def test_labels_move_apart_no_further_than_they_must(heights, expected):
    assert spread_out(heights, 0.1) == pytest.approx(expected)


def test_the_command_needs_neither_torch_nor_matplotlib_to_begin():
    code = "import sys, sparse_pretrain.compare; print({'matplotlib', 'torch', 'hydra'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
