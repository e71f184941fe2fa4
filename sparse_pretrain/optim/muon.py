"""Muon with masked decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_pretrain.optim.adamw import MaskedDecay
from sparse_pretrain.sharding import local, part, whole


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al. 2024) for the weights of hidden layers, plus masked decay.

    The orthogonalised update of an (out, in) weight is scaled by 0.2·√max(out, in), to the root mean square of AdamW's
    updates (Liu et al. 2025, arXiv 2502.16982), so learning rate and weight decay are those for AdamW.

    Decay is that of `MaskedDecay` at `gradient` and `weight`; `momentum` needs Adam. When the tensor `found_inf` (0-dim
    fp32) is 1 everything is left untouched; to know, each step waits for the device.

    Of sharded weights each rank has its part of the momentum. The matrix to orthogonalise is gathered, one at a time;
    every rank orthogonalises it and applies its part.
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
        for group in self.param_groups:
            for weight in group["params"]:
                if isinstance(weight, DTensor) and weight.grad is not None:
                    self._step_sharded(weight, group)
                    weight.grad = None  # used up: torch's step below leaves a weight without gradient alone
        super().step()
        return loss

    def _step_sharded(self, weight: DTensor, group: dict[str, Any]) -> None:
        """The same step, but for rounding. Torch's own takes `DTensor`s too, but then sends something in each of
        Newton and Schulz's five iterations, in bf16, and its result depends on the number of ranks."""
        state, grad = self.state[weight], weight.grad
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        change = _orthogonal_change(whole(grad.lerp(state["momentum_buffer"], group["momentum"])), group)
        local(weight).mul_(1 - group["lr"] * group["weight_decay"]).add_(part(change, weight))


def _orthogonal_change(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What torch's step adds to a weight for this update, that without momentum it takes for the gradient: fp32."""
    change = nn.Parameter(torch.zeros_like(update))
    change.grad = update
    options = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], momentum=0.0, nesterov=False, weight_decay=0.0, **options).step()
    return change.detach()
