"""The blocks that have been pruned, on disk: what a run that was killed does not do again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_pretrain.errors import UserError
from sparse_pretrain.pruning.driver import LayerReport, PrunedLayer

_PARTS = ("weight", "left", "right")


class PartialResults:
    """One safetensors file a block, each there whole or not at all.

    Args:
        folder: is made with the first block.
        device: on which the blocks' tensors are to be.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def get(self, block: str) -> dict[str, PrunedLayer] | None:
        """The layers of a block, or None if it is not there or damaged."""
        try:
            with safe_open(self._path(block), framework="pt", device=str(self.device)) as file:
                reports = json.loads((file.metadata() or {})["reports"])
                # copied into memory as aligned as all other: products come out bit for bit as they did before
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return {
            name: PrunedLayer(LayerReport(**report), *(tensors.get(f"{name}.{part}") for part in _PARTS))
            for name, report in reports.items()
        }

    def put(self, block: str, layers: Mapping[str, PrunedLayer]) -> None:
        """Raises UserError if the disk is full or the folder cannot be written."""
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            for part in _PARTS:
                tensor = getattr(layer, part)
                if tensor is not None:
                    tensors[f"{name}.{part}"] = tensor.cpu().contiguous()
        reports = {name: asdict(layer.report) for name, layer in layers.items()}
        path = self._path(block)
        beside = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                file.write(save(tensors, metadata={"reports": json.dumps(reports)}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            raise UserError(
                "out", f"{path}, which cannot be written ({error.strerror})", "a folder with room for the weights"
            ) from error

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"
