"""Replacing a model's linear layers by 2:4 sparse ones, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from sparse_pretrain.config import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.sparsity.adapters import attach, make_adapter
from sparse_pretrain.sparsity.linear import SparseLinear, is_conv1d
from sparse_pretrain.sparsity.projections import shape_obstacle

# The FFN of every block, as our models call it (ffn) and as Hugging Face's decoders do (mlp).
FFN_PATTERNS = ("*.ffn.*", "*.mlp.*", "ffn.*", "mlp.*")


@dataclass(frozen=True)
class LayerRow:
    """One linear layer of a model. adapted: whether it has an adapter; skipped: why it stays as it is although a
    pattern matched it."""

    name: str
    out_features: int
    in_features: int
    sparse: bool
    adapted: bool = False
    skipped: str = ""


def sparsify(
    model: nn.Module,
    recipe: RecipeConfig,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[LayerRow]:
    """Swap every linear layer of `model` whose name matches, in place; it then computes with sparse weights, and has
    the recipe's adapter.

    A layer that the model uses under several names is swapped under all of them if one matches. Arguments, result and
    errors are those of `select_layers`.
    """
    rows = select_layers(model, recipe, include, exclude)
    swapped: dict[nn.Module, SparseLinear] = {}
    for row in rows:
        layer = model.get_submodule(row.name)
        if row.sparse:
            swapped[layer] = layer = SparseLinear(layer, recipe)
        if row.adapted:
            attach(layer, make_adapter(recipe.adapter, row.in_features, row.out_features))
    for name, module in _linears(model).items():
        if module in swapped:
            replace(model, name, swapped[module])
    return rows


def select_layers(
    model: nn.Module,
    recipe: RecipeConfig,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[LayerRow]:
    """Which linear layers of `model` a recipe makes sparse; changes nothing; weights on `meta` will do.

    Args:
        model: any module holding `nn.Linear` or Hugging Face `Conv1D` layers.
        recipe: decides projection and adapter; one without either selects nothing.
        include: shell-style patterns over whole layer names (`blocks.2.ffn.*` is not `blocks.20.ffn.up`); default:
            the recipe's, else the FFN of every block.
        exclude: patterns of layers to leave dense; default: the recipe's.

    Returns:
        All linear layers of the model in order, sparse or not.

    Raises:
        UserError: a pattern matches no linear layer; a layer named exactly (without wildcard) has a shape that cannot
            be made sparse; or nothing is left to swap. A layer matched by a wildcard whose shape cannot be is skipped,
            and says so in its row.
        ValueError: the model is itself a linear layer, which cannot be swapped in place.
    """
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise ValueError("the model is a linear layer itself: put it into a module, as nn.Sequential(layer)")
    linears = _linears(model)
    first_names = {module: name for name, module in reversed(linears.items())}
    if recipe.projection == recipe.adapter.kind == "none":
        return [_row(name, module) for module, name in reversed(first_names.items())]
    include = recipe.include if include is None else include
    exclude = recipe.exclude if exclude is None else exclude
    if include is None:
        include = [pattern for pattern in FFN_PATTERNS if any(fnmatchcase(name, pattern) for name in linears)]
        if not include:
            raise UserError(
                "recipe.include", "no FFN layer by its usual names", "patterns of layer names", _names(linears)
            )
    for option, patterns in (("recipe.include", include), ("recipe.exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in linears):
                raise UserError(
                    option, f"{pattern}, which matches no linear layer", "patterns of layer names", _names(linears)
                )

    rows: dict[nn.Module, LayerRow] = {}
    for name, module in linears.items():
        excluded = any(fnmatchcase(name, pattern) for pattern in exclude)
        matched = [] if excluded else [pattern for pattern in include if fnmatchcase(name, pattern)]
        if module in rows and not matched:
            continue
        row = _row(first_names[module], module)
        obstacle = shape_obstacle(recipe, row.out_features, row.in_features) if matched else None
        if obstacle and name in matched:
            raise UserError("recipe.include", f"{name}, whose {obstacle}", "layers whose shape can be sparse")
        chosen = bool(matched) and not obstacle
        rows[module] = dataclasses.replace(
            row,
            sparse=chosen and recipe.projection != "none",
            adapted=chosen and recipe.adapter.kind != "none",
            skipped=obstacle or "",
        )
    if not any(row.sparse or row.adapted for row in rows.values()):
        skipped = "; ".join(f"{row.name}: {row.skipped}" for row in rows.values() if row.skipped)
        raise UserError(
            "recipe.include", f"no layer that can be sparse ({skipped or 'all are excluded'})", "at least one"
        )
    return list(rows.values())


def densify(model: nn.Module) -> nn.Module:
    """Undo `sparsify` in place: plain layers again, holding the weights that the model computes with now (2:4 ones
    where it was sparse), so that its outputs stay the same."""
    dense = {module: module.dense_layer() for module in model.modules() if isinstance(module, SparseLinear)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SparseLinear):
            replace(model, name, dense[module])
    return model


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, under every name that the model has for it."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, nn.Linear) or is_conv1d(module)}


def _row(name: str, module: nn.Module) -> LayerRow:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return LayerRow(name, *((columns, rows) if is_conv1d(module) else (rows, columns)), sparse=False)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _names(linears: dict[str, nn.Module]) -> str:
    shown = list(linears)[:8]
    return f"This model's linear layers: {', '.join(shown)}{', …' if len(linears) > len(shown) else ''}"
