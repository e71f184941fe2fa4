"""AdamW with masked decay at each of the places it has been published for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sparse24.ops import use_kernels
from torch import Tensor, nn


@dataclass
class MaskedDecay:
    """What pulls pruned weights towards zero: λ·(1−M)⊙W, for each masked weight W.

    place:
        `gradient`: added to the gradient before the moments (FST, Hu et al. 2024, eq. 7).
        `momentum`: added to the first moment for this step only, and seen by the second (AST, Huang et al. 2025).
        `weight`: W ← W − lr·λ·(1−M)⊙W beside the step, as weight decay is (SR-STE, Zhou et al. 2021, under Adam).
    factor: λ, changed from step to step by whoever owns the schedule; 0 = off.
    masks: weight -> boolean tensor of the same shape, True = kept.
    """

    place: str = "none"
    factor: float = 0.0
    masks: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def term(self, weight: Tensor, mask: Tensor) -> Tensor:
        """λ·(1−M)⊙W, in the weight's dtype."""
        return weight.detach().masked_fill(mask, 0.0).mul_(self.factor)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused, plus masked decay: on a GPU in one pass, elsewhere beside torch's own.

    As torch's own fused optimizers do, it leaves everything untouched when the tensor `found_inf` (0-dim fp32) is set
    to 1: a step is dropped without waiting for the device.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, decay: MaskedDecay | None = None
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.decay = decay or MaskedDecay()
        self.found_inf: Tensor | None = None
        self._tables: dict[int, Any] = {}  # group -> addresses of its tensors

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = self.decay.place if self.decay.factor > 0 else "none"
        if use_kernels(self.param_groups[0]["params"][0]):
            self._step_in_one_pass(place)
            return loss
        if place == "gradient":
            for weight, mask, grad, _ in self._masked():
                grad.add_(self.decay.term(weight, mask))
        elif place == "momentum":
            for weight, mask, grad, group in self._masked():
                self._step_with_decayed_momentum(weight, mask, grad, group)
                weight.grad = None  # used up: torch's step below leaves a weight without gradient alone
        elif place == "weight":
            for weight, mask, _, group in self._masked():
                weight.sub_(self.decay.term(weight, mask).mul_(group["lr"] * self._live()))
        super().step()
        return loss

    def _step_in_one_pass(self, place: str) -> None:
        from sparse24.optim import TensorTable, adamw_step

        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in params]
            adamw_step(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                [self.decay.masks.get(p) for p in params],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decay_factor=self.decay.factor,
                decay_place=place,
                found_inf=self.found_inf,
                table=self._tables.setdefault(index, TensorTable()),
            )

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """The same entries as torch's own, so that checkpoints do not depend on who steps."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state

    def _masked(self) -> list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Any]]]:
        return [
            (p, self.decay.masks[p], p.grad, group)
            for group in self.param_groups
            for p in group["params"]
            if p in self.decay.masks and p.grad is not None
        ]

    def _live(self) -> Tensor | float:
        """1, or 0 for a step that is to be dropped."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf

    def _step_with_decayed_momentum(
        self, weight: nn.Parameter, mask: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        """m ← β₁m + (1−β₁)g;  u = m + λ(1−M)⊙W;  v ← β₂v + (1−β₂)u²;  W ← W − lr·(u/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)."""
        state = self._state_of(weight)
        live = torch.as_tensor(self._live(), device=weight.device)
        beta1, beta2 = group["betas"]
        step = state["step"] + 1
        momentum = torch.lerp(state["exp_avg"], grad, 1 - beta1)
        update = momentum + self.decay.term(weight, mask)
        variance = torch.lerp(state["exp_avg_sq"], update.square(), 1 - beta2)
        denominator = (variance / (1 - beta2**step)).sqrt_().add_(group["eps"])
        change = weight * (group["lr"] * group["weight_decay"]) + update / denominator * (
            group["lr"] / (1 - beta1**step)
        )
        keep = live > 0
        state["step"].copy_(torch.where(keep, step, state["step"]))
        state["exp_avg"].copy_(torch.where(keep, momentum, state["exp_avg"]))
        state["exp_avg_sq"].copy_(torch.where(keep, variance, state["exp_avg_sq"]))
        weight.sub_(torch.where(keep, change, torch.zeros((), device=weight.device)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and embeddings, none for biases and norms (GPT-2's and Llama's practice)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
