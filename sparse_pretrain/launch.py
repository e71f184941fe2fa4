"""Starts the ranks of a run: in this process for one device, under `torch.distributed.run` for several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sparse_pretrain.config import TrainConfig


class RanksFailed(Exception):
    """The ranks of a run ended with an error that they have already printed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the run's ranks ended with exit code {exit_code}")
        self.exit_code = exit_code


def launch(cfg: TrainConfig, run_dir: Path) -> None:
    """Train the run of `run_dir` (its config.yaml is written), or go on with it.

    Raises:
        UserError, Interrupted: as `worker.run`, with one device.
        RanksFailed: with several.
    """
    if cfg.trainer.devices == 1:
        from sparse_pretrain import worker

        worker.run(run_dir)
        return
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={cfg.trainer.devices}",
        "-m",
        "sparse_pretrain.worker",
        str(run_dir),
    ]
    checkout = str(Path(__file__).resolve().parent.parent)  # for ranks of a program that is not installed
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), checkout)))
    exit_code = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode
    if exit_code:
        raise RanksFailed(exit_code)
