"""Quantisation to FP8 against the plain formula, bit for bit."""

import math

import pytest
import torch
from sparse24.fp8 import FORMATS, amax, quantize

DTYPES = list(FORMATS)


def expected(x, dtype, scale):
    """x·(1/scale), saturated unless infinite, rounded by PyTorch."""
    largest = FORMATS[dtype][2]
    y = x.float() * (1 / scale)
    infinite = torch.inf if dtype == torch.float8_e5m2 else torch.nan
    return torch.where(y.isinf(), y.sign() * infinite, y.clamp(-largest, largest)).to(dtype)


def bits(q):
    """As integers; the NaNs of a format are all the same here."""
    return q.view(torch.uint8).int().masked_fill(q.float().isnan(), -1)


def all_codes(dtype):
    """Every finite value of a format, the midpoints between neighbours, and the float32 next to each of these."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()].sort().values
    values = torch.cat([values, (values[1:] + values[:-1]) / 2])
    return torch.cat([values, values.nextafter(torch.tensor(math.inf)), values.nextafter(torch.tensor(-math.inf))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_every_value_tie_and_neighbour(dtype, device):
    x = all_codes(dtype).to(device)
    q, scale = quantize(x, dtype, scale=torch.ones((), device=device))
    assert scale.item() == 1
    assert torch.equal(bits(q), bits(expected(x, dtype, scale)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 700), (70, 130), (1, 4100)])
def test_scale_and_values(dtype, kind, shape, device):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 30).to(kind).to(device)
    q, scale = quantize(x, dtype)
    assert scale.item() == (x.abs().max().float() / FORMATS[dtype][2]).item()
    assert q.shape == x.shape
    assert q.dtype == dtype
    assert torch.equal(bits(q), bits(expected(x, dtype, scale)))
    # half a unit in the last place of a number, or half of the spacing of subnormals
    mantissa, bias, _ = FORMATS[dtype]
    bound = torch.maximum(x.float().abs() * 2.0 ** -(mantissa + 1), scale * 2.0 ** -(bias + mantissa))
    assert ((q.float() * scale - x.float()).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dividing_by_the_scale_differs_at_ties_only(dtype, device):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2)).to(device)
    q, scale = quantize(x, dtype)
    divided = (x / scale).to(dtype)
    assert (bits(q) != bits(divided)).sum() <= 2


@pytest.mark.parametrize("view", ["transposed", "column slice", "every second", "three dimensions"])
def test_strides(view, device):
    base = torch.randn(66, 140, generator=torch.Generator().manual_seed(3)).to(device)
    x = {
        "transposed": base.t(),
        "column slice": base[:, 3:100],
        "every second": base[:, ::2],
        "three dimensions": base.view(6, 11, 140).transpose(0, 1)[:, :, 5:],
    }[view]
    q, scale = quantize(x)
    assert q.is_contiguous()
    assert torch.equal(bits(q), bits(expected(x, torch.float8_e4m3fn, scale)))
    assert amax(x) == x.abs().max()


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 3), (130, 100)])
@pytest.mark.parametrize("flip", [False, True])
def test_transpose_from_the_same_pass(shape, flip, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device)
    x = x.t() if flip else x
    q, q_t, scale = quantize(x, transposed=True)
    assert q_t.is_contiguous()
    assert torch.equal(bits(q), bits(expected(x, torch.float8_e4m3fn, scale)))
    assert torch.equal(bits(q_t), bits(q).t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation(dtype, device):
    largest = FORMATS[dtype][2]
    x = torch.tensor([largest, largest * 1.04, -1e6 * largest, 3e38, -0.0, 0.0], device=device)
    q, _ = quantize(x, dtype, scale=torch.ones((), device=device))
    assert q.float().tolist() == [largest, largest, -largest, largest, 0.0, 0.0]
    assert q.float()[4].signbit()


def test_zeros_have_scale_one(device):
    for x in (torch.zeros(5, device=device), torch.zeros(0, 4, device=device)):
        q, scale = quantize(x)
        assert scale.item() == 1
        assert (q.float() == 0).all()
        assert q.shape == x.shape
        assert amax(x).item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_tensors_stay_finite(dtype, device):
    x = torch.tensor([1e-44, -1e-40, 0.0, 3e-37], device=device)
    q, scale = quantize(x, dtype, amax=torch.tensor(3e-37, device=device))
    assert scale.item() == 2.0**-126
    assert torch.equal(bits(q), bits(expected(x, dtype, scale)))
    assert q.float().isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_hidden(dtype, bad, device):
    x = torch.tensor([1.0, bad, -2.0, 0.0], device=device)
    q, _ = quantize(x, dtype, scale=torch.ones((), device=device))
    assert torch.equal(bits(q), bits(expected(x, dtype, torch.ones(()))))
    if math.isnan(bad) or dtype == torch.float8_e4m3fn:
        assert q.float()[1].isnan()
    else:
        assert q.float()[1].item() == bad
    largest = amax(x)
    assert largest.isnan() if math.isnan(bad) else largest.item() == math.inf
    q, scale = quantize(x, dtype)
    assert not scale.isfinite()
    assert (q.float() * scale).isnan()[:3].all()


def test_bad_arguments_are_named(device):
    x = torch.zeros(4, 4, device=device)
    one = torch.ones((), device=device)
    with pytest.raises(ValueError, match=r"x must be float32.*found torch.int32"):
        quantize(x.int())
    with pytest.raises(ValueError, match="dtype must be float8_e4m3fn or float8_e5m2"):
        quantize(x, torch.float16)
    with pytest.raises(ValueError, match="exclude each other"):
        quantize(x, amax=one, scale=one)
    with pytest.raises(ValueError, match="scale must be 0-dim float32"):
        quantize(x, scale=one.view(1))
    with pytest.raises(ValueError, match="x must be a matrix"):
        quantize(x.view(2, 2, 4), transposed=True)
