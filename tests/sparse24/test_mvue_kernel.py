"""The MVUE kernel against the reference: the same random numbers, the same bits."""

import math

import pytest
import torch
import torch.nn.functional as F
from sparse24.fragments import Fragments, from_fragments
from sparse24.mvue import mvue_pack, mvue_prune
from sparse24.packing import Packed, pack, unpack
from sparse24.reference import mvue24, uniform24

STEP, LAYER, SEED = 11, 3, 1234
CASES = [((150, 70), first) for first in (0, 4, 8, 12, 16, 4100)] + [
    (shape, 12) for shape in ((1, 1), (4, 3), (64, 64), (130, 16), (7, 129))
]


def gradient(tokens, features, dtype=torch.float32, seed=0):
    """Normal numbers over many scales, with groups of every number of zeros."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(tokens, features, generator=generator)
    grad *= 10.0 ** torch.randint(-1, 2, (tokens, features), generator=generator)
    share = torch.rand(-(-tokens // 4), features, generator=generator).repeat_interleave(4, 0)[:tokens]
    return grad.masked_fill(torch.rand(tokens, features, generator=generator) < share, 0.0).to(dtype)


def position(device, first=0, step=STEP, layer=LAYER, feature=0):
    return torch.tensor([step, first, layer, feature], device=device)


def reference(grad, seed=SEED, step=STEP, first=0, layer=LAYER):
    return mvue24(grad, uniform24(seed, step, layer, *grad.shape, first, device=grad.device))


def same_bits(a, b):
    """Zeros of either sign are told apart, NaNs are not."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(nan=0.0).view(torch.int32 if a.dtype == torch.float32 else torch.int16),
        b.nan_to_num(nan=0.0).view(torch.int32 if a.dtype == torch.float32 else torch.int16),
    )


def poisoned(packed):
    """A buffer like this one, full of garbage."""
    values, metadata, *rest = packed
    garbage = torch.full_like(values, 0x7F7F7F7F if values.dtype == torch.int32 else torch.nan)
    return type(packed)(garbage, torch.full_like(metadata, 0x7F7F), *rest)


@pytest.mark.parametrize(("shape", "first"), CASES)
def test_bits_of_the_reference(shape, first, device):
    grad = gradient(*shape).to(device)
    expected = reference(grad, first=first)
    out = torch.full_like(grad, torch.nan)
    assert mvue_prune(grad, SEED, position(device, first), out=out) is out
    assert same_bits(out, expected)
    packed = mvue_pack(grad, SEED, position(device, first), torch.float32)
    wanted = pack(F.pad(expected, (0, 0, 0, -shape[0] % 4)).t())
    assert same_bits(packed.values, wanted.values)
    assert torch.equal(packed.metadata, wanted.metadata)
    again = mvue_pack(grad, SEED, position(device, first), torch.float32, out=poisoned(packed))
    assert same_bits(again.values, wanted.values)
    assert torch.equal(again.metadata, wanted.metadata)


@pytest.mark.parametrize("source", [torch.float32, torch.float16])
def test_half_precision(source, device):
    grad = gradient(150, 70, source).to(device)
    expected = reference(grad.float()).half()
    packed = mvue_pack(grad, SEED, position(device), torch.float16)
    assert packed.values.dtype == torch.float16
    assert torch.equal(unpack(packed).t()[:150], expected)
    if source == torch.float16:
        assert same_bits(mvue_prune(grad, SEED, position(device)), reference(grad))


def test_bfloat16(device):
    grad = gradient(96, 64, torch.bfloat16).to(device)
    exact = reference(grad.float())
    # the interpreter cuts off instead of rounding
    expected = exact.bfloat16() if grad.is_cuda else (exact.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    assert torch.equal(mvue_prune(grad, SEED, position(device)), expected)
    assert torch.equal(unpack(mvue_pack(grad, SEED, position(device), torch.bfloat16)).t(), expected)


@pytest.mark.parametrize("layout", ["transposed", "column slice", "every second", "expanded"])
def test_strides(layout, device):
    base = gradient(140, 140).to(device)
    grad = {
        "transposed": base.t(),
        "column slice": base[:, 5:100],
        "every second": base[::2, ::2],
        "expanded": base[:1].expand(90, 140),
    }[layout]
    expected = reference(grad.contiguous())
    assert same_bits(mvue_prune(grad, SEED, position(device)), expected)
    packed = mvue_pack(grad, SEED, position(device), torch.float32)
    assert torch.equal(unpack(packed).t()[: grad.shape[0]], expected)


@pytest.mark.parametrize("seed", [0, -1, -(2**40), 2**31, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_seeds(seed, device):
    grad = gradient(64, 64).to(device)
    assert same_bits(mvue_prune(grad, seed, position(device)), reference(grad, seed))


def test_steps_layers_and_positions_beyond_32_bits(device):
    grad = gradient(36, 20).to(device)
    for step, first, layer in ((2**31, 2**33 + 4, 2**31 + 1), (2**32 + 7, 2**36 - 32, 0), (0, 2**34 - 16, 2**40)):
        expected = reference(grad, step=step, first=first, layer=layer)
        assert same_bits(mvue_prune(grad, SEED, position(device, first, step, layer)), expected)


def test_cut_into_micro_batches(device):
    grad = gradient(200, 40).to(device)
    whole = mvue_prune(grad, SEED, position(device, 64))
    parts = [mvue_prune(grad[a:b], SEED, position(device, 64 + a)) for a, b in ((0, 52), (52, 120), (120, 200))]
    assert torch.equal(whole, torch.cat(parts))


def test_cut_along_features(device):
    grad = gradient(68, 40).to(device)
    whole = mvue_prune(grad, SEED, position(device, 12))
    parts = [mvue_prune(grad[:, a:b], SEED, position(device, 12, feature=a)) for a, b in ((0, 12), (12, 33), (33, 40))]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    packed = mvue_pack(grad[:, 12:33], SEED, position(device, 12, feature=12), torch.float32)
    assert torch.equal(unpack(packed).t(), whole[:, 12:33])


@pytest.mark.parametrize("padded", [None, 128])
@pytest.mark.parametrize("tokens", [64, 150, 5])
def test_fragment_order(tokens, padded, device):
    features, dtype = 80 if padded is None else 70, torch.float16
    grad = gradient(tokens, features, dtype).to(device)
    fragments = mvue_pack(grad, SEED, position(device, 8), dtype, fragments=True, rows_padded_to=padded)
    assert isinstance(fragments, Fragments)
    expected = F.pad(reference(grad, first=8), (0, (padded or features) - features, 0, -tokens % 64)).t()
    found, wanted = from_fragments(fragments), pack(expected)
    assert same_bits(found.values, wanted.values)
    assert torch.equal(found.metadata, wanted.metadata)
    if padded:
        assert (found.values[features:] == 0).all()
        assert (found.metadata[features:] == 0x4444).all()
    again = mvue_pack(
        grad, SEED, position(device, 8), dtype, fragments=True, rows_padded_to=padded, out=poisoned(fragments)
    )
    assert torch.equal(again.values, fragments.values)
    assert torch.equal(again.metadata, fragments.metadata)


def test_rows_padded_in_row_major_order(device):
    grad = gradient(30, 5).to(device)
    packed = mvue_pack(grad, SEED, position(device), torch.float32, rows_padded_to=9)
    assert isinstance(packed, Packed)
    assert packed.values.shape == (9, 16)
    assert (packed.values[5:] == 0).all()
    assert (packed.metadata[5:] == 0x4444).all()
    assert torch.equal(unpack(packed)[:5].t()[:30], reference(grad))


SPECIAL = {
    "one nan": [math.nan, 1, 2, 3],
    "nan beside zeros": [0, 0, 0, math.nan],
    "two infinities": [math.inf, 1, -math.inf, 3],
    "sum overflows": [3e38] * 4,
    "one infinity": [1, -math.inf, 3, 4],
    "infinity and zeros": [0, 0, math.inf, 0],
    "large": [1e38] * 4,
    "largest is the sum": [1, 2, 3, 6],
    "zeros": [0, 0, 0, 0],
    "negative zeros": [-0.0, -0.0, -0.0, -0.0],
    "one": [0, 0, -2, 0],
    "two": [0, 3, 0, -2],
    "three": [1, 1, 0, -1],
    "equal": [1, -1, 1, -1],
    "tiny": [1e-38, 2e-38, -3e-38, 1e-38],
}


@pytest.mark.parametrize("name", list(SPECIAL))
def test_special_groups(name, device):
    grad = torch.tensor(SPECIAL[name], dtype=torch.float32).view(4, 1).repeat(4, 100).to(device)
    grad[:, 1::2] = grad.view(4, 4, 100).roll(1, dims=1).reshape(16, 100)[:, 1::2]
    expected = reference(grad)
    assert same_bits(mvue_prune(grad, SEED, position(device)), expected)
    packed = mvue_pack(grad, SEED, position(device), torch.float32)
    dense = unpack(packed).t()
    bad = expected.isnan()
    if bad.any():
        # four NaNs do not fit into a packed group: it has two of them
        assert bad.view(4, 4, 100).all(1).equal(bad.view(4, 4, 100).any(1))
        assert (dense.view(4, 4, 100).isnan().sum(1) == 2 * bad.view(4, 4, 100).any(1)).all()
    else:
        assert torch.equal(dense, expected)
        wanted = pack(expected.t())
        assert same_bits(packed.values, wanted.values)
        assert torch.equal(packed.metadata, wanted.metadata)


def test_nothing_to_do(device):
    for shape in ((0, 5), (8, 0)):
        grad = torch.zeros(shape, device=device)
        assert mvue_prune(grad, SEED, position(device)).shape == shape
        packed = mvue_pack(grad, SEED, position(device), torch.float32)
        assert packed.values.shape == (shape[1], shape[0] // 2)


def test_bad_arguments_are_named(device):
    grad, where = torch.zeros(8, 16, device=device), position(device)
    with pytest.raises(ValueError, match="grad must be float32, bfloat16 or float16 of shape"):
        mvue_prune(grad.int(), SEED, where)
    with pytest.raises(ValueError, match=r"position must be int64 of shape \(4,\).*found torch.int32"):
        mvue_prune(grad, SEED, where.int())
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16; found torch.float64"):
        mvue_pack(grad, SEED, where, torch.float64)
    with pytest.raises(ValueError, match="rows_padded_to must be at least the 16 features"):
        mvue_pack(grad, SEED, where, torch.float16, rows_padded_to=8)
    with pytest.raises(ValueError, match="rows must be a multiple of 16"):
        mvue_pack(grad[:, :7], SEED, where, torch.float16, fragments=True)
    with pytest.raises(ValueError, match="out must be torch.float32"):
        mvue_prune(grad, SEED, where, out=grad.half())
    with pytest.raises(ValueError, match="out.values must be"):
        mvue_pack(grad, SEED, where, torch.float16, out=mvue_pack(grad, SEED, where, torch.float32))
