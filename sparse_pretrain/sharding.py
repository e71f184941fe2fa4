"""Tensors of which each rank holds a part (`DTensor`, as FSDP2 makes of parameters); plain ones pass through."""

from __future__ import annotations

from dataclasses import dataclass

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"  # dimensions of Lightning's mesh of all ranks


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


def own(parameter: Tensor) -> Tensor:
    """What this rank of a group that computes a layer together does so with: its part of a split parameter, or all of
    one that each rank has, whose gradient is then the sum of theirs."""
    if not isinstance(parameter, DTensor):
        return parameter
    assert parameter.device_mesh.mesh_dim_names == (TENSOR_PARALLEL,), "FSDP2 has not gathered it"
    gradient = [Partial() if placement.is_replicate() else placement for placement in parameter.placements]
    return parameter.to_local(grad_placements=gradient)


def data_parallel_rank(trainer: lightning.Trainer) -> tuple[int, int]:
    """Which part of each batch this rank learns from, and how many parts there are: ranks that compute layers together
    have the same one."""
    place = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return place["rank"], place["num_replicas"]


@dataclass(frozen=True)
class Split:
    """How a linear layer is spread over ranks that compute it together (tensor parallelism; Shoeybi et al. 2019).

    dimension: of its weight (out_features, in_features) that is cut into equal parts. 0: each rank computes some of the
        outputs from all inputs; 1: each has some of the inputs, and the outputs are the sum of theirs.
    mesh: these ranks, in one dimension.
    """

    dimension: int
    mesh: DeviceMesh

    @property
    def group(self) -> str:
        """The name of their process group."""
        return self.mesh.get_group().group_name

    @property
    def is_first(self) -> bool:
        return self.mesh.get_local_rank() == 0

    def first(self, length: int) -> int:
        """Where this rank's part of so many rows or columns begins."""
        return length // self.mesh.size() * self.mesh.get_local_rank()

    def part(self, matrix: Tensor, dimension: int | None = None) -> Tensor:
        """This rank's part of a whole tensor that has the weight's rows and columns first, or along another dimension;
        sharing its memory."""
        dimension = self.dimension if dimension is None else dimension
        length = matrix.shape[dimension]
        return matrix.narrow(dimension, self.first(length), length // self.mesh.size())

    def place(self, parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
        """The same parameter, spread over the ranks; all of them have the same values of it."""
        values = parameter.detach()
        mine = self.part(values, placement.dim).clone() if isinstance(placement, Shard) else values
        spread = DTensor.from_local(mine, self.mesh, [placement], run_check=False)
        return nn.Parameter(spread, requires_grad=parameter.requires_grad)

    def bias(self, bias: Tensor | None, out_features: int) -> Tensor | None:
        """What this rank adds to its outputs, of a bias that is spread over the ranks in equal parts."""
        if bias is None:
            return None
        mine, first = own(bias), self.first(out_features)
        return mine if self.dimension == 0 else F.pad(mine, (first, out_features - first - len(mine)))
