"""Which backend multiplies in each sparse layer: measured on the run's device, or as asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from sparse24.autograd import MvueKey
from sparse24.dispatch import MARGIN, LayerShape, Plan, UnsupportedError, choose, table
from sparse24.timing import median_ms
from torch import nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.sparsity.conv import SparseConv2d
from sparse_pretrain.sparsity.linear import SparseLinear


def choose_plans(
    model: nn.Module,
    rows: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    micro_batches: int = 1,
    backend: str = "auto",
    cache: Path | None = None,
) -> tuple[dict[str, Plan], str]:
    """A plan for every sparse layer of `model`, by name (dense products where it is not 2:4 or is learned), and
    the measurements as a table (empty if there were none).

    What dispatch compares are products. A convolution may do without the patches that its sparse products need, so with
    `auto` they must be faster than it in a whole training step of the layer too.

    Args:
        model: with its sparse layers; it may be elsewhere than on `device`.
        rows: layer name -> tokens of one micro-batch on one device; a layer that is not there is not used, and dense.
        dtype: of the products.
        device: where the run will be.
        micro_batches: of one optimizer step.
        backend: `auto` or a backend's name.
        cache: a file that remembers measurements; None = measure anew.

    Raises:
        UserError: the backend asked for cannot serve a layer.
    """
    plans: dict[str, Plan] = {}
    tables: dict[object, str] = {}
    faster: dict[object, bool] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLinear):
            continue
        plans[name] = Plan()
        if backend == "dense" or (backend == "auto" and device.type != "cuda") or name not in rows:
            continue
        obstacle = _obstacle(layer)
        if obstacle:
            if backend != "auto":
                found = f"{backend}, which serves 2:4 weights, with {obstacle}"
                raise UserError("trainer.backend", found, ["auto", "dense"])
            continue
        shape = LayerShape(
            rows[name],
            *layer.part_shape,
            dtype,
            transposable=layer.input_is_sparse,
            mvue=layer.weight_gradient == "mvue",
            micro_batches=micro_batches,
            fp8=layer.fp8,
        )
        try:
            plan, measured = choose(shape, device, backend, cache)
        except UnsupportedError as error:
            raise UserError("trainer.backend", f"{backend}, which cannot serve {name}: {error}", "auto") from error
        if measured:
            tables[shape] = table(shape, plan, measured)
        if isinstance(layer, SparseConv2d) and backend == "auto" and plan != Plan():
            key = (shape, layer.geometry)
            if key not in faster:
                faster[key], tables[key] = _beats_convolution(layer, plan, shape, device)
            plan = plan if faster[key] else Plan()
        plans[name] = plan
    return plans, "\n".join(tables.values())


def _obstacle(layer: SparseLinear) -> str | None:
    """Why no backend serves this layer, whatever its shape."""
    if layer.learned is not None:
        return "learned masks"
    if layer.pattern != (2, 4):
        return "recipe.pattern={}:{}".format(*layer.pattern)
    return f"a convolution of {layer.groups} groups" if layer.groups > 1 else None


def _beats_convolution(layer: SparseConv2d, plan: Plan, shape: LayerShape, device: torch.device) -> tuple[bool, str]:
    """Whether a training step of this layer is faster by sparse products of patches than by a convolution with the
    dense Ŵ, by the margin that dispatch asks for; and a line for the table. On images of random numbers, of up to 28x28
    positions."""
    trial = copy.deepcopy(layer).to(device).train()
    trial.product_dtype = shape.dtype
    if layer.weight_gradient == "mvue":
        trial.mvue = MvueKey(0, 0, torch.zeros(2, dtype=torch.int64, device=device))
    side = min(math.ceil(math.sqrt(shape.tokens)), 28)
    images = -(-shape.tokens // side**2)

    def step() -> None:
        trial.project()
        for _ in range(shape.micro_batches):
            with torch.autocast(device.type, shape.dtype, enabled=shape.dtype != torch.float32):
                y = trial(x)
            y.backward(y.detach())

    height, width = layer.geometry.kernel
    what = f"{shape.out_features}x{shape.in_features}, {shape.tokens} tokens, a {height}x{width} convolution"
    times = []
    try:
        size = (images, layer.groups * layer.weight.shape[1], *layer.geometry.input_size((side, side)))
        x = torch.randn(size, dtype=shape.dtype, device=device, requires_grad=True)
        for choice in (Plan(), plan):
            trial.plan = choice
            times.append(median_ms(step, device))
    except torch.OutOfMemoryError:
        return False, f"{what}: no memory for its patches"
    by_convolution, by_patches = times
    faster = by_patches < (1 - MARGIN) * by_convolution
    mark = ("", "*") if faster else ("*", "")
    return faster, f"{what}: {mark[0]}{by_convolution:.3f} ms a step by itself, {mark[1]}{by_patches:.3f} ms by patches"


def apply_plans(model: nn.Module, plans: dict[str, Plan], dtype: torch.dtype) -> None:
    """Let every sparse layer multiply as its plan says, in `dtype`, from its next `project` on."""
    for name, plan in plans.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        layer.plan, layer.product_dtype = plan, dtype
