"""Adapters: a small trained product added to a linear layer's output, beside its weight.

LoRA (Hu et al. 2021), of which SLoPe's lazy low-rank adapter (ICLR 2025) is a setting, and SLoRB (AST, AAAI 2025).
An adapter is the layer's submodule `adapter`; a forward hook adds what it computes, so the layer need not know of it
and may be an `nn.Linear`, a `SparseLinear` or a Hugging Face `Conv1D`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from sparse_pretrain.config_recipe import AdapterConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.sharding import own, put, whole
from sparse_pretrain.sparsity.linear import SparseLinear, is_conv1d


class Adapter(nn.Module):
    """What LoRA and SLoRB have in common.

    `active`: False = it adds nothing and gets no gradient. `original`: the layer's weight as it was before the adapter
    was merged into it, on the CPU; None = not merged. A merged adapter adds nothing and is left out of state dicts, so
    that what they hold is the plain model with the merged weights.
    """

    kind: ClassVar[str]

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.active = True
        self.original: Tensor | None = None

    def start(self, weight: Tensor, mask: Tensor | None) -> None:
        """Called once, when the adapter appears: not after its parameters were loaded.

        Args:
            weight: the layer's master weight (out_features, in_features).
            mask: boolean, of the same shape, True = kept; None = nothing is pruned.
        """

    def delta(self) -> Tensor:
        """The weight (out_features, in_features) with which a dense layer would compute the same."""
        raise NotImplementedError

    def options(self) -> dict[str, str]:
        """What has to be the same for saved parameters to mean the same, as text."""
        raise NotImplementedError

    def placements(self, dimension: int) -> dict[str, Placement]:
        """Where ranks compute the layer together, split along this dimension of its weight: how the parameters are
        spread so that each adds what belongs to its part."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options().items())
        return f"in_features={self.in_features}, out_features={self.out_features}{options}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.original is None:
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.original is not None:
            raise ValueError(f"{prefix.removesuffix('.')} is merged: call unmerge_adapters before loading a state dict")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoRA(Adapter):
    """Y += (alpha / rank) · X Aᵀ Bᵀ (Hu et al. 2021, section 4.1).

    A is `a` (rank, in_features), drawn from torch's global random numbers; B is `b` (out_features, rank), zeros. With
    init=normal and alpha=1 it is SLoPe's X L R / rank (L = Aᵀ, R = Bᵀ).

    Args:
        alpha: the output is scaled by alpha / rank.
        init: of A: `kaiming` (uniform within ±1/√in_features, as in loralib) or `normal` (mean 0, variance 1).
        share: in place of `rank`: the largest rank, but at least 1, with which A and B have at most this share of the
            layer's weights.
    """

    kind = "lora"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        init: str = "kaiming",
        share: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        _check_init(self.kind, init, ["kaiming", "normal"])
        self.share = share
        if share is not None:
            rank = max(1, math.floor(share * in_features * out_features / (in_features + out_features) + 1e-9))
        self.rank = rank
        self.alpha = float(alpha)
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        else:
            nn.init.normal_(self.a)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns what is added to the layer's output, (..., out_features)."""
        return F.linear(F.linear(x, own(self.a)), own(self.b)) * (self.alpha / self.rank)

    def placements(self, dimension: int) -> dict[str, Placement]:
        return {"a": Replicate(), "b": Shard(0)} if dimension == 0 else {"a": Shard(1), "b": Replicate()}

    def delta(self) -> Tensor:
        return (self.b @ self.a) * (self.alpha / self.rank)

    def options(self) -> dict[str, str]:
        size = {"rank": str(self.rank)} if self.share is None else {"rank_share": str(self.share)}
        return {**size, "alpha": str(self.alpha)}


class SLoRB(Adapter):
    """Y += (X Pᵀ) Sᵀ (AST, AAAI 2025): each weight of S serves a whole group of inputs.

    P (in_features / group, in_features) sums groups of consecutive inputs: row j has ones on inputs j·group to
    (j+1)·group − 1. With `train_groups` it starts so and is the Parameter `p`; else the sums are computed without it.
    S is `s` (out_features, in_features / group): zeros, and from `start` on the mean or sum, over each group, of the
    pruned weights W⊙(1−M). The mean divides by the group's size, kept weights included, as the authors' code does.

    Args:
        init: of S: `mean` or `sum`.

    Raises:
        ValueError: in_features is not a multiple of group.
    """

    kind = "slorb"

    def __init__(
        self, in_features: int, out_features: int, group: int = 16, train_groups: bool = True, init: str = "mean"
    ) -> None:
        super().__init__(in_features, out_features)
        _check_init(self.kind, init, ["mean", "sum"])
        if in_features % group:
            raise ValueError(f"in_features must be a multiple of group; found in_features={in_features}, group={group}")
        self.group = group
        self.init = init
        groups = in_features // group
        self.s = nn.Parameter(torch.zeros(out_features, groups))
        self.p = nn.Parameter(torch.eye(groups).repeat_interleave(group, dim=1)) if train_groups else None

    @torch.no_grad()
    def start(self, weight: Tensor, mask: Tensor | None) -> None:
        """S becomes the mean or sum of the pruned weights of each group; zeros where mask is None."""
        if mask is None:
            self.s.zero_()
            return
        pruned = weight.masked_fill(mask, 0).unflatten(1, (-1, self.group))
        put(self.s, pruned.mean(-1) if self.init == "mean" else pruned.sum(-1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns what is added to the layer's output, (..., out_features)."""
        sums = x.unflatten(-1, (-1, self.group)).sum(-1) if self.p is None else F.linear(x, own(self.p))
        return F.linear(sums, own(self.s))

    def placements(self, dimension: int) -> dict[str, Placement]:
        if self.p is None:
            return {"s": Shard(dimension)}
        return {"p": Replicate(), "s": Shard(0)} if dimension == 0 else {"p": Shard(1), "s": Replicate()}

    def delta(self) -> Tensor:
        return self.s.repeat_interleave(self.group, dim=1) if self.p is None else self.s @ self.p

    def options(self) -> dict[str, str]:
        return {"group": str(self.group), "train_groups": str(self.p is not None).lower()}


def _check_init(kind: str, init: str, allowed: list[str]) -> None:
    if init not in allowed:
        raise UserError("recipe.adapter.init", f"{init} with recipe.adapter.kind={kind}", allowed)


def make_adapter(cfg: AdapterConfig, in_features: int, out_features: int) -> LoRA | SLoRB:
    """The adapter that a recipe asks for, for a layer of this shape, with fp32 parameters. Draws from torch's global
    random numbers.

    Raises:
        UserError: recipe.adapter.init is one of the other kind.
        ValueError: kind is `none`, or in_features is not a multiple of group.
    """
    if cfg.kind == "lora":
        return LoRA(in_features, out_features, cfg.rank, cfg.alpha, cfg.init or "kaiming", cfg.rank_share)
    if cfg.kind == "slorb":
        return SLoRB(in_features, out_features, cfg.group, cfg.train_groups, cfg.init or "mean")
    raise ValueError(f"kind={cfg.kind} has no adapter")


def attach(layer: nn.Module, adapter: LoRA | SLoRB) -> None:
    """Make `adapter` the submodule `layer.adapter`, on the weight's device and in its dtype; from now on what it
    computes is added to the layer's output.

    Args:
        layer: an `nn.Linear`, `SparseLinear` or Hugging Face `Conv1D`.

    Raises:
        ValueError: their shapes differ, or the layer has an adapter already.
    """
    out_features, in_features = _out_by_in(layer).shape
    if (adapter.in_features, adapter.out_features) != (in_features, out_features):
        raise ValueError(
            f"the adapter is for in_features={adapter.in_features}, out_features={adapter.out_features}; "
            f"the layer has in_features={in_features}, out_features={out_features}"
        )
    if hasattr(layer, "adapter"):
        raise ValueError("the layer has an adapter already")
    weight = cast(Tensor, layer.weight)
    layer.adapter = adapter.to(weight.device, weight.dtype)
    layer.register_forward_hook(add_adapter)


def start_adapter(layer: nn.Module, adapter: LoRA | SLoRB) -> None:
    """Let the layer's adapter begin, beside its weight as it is now."""
    pruned = isinstance(layer, SparseLinear) and layer.is_sparse
    mask = layer.out_by_in(layer.mask) if isinstance(layer, SparseLinear) and pruned else None
    adapter.start(whole(_out_by_in(layer).detach()), mask)


def add_adapter(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The forward hook of a layer with an adapter."""
    # Looked up here, not bound: a deep copy of the layer has the same hook and an adapter of its own.
    adapter = cast(Adapter, layer.adapter)
    return output + adapter(args[0]) if adapter.active and adapter.original is None else output


def _out_by_in(layer: nn.Module) -> Tensor:
    """The layer's weight as (out_features, in_features), sharing its memory."""
    weight = cast(Tensor, layer.weight)
    transposed = layer.transposed if isinstance(layer, SparseLinear) else is_conv1d(layer)
    return weight.t() if transposed else weight


def adapters_of(model: nn.Module) -> dict[str, LoRA | SLoRB]:
    """Layer name -> its adapter, in the model's order."""
    return {name: cast("LoRA | SLoRB", layer.adapter) for name, layer in _layers(model).items()}


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, "adapter", None), Adapter)}


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every active adapter to its layer's weight, which then computes the same without it: for inference.

    Adapters stay where they are, marked as merged. Those merged already and those not active are left as they are.
    What is trained or loaded before `unmerge_adapters` is lost with it.

    Raises:
        ValueError: a layer computes with a 2:4 weight, or its weight is another module's too. Nothing is merged then.
    """
    layers = {name: layer for name, layer in _layers(model).items() if _is_mergeable(cast(Adapter, layer.adapter))}
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    for name, layer in layers.items():
        # A PackedLinear has no `weight` at all.
        if not hasattr(layer, "weight") or (isinstance(layer, SparseLinear) and layer.is_sparse):
            raise ValueError(
                f"{name} computes with a 2:4 weight, which a merged adapter would fill up: keep the adapter apart"
            )
        if owners[cast(nn.Parameter, layer.weight)] > 1:
            raise ValueError(f"{name} shares its weight with another module, which merging would change: keep it apart")
    for layer in layers.values():
        adapter, weight = cast(Adapter, layer.adapter), cast(Tensor, layer.weight)
        adapter.original = weight.detach().to("cpu", copy=True)
        _out_by_in(layer).add_(adapter.delta())


def _is_mergeable(adapter: Adapter) -> bool:
    return adapter.active and adapter.original is None


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> None:
    """Undo `merge_adapters`: every weight has the very bits that it had before."""
    for layer in _layers(model).values():
        adapter = cast(Adapter, layer.adapter)
        if adapter.original is not None:
            cast(Tensor, layer.weight).copy_(adapter.original)
            adapter.original = None
