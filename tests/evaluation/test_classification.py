"""GLUE's metrics against scikit-learn and scipy, also where a model has learnt nothing."""

import math

import pytest
import torch

from sparse_pretrain.evaluation.classification import (
    GLUE_METRICS,
    f1,
    glue_metrics,
    in_top,
    matthews,
    pearson,
    spearman,
)

ZEROS, ONES = torch.zeros(20, dtype=torch.int64), torch.ones(20, dtype=torch.int64)
MIXED = torch.tensor([0, 1] * 7 + [1] * 6)


def classes(n, seed, count=2):
    return torch.randint(count, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of sklearn, where there is one class only
@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        (classes(500, 0), classes(500, 1)),
        (classes(500, 0), classes(500, 0) | classes(500, 1)),
        *[(a, b) for a in (ZEROS, ONES, MIXED) for b in (ZEROS, ONES, MIXED)],
        (1 - MIXED, MIXED),
        (ZEROS[:1], ONES[:1]),
    ],
)
def test_classes_as_scikit_learn_scores_them(predictions, labels):
    metrics = pytest.importorskip("sklearn.metrics")
    truth, guess = labels.numpy(), predictions.numpy()
    scores = glue_metrics("mrpc", predictions, labels)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess), abs=1e-12)
    assert scores["f1"] == pytest.approx(metrics.f1_score(truth, guess, zero_division=0), abs=1e-12)
    assert matthews(predictions, labels) == pytest.approx(metrics.matthews_corrcoef(truth, guess), abs=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_regression_as_scipy_scores_it(seed, constant):
    """With ties in the labels, as STS-B has them; the predictions far from 0 or all the same."""
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(26, (300,), generator=generator) / 5
    predictions = (labels + torch.randn(300, generator=generator) + 1000).round(decimals=1)
    if constant:
        predictions[:] = 0.1
    scores = glue_metrics("stsb", predictions, labels)
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = float(function(predictions.double().numpy(), labels.double().numpy()).statistic)
        assert math.isnan(expected) == constant
        assert scores[name] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_what_has_no_correlation():
    same, rising = torch.full((9,), 0.1), torch.arange(9.0)
    assert math.isnan(pearson(same, rising))
    assert math.isnan(spearman(rising, same))
    assert math.isnan(spearman(torch.tensor([1.0, float("nan"), 2.0]), rising[:3]))
    assert spearman(rising**3, rising) == pytest.approx(1)
    assert matthews(ZEROS, MIXED) == 0
    assert f1(ZEROS, ZEROS) == 0


def test_every_task_has_its_metrics():
    assert sorted(GLUE_METRICS) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
    perfect = {
        task: glue_metrics(task, MIXED.float() if task == "stsb" else MIXED, MIXED.float() if task == "stsb" else MIXED)
        for task in GLUE_METRICS
    }
    assert perfect["cola"] == {"matthews": pytest.approx(1)}
    assert perfect["stsb"] == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    assert perfect["mrpc"] == perfect["qqp"] == {"accuracy": 1, "f1": 1}
    assert all(perfect[task] == {"accuracy": 1} for task in ("sst2", "mnli", "qnli", "rte", "wnli"))
    labels = torch.tensor([0, 1, 2, 2])
    assert glue_metrics("mnli", torch.tensor([0, 1, 2, 0]), labels) == {"accuracy": 0.75}


def test_the_top_k_of_images():
    logits = torch.tensor([[0.0, 3, 2, 1], [5, 4, 3, 2], [-1, -2, -3, -4]])
    labels = torch.tensor([1, 2, 3])
    assert in_top(logits, labels, 1).tolist() == [True, False, False]
    assert in_top(logits, labels, 3).tolist() == [True, True, False]
    assert in_top(logits, labels, 5).tolist() == [True, True, True]


def test_the_top_k_as_scikit_learn_counts_it():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(400, 10, generator=generator), classes(400, 1, 10)
    for k in (1, 2, 5):
        expected = metrics.top_k_accuracy_score(labels.numpy(), logits.numpy(), k=k)
        assert in_top(logits, labels, k).double().mean() == pytest.approx(expected)
