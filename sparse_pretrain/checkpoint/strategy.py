"""FSDP2 under Lightning, with our checkpoints: each rank writes and reads its parts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sparse_pretrain.checkpoint import store
from sparse_pretrain.checkpoint.saver import Saver


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for modules that shard themselves in `configure_model`.

    The state is what an unsharded run's is, by the same names, with `DTensor`s for what is sharded, so that runs
    continue on another number of devices and with another strategy.
    """

    def __init__(self, saver: Saver, timeout: timedelta, **sizes: int) -> None:
        super().__init__(timeout=timeout, **sizes)  # type: ignore[arg-type]
        self.saver = saver

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        self.saver.save(checkpoint, Path(filepath), together=True)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return store.read(Path(checkpoint_path), self._place)  # verified before the ranks started

    def _place(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """A `DTensor` for a sharded weight and its moments, a tensor on the CPU for all else."""
        weight = self._weight(name)
        if isinstance(weight, DTensor) and weight.shape == size:
            return torch.empty_like(weight, dtype=dtype)
        return torch.empty(size, dtype=dtype)

    def _weight(self, name: str) -> Tensor | None:
        kind, _, rest = name.partition(".")
        if kind == "state_dict":
            return self._parameters().get(rest)
        if kind == "teacher_copy":  # sharded as the student, whose names it has
            return self._parameters().get(f"model.{rest}")
        if kind == "optimizer_states":  # optimizer_states.0.state.5.exp_avg
            optimizer, what, index, _ = rest.split(".")
            if what == "state":
                groups = self.optimizers[int(optimizer)].param_groups
                return [weight for group in groups for weight in group["params"]][int(index)]
        return None

    def _parameters(self) -> dict[str, nn.Parameter]:
        assert self.lightning_module is not None
        return dict(self.lightning_module.named_parameters(remove_duplicate=False))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
