"""Ranks that torchrun, srun or variables set by hand have started: which of them this process is, and whether the
options are for as many. Imports no torch, so that what is wrong is told at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sparse_pretrain.config import TrainerConfig
from sparse_pretrain.errors import UserError

LOST = 76  # exit code: another rank was lost, or this one; the same command continues
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rank:
    """Which rank this process is, of how many, and which variables say so."""

    number: int
    local: int  # on its machine
    ranks: int
    counted: str  # as `WORLD_SIZE=4`
    ranks_here: str  # as `LOCAL_WORLD_SIZE=2`; empty = nothing says how many there are on a machine
    node: int
    address: str
    port: int


def find(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """The rank that a launcher's variables make this process; None where it was started alone.

    A SLURM job's script, and a step of one task, count as started alone: they start their devices' ranks themselves.

    Raises:
        UserError: the variables are incomplete, or contradict each other.
    """
    in_step = "SLURM_PROCID" in environment and (
        "SLURM_STEP_ID" in environment or environment.get("ENVIRONMENT") != "BATCH"
    )
    by_hand = "TORCHELASTIC_RUN_ID" not in environment
    if in_step and by_hand:
        for name, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", _tasks_variable(environment))):
            if environment.get(name, environment.get(slurm)) != environment.get(slurm):
                raise UserError(
                    name, f"{environment[name]} with {slurm}={environment.get(slurm)}", f"{slurm}, or {name} not set"
                )
        return _of_slurm(environment)
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _of_torch(environment)
    return None


def tells(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one to tell what is wrong on all ranks: rank 0, or one that should not be there."""
    number = environment.get("RANK", environment.get("SLURM_PROCID", "0"))
    ranks = environment.get("WORLD_SIZE", environment.get(_tasks_variable(environment), ""))
    return not number.isdecimal() or int(number) == 0 or (ranks.isdecimal() and int(number) >= int(ranks))


def check(trainer: TrainerConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError unless `trainer` is for as many ranks as were started."""
    rank = find(environment)
    devices, nodes = trainer.devices, trainer.nodes
    if rank is None:
        if nodes > 1:
            raise UserError(
                "trainer.nodes",
                f"{nodes} in a process that was started alone",
                f"1, or ranks started by torchrun --nnodes {nodes} --nproc-per-node {devices} or "
                f"srun --nodes {nodes} --ntasks-per-node {devices}",
            )
        return
    if trainer.ranks != rank.ranks:
        raise UserError(
            "trainer.devices",
            f"{devices} with trainer.nodes={nodes} and {rank.counted}",
            f"as many devices x nodes as there are ranks: {rank.ranks}",
        )
    here = rank.ranks_here.partition("=")[2]
    if here and here != str(devices):
        raise UserError("trainer.devices", f"{devices} with {rank.ranks_here}", f"the ranks on each node: {here}")


def _of_torch(environment: Mapping[str, str]) -> Rank:
    missing = [name for name in TORCH_VARIABLES if not environment.get(name)]
    if missing:
        there = "RANK" if "RANK" in environment else "WORLD_SIZE"
        raise UserError(
            missing[0],
            f"nothing with {there}={environment[there]}",
            f"{', '.join(TORCH_VARIABLES)} all set, as torchrun does, or neither RANK nor WORLD_SIZE",
        )
    ranks = _whole(environment, "WORLD_SIZE", at_least=1)
    number = _whole(environment, "RANK", below=("WORLD_SIZE", ranks))
    here = environment.get("LOCAL_WORLD_SIZE", "")
    local = _whole(
        environment,
        "LOCAL_RANK",
        below=("LOCAL_WORLD_SIZE", _whole(environment, "LOCAL_WORLD_SIZE", at_least=1))
        if here
        else ("WORLD_SIZE", ranks),
    )
    return Rank(
        number=number,
        local=local,
        ranks=ranks,
        counted=f"WORLD_SIZE={ranks}",
        ranks_here=f"LOCAL_WORLD_SIZE={here}" if here else "",
        node=_whole(environment, "GROUP_RANK") if environment.get("GROUP_RANK") else 0,
        address=environment["MASTER_ADDR"],
        port=_whole(environment, "MASTER_PORT", at_least=1, below=("65536, the number of ports", 65536)),
    )


def _of_slurm(environment: Mapping[str, str]) -> Rank | None:
    counted = _tasks_variable(environment)
    for name in (counted, "SLURM_LOCALID", "SLURM_JOB_ID"):
        if not environment.get(name):
            raise UserError(
                name, f"nothing with SLURM_PROCID={environment['SLURM_PROCID']}", "what srun sets for each of its tasks"
            )
    ranks = _whole(environment, counted, at_least=1)
    number = _whole(environment, "SLURM_PROCID", below=(counted, ranks))
    local = _whole(environment, "SLURM_LOCALID", below=(counted, ranks))
    if ranks == 1:
        return None
    here = environment.get("SLURM_NTASKS_PER_NODE", "")
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    step = environment.get("SLURM_STEP_ID", "0")
    job = _whole(environment, "SLURM_JOB_ID")
    if not environment.get("MASTER_PORT"):  # the same on all ranks, another one for each job and step
        port = 20000 + (job * 64 + int(step if step.isdecimal() else 0)) % 20000
    else:
        port = _whole(environment, "MASTER_PORT", at_least=1, below=("65536, the number of ports", 65536))
    return Rank(
        number=number,
        local=local,
        ranks=ranks,
        counted=f"{counted}={ranks}",
        ranks_here=f"SLURM_NTASKS_PER_NODE={here}" if here.isdecimal() else "",
        node=_whole(environment, "SLURM_NODEID") if environment.get("SLURM_NODEID") else 0,
        address=environment.get("MASTER_ADDR") or first_host(nodes),
        port=port,
    )


def _tasks_variable(environment: Mapping[str, str]) -> str:
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"


def first_host(nodes: str) -> str:
    """Of SLURM's list of nodes: `gpu[07-09,12],login1` -> gpu07."""
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).split(",")[0]


def _whole(environment: Mapping[str, str], name: str, at_least: int = 0, below: tuple[str, int] | None = None) -> int:
    """A variable's whole number.

    Raises:
        UserError: it is none, or out of bounds; `below` is what sets the upper one, and what that is.
    """
    text = environment[name]
    if not text.isdecimal() or int(text) < at_least:
        raise UserError(name, repr(text), f"a whole number, at least {at_least}")
    if below is not None and int(text) >= below[1]:
        limit = below[0] if below[0][0].isdecimal() else f"{below[0]}={below[1]}"
        raise UserError(name, text, f"below {limit}")
    return int(text)
