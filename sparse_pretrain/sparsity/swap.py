"""Replacing a model's linear layers and convolutions by 2:4 sparse ones, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.sparsity.adapters import attach, make_adapter
from sparse_pretrain.sparsity.conv import SparseConv2d
from sparse_pretrain.sparsity.linear import SparseLinear, is_conv1d
from sparse_pretrain.sparsity.projections import shape_obstacle

# The FFN of every block, as our models call its layers (ffn) and as those of transformers and torchvision do.
FFN_PATTERNS = (
    *("*.ffn.*", "ffn.*", "*.mlp.*", "mlp.*"),
    *("*.layers.*.fc1", "*.layers.*.fc2"),  # BART, Marian, OPT
    *("*.intermediate.dense", "*.layer.[0-9].output.dense", "*.layer.[0-9][0-9].output.dense"),  # BERT, RoBERTa
    *("*.DenseReluDense.*", "*.pwconv1", "*.pwconv2"),  # T5, ConvNeXt
)


@dataclass(frozen=True)
class LayerRow:
    """One linear layer or convolution of a model, whose in_features are then in_channels / groups · kh · kw.

    adapted: whether it has an adapter; skipped: why it stays as it is although a pattern matched it.
    """

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
    """Swap every linear layer and convolution of `model` whose name matches, in place; it then computes with sparse
    weights, and has the recipe's adapter if it is linear.

    A layer that the model uses under several names is swapped under all of them if one matches. Arguments, result and
    errors are those of `select_layers`.
    """
    rows = select_layers(model, recipe, include, exclude)
    swapped: dict[nn.Module, SparseLinear] = {}
    for row in rows:
        layer = model.get_submodule(row.name)
        if row.sparse:
            sparse = SparseConv2d(layer, recipe) if isinstance(layer, nn.Conv2d) else SparseLinear(layer, recipe)
            swapped[layer] = layer = sparse
        if row.adapted:
            attach(layer, make_adapter(recipe.adapter, row.in_features, row.out_features))
    for name, module in _layers(model).items():
        if module in swapped:
            replace(model, name, swapped[module])
    return rows


def select_layers(
    model: nn.Module,
    recipe: RecipeConfig,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[LayerRow]:
    """Which layers of `model` a recipe makes sparse; changes nothing; weights on `meta` will do.

    Args:
        model: any module holding `nn.Linear`, `nn.Conv2d` or Hugging Face `Conv1D` layers.
        recipe: decides projection and adapter; one without either selects nothing.
        include: shell-style patterns over whole layer names (`blocks.2.ffn.*` is not `blocks.20.ffn.up`); default:
            the recipe's, else the FFN of every block, else, in a network of convolutions without any, all but the
            first convolution and the last layer: the stem and the classifier. (Zhou et al. 2021 leave the classifier
            dense; a stem that sees 3 channels has no groups of four.)
        exclude: patterns of layers to leave dense; default: the recipe's.

    Returns:
        All linear layers and convolutions of the model in order, sparse or not.

    Raises:
        UserError: a pattern matches no layer; a layer named exactly (without wildcard) cannot be made sparse; or
            nothing is left to swap. A layer matched by a wildcard that cannot be is skipped, and says so in its row.
        ValueError: the model is itself such a layer, which cannot be swapped in place.
    """
    if _is_layer(model):
        raise ValueError("the model is a layer itself: put it into a module, as nn.Sequential(layer)")
    layers = _layers(model)
    first_names = {module: name for name, module in reversed(layers.items())}
    if recipe.projection == recipe.adapter.kind == "none":
        return [_row(name, module) for module, name in reversed(first_names.items())]
    include = recipe.include if include is None else include
    exclude = recipe.exclude if exclude is None else exclude
    for option, patterns in (("recipe.include", include or []), ("recipe.exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise UserError(
                    option,
                    f"{pattern}, which matches no linear layer or convolution",
                    "patterns of layer names",
                    _names(layers),
                )
    candidates = _default_layers(layers) if include is None else set(layers)

    rows: dict[nn.Module, LayerRow] = {}
    for name, module in layers.items():
        excluded = name not in candidates or any(fnmatchcase(name, pattern) for pattern in exclude)
        patterns = ["*"] if include is None else include
        matched = [] if excluded else [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if module in rows and not matched:
            continue
        row = _row(first_names[module], module)
        obstacle = _obstacle(recipe, module, row) if matched else None
        if obstacle and name in matched:
            raise UserError("recipe.include", f"{name}, whose {obstacle}", "layers that can be sparse")
        chosen = bool(matched) and not obstacle
        rows[module] = dataclasses.replace(
            row,
            sparse=chosen and recipe.projection != "none",
            adapted=chosen and recipe.adapter.kind != "none" and not isinstance(module, nn.Conv2d),
            skipped=obstacle or "",
        )
    if not any(row.sparse or row.adapted for row in rows.values()):
        skipped = "; ".join(f"{row.name}: {row.skipped}" for row in rows.values() if row.skipped)
        raise UserError(
            "recipe.include", f"no layer that can be sparse ({skipped or 'all are excluded'})", "at least one"
        )
    return list(rows.values())


def _default_layers(layers: dict[str, nn.Module]) -> set[str]:
    """The names of the layers that are meant where no pattern says it."""
    ffn = {
        name
        for name, module in layers.items()
        if not isinstance(module, nn.Conv2d) and any(fnmatchcase(name, pattern) for pattern in FFN_PATTERNS)
    }
    if ffn:
        return ffn
    convolutions = [name for name, module in layers.items() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise UserError("recipe.include", "no FFN layer by its usual names", "patterns of layer names", _names(layers))
    return set(layers) - {convolutions[0], list(layers)[-1]}


def _obstacle(recipe: RecipeConfig, module: nn.Module, row: LayerRow) -> str | None:
    """Why a recipe cannot serve this layer, or None if it can."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "weight is computed from others"
    if isinstance(module, NonDynamicallyQuantizableLinear):  # which it reads and never calls
        return "product is computed by nn.MultiheadAttention"
    if _has_own_product(module):
        return f"product is computed by {type(module).__name__} in its own way"
    if not isinstance(module, nn.Conv2d):
        return shape_obstacle(recipe, row.out_features, row.in_features)
    if recipe.projection == "none":
        return "adapter would be for a linear layer; it is a convolution"
    if recipe.fp8 and module.groups > 1:
        return f"groups={module.groups} have no fp8 product"
    return shape_obstacle(recipe, row.out_features // module.groups, row.in_features, linear=False)


def _has_own_product(module: nn.Module) -> bool:
    """Whether a class derived from a layer's computes something else, which the swapped one would not."""
    if isinstance(module, nn.Conv2d):
        kind = type(module)
        return kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def densify(model: nn.Module) -> nn.Module:
    """Undo `sparsify` in place: plain layers again, holding the weights that the model computes with now (2:4 ones
    where it was sparse), so that its outputs stay the same."""
    dense = {module: module.dense_layer() for module in model.modules() if isinstance(module, SparseLinear)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SparseLinear):
            replace(model, name, dense[module])
    return model


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer or convolution, under every name that the model has for it."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_layer(module)}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d)) or is_conv1d(module)


def _row(name: str, module: nn.Module) -> LayerRow:
    rows, columns = module.weight.flatten(1).shape  # type: ignore[operator]
    return LayerRow(name, *((columns, rows) if is_conv1d(module) else (rows, columns)), sparse=False)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _names(layers: dict[str, nn.Module]) -> str:
    shown = list(layers)[:8]
    return f"This model's layers: {', '.join(shown)}{', …' if len(layers) > len(shown) else ''}"
