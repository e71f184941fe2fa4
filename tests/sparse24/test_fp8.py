"""Quantisation to FP8 against the plain formula, bit for bit."""

import math

import pytest
import torch
from sparse24.fp8 import FORMATS, amax, pack_fragments, quantize
from sparse24.fragments import to_fragments
from sparse24.packing import pack
from sparse24.reference import fp8_matmul, fp8_quantize, magnitude_mask

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_gives_the_same_bits(dtype, device):
    codes = all_codes(dtype)
    tensors = [
        codes,
        torch.randn(3, 5, 70).half() * 30,
        torch.randn(40, 66).bfloat16().t(),
        torch.randn(50, 50)[:, 3:20] * 1e-3,
        torch.zeros(5),
        torch.zeros(0, 4),
        torch.tensor([1e-44, -1e-40, 0.0, 3e-37]),
        torch.tensor([3e38, -1.0, -0.0]),
        *(torch.tensor([1.0, bad, -2.0, 0.0]) for bad in (math.nan, math.inf, -math.inf)),
    ]
    for x in tensors:
        q, scale = quantize(x.to(device), dtype)
        found, found_scale = fp8_quantize(x.to(device), dtype)
        torch.testing.assert_close(found_scale, scale, rtol=0, atol=0, equal_nan=True)
        assert found.is_contiguous()
        assert torch.equal(bits(found), bits(q))


@pytest.mark.parametrize("autocast", [False, True])
def test_products_are_exact_whatever_autocast_says(autocast, device):
    a, b = torch.randn(7, 33, device=device).to(DTYPES[0]), torch.randn(33, 5, device=device).to(DTYPES[1])
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        found = fp8_matmul(a, b, torch.tensor(0.25, device=device))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double() @ b.double() / 4, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 64), (48, 320), (128, 512)])
def test_packing_in_fragment_order(shape, dtype, device):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device)
    sparse = dense * magnitude_mask(dense)
    sparse[1, :4] = torch.tensor([0.0, -0.0, 0.0, 2.0])  # fewer than two: filled up as `pack` does
    sparse[2, :4] = torch.tensor([math.nan, 0.0, 1e-30, 0.0])
    sparse[3, :8] = 0
    q, _ = quantize(sparse, dtype, scale=torch.ones((), device=device))
    # as integers, since few operators know fp8; the sign of a zero makes it no non-zero
    integers = q.view(torch.uint8)
    packed = pack(torch.where(integers == 128, 0, integers))
    expected = to_fragments(packed._replace(values=packed.values.view(dtype)))
    found = pack_fragments(q)
    assert torch.equal(found.metadata, expected.metadata)
    # the packed zero may be the negative one
    values, wanted = (f.values.view(torch.uint8).int() for f in (found, expected))
    assert torch.equal(values.masked_fill(values == 128, 0), wanted)
    assert (found.rows, found.cols, found.dtype) == (*shape, dtype)


def test_what_cannot_be_packed_is_named(device):
    with pytest.raises(ValueError, match=r"quantized must be a contiguous matrix in float8.*found torch.float32"):
        pack_fragments(torch.zeros(16, 64, device=device))
    with pytest.raises(ValueError, match="cols must be a multiple of 64 in fragment order; found 32"):
        pack_fragments(torch.zeros(16, 32, device=device).to(torch.float8_e4m3fn))
