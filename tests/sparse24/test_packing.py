"""The packed format: by hand, and round trips bit for bit."""

import math

import pytest
import torch
from sparse24.reference import Packed, magnitude_mask, pack, unpack

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_one_word_by_hand():
    weight = torch.tensor([[5, 6, 0, 0, 0, 7, 0, 8, 0, 0, 9, 10, 11, 0, 0, 12]], dtype=torch.float32)
    packed = pack(weight)
    assert packed.values.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    # positions 0 1 | 1 3 | 2 3 | 0 3, two bits each, the first lowest: 11 00 11 10 11 01 01 00
    assert packed.metadata.dtype == torch.int16
    assert packed.metadata.tolist() == [[0b1100111011010100 - 65536]]
    assert packed.cols == 16


def test_last_word_is_filled_with_empty_groups():
    packed = pack(torch.tensor([[0.0, 0.0, 1.0, 2.0]]))
    # 2 3, then three times 0 1
    assert packed.metadata.tolist() == [[0b0100010001001110]]


def test_groups_with_fewer_non_zeros_take_the_lowest_free_positions():
    packed = pack(torch.tensor([[0.0, 0.0, 0.0, 3.0, 0.0, 4.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert packed.values.tolist() == [[0, 3, 0, 4, 5, 0, 0, 0]]
    assert packed.metadata.tolist() == [[0b0100_0100_0100_1100]]


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("shape", [(1, 4), (3, 20), (16, 64), (5, 36)])
def test_round_trip(shape, dtype):
    weight = randn(*shape).to(dtype)
    weight = weight * magnitude_mask(weight)
    packed = pack(weight)
    assert packed.values.shape == (shape[0], shape[1] // 2)
    assert packed.metadata.shape == (shape[0], math.ceil(shape[1] / 16))
    assert packed.values.dtype == dtype
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("dtype", list(BITS))
def test_round_trip_with_a_mask_keeps_every_bit(dtype):
    weight = randn(12, 40).to(dtype)
    mask = magnitude_mask(randn(12, 40) + 1.0)
    weight[::2] = -0.0
    weight[1::4, ::3] = math.nan
    expected = torch.zeros_like(weight)
    expected[mask] = weight[mask]
    assert torch.equal(unpack(pack(weight, mask)).view(BITS[dtype]), expected.view(BITS[dtype]))


def test_without_a_mask_nan_counts_as_non_zero():
    weight = torch.tensor([[0.0, math.nan, 0.0, math.nan]])
    torch.testing.assert_close(unpack(pack(weight)), weight, rtol=0, atol=0, equal_nan=True)


def test_round_trip_of_a_transposed_weight():
    weight = randn(40, 12)
    mask = magnitude_mask(weight.t())
    assert torch.equal(unpack(pack(weight.t(), mask)), weight.t() * mask)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"cols a multiple of 4; found \(4, 6\)"):
        pack(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="at most 2 non-zeros in each group of 4; found 3"):
        pack(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    with pytest.raises(ValueError, match="exactly 2 True in each group of 4; found 1"):
        pack(torch.ones(1, 4), torch.tensor([[True, False, False, False]]))
    with pytest.raises(ValueError, match=r"mask must be boolean of shape \(1, 4\)"):
        pack(torch.ones(1, 4), torch.ones(1, 4))
    packed = pack(torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"metadata must be int16 of shape \(2, 2\)"):
        unpack(Packed(packed.values, packed.metadata[:, :1], 32))
    with pytest.raises(ValueError, match="values must be"):
        unpack(Packed(packed.values, packed.metadata, 28))
