"""A recipe at work: its parts applied to a swapped model, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
import yaml
from sparse24.autograd import MvueKey
from torch import Tensor, nn

from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.optim.adamw import MaskedDecay, SecondMoment
from sparse_pretrain.paths import config_dir
from sparse_pretrain.schema import load
from sparse_pretrain.seeds import hash_seed
from sparse_pretrain.sharding import local, part, whole
from sparse_pretrain.sparsity.adapters import adapters_of, start_adapter
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.schedule import SPARSE, PhaseSchedule, SwitchMonitor


def load_recipe(name: str) -> RecipeConfig:
    """A shipped recipe, `conf/recipe/NAME.yaml`.

    Raises:
        UserError: no recipe of that name.
    """
    folder = config_dir() / "recipe"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError("recipe", name, sorted(p.stem for p in folder.glob("*.yaml")))
    return load(RecipeConfig, yaml.safe_load(path.read_text()))


class SparseTraining:
    """Follows a recipe over a run: phases, mask refreshes, masked decay, adapters, random numbers, flip rate.

    Everything is a function of the step, the weights and the masks; what must survive a restart beside the model's
    state dict (which holds the masks) is in `state_dict`.

    Args:
        model: a module that `sparsify` has been applied to (without sparse layers and adapters, all of this does
            nothing).
        recipe: the same recipe.
        total_steps: optimizer steps of the run.
        seed: of the random numbers of MVUE, of random masks and of learned ones.
        beta2, eps: of Adam, for the automatic switch (STEP).
        new_head: parameters that are trained in any case, `train_weights` or not.

    Attributes:
        started: whether the sparse phase has begun.
        decay, second_moment: for `AdamW`.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: RecipeConfig,
        total_steps: int,
        seed: int,
        beta2: float = 0.95,
        eps: float = 1e-8,
        new_head: Collection[nn.Parameter] = (),
    ) -> None:
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
        self.adapters = adapters_of(model)
        for adapter in self.adapters.values():
            adapter.active = False  # until `prepare`
        self.adapted = {name: model.get_submodule(name) for name in self.adapters}
        self.recipe = recipe
        self.schedule = PhaseSchedule.from_config(recipe.schedule, total_steps)
        self.adapter_start = int(recipe.adapter.start * total_steps + 1e-6)  # a short run too has a last hundredth
        self.seed = seed
        self.decay = MaskedDecay(place=recipe.decay.place, masks=self._masks())
        self.second_moment = SecondMoment(mean=recipe.schedule.switch_mean)
        self.switch: SwitchMonitor | None = None
        if recipe.schedule.dense_warmup_max is not None and self.layers:
            self.switch = SwitchMonitor(round(recipe.schedule.dense_warmup * total_steps), beta2, eps)
        own = {p for layer in self.layers.values() if layer.learned is not None for p in layer.learned.parameters()}
        beside = {*new_head, *own, *(p for adapter in self.adapters.values() for p in adapter.parameters())}
        self.model = model  # its parameters become other objects when they are sharded: by name
        self._frozen = set() if recipe.train_weights else {n for n, p in model.named_parameters() if p not in beside}
        self.step = 0
        self.started = self.adapters_started = False  # the sparse phase, the adapters: once, whatever is resumed
        self.flips: Tensor | None = None  # (layers,) int64: mask entries changed by the last refresh but the first
        self._counter: Tensor | None = None  # (2,) int64: step, first token; read by MVUE in every backward

    def phase(self, step: int) -> str:
        """What optimizer step `step` is: `dense` in a run without sparse layers, else a phase of the schedule."""
        return self.schedule.phase(step) if self.layers else "dense"

    def prepare(self, step: int, refresh: bool = True) -> None:
        """Make the model ready for optimizer step `step`, after the step before it (or after loading a checkpoint
        taken there, with `refresh=False`: its masks are already those of this step)."""
        self.step = step
        if self.layers:
            self._prepare_layers(step, refresh)
        active = self._adapters_active(step)
        for name, adapter in self.adapters.items():
            if active and not self.adapters_started and self.recipe.adapter.path is None:
                start_adapter(self.adapted[name], adapter)
            adapter.active = active
        self.adapters_started |= active

    def _prepare_layers(self, step: int, refresh: bool) -> None:
        layers = list(self.layers.values())
        self._bind(layers)
        self._counter[0].fill_(step)  # type: ignore[index]
        if self.switch is not None:
            self._watch(self.switch, step, refresh)
        if refresh:
            _gather_inputs(layers)
        sparse = self.schedule.phase(step) == SPARSE
        starts = sparse and not self.started
        self.started |= starts  # a run that goes on from another's dense phase may start without a refresh
        refreshes = starts or (refresh and self.schedule.refresh_due(step))
        if refresh and not refreshes and not sparse and step % self.schedule.refresh_every == 0:
            for layer in layers:  # inputs since then are those of the next refresh
                if layer.input_square is not None:
                    layer.input_square.zero_()
        progress, flips = self.schedule.progress(step), []
        for index, layer in enumerate(layers):
            with layer.gathered() if sparse or refreshes else nullcontext():
                if starts:
                    layer.start(hash_seed(self.seed, index))
                if refreshes:
                    flips.append(layer.refresh())
                if layer.learned is not None and sparse:
                    layer.learned.draw(progress, hash_seed(self.seed, index, step))
                layer.project() if sparse else layer.go_dense()
        if flips and step and not starts:
            self.flips = torch.stack(flips)
        self.decay.place = self.recipe.decay.place if sparse else "none"
        self.decay.factor = self._decay_factor(step) if sparse else 0.0
        self.second_moment.frozen = sparse and self.recipe.frozen_preconditioner

    def _decay_factor(self, step: int) -> float:
        """λ·min(t / ramp, 1), t counted from the first sparse step (AST), for which it is 0."""
        decay, schedule = self.recipe.decay, self.schedule
        assert not isinstance(decay.factor, str)
        ramp = decay.ramp * (schedule.finetune_start - schedule.warmup_end)
        return decay.factor * min((step - schedule.warmup_end) / ramp, 1.0) if ramp else decay.factor

    def _watch(self, switch: SwitchMonitor, step: int, after_a_step: bool) -> None:
        """Begin the sparse phase with this step if the second moment has settled."""
        if step > self.schedule.warmup_end:
            return
        if after_a_step and self.second_moment.watched and self.second_moment.change is not None:
            switch.record(step, self.second_moment.change)
        elif not after_a_step:
            self.second_moment.change = switch.change_before(step)
        if after_a_step and step < self.schedule.warmup_end and switch.settled(step):
            self.schedule = dataclasses.replace(self.schedule, warmup_end=step)
        dense = step < self.schedule.warmup_end
        watched = [layer.weight for layer in self.layers.values()] if dense and switch.watches(step) else []
        self.second_moment.watched = watched

    def _adapters_active(self, step: int) -> bool:
        first = max(self.adapter_start, self.schedule.warmup_end) if self.layers else self.adapter_start
        return min(step, self.schedule.total_steps - 1) >= first

    def adopt(self) -> None:
        """After loading another run's checkpoint, whose schedule may differ: bring the masks up to date. Those that
        inputs decide wait for inputs."""
        if self.started and self.recipe.projection != "metric":
            self.refresh()

    def refresh(self) -> Tensor:
        """Recompute every mask now; returns how many entries changed in each layer, (layers,) int64."""
        return torch.stack([layer.refresh() for layer in self.layers.values()])

    @property
    def own_lr(self) -> dict[nn.Parameter, float]:
        """Parameters with a peak learning rate of their own: the logits of learned masks."""
        learned = (layer.learned for layer in self.layers.values())
        return {mask.logits: self.recipe.learned.logit_lr for mask in learned if mask is not None}

    def adjust_gradients(self) -> None:
        """After the backward pass (and unscaling) and before clipping: logits of learned masks get the gradient of
        their reward, weights that are frozen now lose theirs, and with `weight_gradient=masked` pruned weights do
        (SLoPe: dW is pruned to the forward mask)."""
        self._reward_masks()
        sparse = self.layers and self.schedule.phase(self.step) == SPARSE
        if self._frozen and ((sparse and self.own_lr) or self._adapters_active(self.step)):  # something else to train
            for name, parameter in self.model.named_parameters():
                if name in self._frozen:
                    parameter.grad = None
        if sparse and self.recipe.weight_gradient == "masked":
            for layer in self.layers.values():
                if layer.weight.grad is not None:
                    local(layer.weight.grad).mul_(self.decay.masks[layer.weight])

    def _reward_masks(self) -> None:
        """MaskLLM's −λ(1 − t/T)·Σ‖M ⊙ W‖², as if it were part of the loss: masks that keep large weights."""
        weight = self.recipe.learned.norm_weight * (1 - self.schedule.progress(self.step))
        for layer in self.layers.values():
            if layer.learned is None or not layer.is_sparse or not weight:
                continue
            logits = whole(layer.learned.logits.detach()).requires_grad_()
            kept = layer.out_by_in(layer.master_weight()) * layer.learned.soft_mask(logits=logits)
            (gradient,) = torch.autograd.grad(-weight * kept.square().sum(), logits)
            own = layer.learned.logits
            own.grad = torch.zeros_like(own) if own.grad is None else own.grad
            local(own.grad).add_(part(gradient, own))

    def at_tokens(self, first_token: int) -> None:
        """Say which token of the global batch the next forward pass begins with (a multiple of 4): MVUE draws by
        position, so its draws do not depend on how a batch is cut into parts of whole groups of four tokens."""
        if self._counter is not None:
            self._counter[1].fill_(first_token)

    def _bind(self, layers: list[SparseLinear]) -> None:
        """Masks and the counter live where the weights are: bind them after the model has been moved."""
        device = layers[0].weight.device
        if self._counter is None or self._counter.device != device:
            self._counter = torch.zeros(2, dtype=torch.int64, device=device)
            if self.recipe.weight_gradient == "mvue":
                for index, layer in enumerate(layers):
                    # As tensors: blocks compiled from one code share their graph.
                    where = torch.tensor([index, layer.first_feature], device=device)
                    layer.mvue = MvueKey(self.seed, where[0], self._counter, where[1])
        self.decay.masks = self._masks()

    def _masks(self) -> dict[nn.Parameter, Tensor]:
        """Weight -> mask, of the part of each that this rank holds."""
        return {layer.weight: part(layer.mask, layer.weight) for layer in self.layers.values()}

    def flip_rate(self) -> float | None:
        """Share of all mask entries changed between the last two refreshes, `recipe.schedule.refresh_every` steps
        apart (FST, eq. 5); None before the second refresh. Waits for the device."""
        if self.flips is None:
            return None
        entries = sum(layer.mask.numel() for layer in self.layers.values())
        return int(self.flips.sum()) / entries

    def layer_flip_rates(self) -> dict[str, float]:
        """The same for each layer; empty before the second refresh."""
        if self.flips is None:
            return {}
        counts = self.flips.tolist()
        return {name: n / layer.mask.numel() for n, (name, layer) in zip(counts, self.layers.items(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "flips": self.flips,
            "started": self.started,
            "adapters_started": self.adapters_started,
            "warmup_end": self.schedule.warmup_end,
            "changes": None if self.switch is None else self.switch.changes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.flips, self.started = state["flips"], state["started"]
        self.adapters_started = state["adapters_started"]
        if self.switch is not None and state["changes"] is not None:
            if state["changes"].shape == self.switch.changes.shape:  # else another run's, with another beta2
                self.switch.changes = state["changes"]
            if self.started:
                self.schedule = dataclasses.replace(self.schedule, warmup_end=state["warmup_end"])


def _gather_inputs(layers: list[SparseLinear]) -> None:
    """After a step: its inputs, of all ranks, join those since the last refresh, so that every rank's checkpoint is
    the same."""
    measured = [layer for layer in layers if layer.step_square is not None]
    if not measured:
        return
    total = torch.cat([layer.step_square for layer in measured])  # type: ignore[misc]
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    for layer, square in zip(
        measured, total.split([layer.groups * layer.in_features for layer in measured]), strict=True
    ):
        assert layer.input_square is not None
        assert layer.step_square is not None
        layer.input_square += square.nan_to_num(nan=0.0, posinf=0.0)  # of a step that was dropped for it
        layer.step_square.zero_()
