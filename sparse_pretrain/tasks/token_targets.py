"""Losses of predicted tokens, some of which are not asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of what is not to be predicted


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy over the labels asked for, 0 if there are none; 0-dim fp32.

    Args:
        logits: (batch, n, vocab).
        labels: (batch, n) int64.
    """
    total = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def token_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums and counts, (2,) fp64, of the cross-entropy and of right predictions; arguments as `token_loss`'s."""
    asked = labels != IGNORED
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    right = ((logits.argmax(-1) == labels) & asked).sum()
    return {"loss": sum_and_count(total, asked.sum()), "accuracy": sum_and_count(right, asked.sum())}


def sum_and_count(total: Tensor, count: Tensor | int) -> Tensor:
    """(2,) fp64."""
    return torch.stack((total.double(), torch.as_tensor(count, device=total.device).double()))
