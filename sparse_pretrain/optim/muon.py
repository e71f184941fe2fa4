"""Muon with masked decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_pretrain.optim.adamw import MaskedDecay


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al. 2024) for the weights of hidden layers, plus masked decay.

    The orthogonalised update of an (out, in) weight is scaled by 0.2·√max(out, in), to the root mean square of AdamW's
    updates (Liu et al. 2025, arXiv 2502.16982), so learning rate and weight decay are those for AdamW.

    Decay is that of `MaskedDecay` at `gradient` and `weight`; `momentum` needs Adam. When the tensor `found_inf` (0-dim
    fp32) is 1 everything is left untouched; to know, each step waits for the device.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float, weight_decay: float, decay: MaskedDecay | None = None
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        self.decay = decay or MaskedDecay()
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None and self.found_inf.item():
            return loss
        self.decay.apply(self.param_groups)
        super().step()
        return loss
