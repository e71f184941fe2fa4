"""The search of transposable masks and packing both ways, against the reference, bit for bit."""

import math

import pytest
import torch
from matrices import BITS, VALUES, assert_same, padded, poisoned, randn, views, with_ties
from sparse24.fragments import Fragments, from_fragments
from sparse24.reference import TRANSPOSABLE_PATTERNS, magnitude_mask, pack, transposable_mask

pytest.importorskip("triton", reason="the kernels need triton")

from sparse24.transposable import pack_both, transposable_mask_


def few_values(*shape, values, seed=0):
    index = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values)[index]


def near_ties(*shape, seed=0):
    """Magnitudes a few last bits apart: sums of two, four and eight round differently, so that scores that differ
    become equal and the lower pair with the largest sum is often not the first to reach the score."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.randint(0, 8, shape, generator=generator) * 2.0**-23


WEIGHTS = {
    "normal": randn(128, 128),
    "ties": with_ties(128, 128),
    "zero or one": few_values(128, 128, values=[0.0, 1.0]),
    "near ties": near_ties(192, 192),
    "near ties of several sizes": near_ties(192, 192) * few_values(192, 192, values=[0.5, -1.0, 2.0], seed=1),
    "large and small": few_values(128, 128, values=[2.0**24, 1.0, 3.0, 2.0**25 + 4]),
    "subnormal": few_values(64, 64, values=[1e-45, 3e-45, -4e-45, 0.0]),
    "beyond the cap": few_values(64, 64, values=[2.0**122, -(2.0**123), 2.0**124, 3e38]),
    "not finite": few_values(128, 128, values=[0.0, 1.0, -2.0, math.inf, -math.inf, math.nan]),
}


def old_mask(rows, cols, device):
    return transposable_mask(randn(rows, cols, seed=9)).to(device)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_search(name, device):
    weight = WEIGHTS[name].to(device)
    expected = transposable_mask(weight)
    mask = old_mask(*weight.shape, device)
    flips = torch.tensor([3], device=device)
    changed = int((mask != expected).sum())
    transposable_mask_(weight, mask, flips)
    assert torch.equal(mask, expected)
    assert flips.item() == 3 + changed
    mask.fill_(False)
    transposable_mask_(weight, mask)
    assert torch.equal(mask, expected)


def test_search_of_every_block_of_one_pattern(device):
    """Blocks that are 2:4 both ways already: the pattern itself."""
    weight = TRANSPOSABLE_PATTERNS.reshape(-1, 4).float().to(device)
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=device)
    transposable_mask_(weight, mask)
    assert torch.equal(mask, weight > 0)


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (4, 68), (132, 4), (68, 132)])
def test_search_and_pack_both_ways(shape, dtype, device):
    for weight in (with_ties(*shape).to(device), randn(*shape).to(device, dtype)):
        expected = transposable_mask(weight)
        mask = old_mask(*shape, device)
        flips = torch.zeros(1, dtype=torch.int64, device=device)
        changed = int((mask != expected).sum())
        straight, transpose = pack_both(weight, "transposable", dtype, mask=mask, flips=flips)
        assert torch.equal(mask, expected)
        assert flips.item() == changed
        results = (pack(weight.to(dtype), expected), pack(weight.to(dtype).t(), expected.t()))
        assert_same(straight, results[0])
        assert_same(transpose, results[1])
        out = tuple(poisoned(packed) for packed in (straight, transpose))
        pack_both(weight, "transposable", dtype, out=out)
        assert_same(out[0], results[0])
        assert_same(out[1], results[1])


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("shape", [(4, 4), (20, 12), (64, 128)])
def test_given_mask_keeps_every_bit(shape, dtype, device):
    weight = randn(*shape).to(device, dtype)
    weight[0] = -0.0
    weight[1, ::2] = math.nan
    mask = old_mask(*shape, device)
    before = mask.clone()
    for packed, matrix, kept in zip(
        pack_both(weight, "mask", dtype, mask=mask), (weight, weight.t()), (mask, mask.t()), strict=True
    ):
        expected = pack(matrix, kept)
        assert torch.equal(packed.values.view(BITS[dtype]), expected.values.view(BITS[dtype]))
        assert torch.equal(packed.metadata, expected.metadata)
    assert torch.equal(mask, before)


def test_every_view(device):
    weight = with_ties(20, 12).to(device)
    expected = transposable_mask(weight)
    results = (pack(weight, expected), pack(weight.t(), expected.t()))
    for name, view in views(weight):
        for mask_name, mask in views(old_mask(20, 12, device)):
            flips = torch.zeros((), dtype=torch.int64, device=device)
            changed = int((mask != expected).sum())
            for how in ("transposable", "mask"):
                arguments = {"flips": flips} if how == "transposable" else {}
                straight, transpose = pack_both(view, how, torch.float32, mask=mask, **arguments)
                assert torch.equal(mask, expected), (name, mask_name, how)
                assert flips.item() == changed, (name, mask_name, how)
                assert_same(straight, results[0])
                assert_same(transpose, results[1])


@pytest.mark.parametrize(("shape", "rows_padded_to"), [((64, 64), None), ((128, 64), (128, 128))])
def test_fragments_and_padding(shape, rows_padded_to, device):
    weight = with_ties(*shape).to(device)
    rows, cols = rows_padded_to or shape
    mask = transposable_mask(weight)
    results = []
    for matrix, kept, needed in ((weight, mask, rows), (weight.t(), mask.t(), cols)):
        whole = magnitude_mask(padded(matrix, needed))
        whole[: matrix.shape[0]] = kept
        results.append(pack(padded(matrix, needed).half(), whole))
    for how in ("transposable", "mask"):
        for fragments in (False, True):
            arguments = {"mask": mask, "fragments": fragments, "rows_padded_to": rows_padded_to}
            packed = pack_both(weight, how, torch.float16, **arguments)
            assert all(isinstance(p, Fragments) == fragments for p in packed)
            out = tuple(poisoned(p) for p in packed)
            assert pack_both(weight, how, torch.float16, out=out, **arguments)[0] is out[0]
            for found, again, expected in zip(packed, out, results, strict=True):
                assert_same(found, expected)
                assert_same(again, expected)
    straight = from_fragments(packed[0])
    assert (straight.metadata[shape[0] :] == 0x4444).all()


def test_wrong_arguments_are_refused(device):
    weight = torch.zeros(8, 8, device=device)
    mask = torch.zeros(8, 8, dtype=torch.bool, device=device)
    flips = torch.zeros(1, dtype=torch.int64, device=device)
    for message, args in (
        (r"weight must be \(rows, cols\), multiples of 4; found \(6, 8\)", {"weight": weight[:6]}),
        ("multiple of 4", {"weight": weight[:, :6]}),
        ("how must be transposable or mask; found 'magnitude'", {"how": "magnitude"}),
        ("dtype must be one of", {"dtype": torch.int8}),
        ("mask must be given", {"how": "mask"}),
        ("mask must be boolean", {"mask": mask[:4]}),
        ("flips must be None", {"flips": flips}),
        (r"rows_padded_to must be at least \(8, 8\); found \(8, 4\)", {"rows_padded_to": (8, 4)}),
        ("rows must be a multiple of 16", {"fragments": True}),
    ):
        with pytest.raises(ValueError, match=message):
            pack_both(**{"weight": weight, "how": "transposable", "dtype": torch.float16} | args)
    with pytest.raises(ValueError, match="multiples of 4"):
        transposable_mask_(weight[:6], mask[:6])
