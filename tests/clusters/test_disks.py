"""A file system that fails once and then works, and one that does not; a clock that jumps."""

import errno
import re
import time
from pathlib import Path

import pytest

from sparse_pretrain import runs, train
from sparse_pretrain.checkpoint import files, saver, store
from sparse_pretrain.errors import UserError
from tests.tasks.test_training import assert_same_run

PACKAGE = Path(saver.__file__).parents[1]


@pytest.fixture
def failing(monkeypatch):
    """failing(times): the second checkpoint's first attempts do not get through, and leave what they wrote."""

    def fail(times):
        calls = []
        write = files.write

        def flaky(state, folder, *others):
            calls.append(folder)
            if 1 < len(calls) <= 1 + times:
                partial = folder.with_name(f".{folder.name}.partial")
                partial.mkdir(exist_ok=True)
                (partial / "__0_0.distcp").write_bytes(b"half")
                raise OSError(errno.EIO, "Input/output error")
            write(state, folder, *others)

        monkeypatch.setattr(saver, "RETRY_SECONDS", 0)
        monkeypatch.setattr(files, "write", flaky)

    return fail


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_fails_once(tiny, tmp_path, failing, capsys, beside):
    train.run(tiny("fst", "whole"))
    failing(1)
    train.run(tiny("fst", "flaky", trainer__async_checkpoints=beside))
    assert capsys.readouterr().err.count("Input/output error); allowed: a folder with room for it") == 1
    assert_same_run(tmp_path / "whole", tmp_path / "flaky")
    assert not list((tmp_path / "flaky" / runs.CHECKPOINTS).glob(".*"))


def test_a_disk_that_stays_broken_ends_the_run_and_the_same_command_continues_it(tiny, tmp_path, failing, monkeypatch):
    with monkeypatch.context():
        failing(9)
        with pytest.raises(UserError, match="step-00000008: found that it cannot be written"):
            train.run(tiny("fst"))
    monkeypatch.undo()
    assert store.newest_valid(tmp_path / "run" / runs.CHECKPOINTS)[0].name == "step-00000004"


def test_no_clock_that_can_jump_decides_anything(tiny, tmp_path, monkeypatch):
    """The time of day is read nowhere; a run during which it jumps is the same run."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"\btime\.time\(", path.read_text()), path
    train.run(tiny("fst", "whole"))
    real, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 1e7)
    train.run(tiny("fst", "jumping"))
    assert_same_run(tmp_path / "whole", tmp_path / "jumping")
    seconds = [float(row["seconds"]) for row in runs.read_rows(tmp_path / "jumping" / runs.METRICS_FILE)]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 1000
