"""Several ranks on this machine, for tests: forked from a process that has imported everything, in a second or so."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed import TCPStore

from sparse_pretrain import worker

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["sparse_pretrain.worker"])


def run_ranks(count: int, function: Callable[..., None], *args: Any, seconds: float = 300) -> None:
    """function(*args) in `count` processes, with the variables that torchrun gives them; fails if one of them does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a free port
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    with TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(count)]
        ranks = [
            _processes.Process(
                target=_rank,
                args=(
                    output,
                    {**os.environ, **variables, "RANK": output.name, "LOCAL_RANK": output.name},
                    function,
                    args,
                ),
                daemon=True,
            )
            for output in outputs
        ]
        deadline = time.monotonic() + seconds
        try:
            for rank in ranks:
                rank.start()
            while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
                assert time.monotonic() < deadline, "ranks that do not end"
                time.sleep(0.02)
        finally:
            failed = [output for output, rank in zip(outputs, ranks, strict=True) if rank.exitcode]
            for rank in ranks:
                rank.kill()
                rank.join()
            for output in failed:
                print(f"--- rank {output.name}:\n{output.read_text()}")
        assert not failed, "ranks that failed"


def _rank(output: Path, variables: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        function(*args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise


def train_runs(folders: list[Path]) -> None:
    """Train these runs, one after another."""
    for folder in folders:
        worker.run(folder)
