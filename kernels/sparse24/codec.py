"""Device functions that the packing kernels share: groups of four in, packed values and metadata out, and back.

A kernel works on a tile [R, G]: R rows, G groups of four consecutive columns, powers of two, and one tensor [R, G]
for each of the four entries of a group. Which two are kept is told by a tuple `keep` of four boolean tensors: entries
0 and 1; entries 2 and 3; and if neither, hence one of each half, whether it is 1 (not 0), whether it is 3 (not 2). They
take few comparisons to find, and few selections to use. From these come the pair of values in one 32-bit word, and a
nibble of metadata:

    x0, x1, x2, x3 = load_fours(...)                 or split4(tile of [R, 4 * G])
    keep = two_largest(x0, x1, x2, x3)
    first, second = kept_bits(keep, x0, x1, x2, x3, DTYPE)
    store_values(values_ptr, pair_words(first, second, DTYPE), row_start, group_start, rows, groups, 16, FRAGMENTS)
    store_metadata(metadata_ptr, nibble_of_keep(keep), row_start, group_start, rows, words, FRAGMENTS, False)

Both layouts of the result are stored from a tile whose last dimension is contiguous in memory: for fragment order the
tile is permuted first, so that the compiler stores 16 bytes a thread in either of them. R and G must be multiples of
16 for fragment order, G of 4 for row-major metadata.

Nothing here does arithmetic on 16-bit floats: values are moved as bits, or in float32.
"""

import triton
import triton.language as tl

# --- groups of four ---


@triton.jit
def split4(x):
    """[R, 4 * G] -> four [R, G]: entry 0, 1, 2, 3 of each group."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2))
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3):
    """Four [R, G] -> [R, G, 4]; `tl.reshape(..., (R, 4 * G))` of it undoes `split4`."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (x0.shape[0], x0.shape[1], 4))


@triton.jit
def load_fours(
    ptr, row_start, group_start, rows, groups, row_stride, col_stride, R: tl.constexpr, G: tl.constexpr,
    ROW_MAJOR: tl.constexpr
):  # fmt: skip
    """Four [R, G] of a matrix of any strides, zero outside of it. ROW_MAJOR: whether col_stride is 1."""
    row = row_start + tl.arange(0, R)
    ptr += row.to(tl.int64)[:, None] * row_stride
    inside = row[:, None] < rows
    if ROW_MAJOR:
        col = 4 * group_start + tl.arange(0, 4 * G)
        x0, x1, x2, x3 = split4(tl.load(ptr + col[None, :], mask=inside & (col[None, :] < 4 * groups), other=0))
    else:
        # neighbouring threads then differ in the row: each of the four loads is contiguous in a transposed view
        group = group_start + tl.arange(0, G)
        inside &= group[None, :] < groups
        ptr += (4 * group).to(tl.int64)[None, :] * col_stride
        x0 = tl.load(ptr, mask=inside, other=0)
        x1 = tl.load(ptr + col_stride, mask=inside, other=0)
        x2 = tl.load(ptr + 2 * col_stride, mask=inside, other=0)
        x3 = tl.load(ptr + 3 * col_stride, mask=inside, other=0)
    return x0, x1, x2, x3


# --- which two of a group are kept ---


@triton.jit
def _magnitude(x):
    """|x|, of NaN infinity: the bits of NaN, without the sign, are above those of infinity."""
    bits = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def two_largest(x0, x1, x2, x3):
    """`reference.magnitude_mask` of float32 entries: the two largest |x|, NaN as infinity, a tie keeps the lower."""
    a0, a1, a2, a3 = _magnitude(x0), _magnitude(x1), _magnitude(x2), _magnitude(x3)
    left = tl.minimum(a0, a1) >= tl.maximum(a2, a3)
    right = tl.minimum(a2, a3) > tl.maximum(a0, a1)
    return left, right, a1 > a0, a3 > a2


@triton.jit
def keep_of_pattern(pattern):
    """Pattern 0..5 (01 02 03 12 13 23, as `reference.ROW_PATTERNS`)."""
    return pattern == 0, pattern == 5, pattern >= 3, (pattern & 1) == 0


@triton.jit
def keep_of_mask(word):
    """From a word of `load_mask`, which keeps two."""
    return word == 0x0101, word == 0x01010000, (word & 0x0100) != 0, (word & 0x01000000) != 0


@triton.jit
def mask_of_keep(keep):
    """The opposite of `keep_of_mask`."""
    one_each = tl.where(keep[2], 0x0100, 0x0001) | tl.where(keep[3], 0x01000000, 0x00010000)
    return tl.where(keep[0], 0x0101, tl.where(keep[1], 0x01010000, one_each))


@triton.jit
def nibble_of_keep(keep):
    """Four bits of metadata, int32: the position of the first kept entry in the low two, of the second above."""
    one_each = tl.where(keep[2], 1, 0) | tl.where(keep[3], 3 << 2, 2 << 2)
    return tl.where(keep[0], 0 | 1 << 2, tl.where(keep[1], 2 | 3 << 2, one_each))


@triton.jit
def kept_pair(keep, x0, x1, x2, x3):
    """The first and the second kept entry of each group."""
    first = tl.where(keep[0], x0, tl.where(keep[1], x2, tl.where(keep[2], x1, x0)))
    second = tl.where(keep[0], x1, tl.where(keep[1], x3, tl.where(keep[3], x3, x2)))
    return first, second


@triton.jit
def load_mask(
    ptr, row_start, group_start, rows, groups, row_stride, col_stride, R: tl.constexpr, G: tl.constexpr,
    WORDS: tl.constexpr
):  # fmt: skip
    """A boolean matrix as [R, G] int32, a byte an entry, the first in the lowest; outside, 0 and 1 are kept.

    ptr: int8, any strides; if WORDS, int32, row_stride counts words, and a group is one word.
    """
    row = row_start + tl.arange(0, R)
    group = group_start + tl.arange(0, G)
    inside = (row[:, None] < rows) & (group[None, :] < groups)
    ptr += row.to(tl.int64)[:, None] * row_stride
    if WORDS:
        word = tl.load(ptr + group[None, :], mask=inside, other=0x0101)
    else:
        ptr += (4 * group).to(tl.int64)[None, :] * col_stride
        word = tl.load(ptr, mask=inside, other=1).to(tl.int32)
        word |= tl.load(ptr + col_stride, mask=inside, other=1).to(tl.int32) << 8
        word |= tl.load(ptr + 2 * col_stride, mask=inside, other=0).to(tl.int32) << 16
        word |= tl.load(ptr + 3 * col_stride, mask=inside, other=0).to(tl.int32) << 24
    return word


@triton.jit
def store_mask(
    ptr, word, row_start, group_start, rows, groups, row_stride, col_stride, WORDS: tl.constexpr
):  # fmt: skip
    """The opposite of `load_mask`."""
    row = row_start + tl.arange(0, word.shape[0])
    group = group_start + tl.arange(0, word.shape[1])
    inside = (row[:, None] < rows) & (group[None, :] < groups)
    ptr += row.to(tl.int64)[:, None] * row_stride
    if WORDS:
        tl.store(ptr + group[None, :], word, mask=inside)
    else:
        ptr += (4 * group).to(tl.int64)[None, :] * col_stride
        tl.store(ptr, word.to(tl.int8), mask=inside)
        tl.store(ptr + col_stride, (word >> 8).to(tl.int8), mask=inside)
        tl.store(ptr + 2 * col_stride, (word >> 16).to(tl.int8), mask=inside)
        tl.store(ptr + 3 * col_stride, (word >> 24).to(tl.int8), mask=inside)


@triton.jit
def count_flips(flips_ptr, differing):
    """Add the sum of all bytes of a tile of int32 to an int64 in memory; those of one must sum up to at most 255."""
    count = ((differing * 0x01010101) >> 24) & 255
    tl.atomic_add(flips_ptr, tl.sum(tl.sum(count, axis=1), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def value_bits(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, as bits in an int32, those of a 16-bit dtype in the low half."""
    if x.dtype != DTYPE:
        x = x.to(tl.float32).to(DTYPE)
    if DTYPE.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits


@triton.jit
def kept_bits(keep, x0, x1, x2, x3, DTYPE: tl.constexpr):
    """`value_bits` of the first and of the second kept entry; entries that are in DTYPE already keep every bit."""
    if x0.dtype.primitive_bitwidth == 32:
        first, second = kept_pair(keep, x0, x1, x2, x3)
        first, second = value_bits(first, DTYPE), value_bits(second, DTYPE)
    else:
        first, second = kept_pair(
            keep, value_bits(x0, DTYPE), value_bits(x1, DTYPE), value_bits(x2, DTYPE), value_bits(x3, DTYPE)
        )
    return first, second


@triton.jit
def pair_words(first, second, DTYPE: tl.constexpr):
    """Two tiles [R, G] of `value_bits` as 32-bit words: [R, G] in a 16-bit dtype, [R, 2 * G] in float32."""
    if DTYPE.primitive_bitwidth == 32:
        word = tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1]))
    else:
        word = first | (second << 16)
    return word


# --- stores and loads of the packed form ---


@triton.jit
def store_values(ptr, word, row_start, word_start, rows, words, PER_64: tl.constexpr, FRAGMENTS: tl.constexpr):
    """Store a tile [R, W] of 32-bit words of values.

    ptr: int32 pointer to the contiguous values of the whole matrix.
    row_start, word_start: where the tile begins. rows, words: size of the whole matrix; nothing beyond is written.
    PER_64: words for 64 columns, 16 for 16-bit dtypes (a word is a group) and 8 for fp8 (two groups).
    """
    R: tl.constexpr = word.shape[0]
    W: tl.constexpr = word.shape[1]
    if FRAGMENTS:
        word = tl.reshape(word, (R // 16, 2, 8, W // PER_64, PER_64 // 8, 2, 4))
        word = tl.reshape(tl.permute(word, (0, 3, 4, 2, 6, 5, 1)), (R // 16, 16 * W))
        _store_rows(ptr, word, row_start // 16, word_start * 16, rows // 16, words * 16)
    else:
        _store_rows(ptr, word, row_start, word_start, rows, words)


@triton.jit
def store_metadata(
    ptr, nibbles, row_start, group_start, rows, words, FRAGMENTS: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """Store the metadata of a tile [R, G] of nibbles; those beyond the last group of a row must be 4 (0, 1).

    ptr: int16 pointer to the contiguous metadata of the whole matrix (for fragment order too: viewed as int16).
    rows, words: size of the whole matrix in rows and in int16 words a row.
    """
    R: tl.constexpr = nibbles.shape[0]
    W: tl.constexpr = nibbles.shape[1] // 4
    shift = 4 * tl.arange(0, 4)
    word = tl.sum(tl.reshape(nibbles, (R, W, 4)) << shift[None, None, :], axis=2).to(tl.int16)
    if FRAGMENTS:
        if FP8:
            word = tl.permute(tl.reshape(word, (R // 16, 2, 8, W // 4, 2, 2)), (0, 3, 2, 4, 1, 5))
        else:
            word = tl.permute(tl.reshape(word, (R // 16, 2, 8, W // 4, 4)), (0, 3, 2, 4, 1))
        word = tl.reshape(word, (R // 16, 16 * W))
        _store_rows(ptr, word, row_start // 16, group_start * 4, rows // 16, words * 16)
    else:
        _store_rows(ptr, word, row_start, group_start // 4, rows, words)


@triton.jit
def load_values(
    ptr, row_start, word_start, rows, words, R: tl.constexpr, W: tl.constexpr, FRAGMENTS: tl.constexpr
):  # fmt: skip
    """The tile [R, W] that `store_values` stored (in fragment order: 16-bit values), zero outside of the matrix."""
    if FRAGMENTS:
        word = _load_rows(ptr, row_start // 16, word_start * 16, rows // 16, words * 16, R // 16, 16 * W)
        word = tl.reshape(word, (R // 16, W // 16, 2, 8, 4, 2, 2))
        word = tl.reshape(tl.permute(word, (0, 6, 3, 1, 2, 5, 4)), (R, W))
    else:
        word = _load_rows(ptr, row_start, word_start, rows, words, R, W)
    return word


@triton.jit
def load_nibbles(
    ptr, row_start, group_start, rows, words, R: tl.constexpr, G: tl.constexpr, FRAGMENTS: tl.constexpr
):  # fmt: skip
    """The tile [R, G] of nibbles, int32, that `store_metadata` stored (in fragment order: for 16-bit values)."""
    W: tl.constexpr = G // 4
    if FRAGMENTS:
        word = _load_rows(ptr, row_start // 16, group_start * 4, rows // 16, words * 16, R // 16, 16 * W)
        word = tl.permute(tl.reshape(word, (R // 16, W // 4, 8, 4, 2)), (0, 4, 2, 1, 3))
        word = tl.reshape(word, (R, W))
    else:
        word = _load_rows(ptr, row_start, group_start // 4, rows, words, R, W)
    shift = 4 * tl.arange(0, 4)
    return tl.reshape((word.to(tl.int32)[:, :, None] >> shift[None, None, :]) & 15, (R, G))


@triton.jit
def _store_rows(ptr, x, row_start, col_start, rows, cols):
    row = row_start + tl.arange(0, x.shape[0])
    col = col_start + tl.arange(0, x.shape[1])
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    tl.store(ptr + row.to(tl.int64)[:, None] * cols + col[None, :], x, mask=inside)


@triton.jit
def _load_rows(ptr, row_start, col_start, rows, cols, R: tl.constexpr, C: tl.constexpr):
    row = row_start + tl.arange(0, R)
    col = col_start + tl.arange(0, C)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    return tl.load(ptr + row.to(tl.int64)[:, None] * cols + col[None, :], mask=inside, other=0)
