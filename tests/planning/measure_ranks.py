"""A rank that trains tiny runs, and writes what it held and sent in their second step to RUN_DIR/measured-RANK.json."""

import json
import os
from pathlib import Path

import torch
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_pretrain import worker
from sparse_pretrain.sharding import local
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.tasks import task

STEP = 1  # the second one: the first finds no moments
MOMENTS = "exp_avg", "momentum_buffer"  # AdamW, Muon


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, as a ring would, by the collectives of c10d and of functional c10d."""

    def __init__(self):
        super().__init__()
        self.bytes = {"all_gather": 0.0, "reduce_scatter": 0.0, "all_reduce": 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("c10d::_allgather_base_"):
            self.add("all_gather", args[0].nbytes * share(args))
        elif name.startswith("_c10d_functional::all_gather_into_tensor"):
            self.add("all_gather", result.nbytes * share(args))
        elif name.startswith("c10d::_reduce_scatter_base_"):
            self.add("reduce_scatter", args[1].nbytes * share(args))
        elif name.startswith(("c10d::allreduce_", "_c10d_functional::all_reduce")):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.add("all_reduce", 2 * sum(tensor.nbytes for tensor in tensors) * share(args))
        elif name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(("wait_tensor", "barrier")):
            assert "broadcast" in name or "autograd" in name, name
        return result

    def add(self, kind, count):
        self.bytes[kind] += count


def share(args):
    """(n-1)/n of the n ranks of a collective's group, which is among its arguments: by name, or as an object."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and arg._type().name() == "ProcessGroup":
            return 1 - 1 / ProcessGroup.unbox(arg).size()
        if isinstance(arg, str) and arg in c10d._world.pg_names.values():
            return 1 - 1 / c10d._resolve_process_group(arg).size()
    raise AssertionError(f"no group in {args}")


def size(tensors):
    """Bytes of this rank's parts, each memory once."""
    parts = {local(tensor.detach()).data_ptr(): local(tensor.detach()).nbytes for tensor in tensors}
    return sum(parts.values())


def held(module, gradients):
    layers = [layer for layer in module.modules() if isinstance(layer, SparseLinear)]
    state = [entry for optimizer in module.trainer.optimizers for entry in optimizer.state.values()]
    masks = [mask for layer in layers for mask in (layer.mask, layer.input_mask) if mask is not None]
    sparse = [w for layer in layers for w in (layer.sparse_weight, layer.input_weight) if w is not None]
    buffers = {buffer.data_ptr(): buffer.nbytes for buffer in module.model.buffers()}
    for tensor in (*masks, *sparse):
        buffers.pop(tensor.data_ptr(), None)
    return {
        "master weights, fp32": size(module.model.parameters()),
        "gradients, fp32": gradients,
        "optimizer moments, fp32": size(t for s in state for name, t in s.items() if name.startswith(MOMENTS)),
        "masks": size(masks),
        "2:4 weights": size(sparse),
        "other buffers": sum(buffers.values()),
        "the teacher self": size(() if module.teacher is None else module.teacher.copy.parameters()),
    }


def measure(folders: list[Path]) -> None:
    for folder in folders:
        measure_one(folder)


def measure_one(folder: Path) -> None:
    sent, gradients, step = Sent(), [0], task.Task.training_step
    clip = task.clip_gradients

    def noting_clip(model, max_norm):
        gradients[0] = size(p.grad for p in model.parameters() if p.grad is not None)
        return clip(model, max_norm)

    def measured_step(module, batch, index):
        if module.steps_done != STEP:
            return step(module, batch, index)
        with sent:
            result = step(module, batch, index)
        values = {"held": held(module, gradients[0]), "sent": sent.bytes}
        (folder / f"measured-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(values))
        return result

    task.clip_gradients, task.Task.training_step = noting_clip, measured_step
    try:
        worker.run(folder)
    finally:
        task.clip_gradients, task.Task.training_step = clip, step
