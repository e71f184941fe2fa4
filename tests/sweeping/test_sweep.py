"""How trials end, and how processes share them: the whole command around runs that are fakes."""

import signal
import time

import pytest
from optuna.trial import TrialState

pytestmark = pytest.mark.slow

SEEDS = "seed: {{type: categorical, choices: {}}}"
LR = "optimizer.lr: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}"


def states(fake):
    return [trial.state.name for trial in fake.trials()]


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_finite_space_is_searched_to_its_end(fake, spaces):
    """The sampler repeats itself long before; what it never draws is run too."""
    output, _ = fake.run(*spaces(mine=SEEDS.format([1, 2, 3, 4])), "trials=9", "sampler=random", "workers=2")
    assert "4 trials over seed, 2 at once" in output
    assert "All settings of the space have been tried: 4 trials, of 9 asked for" in output
    assert sorted(trial.params["seed"] for trial in fake.trials()) == ["1", "2", "3", "4"]
    assert len(fake.events("done")) == 4


def test_a_grid_goes_in_order_and_more_trials_continue_it(fake, spaces):
    space = "optimizer.weight_decay: {type: float, low: 0, high: 0.2, step: 0.1}\n" + SEEDS.format([1, 2])
    options = [*spaces(mine=space), "sampler=grid", "pruner=none"]
    fake.run(*options, "trials=2")
    output, _ = fake.run(*options, "trials=4")
    assert "2 have been begun, 2 of them have ended: going on" in output
    found = [(trial.params["optimizer.weight_decay"], trial.params["seed"]) for trial in fake.trials()]
    assert found == [(0.0, "1"), (0.0, "2"), (0.1, "1"), (0.1, "2")]
    assert len(fake.events("start")) == 4


@pytest.mark.parametrize("step_seconds", [0.1, 0.0])  # 0: a trial is over before its rows are read
def test_failures_are_told_and_do_not_stop_the_others(fake, spaces, step_seconds):
    """13 fails, 17 diverges, 19 is killed again and again, 23 once."""
    space = SEEDS.format([1, 13, 17, 19, 23, 2])
    output, _ = fake.run(*spaces(mine=space), "sampler=grid", "pruner=none", "workers=2", step_seconds=step_seconds)
    found = {trial.params["seed"]: trial for trial in fake.trials()}
    assert {seed for seed, trial in found.items() if trial.state == TrialState.COMPLETE} == {"1", "2", "23"}
    reasons = {
        "13": "seed: found 13; allowed: luckier ones",
        "17": "diverged: the validation loss at step 4 is nan",
        "19": "its process ended by SIGKILL 3 times without getting any further",
    }
    for seed, reason in reasons.items():
        assert found[seed].user_attrs["reason"] == reason
        assert f"trial {found[seed].number}: failed: {reason}" in output
        assert f"trial {found[seed].number} failed: {reason}" in output  # in the table's notes
    starts = [run for run, *_ in fake.events("start")]
    assert sorted(starts.count(run) for run in set(starts)) == [1, 1, 1, 1, 2, 3]
    assert found["1"].user_attrs["steps"] == 6
    assert found["1"].user_attrs["seconds"] == 3.0


def test_too_many_failures_in_a_row_stop_it(fake, spaces):
    space = SEEDS.format([13, 1, 2]) + "\noptimizer.weight_decay: {type: float, low: 0, high: 0.2, step: 0.1}"
    options = [*spaces(mine=space), "sampler=grid", "pruner=none", "max_failures=2"]
    _, errors = fake.run(*options, code=2)
    expected = "max_failures: found 2 trials that failed in a row, the last with: seed: found 13; allowed: luckier ones"
    assert errors.startswith(f"error: {expected}")
    assert errors.count("\n") == 1
    assert states(fake) == ["FAIL"] * 2
    fake.run(*options)
    assert states(fake) == ["FAIL"] * 3 + ["COMPLETE"] * 6


def test_settings_that_do_not_go_together_are_failed_trials(fake, spaces):
    space = "recipe: {type: categorical, choices: [ste, sr_ste]}\nrecipe.decay.factor: {type: float, low: 0.0, high: 1.0e-4, step: 1.0e-4}"
    output, _ = fake.run(*spaces(mine=space), "sampler=grid", "pruner=none")
    assert states(fake) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "trial 1: failed: recipe.decay.place: found none with a decay factor above 0" in output
    assert len(fake.events("start")) == 3


def test_bad_trials_are_pruned_with_a_checkpoint(fake, spaces):
    space = "optimizer.lr: {type: categorical, choices: [3.0e-3, 2.0e-3, 2.5e-3, 1.0e-7]}"
    options = ["sampler=grid", "pruner=median", "prune_after_trials=2", "prune_after_steps=2"]
    output, _ = fake.run(*spaces(mine=space), *options, step_seconds=0.3)
    *_, last = fake.trials()
    assert last.state == TrialState.PRUNED
    assert 2 <= last.last_step < 6
    assert last.value == last.intermediate_values[last.last_step]
    assert f"trial 3: pruned at step {last.last_step}" in output
    (stopped,) = fake.events("stopped")
    assert last.user_attrs["run_dir"].endswith(stopped[0])
    assert (fake.runs / stopped[0] / "checkpoint").read_text() == stopped[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_stops_it_and_the_same_command_goes_on(fake, spaces, number):
    options = [*spaces(mine=LR), "trials=4", "workers=2", "pruner=none"]
    process = fake.start(*options, step_seconds=0.3)
    wait_until(lambda: len(fake.events("step")) >= 2 or process.poll() is not None)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"{number.name}: the sweep has stopped, its running trials too; the same command continues it" in errors
    assert "Traceback" not in errors
    stopped = {run: int(step) for run, step in fake.events("stopped")}
    assert stopped
    assert states(fake) == ["RUNNING"] * 2
    output, _ = fake.run(*options)
    assert output.count("(goes on)") == 2
    assert states(fake) == ["COMPLETE"] * 4
    for run, step in stopped.items():  # no step again
        assert [int(done) for name, _, done in fake.events("start") if name == run] == [0, step]


def test_several_processes_share_one_sweep(fake, spaces):
    options = [*spaces(mine=LR), "trials=9", "workers=2", "pruner=none"]
    processes = [fake.start(*options, step_seconds=0.1) for _ in range(3)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    assert states(fake) == ["COMPLETE"] * 9
    assert len({str(trial.params) for trial in fake.trials()}) == 9
    assert len(fake.events("start")) == len(fake.events("done")) == 9
    assert not fake.events("refused")
    assert any("Best: trial" in output for output, _ in outputs)


def test_a_run_that_ended_before_it_was_told_is_not_run_again(fake, spaces):
    """The sweep was killed between the end of a run and the word of it in the study."""
    options = [*spaces(mine=LR), "trials=2", "pruner=none"]
    fake.run(*options)
    journal = fake.out / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    told = max(i for i, line in enumerate(lines) if '"op_code":6' in line)
    journal.write_text("".join(lines[: told - 2]))
    assert states(fake) == ["COMPLETE", "RUNNING"]
    before = fake.events()
    fake.run(*options)
    assert states(fake) == ["COMPLETE"] * 2
    assert fake.events() == before


def test_another_sweep_does_not_get_its_folder(fake, spaces, tmp_path):
    options = spaces(mine=LR)
    fake.run(*options, "trials=1")
    _, errors = fake.run(*options, "trials=1", "sampler=random", code=2)
    assert f"out: found {fake.out}, holding a sweep with method.sampler=tpe where this one has random" in errors
    _, errors = fake.run(*options, "trials=1", "recipe=ste", code=2)
    assert "holding a sweep with options.recipe." in errors
    _, errors = fake.run(*spaces(mine=LR.replace("high: 1.0e-2", "high: 2.0e-2")), "trials=1", code=2)
    assert "holding a sweep with space.optimizer.lr={" in errors
    url = f"storage=sqlite:///{tmp_path}/study.db"
    spaces(mine=LR)
    (fake.out / "sweep.yaml").unlink()
    fake.run(*options, "trials=1", url)
    (fake.out / "sweep.yaml").unlink()
    _, errors = fake.run(*options, "trials=1", url, "recipe=ste", code=2)
    assert "storage: found another sweep under the name out" in errors
