"""AdamW with masked decay at each of the places it has been published for, and STEP's frozen second moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sparse24.ops import use_kernels
from torch import Tensor, nn

from sparse_pretrain.sharding import local, sum_over_parts

FROZEN = "second_moment_frozen"  # of a group: the switch was made; of a weight's state: it had a second moment then


@dataclass
class MaskedDecay:
    """What pulls pruned weights towards zero: λ·(1−M)⊙W, for each masked weight W.

    place:
        `gradient`: added to the gradient before the moments (FST, Hu et al. 2024, eq. 7).
        `momentum`: added to the first moment for this step only, and seen by the second (AST, Huang et al. 2025).
        `weight`: W ← W − lr·λ·(1−M)⊙W beside the step, as weight decay is (SR-STE, Zhou et al. 2021, under Adam).
    factor: λ, changed from step to step by whoever owns the schedule; 0 = off.
    masks: weight -> boolean tensor of the same shape, True = kept; of a sharded weight, of this rank's part.
    """

    place: str = "none"
    factor: float = 0.0
    masks: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    @property
    def place_now(self) -> str:
        """`momentum` is a step of its own, in which the second moment sees u, with a factor of 0 too."""
        return self.place if self.factor > 0 or self.place == "momentum" else "none"

    def term(self, weight: Tensor, mask: Tensor) -> Tensor:
        """λ·(1−M)⊙W, in the weight's dtype, of this rank's part."""
        return local(weight.detach()).masked_fill(mask, 0.0).mul_(self.factor)

    def apply(self, groups: list[dict[str, Any]], live: Tensor | float = 1.0) -> None:
        """At `gradient` and `weight`: to the parameters of an optimizer's groups that have a mask and a gradient.

        live: 1, or 0 for a step that is to be dropped (its gradients may be anything, its weights stay).
        """
        for group in groups:
            for weight in group["params"]:
                mask = self.masks.get(weight)
                if mask is None or weight.grad is None:
                    continue
                if self.place_now == "gradient":
                    local(weight.grad).add_(self.term(weight, mask))
                elif self.place_now == "weight":
                    local(weight).sub_(self.term(weight, mask).mul_(group["lr"] * live))


@dataclass
class SecondMoment:
    """What STEP (Lu et al. 2023) asks of Adam's second moment: how much it still changes, and then to hold it.

    watched: weights whose change is computed by each step; empty = none.
    mean: over all of their entries, `arithmetic` or `geometric` (entries that do not change at all count as the
        smallest normal float32).
    change: Z_t = mean |v_t − v_{t−1}| of the last step, 0-dim fp32; after a dropped step still that of the step before
        (infinite if there was none).
    frozen: set it to True once: from the next step on AdamW divides by the v̂ = v/(1−β₂ᵗ) of the step before, and v
        changes no more. There is no way back.
    """

    watched: list[nn.Parameter] = field(default_factory=list)
    mean: str = "arithmetic"
    change: Tensor | None = None
    frozen: bool = False

    def record(self, changes: dict[nn.Parameter, Tensor], found_inf: Tensor | None) -> None:
        """Set `change` from the |v_t − v_{t−1}| of the watched weights, of this rank's part of each."""
        entries, geometric = sum(weight.numel() for weight in changes), self.mean == "geometric"
        if geometric:
            tiny = torch.finfo(torch.float32).tiny
            changes = {weight: x.clamp_min_(tiny).log_() for weight, x in changes.items()}
        total = torch.stack([x.sum() for x in changes.values()]).sum()
        mean = sum_over_parts(total, next(iter(changes))) / entries
        mean = mean.exp() if geometric else mean
        if found_inf is not None:
            before = torch.full_like(mean, math.inf) if self.change is None else self.change.to(mean.device)
            mean = torch.where(found_inf.to(mean.device) > 0, before, mean)
        self.change = mean


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused, plus masked decay: on a GPU in one pass, elsewhere beside torch's own.

    As torch's own fused optimizers do, it leaves everything untouched when the tensor `found_inf` (0-dim fp32) is set
    to 1: a step is dropped without waiting for the device.

    Once the second moment is frozen (STEP, Lu et al. 2023: the preconditioner of the sparse phase) the step is

        m ← β₁m + (1−β₁)g        W ← W − lr·(m/(1−β₁ᵗ)) / (√v* + ε)        v* = v/(1−β₂ᵗ) of the switch

    for every parameter that had been trained by then; one whose first gradient comes later has an AdamW step of its own
    beginnings. v* takes the place of v in the state. ε and the correction of v are those of the steps before, so
    nothing jumps at the switch; the authors' release has √v + ε^0.75 with v uncorrected.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decay: MaskedDecay | None = None,
        second_moment: SecondMoment | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.decay = decay or MaskedDecay()
        self.second_moment = second_moment or SecondMoment()
        self.found_inf: Tensor | None = None
        self._tables: dict[tuple[int, bool], Any] = {}  # (group, whether frozen) -> addresses of its tensors

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.second_moment.frozen:
            self._freeze()
        if self.second_moment.watched:
            self._watch()
        if use_kernels(self.param_groups[0]["params"][0]):
            self._step_in_one_pass()
            return loss
        self.decay.apply(self.param_groups, self._live())
        decays_momentum = self.decay.place_now == "momentum"
        for weight, group in self._stepping():
            if (decays_momentum and weight in self.decay.masks) or self._is_frozen(weight):
                self._step_by_formula(weight, group)
                weight.grad = None  # used up: torch's step below leaves a weight without gradient alone
        super().step()
        return loss

    def _stepping(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _step_in_one_pass(self) -> None:
        from sparse24.optim import TensorTable, adamw_step

        for index, group in enumerate(self.param_groups):
            for frozen in (False, True):
                params = [p for p in group["params"] if p.grad is not None and self._is_frozen(p) == frozen]
                states = [self._state_of(p) for p in params]
                adamw_step(
                    [local(p) for p in params],
                    [local(p.grad) for p in params if p.grad is not None],
                    [local(state["exp_avg"]) for state in states],
                    [local(state["exp_avg_sq"]) for state in states],
                    [state["step"] for state in states],
                    [self.decay.masks.get(p) for p in params],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    decay_factor=self.decay.factor,
                    decay_place=self.decay.place_now,
                    frozen=frozen,
                    found_inf=self.found_inf,
                    table=self._tables.setdefault((index, frozen), TensorTable()),
                )

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """The same entries as torch's own, so that checkpoints do not depend on who steps."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state

    def _is_frozen(self, weight: nn.Parameter) -> bool:
        return FROZEN in self.state.get(weight, {})

    def _freeze(self) -> None:
        """v ← v/(1−β₂ᵗ), for all that have a v. Waits for the device, once in a run."""
        for group in self.param_groups:
            if group.get(FROZEN):
                continue
            group[FROZEN] = True
            for weight in group["params"]:
                state = self.state.get(weight)
                if state and state["step"] > 0:
                    local(state["exp_avg_sq"]).div_(1 - group["betas"][1] ** state["step"].to(weight.device))
                    state[FROZEN] = True

    def _watch(self) -> None:
        """Z_t of the step to come: |v_t − v_{t−1}| = (1−β₂)·|u² − v_{t−1}|, where u is what the second moment sees."""
        watched, changes = set(self.second_moment.watched), {}
        for weight, group in self._stepping():
            if weight in watched and not self._is_frozen(weight):
                state = self._state_of(weight)
                seen = self._seen(weight, group)
                change = seen.square().float().sub_(local(state["exp_avg_sq"])).abs_()
                changes[weight] = change.mul_(1 - group["betas"][1])
        if changes:
            self.second_moment.record(changes, self.found_inf)

    def _seen(self, weight: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """What the second moment of this weight sees in this step, before the decay has been applied."""
        mask, place = self.decay.masks.get(weight), self.decay.place_now
        assert weight.grad is not None
        grad = local(weight.grad)
        if mask is not None and place == "momentum":
            grad = torch.lerp(local(self._state_of(weight)["exp_avg"]), grad, 1 - group["betas"][0])
        return grad + self.decay.term(weight, mask) if mask is not None and place in ("gradient", "momentum") else grad

    def _live(self) -> Tensor | float:
        """1, or 0 for a step that is to be dropped."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf

    def _step_by_formula(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        """m ← β₁m + (1−β₁)g;  u = m + λ(1−M)⊙W;  v ← β₂v + (1−β₂)u²;  W ← W − lr·(u/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε).

        u = m where the decay is not at `momentum`. A frozen v stays, and is v̂ as it is.
        """
        state = {name: local(value) for name, value in self._state_of(weight).items() if isinstance(value, Tensor)}
        assert weight.grad is not None
        grad, own = local(weight.grad), local(weight)
        live = torch.as_tensor(self._live(), device=weight.device)
        beta1, beta2 = group["betas"]
        step = state["step"] + 1
        momentum = torch.lerp(state["exp_avg"], grad, 1 - beta1)
        mask = self.decay.masks.get(weight) if self.decay.place_now == "momentum" else None
        update = momentum if mask is None else momentum + self.decay.term(weight, mask)
        if self._is_frozen(weight):
            variance = corrected = state["exp_avg_sq"]
        else:
            variance = torch.lerp(state["exp_avg_sq"], update.square(), 1 - beta2)
            corrected = variance / (1 - beta2**step)
        denominator = corrected.sqrt().add_(group["eps"])
        change = own * (group["lr"] * group["weight_decay"]) + update / denominator * (group["lr"] / (1 - beta1**step))
        keep = live > 0
        state["step"].copy_(torch.where(keep, step, state["step"]))
        state["exp_avg"].copy_(torch.where(keep, momentum, state["exp_avg"]))
        state["exp_avg_sq"].copy_(torch.where(keep, variance, state["exp_avg_sq"]))
        own.sub_(torch.where(keep, change, torch.zeros((), device=weight.device)))

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """Of sharded parameters, gradients and moments torch's step is given this rank's parts."""
        complex_ones = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return complex_ones


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float, own_lr: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Weight decay for matrices and embeddings, none for biases and norms (GPT-2's and Llama's practice).

    Args:
        lr: the peak learning rate; a group has it as `peak_lr`, and `lr` is at first the same.
        own_lr: parameter -> its own peak learning rate, of parameters that have one (mask logits); without decay.

    Returns:
        groups for an optimizer, none of them empty.
    """
    own_lr = own_lr or {}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        (lr, weight_decay, [p for p in trained if p not in own_lr and p.dim() >= 2]),
        (lr, 0.0, [p for p in trained if p not in own_lr and p.dim() < 2]),
        *((rate, 0.0, [p for p in trained if own_lr.get(p) == rate]) for rate in sorted(set(own_lr.values()))),
    ]
    return [
        {"params": params, "weight_decay": decay, "lr": rate, "peak_lr": rate}
        for rate, decay, params in groups
        if params
    ]
