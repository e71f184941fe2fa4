"""Outlier features: activations, and channels of them, that are far larger than the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 3  # magnitudes per sequence that are kept
# Massive activations (Sun et al. 2024, arXiv 2402.17762): above this, and this often the median magnitude.
MASSIVE, MASSIVE_TIMES_MEDIAN = 100.0, 1000.0
# A channel is an outlier if it ever exceeds this, and this often the mean magnitude.
OUTLIER, OUTLIER_TIMES_MEAN = 6.0, 20.0


class Moments:
    """The sums of which a kurtosis is made, in float64, for any number of rows of values."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None  # of powers 1 to 4, (4, rows)

    def update(self, values: Tensor) -> None:
        """values: (rows, ...)."""
        flat = values.flatten(1).double()
        square = flat.square()
        sums = torch.stack([part.sum(1) for part in (flat, square, square * flat, square.square())])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += flat.shape[1]

    def kurtosis(self) -> Tensor:
        """Pearson's, E[(x − μ)⁴] / σ⁴, of each row, (rows,): 3 for a normal distribution; 0 where all values are
        equal."""
        assert self.sums is not None
        m1, m2, m3, m4 = self.sums / self.count
        variance = m2 - m1.square()
        fourth = m4 - 4 * m1 * m3 + 6 * m1.square() * m2 - 3 * m1.pow(4)
        constant = variance <= 1e-12 * m2  # what rounding leaves of nothing
        return torch.where(constant, 0.0, fourth / variance.square().clamp(min=1e-300))


class HiddenMeter:
    """Collects, over batches, how large the entries of one hidden state are."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.sequences = self.massive = 0
        self.largest = torch.zeros(LARGEST, dtype=torch.float64)
        self.median = self.magnitude_sum = 0.0
        self.channel_largest: Tensor | None = None

    def update(self, hidden: Tensor, mask: Tensor | None) -> None:
        """hidden: (batch, tokens, d_model); mask (batch, tokens) boolean, True = a token; None = all are."""
        for i, sequence in enumerate(hidden.float()):
            entries = sequence if mask is None else sequence[mask[i]]
            magnitude = entries.abs()
            median = float(magnitude.median())
            self.moments.update(entries[None])
            self.largest += magnitude.flatten().topk(LARGEST).values.double().cpu()
            self.median += median
            self.magnitude_sum += float(magnitude.double().sum())
            self.massive += int((magnitude > max(MASSIVE, MASSIVE_TIMES_MEDIAN * median)).sum())
            channels = magnitude.amax(0)
            known = self.channel_largest
            self.channel_largest = channels if known is None else torch.maximum(known, channels)
            self.sequences += 1

    def result(self) -> dict[str, Any]:
        """`largest` (the three largest |h|) and `median` (of |h|), each of a sequence, mean over sequences; their ratio
        `largest_over_median`; `massive`, entries per sequence; `kurtosis` of all entries; `outlier_channels`, by
        number; `largest_of_all`."""
        assert self.channel_largest is not None
        threshold = max(OUTLIER, OUTLIER_TIMES_MEAN * self.magnitude_sum / self.moments.count)
        largest, median = self.largest / self.sequences, self.median / self.sequences
        return {
            "largest": largest.tolist(),
            "median": median,
            "largest_over_median": float(largest[0]) / max(median, 1e-30),
            "massive": self.massive / self.sequences,
            "kurtosis": self.moments.kurtosis().item(),
            "outlier_channels": (self.channel_largest > threshold).nonzero().flatten().tolist(),
            "largest_of_all": float(self.channel_largest.max()),
        }


class InputMeter:
    """Collects, over batches, the second moment of each input of a linear layer: D_jj = E[x_j²] of OATS and Wanda."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None) -> None:
        """x: (batch, tokens, in_features); mask (batch, tokens) boolean, True = a token; None = all are."""
        rows = x.flatten(0, -2) if mask is None else x[mask]
        sums = rows.double().square().sum(0)
        self.sums = sums if self.sums is None else self.sums + sums
        self.rows += len(rows)

    def second_moment(self) -> Tensor:
        """(in_features,) float64."""
        assert self.sums is not None
        return self.sums / self.rows
