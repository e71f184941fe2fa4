"""The picture of a search for the decay factor."""

import io

from matplotlib.image import imread

from sparse_pretrain.reporting.decay_curve import decay_curve

POINTS = [(1e-5, 1.15), (1e-4, 1.05), (1e-3, 0.8), (1e-2, 0.3)]


def picture(points=POINTS, failed=(), chosen=1e-3):
    return decay_curve(points, failed, chosen, (0.60, 0.95), sample_step=40, refresh_every=10)


def test_the_same_search_gives_the_same_picture():
    assert picture() == picture()
    pixels = imread(io.BytesIO(picture()))
    assert pixels.shape[1] > pixels.shape[0] > 400
    assert picture(chosen=1e-4) != picture()
    assert picture(failed=[1e-1]) != picture()


def test_one_point_and_none_above_zero():
    assert imread(io.BytesIO(picture([(1e-4, 0.0)], chosen=1e-4))).size
