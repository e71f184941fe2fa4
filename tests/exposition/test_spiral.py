"""The Cubist Spiral against its geometry, written down a second time."""

import numpy as np
import pytest
import torch

from sparse_pretrain.exposition.spiral import corners, cubist_spiral


def by_hand(points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both curves' corners (2, 17, 2), points (n, 2) not standardised, classes."""
    angles = [np.pi + i * np.pi / 4 + 2 * np.pi / 5 for i in range(17)]
    curves = []
    for side in (15, -15):
        curves.append([((10 * a + np.pi + side) * np.cos(a), (10 * a + np.pi + side) * np.sin(a)) for a in angles])
    corner, all_points, classes = np.array(curves), [], []
    for label, curve in enumerate(corner):
        lengths = [np.hypot(*(curve[i + 1] - curve[i])) for i in range(16)]
        for i, length in enumerate(lengths):
            count = int(length / sum(lengths) * points / 2)
            for share in np.arange(count) / (count - 1):
                all_points.append(curve[i] * (1 - share) + curve[i + 1] * share)
                classes.append(label)
    return corner, np.array(all_points), np.array(classes)


@pytest.mark.parametrize("points", [1000, 50_000])
def test_points_are_where_they_should_be(points):
    _, raw, classes = by_hand(points)
    x, y = cubist_spiral(points)
    assert x.dtype == y.dtype == torch.float32
    np.testing.assert_array_equal(y.numpy(), classes)
    np.testing.assert_allclose(x.numpy(), (raw - raw.mean(axis=0)) / raw.std(axis=0, ddof=1), atol=2e-6)


def test_counts_and_standardisation():
    x, y = cubist_spiral(50_000)
    for label in (0, 1):
        assert 25_000 - 16 <= int((y == label).sum()) <= 25_000
    np.testing.assert_allclose(x.double().mean(dim=0), 0, atol=1e-6)
    np.testing.assert_allclose(x.double().std(dim=0), 1, atol=1e-6)


def test_classes_lie_fifteen_on_either_side_of_the_centre_line():
    centre, ray = corners()
    outer, inner = (torch.tensor(curve) for curve in by_hand(1000)[0])
    torch.testing.assert_close((outer + inner) / 2, centre)
    torch.testing.assert_close(outer - centre, 15 * ray)
    torch.testing.assert_close((centre - inner).norm(dim=1), torch.full((17,), 15.0, dtype=torch.float64))
    radius = centre.norm(dim=1)
    torch.testing.assert_close(radius[8:] - radius[:-8], torch.full((9,), 20 * np.pi, dtype=torch.float64))  # one turn


def test_no_noise():
    assert torch.equal(cubist_spiral(2000)[0], cubist_spiral(2000)[0])
