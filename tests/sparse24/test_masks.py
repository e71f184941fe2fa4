"""Masks and the soft threshold against second formulations, and on awkward values."""

import itertools
import math

import pytest
import torch
from sparse24.reference import (
    TRANSPOSABLE_PATTERNS,
    magnitude_mask,
    soft_threshold,
    soft_threshold_scale,
    transposable_mask,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_ties(*shape, seed=0):
    """Small integers of both signs: zeros and ties in nearly every group."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


# --- magnitude ---


def slow_magnitude_mask(weight):
    """Second formulation: sort the four (−|w|, index) of each group with Python."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    groups, kept = weight.reshape(-1, 4).tolist(), mask.view(-1, 4)
    for g, group in enumerate(groups):
        key = [(-math.inf if math.isnan(w) else -abs(w), i) for i, w in enumerate(group)]
        for _, i in sorted(key)[:2]:
            kept[g, i] = True
    return mask


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 4), (4, 4), (12, 20), (4,), (2, 3, 8), (64, 64)])
@pytest.mark.parametrize("make", [randn, with_ties])
def test_magnitude_mask_keeps_the_two_largest(shape, dtype, make):
    weight = make(*shape).to(dtype)
    mask = magnitude_mask(weight)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, slow_magnitude_mask(weight))
    assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_magnitude_mask_of_every_order_of_values_with_ties():
    weight = torch.tensor(list(itertools.product([0.0, -1.0, 2.0, math.inf, math.nan], repeat=4)))
    assert torch.equal(magnitude_mask(weight), slow_magnitude_mask(weight))


def test_magnitude_mask_of_a_transposed_and_a_strided_weight():
    weight = randn(24, 40)
    assert torch.equal(magnitude_mask(weight.t()), slow_magnitude_mask(weight.t().contiguous()))
    assert torch.equal(magnitude_mask(weight[:, ::2]), slow_magnitude_mask(weight[:, ::2].contiguous()))


N_OF_M = [(1, 2), (1, 4), (3, 4), (2, 8), (4, 8), (8, 16), (1, 3)]


def slow_n_of_m_mask(weight, kept, group):
    """Second formulation: sort the (−|w|, index) of each group with Python."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    groups, out = weight.reshape(-1, group).tolist(), mask.view(-1, group)
    for g, values in enumerate(groups):
        key = [(-math.inf if math.isnan(w) else -abs(w), i) for i, w in enumerate(values)]
        out[g, [i for _, i in sorted(key)[:kept]]] = True
    return mask


@pytest.mark.parametrize(("kept", "group"), N_OF_M)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("make", [randn, with_ties])
def test_magnitude_mask_keeps_the_n_largest_of_m(kept, group, dtype, make):
    for shape in [(group,), (6, 48), (2, 3, 48)]:
        weight = make(*shape).to(dtype)
        mask = magnitude_mask(weight, kept, group)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, slow_n_of_m_mask(weight, kept, group))
        assert (mask.unflatten(-1, (-1, group)).sum(-1) == kept).all()
    assert magnitude_mask(torch.zeros(0, group), kept, group).shape == (0, group)


def test_n_of_m_of_every_order_of_values_with_ties():
    """A tie keeps the lower index; a NaN counts as infinite, so that none is hidden while there is room."""
    weight = torch.tensor(list(itertools.product([0.0, -1.0, 2.0, -math.inf, math.nan], repeat=4)))
    for kept in (1, 3):
        mask = magnitude_mask(weight, kept, 4)
        assert torch.equal(mask, slow_n_of_m_mask(weight, kept, 4))
        few = weight.isfinite().sum(-1) >= 4 - kept
        assert (mask | weight.isfinite())[few].all()
    assert torch.equal(magnitude_mask(weight, 2, 4), slow_n_of_m_mask(weight, 2, 4))


def test_n_of_m_of_a_transposed_and_a_strided_weight_which_stays_as_it_was():
    weight = randn(32, 48)
    before = weight.clone()
    assert torch.equal(magnitude_mask(weight.t(), 2, 8), slow_n_of_m_mask(weight.t().contiguous(), 2, 8))
    assert torch.equal(magnitude_mask(weight[:, ::2], 4, 8), slow_n_of_m_mask(weight[:, ::2].contiguous(), 4, 8))
    assert torch.equal(weight, before)


def test_n_of_m_needs_whole_groups():
    with pytest.raises(ValueError, match="in_features must be a multiple of 8; found 12"):
        magnitude_mask(torch.zeros(4, 12), 4, 8)
    with pytest.raises(ValueError, match=r"weight must be floating point; found torch\.int64"):
        magnitude_mask(torch.zeros(4, 8, dtype=torch.int64), 4, 8)


def test_masks_leave_the_weight_alone():
    weight = torch.tensor([[math.nan, 1.0, math.inf, -3.0]] * 4)
    before = weight.clone()
    magnitude_mask(weight), transposable_mask(weight), transposable_mask(weight.t())
    torch.testing.assert_close(weight, before, rtol=0, atol=0, equal_nan=True)


# --- transposable ---


def brute_force(weight, dtype):
    """Second formulation: score of all 90 patterns for every block, first of the largest. Rows are summed as
    the definition says, so in float32 it must agree in every bit."""
    rows, columns = weight.shape[0] // 4, weight.shape[1] // 4
    blocks = weight.to(dtype).abs().reshape(rows, 4, columns, 4).transpose(1, 2).reshape(-1, 1, 4, 4)
    row = (blocks * TRANSPOSABLE_PATTERNS).sum(-1)  # two non-zeros a row: rounded once, whatever the order
    score = (row[..., 0] + row[..., 1]) + (row[..., 2] + row[..., 3])
    first = torch.tensor([int((s == s.max()).nonzero()[0]) for s in score])
    mask = TRANSPOSABLE_PATTERNS[first]
    return mask.reshape(rows, columns, 4, 4).transpose(1, 2).reshape(weight.shape), score.max(dim=1).values


def assert_transposable(mask):
    rows, columns = mask.shape
    assert (mask.reshape(rows, -1, 4).sum(-1) == 2).all()
    assert (mask.t().reshape(columns, -1, 4).sum(-1) == 2).all()


def test_patterns_are_all_and_in_lexicographic_order():
    choices = list(itertools.combinations(range(4), 2))
    expected = []
    for rows in itertools.product(choices, repeat=4):
        block = torch.zeros(4, 4, dtype=torch.bool)
        for r, kept in enumerate(rows):
            block[r, list(kept)] = True
        if (block.sum(0) == 2).all():
            expected.append(block)
    assert len(expected) == 90
    assert TRANSPOSABLE_PATTERNS.dtype == torch.bool
    assert torch.equal(TRANSPOSABLE_PATTERNS, torch.stack(expected))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (64, 96)])
@pytest.mark.parametrize("make", [randn, with_ties])
def test_transposable_mask_is_the_definition_bit_for_bit(shape, dtype, make):
    weight = make(*shape).to(dtype)
    mask = transposable_mask(weight)
    assert_transposable(mask)
    assert torch.equal(mask, brute_force(weight, torch.float32)[0])


def test_transposable_mask_breaks_rounding_ties_as_defined():
    # exactly equal or only rounded equal: sums of 2^24 and small odd numbers
    weight = with_ties(32, 32) + 2.0**24 * (with_ties(32, 32, seed=1) > 0)
    assert torch.equal(transposable_mask(weight), brute_force(weight, torch.float32)[0])
    assert not torch.equal(transposable_mask(weight), brute_force(weight, torch.float64)[0])  # there were some


def test_transposable_mask_is_optimal_in_float64():
    weight = randn(128, 128, seed=2)
    mask = transposable_mask(weight)
    kept = (weight.double().abs() * mask).reshape(32, 4, 32, 4).sum((1, 3)).flatten()
    torch.testing.assert_close(kept, brute_force(weight, torch.float64)[1], rtol=1e-6, atol=0)


def test_transposable_mask_of_zeros_is_the_first_pattern():
    assert torch.equal(transposable_mask(torch.zeros(4, 4)), TRANSPOSABLE_PATTERNS[0])


def test_transposable_mask_of_a_transposed_weight():
    weight = randn(20, 12)
    assert torch.equal(transposable_mask(weight.t()), brute_force(weight.t().contiguous(), torch.float32)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("places", [[(0, 0)], [(3, 3), (3, 2)], [(3, 3), (2, 3), (1, 0), (0, 0)]])
def test_transposable_mask_never_hides_what_is_not_finite(value, places):
    weight = 1e3 * randn(4, 4)
    for place in places:
        weight[place] = value
    mask = transposable_mask(weight)
    assert_transposable(mask)
    assert all(mask[place] for place in places)


# --- soft threshold ---


def test_soft_threshold_subtracts_the_third_largest():
    weight = torch.tensor([[3.0, -1.0, 0.5, -7.0, 0.0, 0.0, 0.0, -2.0, 1.0, 1.0, -1.0, 4.0]])
    expected = torch.tensor([[2.0, 0.0, 0.0, -6.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0, 3.0]])
    assert torch.equal(soft_threshold(weight), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_soft_threshold_against_sorting(dtype):
    weight = randn(12, 20).to(dtype)
    groups = weight.double().reshape(12, 5, 4)
    third = groups.abs().sort(-1, descending=True).values[..., 2:3]
    expected = (groups.sign() * (groups.abs() - third).clamp(min=0)).reshape(12, 20).to(dtype)
    assert torch.equal(soft_threshold(weight), expected)
    assert ((expected != 0).reshape(12, 5, 4).sum(-1) == 2).all()
    assert torch.equal(soft_threshold(weight.t()[:, :8]), soft_threshold(weight.t()[:, :8].contiguous()))


def test_soft_threshold_is_continuous_where_the_mask_flips():
    # two entries change places among the kept; a hard threshold would jump by 1 here
    below = soft_threshold(torch.tensor([2.0, 1.0 - 1e-4, 1.0, 0.3]))
    above = soft_threshold(torch.tensor([2.0, 1.0 + 1e-4, 1.0, 0.3]))
    assert (below - above).abs().max() < 3e-4
    # |S(v) − S(w)| <= 2 max|v − w|: each entry and the threshold move at most that much
    weight, change = randn(64, 64), 1e-2 * randn(64, 64, seed=1)
    assert (soft_threshold(weight + change) - soft_threshold(weight)).abs().max() <= 2 * change.abs().max() + 1e-6


def test_soft_threshold_shows_nan():
    assert soft_threshold(torch.tensor([math.nan, 1.0, 2.0, 3.0])).isnan().all()
    assert soft_threshold(torch.tensor([math.inf, 1.0, 2.0, 3.0])).tolist() == [math.inf, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_soft_threshold_scale_of_gaussian_weights(std):
    beta = soft_threshold_scale(std * randn(1024, 1024))
    assert beta.dtype == torch.float32
    assert beta.shape == ()
    # 262144 groups; the standard error of the ratio is about 0.0015
    assert abs(beta.item() - 1.4837) < 0.005


def test_soft_threshold_scale_minimises_the_error():
    weight = randn(64, 64)
    soft, beta = soft_threshold(weight), soft_threshold_scale(weight)
    error = [((weight - factor * beta * soft) ** 2).sum() for factor in (0.99, 1.0, 1.01)]
    assert error[1] < error[0]
    assert error[1] < error[2]


# --- errors ---


@pytest.mark.parametrize("operator", [magnitude_mask, transposable_mask, soft_threshold])
def test_wrong_weights_are_refused(operator):
    with pytest.raises(ValueError, match="in_features must be a multiple of 4; found 6"):
        operator(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"weight must be floating point; found torch\.int64"):
        operator(torch.zeros(4, 4, dtype=torch.int64))


def test_transposable_mask_needs_rows_in_fours():
    with pytest.raises(ValueError, match=r"multiples of 4; found \(6, 4\)"):
        transposable_mask(torch.zeros(6, 4))
