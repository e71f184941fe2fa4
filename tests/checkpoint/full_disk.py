"""One of two ranks that save into the folder argv[1] while the disk of one of them is full."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from sparse_pretrain.checkpoint import files, saver, store
from sparse_pretrain.checkpoint.saver import Saver
from sparse_pretrain.errors import UserError


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    state = {"steps_done": 1, "weights": distribute_tensor(torch.arange(1000.0), mesh, [Shard(0)])}
    write = files._HashingStream.write
    saver.RETRY_SECONDS = 0

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step, (rank, background) in enumerate(((0, False), (1, False), (0, True), (1, True)), 1):
        saving = Saver(kept=9, background=background)
        path = store.checkpoint_folder(folder, step)
        if dist.get_rank() == rank:
            files._HashingStream.write = full
        if not background:
            with pytest.raises(UserError, match="no space left"):
                saving.save(state, path, together=True)
        else:
            saving.save(state, path, together=True)
            with pytest.raises(UserError, match="no space left"):
                saving.wait()
        dist.barrier()
        assert store.list_steps(folder) == list(range(1, step))
        assert not list(folder.glob(".*"))
        dist.barrier()
        files._HashingStream.write = write
        saving.save(state, path, together=True)
        saving.wait()
        dist.barrier()
        assert torch.equal(store.load(path)["weights"], torch.arange(1000.0))
    os._exit(0)  # the group of the background has threads


if __name__ == "__main__":
    main(Path(sys.argv[1]))
