"""Outlier features, against scipy, numpy and loops."""

import numpy as np
import pytest
import torch

from sparse_pretrain.diagnostics.activations import HiddenMeter, InputMeter, Moments


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_kurtosis_is_scipys(offset):
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    rows = np.stack([draw.normal(size=5000), draw.standard_t(5, size=5000), draw.uniform(size=5000)]) + offset
    moments = Moments()
    for part in np.array_split(rows, 3, axis=1):
        moments.update(torch.from_numpy(part))
    assert moments.kurtosis().numpy() == pytest.approx(stats.kurtosis(rows, axis=1, fisher=False), rel=1e-6)


def test_kurtosis_of_known_values():
    moments = Moments()
    moments.update(torch.tensor([[1.0, -1.0, 1.0, -1.0], [7.0, 7.0, 7.0, 7.0]]))
    assert moments.kurtosis().tolist() == [1.0, 0.0]
    one_of_many = torch.zeros(1, 1000)
    one_of_many[0, 0] = 1.0
    moments = Moments()
    moments.update(one_of_many)
    p = 1 / 1000  # of a Bernoulli variable: (1 − 3p(1 − p)) / (p(1 − p))
    assert moments.kurtosis().item() == pytest.approx((1 - 3 * p * (1 - p)) / (p * (1 - p)))


@pytest.mark.parametrize("lengths", [None, (6, 3, 5, 6)])
def test_largest_median_and_outliers(lengths):
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 10)
    hidden[1, 2, 7] = 5000.0
    hidden[2, :, 3] = -50.0
    mask = None if lengths is None else torch.arange(6) < torch.tensor(lengths)[:, None]
    meter = HiddenMeter()
    for rows in (slice(0, 3), slice(3, 4)):
        meter.update(hidden[rows], None if mask is None else mask[rows])
    found = meter.result()

    sequences = [hidden[i, : 6 if lengths is None else lengths[i]].numpy() for i in range(4)]
    ordered = [np.sort(np.abs(sequence).ravel()) for sequence in sequences]
    largest = np.mean([values[:-4:-1] for values in ordered], axis=0)
    median = np.mean([values[(len(values) - 1) // 2] for values in ordered])
    entries = np.concatenate(sequences)
    assert found["largest"] == pytest.approx(largest.tolist(), rel=1e-6)
    assert found["median"] == pytest.approx(float(median), rel=1e-6)
    assert found["largest_over_median"] == pytest.approx(largest[0] / median, rel=1e-6)
    assert found["largest_of_all"] == 5000.0
    assert found["massive"] == 1 / 4  # 5000 alone is above 100 and above a thousand medians
    threshold = max(6.0, 20 * np.abs(entries).mean())
    assert found["outlier_channels"] == np.flatnonzero(np.abs(entries).max(0) > threshold).tolist()
    assert 7 in found["outlier_channels"]
    centred = entries - entries.mean(dtype=np.float64)
    assert found["kurtosis"] == pytest.approx(float((centred**4).mean() / (centred**2).mean() ** 2), rel=1e-4)


def test_massive_is_large_in_itself_and_beside_the_others():
    for largest, median, massive in ((50.0, 0.01, 0.0), (150.0, 0.01, 1.0), (150.0, 1.0, 0.0)):
        hidden = torch.full((1, 4, 8), median)
        hidden[0, 1, 2] = -largest
        meter = HiddenMeter()
        meter.update(hidden, None)
        assert meter.result()["massive"] == massive


def test_second_moment_of_inputs():
    torch.manual_seed(0)
    x = torch.randn(5, 6, 10)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [6], [1]])
    meter = InputMeter()
    meter.update(x[:2], mask[:2])
    meter.update(x[2:], mask[2:])
    assert torch.allclose(meter.second_moment().float(), x[mask].square().mean(0))
    whole = InputMeter()
    whole.update(x, None)
    whole.update(x, None)  # seen twice, as qkv's input is
    assert torch.allclose(whole.second_moment().float(), x.square().mean((0, 1)))
