"""Which rank a process is, by its launcher's variables; what is wrong with them is one sentence."""

import multiprocessing
import os
import socket
import subprocess
import sys

import pytest

from sparse_pretrain import cli, cluster, launch, meeting
from sparse_pretrain.config import TrainerConfig
from sparse_pretrain.errors import UserError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "ENVIRONMENT": "BATCH"}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


def test_torchrun():
    rank = cluster.find(TORCHRUN)
    assert (rank.number, rank.local, rank.ranks, rank.node, rank.address, rank.port) == (3, 1, 4, 1, "node1", 29500)
    cluster.check(TrainerConfig(devices=2, nodes=2), TORCHRUN)
    assert cluster.find({**TORCHRUN, **SRUN}).port == 29500  # torchrun as a task of srun, one on each node


def test_srun():
    rank = cluster.find(SRUN)
    assert (rank.number, rank.local, rank.ranks, rank.node, rank.address) == (3, 1, 4, 1, "gpu07")
    cluster.check(TrainerConfig(devices=2, nodes=2), {**SRUN, "SLURM_NTASKS_PER_NODE": "2"})
    assert cluster.find({**SRUN, "SLURM_PROCID": "0"}).port == rank.port
    assert cluster.find({**SRUN, "SLURM_STEP_ID": "1"}).port != rank.port
    own = cluster.find({**SRUN, "MASTER_ADDR": "here", "MASTER_PORT": "1234", "WORLD_SIZE": "4"})
    assert (own.address, own.port) == ("here", 1234)


@pytest.mark.parametrize(
    "environment",
    [{}, BATCH, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {"MASTER_PORT": "1"}],
    ids=["nothing", "a job's script", "a step of one task", "half of nothing"],
)
def test_started_alone(environment):
    assert cluster.find(environment) is None
    cluster.check(TrainerConfig(devices=4), environment)
    with pytest.raises(UserError, match="trainer.nodes: found 2 in a process that was started alone; allowed: 1, or"):
        cluster.check(TrainerConfig(nodes=2), environment)


def test_the_first_of_slurms_nodes():
    for nodes, first in (("a1", "a1"), ("gpu[07-09,12],x", "gpu07"), ("n[3,5]", "n3"), ("a-1,b", "a-1")):
        assert cluster.first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: found nothing with RANK=0; allowed: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT all set"),
        ({"WORLD_SIZE": "2"}, "RANK: found nothing with WORLD_SIZE=2"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT: found nothing with RANK=3"),
        ({**TORCHRUN, "RANK": "4"}, "RANK: found 4; allowed: below WORLD_SIZE=4"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK: found '-1'; allowed: a whole number"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE: found '0'; allowed: a whole number, at least 1"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK: found 2; allowed: below LOCAL_WORLD_SIZE=2"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT: found 70000; allowed: below 65536"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID: found 4; allowed: below SLURM_STEP_NUM_TASKS=4"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS: found 'many'"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID: found nothing with SLURM_PROCID=3"),
        (without(SRUN, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), "SLURM_NTASKS: found nothing with SLURM_PROCID=3"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE: found 8 with SLURM_STEP_NUM_TASKS=4"),
        ({**SRUN, "RANK": "0"}, "RANK: found 0 with SLURM_PROCID=3"),
    ],
)  # fmt: skip
def test_variables_that_contradict_each_other(environment, expected):
    with pytest.raises(UserError) as error:
        cluster.find(environment)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        (TORCHRUN, {}, "trainer.devices: found 1 with trainer.nodes=1 and WORLD_SIZE=4; allowed: as many devices x nodes as there are ranks: 4"),
        (TORCHRUN, {"devices": 4}, "trainer.devices: found 4 with LOCAL_WORLD_SIZE=2; allowed: the ranks on each node: 2"),
        (SRUN, {"devices": 2}, "trainer.devices: found 2 with trainer.nodes=1 and SLURM_STEP_NUM_TASKS=4"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "4"}, {"devices": 2, "nodes": 2}, "trainer.devices: found 2 with SLURM_NTASKS_PER_NODE=4"),
    ],
)  # fmt: skip
def test_options_for_another_number_of_ranks(environment, options, expected):
    with pytest.raises(UserError) as error:
        cluster.check(TrainerConfig(**options), environment)
    assert str(error.value).startswith(expected)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def ended(capfd):
    """ended(function, [variables of a rank, …]): exit codes of the ranks that call it, and all that they told on stderr.
    They are forks of this process, which has imported what takes long."""

    def run(function, ranks):
        port, fork = str(free_port()), multiprocessing.get_context("fork")
        common = {"WORLD_SIZE": str(len(ranks)), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def rank(own):
            os.environ.update({**common, **own})
            function()

        processes = [fork.Process(target=rank, args=(own,)) for own in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
            process.kill()
        return [process.exitcode for process in processes], capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "trainer.devices=3"], "error: trainer.devices: found 3 with trainer.nodes=1 and WORLD_SIZE=2"),
        (["train", "trainer.devices=2", "trainer.batch_size=3"], "error: trainer.batch_size: found 3; allowed: a multiple of trainer.devices=2\n"),
        (["train", "trainer.nodes=2", "trainer.batch_size=1"], "error: trainer.batch_size: found 1; allowed: a multiple of trainer.devices=1 x trainer.nodes=2\n"),
        (["train", "trainer.devices=2", "data=text", "data.train=[no/such]"], "error: data.train: found"),
        (["doctor"], "error: command: found doctor with WORLD_SIZE=2; allowed: train, finetune, compare, decay-search"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_once_and_ends_every_rank(ended, arguments, expected):
    codes, told = ended(lambda: cli.main(arguments), [{"RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1"}])
    assert codes == [2, 2], told
    assert told.count("\n") == 1
    assert told.startswith(expected)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ([{"RANK": "0"}, {"RANK": "1"}, {"RANK": "1"}], "RANK: found 1, which another process has too; allowed: another number for each process"),
        ([{"RANK": "0"}, {"RANK": "0"}, {"RANK": "1"}], "RANK: found 0, which another process has too; allowed: another number for each process"),
        ([{"RANK": "0"}, {"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "4"}], "WORLD_SIZE: found 4; allowed: 3, as on rank 0"),
    ],
)  # fmt: skip
def test_ranks_that_are_not_of_one_launch_are_told_once(ended, monkeypatch, variables, expected):
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 1)
    codes, told = ended(lambda: launch.together(cluster.find(), lambda: launch._meeting.announce({})), variables)
    assert codes == [2, 2, 2]
    assert told == f"error: {expected}\n"


def test_addresses_that_are_not_rank_0s(monkeypatch):
    monkeypatch.setattr(meeting, "NAME_SECONDS", 0)
    with pytest.raises(UserError, match="MASTER_ADDR: found no-such-node.invalid, which is no machine's name"):
        meeting._check_name("no-such-node.invalid")
    rank = cluster.find({**TORCHRUN, "RANK": "0", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": str(free_port())})
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 0.2)
    with pytest.raises(UserError, match="MASTER_ADDR: found 192.0.2.1, which does not lead to rank 0's machine"):
        meeting._check_server(rank)


@pytest.mark.slow
def test_a_port_in_use_is_told_once_and_ends_every_rank():
    """Ranks of a launcher that is neither torchrun nor srun."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "sparse_pretrain.cli", "train", "trainer.devices=2"], stderr=subprocess.PIPE, text=True,
                env={**common, "RANK": str(n), "LOCAL_RANK": str(n)},
            )
            for n in range(2)
        ]  # fmt: skip
        told = "".join(rank.communicate(timeout=100)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], told
    assert told == f"error: MASTER_PORT: found {port}, which is in use; allowed: a free port of rank 0's node\n"
