"""A rank that trains several runs, one after another: starting processes takes longer than tiny runs do."""

import sys
from pathlib import Path

import torch

from sparse_pretrain import worker

if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        worker.run(Path(folder))
    torch.distributed.destroy_process_group()
