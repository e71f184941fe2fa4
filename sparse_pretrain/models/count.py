"""How large a model is and what a token of training costs: parameters, FLOP, memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BACKWARD = 2  # times the forward pass: a product for the input's gradient, one for the weight's


@dataclass(frozen=True)
class ModelCount:
    """What a model is and costs.

    Attributes:
        parameters: all of them, tied ones once, without mask logits.
        flop_per_token: forward and backward of one training token, dense.
        state_bytes: weights, gradients and Adam's two moments in fp32, of mask logits too.
        rows: of the input of each layer's product for one example: tokens, or positions of a convolution.
    """

    parameters: int
    flop_per_token: int
    state_bytes: int
    rows: dict[str, int] = field(default_factory=dict)


def count_model(
    model: nn.Module,
    dense: nn.Module,
    inputs: tuple[Tensor, ...],
    tokens: int,
    mask_logits: Collection[nn.Parameter] = (),
) -> ModelCount:
    """FLOP of the matrix products of one example's forward pass, attention's among them, and twice that for backward.

    Args:
        model: as it is trained, with adapters and mask logits.
        dense: the same model before layers were swapped, on the `meta` device: it computes nothing.
        inputs: of one example.
        tokens: that an example counts as.
        mask_logits: trained beside the model; none of its parameters.
    """
    rows: dict[str, int] = {}
    for name, module in dense.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding):
            module.register_forward_hook(partial(_note_rows, rows, name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense.eval()(*(value.to("meta") for value in inputs))
    forward = counter.get_total_flops()
    known = dict(dense.named_modules())
    for name, module in model.named_modules():  # adapters
        layer = name.rpartition(".")[0]
        if name not in known and layer in rows:
            weights = sum(p.numel() for p in module.parameters() if p.dim() == 2 and p not in mask_logits)
            forward += 2 * rows[layer] * weights
    parameters = sum(p.numel() for p in model.parameters() if p not in mask_logits)
    return ModelCount(
        parameters=parameters,
        flop_per_token=(1 + BACKWARD) * forward // tokens,
        state_bytes=16 * (parameters + sum(p.numel() for p in mask_logits)),
        rows=rows,
    )


def _note_rows(rows: dict[str, int], name: str, module: nn.Module, _: Any, output: Tensor) -> None:
    """A forward hook. A convolution's output is (batch, channels, height, width); others end with their features."""
    rows[name] = output.numel() // output.shape[1 if output.dim() == 4 else -1]
