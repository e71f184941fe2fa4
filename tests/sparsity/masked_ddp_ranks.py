"""A rank that trains several runs and writes what each of their steps sent to RUN_DIR/sent.json; those whose name ends
with `plain` without the hook that leaves pruned weights' gradients out."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from sparse_pretrain import worker
from sparse_pretrain.tasks.task import Task
from tests.planning.measure_ranks import Sent


def main(folder: Path) -> None:
    step, masked, sent = Task.training_step, worker.MaskedDDPStrategy, []

    def measured_step(module, batch, index):
        with Sent() as one:
            step(module, batch, index)
        sent.append(one.bytes["all_reduce"])

    Task.training_step = measured_step
    if folder.name.endswith("plain"):
        worker.MaskedDDPStrategy = lambda training, **options: DDPStrategy(**options)
    try:
        worker.run(folder)
    finally:
        Task.training_step, worker.MaskedDDPStrategy = step, masked
    (folder / "sent.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        main(Path(name))
    torch.distributed.destroy_process_group()
