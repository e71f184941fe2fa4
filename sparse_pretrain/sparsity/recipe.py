"""A recipe at work: its parts applied to a swapped model, step by step."""

from __future__ import annotations

from typing import Any

import torch
import yaml
from sparse24.autograd import MvueKey
from torch import Tensor, nn

from sparse_pretrain.config import RecipeConfig, load
from sparse_pretrain.errors import UserError
from sparse_pretrain.optim.adamw import MaskedDecay
from sparse_pretrain.paths import config_dir
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.schedule import SPARSE, PhaseSchedule


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
    """Follows a recipe over a run: phases, mask refreshes, masked decay, MVUE's random numbers, flip rate.

    Everything is a function of the step, the weights and the masks; what must survive a restart beside the model's
    state dict (which holds the masks) is in `state_dict`.

    Args:
        model: a module that `sparsify` has been applied to (without sparse layers, all of this does nothing).
        recipe: the same recipe.
        total_steps: optimizer steps of the run.
        seed: of MVUE's random numbers.
    """

    def __init__(self, model: nn.Module, recipe: RecipeConfig, total_steps: int, seed: int) -> None:
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
        self.recipe = recipe
        self.schedule = PhaseSchedule.from_config(recipe.schedule, total_steps)
        self.seed = seed
        self.decay = MaskedDecay(
            place=recipe.decay.place, masks={layer.weight: layer.mask for layer in self.layers.values()}
        )
        self.flips: Tensor | None = None  # (layers,) int64: mask entries changed by the last refresh but the first
        self._counter: Tensor | None = None  # (2,) int64: step, first token; read by MVUE in every backward

    def prepare(self, step: int, refresh: bool = True) -> None:
        """Make the model ready for optimizer step `step`, after the step before it (or after loading a checkpoint
        taken there, with `refresh=False`: its masks are already those of this step)."""
        if not self.layers:
            return
        layers = list(self.layers.values())
        self._bind(layers)
        self._counter[0].fill_(step)  # type: ignore[index]
        sparse = self.schedule.phase(step) == SPARSE
        if refresh and self.schedule.refresh_due(step):
            flips = self.refresh()
            if step > self.schedule.warmup_end:
                self.flips = flips
        for layer in layers:
            layer.project() if sparse else layer.go_dense()
        self.decay.factor = self.recipe.decay.factor if sparse else 0.0

    def refresh(self) -> Tensor:
        """Recompute every mask now; returns how many entries changed in each layer, (layers,) int64."""
        return torch.stack([layer.refresh() for layer in self.layers.values()])

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
                    # The index as a tensor: blocks compiled from one code share their graph.
                    layer.mvue = MvueKey(self.seed, torch.tensor(index, device=device), self._counter)
        self.decay.masks = {layer.weight: layer.mask for layer in layers}

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
        return {"flips": self.flips}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.flips = state["flips"]
