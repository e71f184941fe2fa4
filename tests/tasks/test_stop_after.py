"""trainer.stop_after: a run that ends early, and goes on as if it had not."""

import pytest

from sparse_pretrain import runs, train
from sparse_pretrain.checkpoint import store
from tests.tasks.test_training import assert_same_run, metrics, phases


def test_it_ends_with_a_checkpoint_and_goes_on_bit_identically(tiny, tmp_path, capsys):
    """Not on a logged or a checkpointed step."""
    changes = phases(trainer__log_every=3, model__dropout=0.1)
    train.run(tiny("fst", "whole", **changes))
    capsys.readouterr()
    run_dir = train.run(tiny("fst", "stopped", trainer__stop_after=7, **changes))
    assert "stopped at step 7 of 12, by trainer.stop_after=7" in capsys.readouterr().out
    assert store.list_steps(run_dir / runs.CHECKPOINTS)[-1] == 7
    assert not (run_dir / runs.SUMMARY_FILE).exists()
    train.run(tiny("fst", "stopped", trainer__stop_after=8, **changes))
    train.run(tiny("fst", "stopped", **changes))
    assert runs.is_complete(run_dir)
    assert_same_run(tmp_path / "whole", run_dir)


def test_it_stops_at_once_where_it_has_been(tiny, capsys):
    run_dir = train.run(tiny("fst", trainer__stop_after=6))
    rows = metrics(run_dir)
    train.run(tiny("fst", trainer__stop_after=5))
    assert "stopped at step 6 of 12, by trainer.stop_after=5" in capsys.readouterr().out
    assert metrics(run_dir) == rows
    assert store.list_steps(run_dir / runs.CHECKPOINTS)[-1] == 6


@pytest.mark.parametrize("stop", [12, 100])
def test_beyond_the_end_it_means_nothing(tiny, stop):
    run_dir = train.run(tiny("fst", trainer__stop_after=stop))
    assert runs.is_complete(run_dir)
    (run_dir / runs.SUMMARY_FILE).unlink()  # killed just before
    train.run(tiny("fst", trainer__stop_after=stop))
    assert runs.is_complete(run_dir)


def test_a_stopped_run_is_not_complete_in_the_table(tiny, capsys):
    folders = [
        train.run(tiny("dense", "dense")),
        train.run(tiny("fst", "fst", trainer__stop_after=5)),
        train.run(tiny("ste", "ste", trainer__stop_after=1, trainer__log_every=2)),
    ]
    capsys.readouterr()
    train.finish(folders)
    output = capsys.readouterr().out
    assert "fst: not complete, at step 5 of 12" in output
    assert "ste:" not in output  # it has not logged a step
    train.finish(folders[2:])
    assert capsys.readouterr().out == ""
