"""One forward pass that reads off what goes on in a model, by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_pretrain.diagnostics.activations import HiddenMeter, InputMeter
from sparse_pretrain.diagnostics.attention import HeadMeter, attention_probabilities
from sparse_pretrain.models.blocks import Attention, Block
from sparse_pretrain.sparsity.linear import SparseLinear

Batch = tuple[Tensor, Tensor | None]  # token ids (batch, tokens) int64; mask of the same shape, True = a token


@dataclass
class Probe:
    """heads: a meter per attention layer; hidden: of what goes into the first block and comes out of each; inputs: by
    linear layer of the blocks."""

    heads: dict[str, HeadMeter] = field(default_factory=dict)
    hidden: dict[str, HiddenMeter] = field(default_factory=dict)
    inputs: dict[str, InputMeter] = field(default_factory=dict)
    mask: Tensor | None = None  # of the batch being looked at

    def attend(self, meter: HeadMeter, layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attention, values = attention_probabilities(layer, args[0], self.mask)
        meter.update(attention, values, layer.causal, self.mask)

    def enter(self, meter: HiddenMeter | InputMeter, layer: nn.Module, args: tuple[Any, ...]) -> None:
        meter.update(args[0], self.mask)

    def leave(self, meter: HiddenMeter, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        meter.update(output, self.mask)


@torch.no_grad()
def run_probe(model: nn.Module, hidden: Callable[..., Tensor], batches: Iterable[Batch], epsilon: float) -> Probe:
    """Run the model on the batches; returns what the meters read.

    The model is in evaluation mode and stays as it is. Attention is computed again, a layer at a time, from the layer's
    own queries and keys: only one layer's (batch, heads, tokens, tokens) is in memory.

    Args:
        hidden: the model's method that gives the last hidden state for token ids, and takes `mask` if there are masks.
        epsilon: as of `HeadMeter`.

    Raises:
        ValueError: the model has no `Block`.
    """
    probe = Probe()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Block):
            if not probe.hidden:
                meter = probe.hidden["embedding"] = HiddenMeter()
                handles.append(module.register_forward_pre_hook(partial(probe.enter, meter)))
            meter = probe.hidden[name] = HiddenMeter()
            handles.append(module.register_forward_hook(partial(probe.leave, meter)))
            for child_name, child in module.named_modules(prefix=name):
                if isinstance(child, Attention):
                    heads = probe.heads[child_name] = HeadMeter(epsilon)
                    hook = partial(probe.attend, heads)
                    handles.append(child.register_forward_pre_hook(hook, with_kwargs=True))
                elif isinstance(child, nn.Linear | SparseLinear):
                    # Seen twice where attention is computed again, which leaves a mean as it is.
                    inputs = probe.inputs[child_name] = InputMeter()
                    handles.append(child.register_forward_pre_hook(partial(probe.enter, inputs)))
    try:
        if not probe.hidden:
            raise ValueError("the model has none of this project's transformer blocks")
        for tokens, mask in batches:
            probe.mask = mask
            hidden(tokens) if mask is None else hidden(tokens, mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return probe
