"""Kernels that project and pack along rows, against the reference, bit for bit where both are defined."""

import itertools
import math

import pytest
import torch
from matrices import BITS, VALUES, assert_same, padded, poisoned, randn, rows_of, views, with_ties
from sparse24.fragments import Fragments
from sparse24.reference import magnitude_mask, pack, soft_threshold, unpack

pytest.importorskip("triton", reason="the kernels need triton")

from sparse24.prune import prune_pack, unpack_dense, update_mask

SHAPES = [(1, 4), (3, 20), (16, 64), (21, 68), (40, 300), (70, 132)]


def awkward():
    """(625, 4): every group of zeros, ones, a large number, infinities and NaNs."""
    return torch.tensor(list(itertools.product([0.0, -1.0, 2e38, -math.inf, math.nan], repeat=4)))


# --- magnitude ---


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_magnitude(shape, dtype, device):
    for weight in (with_ties(*shape).to(device), with_ties(*shape).to(device, dtype), randn(*shape).to(device, dtype)):
        packed = prune_pack(weight, "magnitude", dtype)
        assert_same(packed, pack(weight.to(dtype), magnitude_mask(weight)))


def test_magnitude_rounds_float32_to_nearest(device):
    dtypes = (
        [torch.float16] if device.type == "cpu" else [torch.float16, torch.bfloat16]
    )  # Triton's interpreter truncates
    weight = randn(20, 68).to(device)
    for dtype in dtypes:
        assert_same(prune_pack(weight, "magnitude", dtype), pack(weight.to(dtype), magnitude_mask(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_magnitude_of_every_group_of_special_values(dtype, device):
    weight = awkward().to(device, dtype)
    mask = magnitude_mask(weight)
    assert_same(prune_pack(weight, "magnitude", dtype), pack(weight, mask))
    assert_same(prune_pack(weight.float(), "magnitude", torch.float16), pack(weight.half(), mask))


@pytest.mark.parametrize("dtype", VALUES)
def test_magnitude_keeps_every_bit_of_a_weight_in_the_dtype_of_the_values(dtype, device):
    weight = randn(16, 64).to(device, dtype)
    weight[0] = -0.0
    payload = weight.view(BITS[dtype])
    payload[1, ::3] = -1  # a NaN with every bit set
    packed = prune_pack(weight, "magnitude", dtype)
    expected = pack(weight, magnitude_mask(weight))
    assert torch.equal(packed.values.view(BITS[dtype]), expected.values.view(BITS[dtype]))


def test_magnitude_updates_the_mask_and_counts_its_flips(device):
    weight = with_ties(21, 68).to(device)
    new = magnitude_mask(weight)
    for name, view in views(weight):
        for mask_name, mask in views(magnitude_mask(randn(21, 68, seed=1)).to(device)):
            flips = torch.tensor([5], device=device)
            expected = 5 + int((mask != new).sum())
            packed = prune_pack(view, "magnitude", torch.float16, mask=mask, flips=flips)
            assert torch.equal(mask, new), (name, mask_name)
            assert flips.item() == expected, (name, mask_name)
            assert_same(packed, pack(weight.half(), new))
            mask.copy_(~new)
            update_mask(view, mask, flips)
            assert torch.equal(mask, new), (name, mask_name)
            assert flips.item() == expected + 21 * 68, (name, mask_name)
            mask.fill_(False)
            update_mask(view, mask)
            assert torch.equal(mask, new), (name, mask_name)


def test_a_mask_that_is_a_view_leaves_its_neighbours_alone(device):
    whole = torch.zeros(8, 40, dtype=torch.bool, device=device)
    weight = randn(4, 12).to(device)
    update_mask(weight, whole[1:5, 8:20])
    assert torch.equal(whole[1:5, 8:20], magnitude_mask(weight))
    assert int(whole.sum()) == 4 * 6


# --- given mask ---


@pytest.mark.parametrize("shape", SHAPES)
def test_given_mask(shape, device):
    weight = with_ties(*shape).to(device)
    weight[0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    mask = magnitude_mask(randn(*shape, seed=1)).to(device)
    for dtype in VALUES:
        expected = pack(weight.to(dtype), mask)
        for (_, view), (_, mask_view) in zip(views(weight), reversed(list(views(mask))), strict=True):
            assert_same(prune_pack(view, "mask", dtype, mask=mask_view), expected)
            assert torch.equal(mask_view, mask)


# --- soft threshold ---


@pytest.mark.parametrize("weight_dtype", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_threshold(shape, weight_dtype, device):
    """The reference in float32 is met exactly, also for 16-bit weights, for which it would otherwise round twice."""
    scale = torch.tensor(1.4837, device=device)
    for weight in (randn(*shape).to(device, weight_dtype), with_ties(*shape).to(device, weight_dtype)):
        expected = soft_threshold(weight.float())
        for dtype in (torch.float32, torch.float16):
            packed = prune_pack(weight, "soft_threshold", dtype, scale=scale)
            assert torch.equal(unpack(packed), (expected * scale).to(dtype))
            assert torch.equal(packed.metadata, pack(weight, magnitude_mask(weight)).metadata)
            assert torch.equal(unpack(prune_pack(weight, "soft_threshold", dtype)), expected.to(dtype))


def test_soft_threshold_shows_what_is_not_finite(device):
    weight = awkward().to(device)
    found = unpack(prune_pack(weight, "soft_threshold", torch.float32))
    expected = soft_threshold(weight)
    finite = ~expected.isnan().any(1)
    assert torch.equal(found[finite], expected[finite])
    # as many NaNs as a packed group can hold: two
    assert (found[~finite].isnan().sum(1) == 2).all()
    assert (found[~finite].nan_to_num() == 0).all()


# --- layouts, strides, buffers ---


@pytest.mark.parametrize("how", ["magnitude", "mask", "soft_threshold"])
@pytest.mark.parametrize(
    ("rows", "cols", "rows_padded_to"), [(16, 64, None), (32, 320, None), (40, 128, 64), (4, 64, 128)]
)
def test_fragments_and_padding(how, rows, cols, rows_padded_to, device):
    weight = with_ties(rows, cols).to(device)
    mask = magnitude_mask(randn(rows, cols, seed=1)).to(device) if how == "mask" else None
    whole = padded(weight if how != "soft_threshold" else soft_threshold(weight), rows_padded_to or rows)
    kept = magnitude_mask(padded(weight, rows_padded_to or rows))
    if mask is not None:
        kept[:rows] = mask
    for dtype in (torch.float16, torch.bfloat16):
        expected = pack(whole.to(dtype), kept)
        for fragments in (False, True):
            args = {"mask": mask, "fragments": fragments, "rows_padded_to": rows_padded_to}
            packed = prune_pack(weight, how, dtype, **args)
            assert isinstance(packed, Fragments) == fragments
            assert_same(packed, expected)
            assert (rows_of(packed).metadata[rows:] == 0x4444).all()
            out = poisoned(packed)
            assert prune_pack(weight, how, dtype, out=out, **args) is out
            assert_same(out, expected)
            assert_same(prune_pack(weight.t().contiguous().t(), how, dtype, out=poisoned(packed), **args), expected)


@pytest.mark.parametrize("shape", [(21, 68), (5, 4), (18, 256)])
def test_every_view_gives_the_same_and_is_left_alone(shape, device):
    weight = randn(*shape).to(device)
    expected = pack(weight, magnitude_mask(weight))
    for _, view in views(weight):
        assert_same(prune_pack(view, "magnitude", torch.float32, out=poisoned(expected)), expected)
        assert torch.equal(view, weight)


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("shape", [(1, 4), (21, 68), (32, 64), (16, 320)])
def test_unpack_dense(shape, dtype, device):
    weight = randn(*shape).to(device, dtype)
    mask = magnitude_mask(randn(*shape, seed=1)).to(device)
    weight[::2] = -0.0
    weight[0, ::3] = math.nan
    for fragments in (False, True):
        if fragments and (shape[0] % 16 or shape[1] % 64 or dtype == torch.float32):
            continue
        packed = prune_pack(weight, "mask", dtype, mask=mask, fragments=fragments)
        dense = unpack_dense(packed)
        assert torch.equal(dense.view(BITS[dtype]), unpack(rows_of(packed)).view(BITS[dtype]))


def test_empty_matrices(device):
    weight = torch.zeros(0, 8, device=device)
    packed = prune_pack(weight, "magnitude", torch.float16)
    assert packed.values.shape == (0, 4)
    assert unpack_dense(packed).shape == (0, 8)


def test_wrong_arguments_are_refused(device):
    weight = torch.zeros(4, 8, device=device)
    mask = torch.zeros(4, 8, dtype=torch.bool, device=device)
    one = torch.ones((), device=device)
    flips = torch.zeros(1, dtype=torch.int64, device=device)
    for message, args in (
        (r"weight must be .* multiple of 4; found \(4, 6\)", {"weight": weight[:, :6]}),
        ("weight must be float32, bfloat16 or float16; found torch.float64", {"weight": weight.double()}),
        ("how must be one of magnitude, soft_threshold, mask; found 'best'", {"how": "best"}),
        ("dtype must be one of .*; found torch.float64", {"dtype": torch.float64}),
        ("mask must be given", {"how": "mask"}),
        (r"mask must be boolean of shape \(4, 8\)", {"mask": mask.float()}),
        ("mask must be None", {"how": "soft_threshold", "mask": mask}),
        ("scale must be None", {"scale": one}),
        ("scale must be 0-dim float32", {"how": "soft_threshold", "scale": one.half()}),
        ("flips must be None", {"flips": flips}),
        ("flips must be int64 of one element", {"mask": mask, "flips": flips.int()}),
        ("rows_padded_to must be at least the 4 rows", {"rows_padded_to": 2}),
        ("cols must be a multiple of 64", {"fragments": True, "rows_padded_to": 16}),
        ("out must be Packed; found tuple", {"out": (weight, weight)}),
    ):
        with pytest.raises(ValueError, match=message):
            prune_pack(**{"weight": weight, "how": "magnitude", "dtype": torch.float16} | args)
    packed = prune_pack(weight, "magnitude", torch.float16)
    with pytest.raises(ValueError, match=r"packed\.metadata must be torch.int16"):
        unpack_dense(packed._replace(metadata=packed.metadata.int()))
