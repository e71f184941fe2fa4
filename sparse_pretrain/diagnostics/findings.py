"""All that is found about checkpoints, put together: for each its sinks, outliers, masks and spectra, and a summary."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from sparse_pretrain.diagnostics.masks import Agreement, PrunedLayer, agreement, magnitude_mask, pruned_mass
from sparse_pretrain.diagnostics.probe import Probe
from sparse_pretrain.diagnostics.spectra import layer_spectra

TOP_COLUMNS = 0.01  # the share of a layer's inputs in which pruned weights are looked for

# The words of the results, for who reads the JSON alone.
DEFINITIONS = {
    "alpha_k": "attention that key k gets, mean over the queries that see it (Gu et al., ICLR 2025)",
    "sink": "a key with alpha_k > threshold in one sequence, layer and head; counted over all of them",
    "candidates": "keys that at least half of the tokens see: of which highest_alpha, any_sink and sink_at are",
    "rank1_share": "sum over tokens of (o . v/|v|)^2 / |o|^2, o a head's output for a token after the key with the "
    "highest alpha, v that key's value (Catch, Tag, Release, arXiv 2502.00919); tag_cosine: mean cosine of o and v",
    "largest_over_median": "largest |h| / median |h| of a hidden state, each of a sequence, mean over sequences",
    "massive": "entries per sequence with |h| > max(100, 1000 median |h|) (Sun et al. 2024)",
    "kurtosis": "E[(x - mean)^4] / variance^2; a normal distribution has 3",
    "outlier_channels": "features with |h| > max(6, 20 mean |h|) somewhere",
    "second_moment": "D_jj = E[x_j^2] of input j of a linear layer: largest / median",
    "pruned_mass": "share of the sum of pruned |W| that is in the 1% of the columns (at least one) with the largest "
    "second moment; column_share: the share of the columns that this is",
    "mask": "of a layer that computes with all its weights: what magnitude pruning would keep",
    "magnitude_mask": "agreement with what magnitude pruning of W would keep",
    "equal": "share of mask entries that agree; overlap: |A and B| / min(|A|, |B|) of the kept; by_chance: expected of "
    "independent masks",
    "W": "the master weight, or the reference's",
    "residual": "W - W_sparse; residual_after_adapter: W - W_sparse - adapter",
    "stable_rank": "squared Frobenius norm / squared largest singular value",
    "effective_rank": "exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)",
}


@dataclass(frozen=True)
class Findings:
    """Of one checkpoint. attention, hidden, inputs, layers: name -> figures, as the meters and `layer_findings` give
    them; masks stay beside, for `agreements`."""

    label: str
    path: str
    step: int
    recipe: str
    weights: str
    is_sparse: bool
    attention: dict[str, dict[str, Any]]
    hidden: dict[str, dict[str, Any]]
    inputs: dict[str, dict[str, float]]
    layers: dict[str, dict[str, Any]]
    masks: dict[str, Tensor]

    def summary(self) -> dict[str, float | int | None]:
        """One figure of each kind: means over layers and heads, or the extreme of them."""
        heads = list(self.attention.values())
        by_position = [layer["sink_at"] for layer in heads]
        at = [fmean(shares) for shares in zip(*by_position, strict=True) if None not in shares]
        residuals = [layer["spectra"]["residual"] for layer in self.layers.values()]
        weights = [layer["spectra"]["weight"] for layer in self.layers.values()]
        return {
            "first_sink": fmean(share for layer in heads for share in layer["first_sink"]),
            "any_sink": fmean(share for layer in heads for share in layer["any_sink"]),
            "sink_at_best_position": max(at),
            "highest_alpha": max(alpha for layer in heads for alpha in layer["highest_alpha"]),
            "rank1_share": fmean(share for layer in heads for share in layer["rank1_share"]),
            "largest_over_median": max(state["largest_over_median"] for state in self.hidden.values()),
            "kurtosis": max(state["kurtosis"] for state in self.hidden.values()),
            "outlier_channels": max(len(state["outlier_channels"]) for state in self.hidden.values()),
            "second_moment": max(row["largest_over_median"] for row in self.inputs.values()),
            "pruned_mass_excess": fmean(layer["pruned_mass"] / layer["column_share"] for layer in self.layers.values()),
            "equal_to_magnitude_mask": fmean(layer["magnitude_mask"]["equal"] for layer in self.layers.values()),
            "weight_effective_rank": fmean(row["effective_rank"] for row in weights),
            "residual_effective_rank": fmean(row["effective_rank"] for row in residuals),
            "residual_norm": self._relative_norm("residual"),
            "residual_after_adapter_norm": self._relative_norm("residual_after_adapter"),
        }

    def _relative_norm(self, part: str) -> float | None:
        """Over the weight's, mean over the layers that have this part; None if none has."""
        spectra = [layer["spectra"] for layer in self.layers.values() if part in layer["spectra"]]
        return fmean(row[part]["norm"] / max(row["weight"]["norm"], 1e-30) for row in spectra) if spectra else None

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "masks"}
        return {**fields, "summary": self.summary()}


def input_findings(probe: Probe) -> dict[str, dict[str, float]]:
    """By linear layer: the largest D_jj and it over the median one."""
    found = {}
    for name, meter in probe.inputs.items():
        moment = meter.second_moment()
        largest, median = float(moment.max()), float(moment.median())
        found[name] = {"largest": largest, "largest_over_median": largest / max(median, 1e-30)}
    return found


def layer_findings(
    pruned: dict[str, PrunedLayer], probe: Probe, reference: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """By sparse layer, or what would be one: what was pruned, in which columns, and its spectra.

    Args:
        reference: weights before pruning, by layer; of layers that are not in it their own.
    """
    found = {}
    for name, layer in pruned.items():
        weight = reference.get(name, layer.weight)
        mass, columns = pruned_mass(weight, layer.mask, probe.inputs[name].second_moment(), TOP_COLUMNS)
        by_magnitude = agreement(layer.mask, magnitude_mask(weight, layer.pattern))
        found[name] = {
            "is_sparse": layer.is_sparse,
            "kept": layer.mask.float().mean().item(),
            "pruned_mass": mass,
            "column_share": columns,
            "magnitude_mask": dataclasses.asdict(by_magnitude),
            "spectra": {kind: dataclasses.asdict(values) for kind, values in layer_spectra(layer, weight).items()},
        }
    return found


@dataclass(frozen=True)
class PairAgreement:
    """Of two checkpoints, by label. layers: those of one name and shape in both; mean: over them; None if there are
    none."""

    a: str
    b: str
    layers: dict[str, Agreement]
    mean: Agreement | None


def agreements(checkpoints: Sequence[Findings]) -> list[PairAgreement]:
    """Of every two of them."""
    pairs = []
    for a, b in itertools.combinations(checkpoints, 2):
        layers = {
            name: agreement(mask, b.masks[name])
            for name, mask in a.masks.items()
            if name in b.masks and b.masks[name].shape == mask.shape
        }
        pairs.append(PairAgreement(a.label, b.label, layers, mean_agreement(list(layers.values()))))
    return pairs


def mean_agreement(rows: Sequence[Agreement]) -> Agreement | None:
    names = [field.name for field in dataclasses.fields(Agreement)]
    return Agreement(**{name: fmean(getattr(row, name) for row in rows) for name in names}) if rows else None
