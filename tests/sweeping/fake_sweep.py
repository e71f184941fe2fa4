"""`sparse-pretrain sweep` with fake_trial.py in place of training, without torch and pictures: the arguments are the
command's."""

import sys
import types
from pathlib import Path

from sparse_pretrain import cli, sweep
from sparse_pretrain.sweeping import pool, results, runner


def patch(set_attribute) -> None:
    """`set_attribute(object, name, value)`: setattr, or a test's monkeypatch."""
    set_attribute(runner, "PROGRAM", [sys.executable, str(Path(__file__).with_name("fake_trial.py"))])
    set_attribute(pool, "POLL_SECONDS", 0.02)
    set_attribute(sweep, "prepare", lambda cfg, example: [])
    set_attribute(results, "_importances", lambda study: {})


if __name__ == "__main__":
    patch(setattr)
    sys.modules["sparse_pretrain.sweeping.figure"] = types.SimpleNamespace(sweep_figure=lambda sweep: b"")
    cli.main(["sweep", *sys.argv[1:]])
