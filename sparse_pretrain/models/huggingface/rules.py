"""Which tensors of a Hugging Face checkpoint a tensor of our models is made of, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One tensor of ours.

    Attributes:
        ours: its name.
        theirs: the tensors that are its rows, one below the other.
        rows: of each of theirs; needed where there are several, or where ours may be absent (a bias: zeros there).
        transposed: theirs is (in_features, out_features), as in `Conv1D`.
        batched: theirs has one dimension of size 1 before ours.
        skipped: theirs has so many rows before ours that mean nothing to us; zeros when written.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False
    batched: bool = False
    skipped: int = 0


def linear(ours: str, theirs: str | tuple[str, ...], rows: int | tuple[int, ...], conv1d: bool = False) -> list[Rule]:
    """Weight and bias of a linear layer; `rows`: out_features of each layer of theirs."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    rows = (rows,) if isinstance(rows, int) else rows
    if conv1d and len(theirs) > 1:
        raise ValueError("no checkpoint has several Conv1D where ours has one layer")
    return [
        Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), rows, transposed=conv1d),
        Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), rows),
    ]


def norm(ours: str, theirs: str, width: int) -> list[Rule]:
    """Weight and bias of a LayerNorm."""
    return [Rule(f"{ours}.{part}", (f"{theirs}.{part}",), (width,)) for part in ("weight", "bias")]


def embedding(ours: str, theirs: str) -> Rule:
    return Rule(f"{ours}.weight", (f"{theirs}.weight",))


def to_theirs(rules: Iterable[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of theirs from ours; a bias that ours does not have is zeros in theirs."""
    tensors: dict[str, Tensor] = {}
    like = next(iter(state.values()))
    for rule in rules:
        if rule.ours in state:
            tensor = state[rule.ours]
        elif rule.ours.endswith(".bias"):
            tensor = like.new_zeros(sum(rule.rows))
        else:
            continue  # of a head that this model does not have
        parts = tensor.split(rule.rows) if len(rule.theirs) > 1 else (tensor,)
        for name, part in zip(rule.theirs, parts, strict=True):
            if rule.skipped:
                part = torch.cat((part.new_zeros(rule.skipped, *part.shape[1:]), part))
            part = part.t() if rule.transposed else part
            tensors[name] = (part.unsqueeze(0) if rule.batched else part).contiguous()
    return tensors


def from_theirs(
    rules: Iterable[Rule], tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Ours from a checkpoint of theirs, in float32: those of `wanted` (our state dict, on `meta` will do) that it has
    in whole. A bias that is wanted and not there is zeros if its weight is there."""
    state: dict[str, Tensor] = {}
    for rule in rules:
        if rule.ours not in wanted:
            continue
        parts = []
        for name, rows in zip(rule.theirs, rule.rows or (0,), strict=True):
            weight = f"{name.removesuffix('.bias')}.weight"
            if name in tensors:
                part = tensors[name].float()
                part = part.squeeze(0) if rule.batched else part
                parts.append((part.t() if rule.transposed else part)[rule.skipped :])
            elif name.endswith(".bias") and weight in tensors:
                parts.append(torch.zeros(rows))
        if len(parts) == len(rule.theirs):
            state[rule.ours] = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    return state
