"""Sparse weights -> a tile at a time, and its product with x: what linear, dequantize and the experts share.

`slots` are groups of four columns in 2:4, columns in a bitmap. See docs/kernels-triton.md.
"""

import triton
import triton.language as tl

from pyllmq.triton_kernels.codebook_decode import GROUP_SLOTS, load_codes
from pyllmq.triton_kernels.codebook_linear import add_product


@triton.jit
def load_groups(
    values, codebook, positions, rows, columns, groups, first_group, row,
    BITS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BY_WORD: tl.constexpr,
):  # fmt: skip
    """(first, second weights, first, second columns) [groups, rows] of the groups from `first_group` on.

    `values` are codes where BITS is not 0. Outside the matrix, where columns are too large, weights are anything finite.
    """
    COUNT: tl.constexpr = BLOCK_SLOTS // GROUP_SLOTS
    begin = first_group // GROUP_SLOTS
    group = first_group + tl.arange(0, BLOCK_SLOTS)
    inside = (group < groups)[:, None] & (row < rows)[None, :]
    if BY_WORD:
        # A group's positions are 4 bits in a row, as codes of 4 bits are. 9 to 14 instructions per weight at one token where
        # bytes take 11 to 17, but 16 to 25 for 13 to 24 at sixteen.
        places = load_codes(positions, (groups + 1) // 2, rows, row, begin, COUNT, 4)
    else:
        packed = tl.load(positions + (group // 2).to(tl.int64)[:, None] * rows + row[None, :], mask=inside, other=0)
        places = packed.to(tl.int32) >> (group % 2 * 4)[:, None] & 15
    first_column = 4 * group[:, None] + (places & 3)
    second_column = 4 * group[:, None] + (places >> 2)
    if BITS == 0:
        first = tl.load(values + group.to(tl.int64)[:, None] * rows + row[None, :], mask=inside, other=0)
        second = tl.load(values + (group + groups).to(tl.int64)[:, None] * rows + row[None, :], mask=inside, other=0)
    else:
        code_bytes = (groups * BITS + 7) // 8
        second_codes = values + code_bytes.to(tl.int64) * rows
        first_code = load_codes(values, code_bytes, rows, row, begin, COUNT, BITS)
        second_code = load_codes(second_codes, code_bytes, rows, row, begin, COUNT, BITS)
        first = tl.load(codebook + (tl.minimum(first_column, columns - 1) << BITS | first_code))
        second = tl.load(codebook + (tl.minimum(second_column, columns - 1) << BITS | second_code))
    return first, second, first_column, second_column


@triton.jit
def add_groups(
    total, x, of_token, there, values, codebook, positions, rows, columns, groups, first_group, row,
    BITS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """total + x times the weights of the groups from `first_group` on; x of a token begins at `of_token`.

    total: fp32 [tokens, rows], of a single token [groups, rows].
    """
    first, second, first_column, second_column = load_groups(
        values, codebook, positions, rows, columns, groups, first_group, row, BITS, BLOCK_SLOTS, BLOCK_TOKENS == 1
    )
    if BLOCK_TOKENS == 1:
        # x by the place of each weight: neighbouring threads read one of four neighbours
        place = x + of_token[:, None]
        factor = tl.load(place + first_column, mask=there[:, None] & (first_column < columns), other=0.0)
        total += factor.to(tl.float32) * first.to(tl.float32)
        factor = tl.load(place + second_column, mask=there[:, None] & (second_column < columns), other=0.0)
        total += factor.to(tl.float32) * second.to(tl.float32)
    else:
        for j in tl.static_range(4):
            column = 4 * (first_group + tl.arange(0, BLOCK_SLOTS)) + j
            weight = tl.where(first_column == column[:, None], first, 0)
            weight += tl.where(second_column == column[:, None], second, 0)
            inside = there[:, None] & (column < columns)[None, :]
            factor = tl.load(x + of_token[:, None] + column[None, :], mask=inside, other=0.0)
            total = add_product(total, factor, weight, FP32_DOT)
    return total


@triton.jit
def _bits_set(word):
    """Of each int32: the same arithmetic on every GPU and in the interpreter."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word + (word >> 8) + (word >> 16) + (word >> 24)) & 63


@triton.jit
def load_columns(values, masks, ranks, row_offsets, rows, columns, column, row):
    """The weights [columns, rows] of a bitmap."""
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    place = (column // 32).to(tl.int64)[:, None] * rows + row[None, :]
    word = tl.load(masks + place, mask=inside, other=0)
    bit = (column % 32)[:, None]
    kept = inside & (((word >> bit) & 1) == 1)
    before = tl.load(ranks + place, mask=inside, other=0).to(tl.int32) + _bits_set(word & ((1 << bit) - 1))
    begin = tl.load(row_offsets + row, mask=row < rows, other=0)[None, :]
    return tl.load(values + begin + before, mask=kept, other=0)


@triton.jit
def add_columns(
    total, x, of_token, there, values, masks, ranks, row_offsets, rows, columns, first_column, row,
    BLOCK_TOKENS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """The same of a bitmap's columns from `first_column` on; total of a single token: [columns, rows]."""
    column = first_column + tl.arange(0, BLOCK_SLOTS)
    weight = load_columns(values, masks, ranks, row_offsets, rows, columns, column, row)
    if BLOCK_TOKENS == 1:
        inside = there[None, :] & (column < columns)[:, None]
        factor = tl.load(x + of_token[None, :] + column[:, None], mask=inside, other=0.0)
        total += factor.to(tl.float32) * weight.to(tl.float32)
    else:
        inside = there[:, None] & (column < columns)[None, :]
        factor = tl.load(x + of_token[:, None] + column[None, :], mask=inside, other=0.0)
        total = add_product(total, factor, weight, FP32_DOT)
    return total
