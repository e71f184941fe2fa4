"""Spreading a model over ranks: FSDP2, and the FFNs by tensor parallelism."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from sparse_pretrain.models.blocks import FeedForward
from sparse_pretrain.models.vit import ViT
from sparse_pretrain.sharding import DATA_PARALLEL, TENSOR_PARALLEL, Split, own
from sparse_pretrain.sparsity.adapters import adapters_of
from sparse_pretrain.sparsity.linear import SparseLinear

CUT = {"up": 0, "gate": 0, "down": 1}  # layer of an FFN -> dimension of its weight along which it is cut


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """By FSDP2: every block, then what is left, over all ranks. If there is more than one rank in the mesh's dimension
    `tensor_parallel`, then these compute each FFN together, and its weights are sharded over `data_parallel`."""
    ranks = mesh[DATA_PARALLEL]
    if mesh[TENSOR_PARALLEL].size() > 1:
        for module in model.modules():
            if isinstance(module, FeedForward):
                shard_ffn(module, mesh)
        ranks = mesh._flatten("ranks")
    for block in blocks_of(model):
        fully_shard(block, mesh=ranks)
    fully_shard(model, mesh=ranks)
    if isinstance(model, ViT):
        register_fsdp_forward_method(model, "forward_heads")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of its outermost lists of modules: the blocks of a transformer."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in blocks_of(child)]


def shard_ffn(ffn: FeedForward, mesh: DeviceMesh) -> None:
    """Let each rank of `tensor_parallel` compute some of the hidden features (Shoeybi et al. 2019, section 3): `up` and
    `gate` by rows, `down` by columns. Between them nothing is sent: outputs are summed after `down`, the gradients of
    inputs before `up`."""
    together = mesh[TENSOR_PARALLEL]
    for name, layer in ffn.named_children():
        _split_layer(layer, Split(CUT[name], together))

    def share_input(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        shared = DTensor.from_local(args[0], together, [Replicate()], run_check=False)
        return (shared.to_local(grad_placements=[Partial()]),)

    def sum_outputs(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        partial = DTensor.from_local(output, together, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()

    ffn.register_forward_pre_hook(share_input)
    ffn.register_forward_hook(sum_outputs)
    fully_shard(ffn, mesh=mesh[DATA_PARALLEL])


def placements(layer: nn.Module, dimension: int) -> dict[str, Placement]:
    """How each parameter of a linear layer, with its adapter and the logits of its mask, is spread over ranks that
    compute it together, its weight cut along `dimension`."""
    found: dict[str, Placement] = {"weight": Shard(dimension), "learned.logits": Shard(dimension), "bias": Shard(0)}
    for adapter in adapters_of(layer).values():
        found |= {f"adapter.{name}": placement for name, placement in adapter.placements(dimension).items()}
    return {name: found[name] for name, _ in layer.named_parameters()}


def _split_layer(layer: nn.Module, split: Split) -> None:
    if isinstance(layer, SparseLinear):
        layer.split = split
        layer.go_dense()
    else:
        assert isinstance(layer, nn.Linear)
        layer.forward = functools.partial(_forward, layer, split)  # type: ignore[method-assign]
    for name, placement in placements(layer, split.dimension).items():
        parent, _, own_name = name.rpartition(".")
        module = layer.get_submodule(parent)
        module.register_parameter(own_name, split.place(module.get_parameter(own_name), placement))


def _forward(layer: nn.Linear, split: Split, x: Tensor) -> Tensor:
    """Of a dense layer."""
    return F.linear(x, own(layer.weight), split.bias(layer.bias, layer.out_features))
