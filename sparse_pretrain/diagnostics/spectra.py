"""Singular values of weights and of what pruning takes from them: what a low-rank part could give back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_pretrain.diagnostics.masks import PrunedLayer
from sparse_pretrain.sparsity.adapters import Adapter


@dataclass(frozen=True)
class Spectrum:
    """singular_values: the largest first, to 7 digits; norm: Frobenius; stable_rank: ‖·‖_F² / σ₁²; effective_rank: exp
    of the entropy of σ / Σσ (Roy and Vetterli 2007). Both ranks are 0 for a matrix of zeros."""

    singular_values: list[float]
    norm: float
    stable_rank: float
    effective_rank: float


def spectrum(matrix: Tensor) -> Spectrum:
    """Of a matrix (rows, columns), computed in float32 or better."""
    values = torch.linalg.svdvals(matrix if matrix.dtype == torch.float64 else matrix.float()).double()
    square = float(values.square().sum())
    rounded = [float(f"{value:.7g}") for value in values.tolist()]
    if square == 0:
        return Spectrum(rounded, 0.0, 0.0, 0.0)
    shares = values / values.sum()
    return Spectrum(
        singular_values=rounded,
        norm=square**0.5,
        stable_rank=square / float(values[0]) ** 2,
        effective_rank=float(torch.special.entr(shares).sum().exp()),
    )


def layer_spectra(pruned: PrunedLayer, weight: Tensor) -> dict[str, Spectrum]:
    """`weight`: W; `residual`: W − Ŵ, what pruning takes; of a sparse layer with an active adapter also
    `residual_after_adapter`: W − Ŵ − ΔW, what is then still lacking.

    Args:
        weight: W, (out_features, in_features): the layer's master weight, or that of before pruning.
    """
    residual = weight - pruned.kept
    spectra = {"weight": spectrum(weight), "residual": spectrum(residual)}
    adapter = getattr(pruned.layer, "adapter", None)
    if pruned.is_sparse and isinstance(adapter, Adapter) and adapter.active:
        spectra["residual_after_adapter"] = spectrum(residual - adapter.delta().detach())
    return spectra
