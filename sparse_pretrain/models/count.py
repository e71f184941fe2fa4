"""How large a model is and what a token of training costs: parameters, FLOP, memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from sparse_pretrain.config_models import GPTConfig


@dataclass(frozen=True)
class ModelCount:
    """parameters: all of them, tied ones once; flop_per_token: forward and backward of one training token, dense;
    state_bytes: weights, gradients and Adam's two moments in fp32, of mask logits too."""

    parameters: int
    flop_per_token: int
    state_bytes: int


def count_model(
    model: nn.Module, cfg: GPTConfig, seq_len: int, mask_logits: Collection[nn.Parameter] = ()
) -> ModelCount:
    """6 FLOP per weight of a matrix product and token (2 forward, 4 backward), plus 12 · n_layer · d_model · seq_len
    for attention (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B). Mask logits are trained beside the model
    and are none of its parameters."""
    parameters = sum(p.numel() for p in model.parameters() if p not in mask_logits)
    # By shape, not by type: a layer may have been swapped for a sparse one. A tied head counts as the product it is.
    matmul_weights = sum(
        p.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
        if p.dim() == 2
    )
    return ModelCount(
        parameters=parameters,
        flop_per_token=6 * matmul_weights + 12 * cfg.n_layer * cfg.d_model * seq_len,
        state_bytes=16 * (parameters + sum(p.numel() for p in mask_logits)),
    )
