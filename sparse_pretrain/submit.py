"""`hydra/launcher=slurm`: runs as jobs of SLURM's through submitit, each the same command that would train it here.

Not through Hydra's launcher plugin, which runs a function in the job: a run needs its signals, and an exit code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.core.core import PicklingExecutor
from submitit.core.utils import DelayedSubmission
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from sparse_pretrain.config import TrainerConfig
from sparse_pretrain.errors import UserError


class Job:
    """One command, run in a job until it ends; when time is up it saves, and the job goes back to the queue.

    Args:
        arguments: of `sparse-pretrain`.
        folder: to run it in.
    """

    def __init__(self, arguments: Sequence[str], folder: str) -> None:
        self.arguments, self.folder = list(arguments), folder
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        def forward(number: int, _: FrameType | None) -> None:
            if self._process is not None:
                self._process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, forward)
        command = [sys.executable, "-m", "sparse_pretrain.cli", *self.arguments]
        self._process = subprocess.Popen(command, cwd=self.folder, start_new_session=True)
        exit_code = self._process.wait()
        if exit_code:
            sys.exit(exit_code if exit_code > 0 else 128 - exit_code)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit when the job is about to be ended: what to run when it starts again."""
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(ChildProcessError):  # not `wait`, in which the signal has found this process
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Job(self.arguments, self.folder))


class _AnywhereSlurm(SlurmExecutor):
    """Writes job scripts where there is no SLURM too."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def submit(commands: Sequence[Sequence[str]], trainer: TrainerConfig, options: dict[str, Any]) -> None:
    """Hand each command line of `sparse-pretrain` to SLURM as a job, and print which; with `dry_run`, the job script.

    A job on one node is one task, which starts a rank for each device; one on several has a task for each rank.

    Args:
        options: those of conf/hydra/launcher/slurm.yaml.

    Raises:
        UserError: there is no SLURM here, or an option that it does not have.
    """
    options = dict(options)
    cluster, dry_run = options.pop("cluster"), options.pop("dry_run")
    folder, timeouts = Path(options.pop("submitit_folder")).absolute(), options.pop("max_num_timeout")
    if cluster not in ("slurm", "local"):
        raise UserError("hydra.launcher.cluster", cluster, ["slurm", "local"])
    if cluster == "local" and trainer.nodes > 1:
        raise UserError("trainer.nodes", f"{trainer.nodes} with hydra.launcher.cluster=local", "1")
    if cluster == "slurm" and not dry_run and SlurmExecutor.affinity() < 0:
        raise UserError(
            "hydra/launcher", "slurm, but no srun", "a machine of a SLURM cluster, or --dry-run to see the job script"
        )
    options |= {"nodes": trainer.nodes, "tasks_per_node": trainer.devices if trainer.nodes > 1 else 1}
    given = {name: value for name, value in options.items() if value not in (None, [], {})}
    executor: PicklingExecutor
    if cluster == "local" and not dry_run:
        executor = LocalExecutor(folder, max_num_timeout=timeouts)
        known = ("timeout_min", "tasks_per_node", "gpus_per_node", "signal_delay_s", "setup")
        executor.update_parameters(**{name: value for name, value in given.items() if name in known})
    else:
        executor = _AnywhereSlurm(folder, max_num_timeout=timeouts)
        try:
            executor.update_parameters(**executor._convert_parameters(given))
        except ValueError as error:
            raise UserError("hydra.launcher", str(error).splitlines()[0], "the options of sbatch") from error
    if dry_run:
        if len(commands) > 1:
            executor.parameters["map_count"] = len(commands)
        print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        for number, command in enumerate(commands):
            print(f"# job {number}: sparse-pretrain {subprocess.list2cmdline(command)}")
        return
    folder = Path(str(folder).replace("%j", "")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with executor.batch():
        jobs = [executor.submit(Job(command, os.getcwd())) for command in commands]
    for job, command in zip(jobs, commands, strict=True):
        print(f"job {job.job_id}: sparse-pretrain {subprocess.list2cmdline(command)}")
    print(f"\nTheir output: {folder}; the runs when they are complete: sparse-pretrain report", flush=True)
