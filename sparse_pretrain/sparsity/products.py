"""Which backend multiplies in each sparse layer: measured on the run's device, or as asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from sparse24.dispatch import LayerShape, Plan, UnsupportedError, choose, table
from torch import nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.sparsity.linear import SparseLinear


def choose_plans(
    model: nn.Module,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    micro_batches: int = 1,
    backend: str = "auto",
    cache: Path | None = None,
) -> tuple[dict[str, Plan], str]:
    """A plan for every sparse layer of `model`, by name (dense products where it is not 2:4 or is learned), and
    the measurements as a table (empty if there were none).

    Args:
        model: with its sparse layers; it may be elsewhere than on `device`.
        tokens: of one micro-batch on one device.
        dtype: of the products.
        device: where the run will be.
        micro_batches: of one optimizer step.
        backend: `auto` or a backend's name.
        cache: a file that remembers measurements; None = measure anew.

    Raises:
        UserError: the backend asked for cannot serve a layer.
    """
    plans: dict[str, Plan] = {}
    tables: dict[LayerShape, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLinear):
            continue
        if layer.learned is not None or layer.pattern != (2, 4):
            if backend not in ("auto", "dense"):
                pattern = (
                    "learned masks" if layer.learned is not None else "recipe.pattern={}:{}".format(*layer.pattern)
                )
                raise UserError(
                    "trainer.backend", f"{backend}, which serves 2:4 weights, with {pattern}", ["auto", "dense"]
                )
            plans[name] = Plan()
            continue
        shape = LayerShape(
            tokens,
            layer.out_features,
            layer.in_features,
            dtype,
            transposable=layer.input_is_sparse,
            mvue=layer.weight_gradient == "mvue",
            micro_batches=micro_batches,
            fp8=layer.fp8,
        )
        try:
            plans[name], rows = choose(shape, device, backend, cache)
        except UnsupportedError as error:
            raise UserError("trainer.backend", f"{backend}, which cannot serve {name}: {error}", "auto") from error
        if rows:
            tables[shape] = table(shape, plans[name], rows)
    return plans, "\n".join(tables.values())


def apply_plans(model: nn.Module, plans: dict[str, Plan], dtype: torch.dtype) -> None:
    """Let every sparse layer multiply as its plan says, in `dtype`, from its next `project` on."""
    for name, plan in plans.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        layer.plan, layer.product_dtype = plan, dtype
