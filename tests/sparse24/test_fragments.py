"""Fragment order: by the definition of the instructions, lane by lane, and round trips bit for bit."""

import pytest
import torch
from sparse24.fragments import Fragments, fragment_shapes, from_fragments, packed_output, to_fragments
from sparse24.packing import Packed

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def random_packed(rows, cols, dtype, seed=0):
    """Any bits at all, NaNs, infinities and zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (rows, cols // 2 * dtype.itemsize), generator=generator, dtype=torch.int8)
    values[0] = -1  # NaN
    values[1, ::2] = 0
    values[1, 1::2] = -128  # -0.0
    metadata = torch.randint(-(2**15), 2**15, (rows, cols // 16), generator=generator, dtype=torch.int16)
    return Packed(values.view(dtype), metadata, cols)


def bits(tensor):
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 64), (32, 192), (48, 128)])
def test_round_trip_keeps_every_bit(shape, dtype):
    packed = random_packed(*shape, dtype)
    fragments = to_fragments(packed)
    assert (fragments.rows, fragments.cols, fragments.dtype) == (*shape, dtype)
    assert (fragments.values.shape, fragments.metadata.shape) == fragment_shapes(*shape, dtype)
    assert fragments.values.is_contiguous()
    assert fragments.metadata.is_contiguous()
    back = from_fragments(fragments)
    assert back.cols == shape[1]
    assert back.values.dtype == dtype
    assert torch.equal(bits(back.values), bits(packed.values))
    assert torch.equal(back.metadata, packed.metadata)


def test_round_trip_of_a_view():
    packed = random_packed(32, 128, torch.float16)
    wide = Packed(packed.values.repeat(1, 2)[:, :64], packed.metadata.repeat(1, 2)[:, :8], 128)
    assert torch.equal(to_fragments(wide).values, to_fragments(packed).values)
    assert torch.equal(to_fragments(wide).metadata, to_fragments(packed).metadata)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_16_bit_order_lane_by_lane(dtype):
    rows, cols = 32, 128
    packed = random_packed(rows, cols, dtype)
    stored, words = bits(packed.values).int() & 0xFFFF, packed.metadata.int() & 0xFFFF
    fragments = to_fragments(packed)
    for tile in range(rows // 16):
        for block in range(cols // 64):
            for lane in range(32):
                g, t = divmod(lane, 4)
                for step in range(2):
                    s = stored[16 * tile : 16 * tile + 16, 32 * block + 16 * step :]
                    expected = [
                        int(s[g, 2 * t]) | int(s[g, 2 * t + 1]) << 16,
                        int(s[g + 8, 2 * t]) | int(s[g + 8, 2 * t + 1]) << 16,
                        int(s[g, 2 * t + 8]) | int(s[g, 2 * t + 9]) << 16,
                        int(s[g + 8, 2 * t + 8]) | int(s[g + 8, 2 * t + 9]) << 16,
                    ]
                    found = fragments.values[tile, block, step, lane].tolist()
                    assert [word & 0xFFFFFFFF for word in found] == expected
                e = words[16 * tile : 16 * tile + 16, 4 * block :]
                assert int(fragments.metadata[tile, block, lane]) & 0xFFFFFFFF == int(e[g, t]) | int(e[g + 8, t]) << 16


def test_fp8_order_lane_by_lane():
    rows, cols = 32, 128
    packed = random_packed(rows, cols, torch.float8_e4m3fn)
    stored, words = bits(packed.values).int() & 0xFF, packed.metadata.int() & 0xFFFF
    fragments = to_fragments(packed)

    def four(s, row, column):
        return sum(int(s[row, column + i]) << (8 * i) for i in range(4))

    for tile in range(rows // 16):
        for block in range(cols // 64):
            s, e = stored[16 * tile :, 32 * block :], words[16 * tile :, 4 * block :]
            for lane in range(32):
                g, t = divmod(lane, 4)
                expected = [
                    four(s, g, 4 * t),
                    four(s, g + 8, 4 * t),
                    four(s, g, 4 * t + 16),
                    four(s, g + 8, 4 * t + 16),
                ]
                assert [word & 0xFFFFFFFF for word in fragments.values[tile, block, lane].tolist()] == expected
                row, word = g + 8 * (lane & 1), t >> 1
                expected = int(e[row, 2 * word]) | int(e[row, 2 * word + 1]) << 16
                assert int(fragments.metadata[tile, block, lane]) & 0xFFFFFFFF == expected


def test_wrong_arguments_are_refused():
    def packed(rows, cols, dtype=torch.float16):
        return Packed(torch.zeros(rows, cols // 2, dtype=dtype), torch.zeros(rows, cols // 16, dtype=torch.int16), cols)

    with pytest.raises(ValueError, match="rows must be a multiple of 16 in fragment order; found 24"):
        to_fragments(packed(24, 64))
    with pytest.raises(ValueError, match="cols must be a multiple of 64 in fragment order; found 96"):
        to_fragments(packed(16, 96))
    with pytest.raises(ValueError, match=r"dtype must be one of bfloat16, .* in fragment order; found torch.float32"):
        to_fragments(packed(16, 64, torch.float32))
    with pytest.raises(ValueError, match=r"values must be \(rows, cols/2\)"):
        to_fragments(packed(16, 64)._replace(cols=128))
    with pytest.raises(ValueError, match=r"metadata must be int16 of shape \(16, 4\); found torch.int32"):
        to_fragments(packed(16, 64)._replace(metadata=torch.zeros(16, 4, dtype=torch.int32)))
    fragments = to_fragments(packed(16, 64))
    with pytest.raises(ValueError, match=r"values must be int32 of shape \(2, 1, 2, 32, 4\)"):
        from_fragments(fragments._replace(rows=32))
    with pytest.raises(ValueError, match="metadata must be int32"):
        from_fragments(fragments._replace(metadata=fragments.metadata.float()))


@pytest.mark.parametrize("fragments", [False, True])
def test_output_is_new_or_the_one_given(fragments):
    cpu = torch.device("cpu")
    new = packed_output(16, 64, torch.float16, cpu, fragments)
    assert isinstance(new, Fragments if fragments else Packed)
    assert packed_output(16, 64, torch.float16, cpu, fragments, new) is new
    with pytest.raises(ValueError, match="out must be"):
        packed_output(16, 64, torch.float16, cpu, not fragments, new)
    with pytest.raises(
        ValueError, match="out must be a matrix" if fragments else r"out\.values must be torch.bfloat16"
    ):
        packed_output(16, 64, torch.bfloat16, cpu, fragments, new)
    with pytest.raises(ValueError, match="out"):
        packed_output(32, 64, torch.float16, cpu, fragments, new)
    with pytest.raises(ValueError, match=r"out\.values must be .* contiguous"):
        packed_output(
            16, 64, torch.float16, cpu, fragments, new._replace(values=torch.stack([new.values] * 2, -1)[..., 0])
        )
