"""Which decay factors are tried and taken, on curves of the flip rate that are made up."""

import math

import pytest

from sparse_pretrain.sparsity.decay_search import WINDOW, Trial, choose, in_window, next_factor, round_factor


def trials(ratios: dict[float, float | None]) -> list[Trial]:
    return [Trial(factor, ratio, ratio, "" if ratio is not None else "diverged") for factor, ratio in ratios.items()]


def search(ratio_of, factors, refine) -> list[Trial]:
    tried = trials({factor: ratio_of(factor) for factor in factors})
    for _ in range(refine):
        factor = next_factor(tried)
        if factor is None:
            break
        tried += trials({factor: ratio_of(factor)})
    return tried


DECADES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]


@pytest.mark.parametrize("middle", [3e-6, 2.2e-5, 5e-4, 3e-3])
@pytest.mark.parametrize("steepness", [1, 2, 5])
def test_a_falling_curve_is_found_between_decades(middle, steepness):
    """μ = 1.1 / (1 + (λ/middle)^steepness): 0.755 where λ is somewhat below the middle."""
    tried = search(lambda factor: 1.1 / (1 + (factor / middle) ** steepness), DECADES, refine=4)
    assert in_window(choose(tried), tried)
    assert len(tried) <= 9
    assert len({trial.factor for trial in tried}) == len(tried)


def test_nothing_more_is_tried_once_one_is_in_the_window():
    assert next_factor(trials({1e-5: 1.1, 1e-4: 0.7, 1e-3: 0.2})) is None


def test_bisection_is_in_the_logarithm_and_between_the_first_that_bracket_the_window():
    assert next_factor(trials({1e-3: 0.2, 1e-6: 1.2, 1e-5: 1.1})) == 1e-4
    assert next_factor(trials({1e-5: 1.1, 1e-4: 0.5})) == 3.2e-5
    noisy = {1e-6: 1.2, 1e-5: 0.4, 1e-4: 1.0, 1e-3: 0.3}
    assert next_factor(trials(noisy)) == 3.2e-6


def test_there_is_no_end_to_bisecting_but_digits():
    """A curve that jumps over the window: down to neighbours of two digits, then no more."""
    tried = search(lambda factor: 1.1 if factor < 2.25e-4 else 0.1, DECADES, refine=50)
    assert len(tried) < 15
    assert {2.2e-4, 2.3e-4} <= {trial.factor for trial in tried}
    assert choose(tried).ratio == 1.1


@pytest.mark.parametrize("ratio", [1.4, 0.3], ids=["above", "below"])
def test_nothing_to_bisect_where_all_are_on_one_side(ratio):
    tried = trials(dict.fromkeys(DECADES, ratio))
    assert next_factor(tried) is None
    assert choose(tried).factor == 1e-6
    assert not in_window(choose(tried), tried)


def test_runs_that_diverged_are_outside():
    """A factor too large may make a run diverge: the search goes on below it."""
    tried = trials({1e-4: 1.2, 1e-3: None})
    assert next_factor(tried) == 3.2e-4
    assert choose(tried).factor == 1e-4
    assert next_factor(trials({1e-4: None, 1e-3: 1.2})) is None
    assert choose(trials({1e-4: None})) is None
    assert not in_window(trials({1e-4: None})[0], trials({1e-4: None}))


def test_the_nearest_to_the_middle_is_chosen():
    assert choose(trials({1e-5: 0.94, 1e-4: 0.80, 1e-3: 0.61})).factor == 1e-4
    middle = math.sqrt(WINDOW[0] * WINDOW[1])
    assert choose(trials({1e-5: middle * 1.1, 1e-4: middle / 1.1})).factor == 1e-5  # the smaller of two as near
    assert choose(trials({1e-5: 1.1, 1e-4: 0.1})).factor == 1e-5  # the nearest to the window
    assert choose(trials({1e-5: 1.6, 1e-4: 0.0})).factor == 1e-5  # frozen masks are as far from it as can be
    assert choose(trials({1e-5: 0.0, 1e-4: 0.0})).factor == 1e-5


@pytest.mark.parametrize(("ratio", "inside"), [(0.60, True), (0.95, True), (0.599, False), (0.951, False)])
def test_the_window_includes_its_ends(ratio, inside):
    (trial,) = trials({1e-4: ratio})
    assert in_window(trial, [trial]) is inside


def test_factors_can_be_typed():
    assert round_factor(math.sqrt(1e-5 * 1e-4)) == 3.2e-5
    assert f"{round_factor(math.sqrt(1e-5 * 1e-4)):g}" == "3.2e-05"


def test_far_too_strong_a_decay_does_not_count():
    """Masks change again then, as weights swing about zero: a ratio in the window means something else."""
    tried = trials({1e-4: 1.9, 1e-2: 0.25, 10.0: 0.75})
    assert not any(in_window(trial, tried) for trial in tried)
    assert next_factor(tried) == 1e-3
    assert choose(tried).factor in (1e-4, 1e-2)
    tried += trials({1e-3: 0.9})
    assert choose(tried).factor == 1e-3
