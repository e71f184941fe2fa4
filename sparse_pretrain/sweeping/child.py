"""The process of one trial: an ordinary training run. `python -m sparse_pretrain.sweeping.child CONFIG COMMAND LOCK`

CONFIG is a file with the run's whole config, COMMAND what a user continues the run with, LOCK the descriptor of the
trial's lock, which this process holds too while it lives.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import yaml

from sparse_pretrain import runs, train
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import before_the_first_step
from sparse_pretrain.schema import load

PATIENCE_SECONDS = 60  # for what is left of a killed run to let go of its folder: data workers live on for some seconds


def main(arguments: list[str]) -> None:
    """Exits as `sparse-pretrain train` does."""
    path, command, lock = arguments
    os.register_at_fork(after_in_child=lambda: _close(int(lock)))  # data workers outlive a killed run
    cfg = load(TrainConfig, yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    try:
        with before_the_first_step():
            wait_for(runs.resolve_run_dir(cfg))
        train.run(cfg, command)
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error: {error}" if isinstance(error, UserError) else error, file=sys.stderr)
        sys.exit(exit_code)


def wait_for(run_dir: Path) -> None:
    """Until no other process has the run folder, or long enough for `train` to say that one has."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while run_dir.is_dir() and time.monotonic() < deadline:
        with contextlib.suppress(UserError), runs.locked(run_dir):
            return
        time.sleep(0.2)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1:])
