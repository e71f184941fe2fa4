"""Tensors of which each rank holds a part (`DTensor`, as FSDP2 makes of parameters); plain ones pass through."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from all ranks: every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, the part that this rank holds of `like`, a tensor of the same size; sharing its memory."""
    if not isinstance(like, DTensor):
        return tensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dimension, (first, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dimension, min(first, tensor.shape[dimension]), length)
    return tensor


def put(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor to values of its whole size, that every rank has: no rank sends anything."""
    local(tensor).copy_(part(values, tensor))


def sum_over_parts(value: Tensor, of: Tensor) -> Tensor:
    """The sum over the ranks that hold parts of the tensor `of`; changes `value`."""
    if isinstance(of, DTensor):
        for dimension in range(of.device_mesh.ndim):
            torch.distributed.all_reduce(value, group=of.device_mesh.get_group(dimension))
    return value
