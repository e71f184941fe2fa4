from itertools import pairwise

import pytest

from sparse_pretrain.config import SchedulerConfig
from sparse_pretrain.optim.schedules import lr_share

STEPS = 100


def shares(**options):
    cfg = SchedulerConfig(warmup_steps=10, final_lr_share=0.1, **options)
    return [lr_share(step, STEPS, cfg) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_warmup_is_linear_to_the_peak(name):
    assert shares(name=name)[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_cosine_falls_to_the_final_share():
    values = shares(name="cosine")
    assert values[55] == pytest.approx(0.55)  # half-way after the warm-up
    assert values[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_wsd_is_constant_then_falls_linearly():
    values = shares(name="wsd", decay_share=0.2)
    assert values[10:81] == [1.0] * 71
    assert values[90] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.145)


def test_constant_stays():
    assert shares(name="constant")[10:] == [1.0] * 90


def test_no_warmup_begins_at_the_peak():
    assert lr_share(0, 10, SchedulerConfig(name="cosine", warmup_steps=0)) == 1.0
