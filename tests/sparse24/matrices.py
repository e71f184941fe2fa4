"""Matrices to test the packing kernels with, and how to compare what they give."""

import torch
from sparse24.fragments import Fragments, from_fragments

VALUES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_ties(*shape, seed=0):
    """Small integers of both signs: zeros and ties in nearly every group, and no rounding in any dtype."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def views(matrix):
    """The same matrix under other strides."""
    yield "contiguous", matrix.contiguous()
    yield "transposed", matrix.t().contiguous().t()
    wide = torch.full((2 * matrix.shape[0], matrix.shape[1] + 3), 7).to(matrix)
    wide[::2, 1:-2] = matrix
    yield "sliced", wide[::2, 1:-2]
    gaps = torch.full((matrix.shape[0], 2 * matrix.shape[1]), 7).to(matrix)
    gaps[:, ::2] = matrix
    yield "gaps", gaps[:, ::2]


def poisoned(packed):
    """A buffer of the same layout, full of ones in every bit."""
    return packed._replace(
        values=packed.values.view(torch.int32).clone().fill_(-1).view(packed.values.dtype),
        metadata=torch.full_like(packed.metadata, -1),
    )


def rows_of(packed):
    return from_fragments(packed) if isinstance(packed, Fragments) else packed


def assert_same(packed, expected):
    """The same bits; NaNs that went through a rounding may differ in theirs."""
    packed = rows_of(packed)
    assert packed.cols == expected.cols
    assert packed.values.dtype == expected.values.dtype
    assert torch.equal(packed.metadata, expected.metadata)
    nan = expected.values.isnan()
    assert torch.equal(packed.values.isnan(), nan)
    bits = BITS[packed.values.dtype]
    assert torch.equal(packed.values.view(bits)[~nan], expected.values.view(bits)[~nan])


def padded(matrix, rows):
    return torch.cat([matrix, matrix.new_zeros(rows - matrix.shape[0], matrix.shape[1])])
