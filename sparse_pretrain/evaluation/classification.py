"""Metrics of classification and regression: those of GLUE, and top-k accuracy.

In plain torch, because a metric must also be right where a model has learnt nothing. torchmetrics 1.9 gives a model
that always predicts one class a Matthews correlation other than 0, and a constant regression correlations of 0 where
scipy says that there are none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of the (n,) predicted classes that are the labels."""
    return float((predictions == labels).double().mean())


def f1(predictions: Tensor, labels: Tensor) -> float:
    """F1 of class 1 among the classes 0 and 1: 2·TP / (2·TP + FP + FN); 0 if neither predicted nor there."""
    hits = float(((predictions == 1) & (labels == 1)).sum())
    total = float((predictions == 1).sum() + (labels == 1).sum())
    return 2 * hits / total if total else 0.0


def pearson(predictions: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of two (n,) tensors, in fp64; nan if one of them is constant."""
    pair = torch.stack([predictions.double(), labels.double()])
    if (pair == pair[:, :1]).all(dim=1).any():
        return float("nan")
    return float(torch.corrcoef(pair)[0, 1])


def spearman(predictions: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs; nan if one tensor is constant."""
    if predictions.isnan().any() or labels.isnan().any():
        return float("nan")
    return pearson(_ranks(predictions), _ranks(labels))


def matthews(predictions: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of the classes 0 and 1, which is Pearson's; 0 if one of them does not vary."""
    correlation = pearson(predictions, labels)
    return 0.0 if correlation != correlation else correlation


def _ranks(values: Tensor) -> Tensor:
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)
    return (last - (sizes - 1) / 2)[group]


GLUE_METRICS: dict[str, tuple[Callable[[Tensor, Tensor], float], ...]] = {
    "cola": (matthews,),
    "sst2": (accuracy,),
    "mrpc": (accuracy, f1),
    "qqp": (accuracy, f1),
    "stsb": (pearson, spearman),
    "mnli": (accuracy,),
    "qnli": (accuracy,),
    "rte": (accuracy,),
    "wnli": (accuracy,),
}


def glue_metrics(task: str, predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of a GLUE task (Wang et al. 2019, table 1), by name, over a whole set; as fractions, not in percent.

    MNLI has two sets, matched and mismatched: each is a call of its own.

    Args:
        task: a key of GLUE_METRICS.
        predictions, labels: (n,) class indices, n at least 1; of `stsb` (n,) floats.
    """
    return {metric.__name__: metric(predictions, labels) for metric in GLUE_METRICS[task]}


def in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k classes with the largest logits; the mean is the top-k accuracy.

    logits: (n, classes) of any float dtype; labels: (n,) int64. Returns (n,) bool. With fewer than k classes it is
    always so.
    """
    likeliest = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return (likeliest == labels[:, None]).any(-1)
