"""The MVUE estimators: unbiased, of the least variance, exact where they must be."""

import math

import pytest
import torch
from sparse24.reference import mvue24, mvue24_fast, uniform24

DRAWS = 40_000
GROUPS = torch.tensor(
    [
        [1.0, -1.0, 1.0, -1.0],
        [0.1, -0.2, 0.3, 0.35],
        [4.0, 1.0, -0.5, 0.25],  # the largest is more than the others together
        [-0.5, 4.0, 0.25, 1.0],
        [0.5, -0.25, 4.0, 1.0],
        [0.5, -0.25, 1.0, -4.0],
        [3.0, 0.0, -2.0, 2.0],
        [1.0, 2.0, 3.0, 6.0],  # exactly as much
        [-1e-3, 1.0, 1.0, 1e-2],
    ]
)  # (groups, 4)
FAST = "fast"


def draws(estimator):
    """(draws, groups, 4) outputs for GROUPS, as many independent columns, with fixed numbers."""
    grad = GROUPS.reshape(-1, 1).expand(-1, DRAWS).contiguous()
    uniform = [uniform24(7, step, 0, grad.shape[0], DRAWS) for step in (1, 2)]
    out = mvue24_fast(grad, *uniform) if estimator == FAST else mvue24(grad, uniform[0])
    return out.reshape(len(GROUPS), 4, DRAWS).permute(2, 0, 1).double()


@pytest.fixture(scope="module")
def exact():
    return draws("exact")


@pytest.fixture(scope="module")
def fast():
    return draws(FAST)


def exact_probability(group):
    """Second formulation, in float64: scale up until the sum is 2, capping at 1."""
    p = torch.zeros(4, dtype=torch.float64)
    magnitude, free, left = group.double().abs(), torch.ones(4, dtype=torch.bool), 2.0
    while True:
        p[free] = left * magnitude[free] / magnitude[free].sum()
        if (p <= 1).all():
            return p
        free &= p < 1
        p[~free] = 1.0
        left = 2.0 - (~free).sum().item()


def fast_probability(group):
    """Second formulation, in float64: add up the ordered pairs."""
    t = group.double().abs() / group.double().abs().sum()
    p = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            if i != j:
                pair = t[i] * t[j] / (1 - t[i])
                p[i] += pair
                p[j] += pair
    return p


PROBABILITY = {
    "exact": torch.stack([exact_probability(g) for g in GROUPS]),
    FAST: torch.stack([fast_probability(g) for g in GROUPS]),
}


def theoretical_variance(p):
    return torch.where(p > 0, GROUPS.double() ** 2 * (1 / p.clamp(min=1e-300) - 1), 0.0).clamp(min=0)


@pytest.mark.parametrize("name", ["exact", FAST])
def test_unbiased(name, request):
    out, p = request.getfixturevalue(name), PROBABILITY[name]
    error = (out.mean(0) - GROUPS).abs()
    # 36 entries: |z| < 4.5 fails by chance once in 4000 runs, and the numbers are fixed. 1e-6: rounding where
    # p = 1.
    assert (error <= 4.5 * (theoretical_variance(p) / DRAWS).sqrt() + 1e-6).all()


@pytest.mark.parametrize("name", ["exact", FAST])
def test_inclusion_probabilities(name, request):
    out, p = request.getfixturevalue(name), PROBABILITY[name]
    kept = (out != 0).double().mean(0)
    assert ((kept - p).abs() <= 4.5 * (p * (1 - p) / DRAWS).clamp(min=0).sqrt() + 1e-6).all()


@pytest.mark.parametrize("name", ["exact", FAST])
def test_kept_entries_are_divided_by_their_probability(name, request):
    out, p = request.getfixturevalue(name), PROBABILITY[name]
    expected = torch.where(p > 0, GROUPS.double() / p.clamp(min=1e-300), 0.0).expand_as(out)
    torch.testing.assert_close(out, torch.where(out != 0, expected, 0.0), rtol=2e-6, atol=0)


def test_exactly_two_are_kept(exact, fast):
    for out in (exact, fast):
        assert ((out != 0).sum(-1) == 2).all()


def test_variance_is_the_minimum_and_below_the_fast_estimator(exact, fast):
    variance = [((out - GROUPS) ** 2).mean(0).sum().item() for out in (exact, fast)]
    theory = [theoretical_variance(PROBABILITY[name]).sum().item() for name in ("exact", FAST)]
    assert theory[0] < 0.98 * theory[1]
    # relative standard error of the summed squares over 40000 draws is below 1 %
    assert variance[0] == pytest.approx(theory[0], rel=0.03)
    assert variance[1] == pytest.approx(theory[1], rel=0.03)
    assert variance[0] < variance[1]


# --- exact cases of mvue24 ---


def one_group(group, u, dtype=torch.float32):
    return mvue24(torch.tensor(group, dtype=dtype).view(4, 1), torch.tensor([[u]])).flatten().tolist()


LAST = 1 - 2.0**-24


@pytest.mark.parametrize(
    ("group", "u", "expected"),
    [
        ([1, -1, 1, -1], 0.0, [2, 0, 2, 0]),  # p = 1/2 each: [0, 1/2) [1/2, 1) [1, 3/2) [3/2, 2)
        ([1, -1, 1, -1], 0.5 - 2.0**-24, [2, 0, 2, 0]),
        ([1, -1, 1, -1], 0.5, [0, -2, 0, -2]),
        ([1, -1, 1, -1], LAST, [0, -2, 0, -2]),
        ([-8, 1, 2, -1], 0.0, [-8, 4, 0, 0]),  # dominant first: [0, 1) [1, 5/4) [5/4, 7/4) [7/4, 2)
        ([-8, 1, 2, -1], 0.25, [-8, 0, 4, 0]),
        ([-8, 1, 2, -1], LAST, [-8, 0, 0, -4]),
        ([1, 2, 1, 8], 0.0, [4, 0, 0, 8]),
        ([1, 2, 1, 8], LAST, [0, 0, 4, 8]),
        ([1, 2, 3, 6], 0.5, [0, 0, 6, 6]),  # as large as the others together
        ([0, 1, 1, 1], 0.0, [0, 1.5, 1.5, 0]),  # [0, 2/3) [2/3, 4/3) [4/3, 2)
        ([0, 1, 1, 1], LAST, [0, 0, 1.5, 1.5]),
        ([1, 1, 1, 0], LAST, [0, 1.5, 1.5, 0]),
    ],
)
def test_systematic_sampling_by_hand(group, u, expected):
    assert one_group(group, u) == expected


def test_systematic_sampling_against_its_definition():
    generator = torch.Generator().manual_seed(3)
    grad, uniform = torch.randn(4000, 8, generator=generator), torch.rand(1000, 8, generator=generator)
    out = mvue24(grad, uniform)
    expected = torch.zeros(1000, 8, 4, dtype=torch.float64)
    groups = grad.view(1000, 4, 8).transpose(1, 2).double()
    for g in range(1000):
        for f in range(8):
            p = exact_probability(groups[g, f])
            end = p.cumsum(0)
            u = uniform[g, f].item()
            for i in range(4):
                if any(end[i] - p[i] <= point < end[i] for point in (u, u + 1)):
                    expected[g, f, i] = groups[g, f, i] / p[i]
    torch.testing.assert_close(out.view(1000, 4, 8).transpose(1, 2).double(), expected, rtol=1e-5, atol=0)


def test_a_dominant_entry_is_always_kept_unchanged():
    generator = torch.Generator().manual_seed(4)
    groups = torch.randn(4096, 4, 64, generator=generator) * 10.0 ** torch.randint(
        -6, 7, (4096, 4, 64), generator=generator
    )
    magnitude = groups.double().abs()
    dominant = 2 * magnitude > magnitude.sum(1, keepdim=True) * (1 + 1e-6)
    assert dominant.any(1).float().mean() > 0.5
    uniform = torch.rand(4096, 64, generator=generator)
    uniform[::3] *= 2.0**-20  # many draws at the very ends of the range
    uniform[1::3] = 1 - uniform[1::3] * 2.0**-20
    out = mvue24(groups.view(-1, 64), uniform.clamp(max=LAST)).view_as(groups)
    assert torch.equal(out[dominant], groups[dominant])
    assert ((out != 0).sum(1) == 2).all()


@pytest.mark.parametrize("u", [0.0, 0.3, 0.5, LAST])
def test_groups_of_fewer_than_three_come_back_unchanged(u):
    generator = torch.Generator().manual_seed(5)
    groups = torch.randn(64, 4, 16, generator=generator)
    groups[torch.rand(64, 4, 16, generator=generator).argsort(1) < 2] = 0.0
    groups[:8, 2] = 0.0
    grad, uniform = groups.view(-1, 16), torch.full((64, 16), u)
    assert torch.equal(mvue24(grad, uniform), grad)
    assert torch.equal(mvue24_fast(grad, uniform, uniform), grad)
    assert (mvue24(torch.zeros(8, 3), torch.full((2, 3), u)) == 0).all()


@pytest.mark.parametrize("u", [0.0, 0.4, LAST])
@pytest.mark.parametrize("estimator", [mvue24, lambda grad, u: mvue24_fast(grad, u, u)], ids=["exact", "fast"])
@pytest.mark.parametrize(
    "group",
    [[math.nan, 1, 2, 3], [1, 0, math.nan, 0], [math.inf, 1, -math.inf, 3], [3e38] * 4, [0, 0, 0, math.nan]],
)
def test_what_is_not_finite_is_never_hidden(group, estimator, u):
    grad = torch.tensor([group, [1.0, 2.0, 3.0, 4.0]], dtype=torch.float32).t().contiguous()
    out = estimator(grad, torch.full((1, 2), u))
    assert out[:, 0].isnan().all()
    assert out[:, 1].isfinite().all()


@pytest.mark.parametrize("u", [0.0, 0.4, LAST])
def test_one_infinity_is_kept(u):
    for place in range(4):
        group = [1.0, 2.0, 3.0, 4.0]
        group[place] = -math.inf
        out = one_group(group, u)
        assert out[place] == -math.inf
        assert sum(value != 0 for value in out) == 2


@pytest.mark.parametrize("place", range(4))
def test_the_fast_estimator_does_not_cancel_beside_a_huge_entry(place):
    group = torch.ones(4, 1)
    group[place] = 1e8
    out = mvue24_fast(group, torch.tensor([[0.5]]), torch.tensor([[0.1]])).flatten()
    assert out[place].item() == pytest.approx(1e8, rel=1e-5)
    assert out.sort().values[2].item() == pytest.approx(3, rel=1e-5)


def test_large_finite_values_do_not_overflow():
    assert one_group([1e38] * 4, 0.0) == pytest.approx([2e38, 0, 2e38, 0])  # their sum is above the largest float32


def test_tokens_not_a_multiple_of_four_count_as_followed_by_zeros():
    grad, uniform = torch.randn(7, 5, generator=torch.Generator().manual_seed(6)), torch.full((2, 5), 0.7)
    padded = torch.cat([grad, torch.zeros(1, 5)])
    assert torch.equal(mvue24(grad, uniform), mvue24(padded, uniform)[:7])
    assert torch.equal(mvue24_fast(grad, uniform, uniform), mvue24_fast(padded, uniform, uniform)[:7])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    grad = torch.randn(64, 16, generator=torch.Generator().manual_seed(7)).to(dtype)
    uniform = uniform24(0, 0, 0, 64, 16)
    out = mvue24(grad, uniform)
    assert out.dtype == dtype
    assert torch.equal(out, mvue24(grad.float(), uniform).to(dtype))


def test_mvue_of_a_transposed_gradient():
    grad, uniform = (
        torch.randn(16, 64, generator=torch.Generator().manual_seed(8)).t(),
        uniform24(0, 0, 0, 64, 16),
    )
    before = grad.clone()
    assert torch.equal(mvue24(grad, uniform), mvue24(grad.contiguous(), uniform))
    assert torch.equal(grad, before)


def test_wrong_arguments_are_refused():
    with pytest.raises(
        ValueError, match=r"uniform must be float32 of shape \(2, 3\).*found torch\.float32 of \(1, 3\)"
    ):
        mvue24(torch.zeros(5, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        mvue24_fast(torch.zeros(4, 3), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="grad must be floating point"):
        mvue24(torch.zeros(2, 4, 3), torch.zeros(1, 3))
