"""sparse24_linear and bitmap_linear: weights spread on the way to the multiplication, and the dense matrix for many tokens.

Programs split rows and columns (split-K) and leave fp32 partial sums, which one more launch adds in order. Sizes of tiles are
fixed: they were never measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from pyllmq.triton_kernels.codebook_linear import FP32_DOT, _add_parts, splits
from pyllmq.triton_kernels.configs import Tile

ONE_TOKEN = Tile(rows=64, slots=32, tokens=1, warps=4, stages=3, programs=264)
MORE_TOKENS = Tile(rows=64, slots=32, tokens=16, warps=4, stages=3, programs=264)
"""`slots` are groups of four columns in 2:4, columns / 4 in a bitmap."""


@triton.jit
def _load_groups(values, positions, rows, groups, group, row):
    """(first, second values, first, second positions) [groups, rows] of the groups below `groups`."""
    inside = (group < groups)[:, None] & (row < rows)[None, :]
    first_place = group.to(tl.int64)[:, None] * rows + row[None, :]
    second_place = (group + groups).to(tl.int64)[:, None] * rows + row[None, :]
    packed = tl.load(positions + (group // 2).to(tl.int64)[:, None] * rows + row[None, :], mask=inside, other=0)
    code = packed.to(tl.int32) >> (group % 2 * 4)[:, None]
    first = tl.load(values + first_place, mask=inside, other=0)
    second = tl.load(values + second_place, mask=inside, other=0)
    return first, second, code & 3, (code >> 2) & 3


@triton.jit
def _bits_set(word):
    """Of each int32: the same arithmetic on every GPU and in the interpreter."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word + (word >> 8) + (word >> 16) + (word >> 24)) & 63


@triton.jit
def _load_columns(values, masks, ranks, row_offsets, rows, columns, column, row):
    """The weights [columns, rows] of a bitmap."""
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    place = (column // 32).to(tl.int64)[:, None] * rows + row[None, :]
    word = tl.load(masks + place, mask=inside, other=0)
    bit = (column % 32)[:, None]
    kept = inside & (((word >> bit) & 1) == 1)
    before = tl.load(ranks + place, mask=inside, other=0).to(tl.int32) + _bits_set(word & ((1 << bit) - 1))
    begin = tl.load(row_offsets + row, mask=row < rows, other=0)[None, :]
    return tl.load(values + begin + before, mask=kept, other=0)


@triton.jit(do_not_specialize=["tokens", "slots_per_split"])
def _multiply_24(
    x, values, positions, parts, tokens, rows, columns, groups, slots_per_split,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """parts[split] [tokens, rows]: a group's weight at place j, or zero, times x of place j, for the four places."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    begin = tl.program_id(1) * slots_per_split
    end = tl.minimum(begin + slots_per_split, groups)
    if BLOCK_TOKENS == 1:
        total = tl.zeros([BLOCK_SLOTS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    for slot in range(begin, end, BLOCK_SLOTS):
        group = slot + tl.arange(0, BLOCK_SLOTS)
        first, second, first_place, second_place = _load_groups(values, positions, rows, groups, group, row)
        for j in tl.static_range(4):
            column = 4 * group + j
            weight = tl.where(first_place == j, first, 0) + tl.where(second_place == j, second, 0)
            if BLOCK_TOKENS == 1:
                factor = tl.load(x + tl.program_id(2) * columns + column, mask=column < columns, other=0.0)
                total += factor.to(tl.float32)[:, None] * weight.to(tl.float32)
            else:
                inside = (token < tokens)[:, None] & (column < columns)[None, :]
                factor = tl.load(x + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
                total = tl.dot(factor, weight.to(factor.dtype), total, input_precision=FP32_DOT)
    part = tl.program_id(1).to(tl.int64) * tokens
    if BLOCK_TOKENS == 1:
        tl.store(parts + (part + tl.program_id(2)) * rows + row, tl.sum(total, 0), mask=row < rows)
    else:
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        tl.store(parts + (part + token)[:, None] * rows + row[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "slots_per_split"])
def _multiply_bitmap(
    x, values, masks, ranks, row_offsets, parts, tokens, rows, columns, slots_per_split,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """parts[split] [tokens, rows] = x[:, columns of this split] times the weights there."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    begin = tl.program_id(1) * slots_per_split
    end = tl.minimum(begin + slots_per_split, columns)
    if BLOCK_TOKENS == 1:
        total = tl.zeros([BLOCK_SLOTS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    for slot in range(begin, end, BLOCK_SLOTS):
        column = slot + tl.arange(0, BLOCK_SLOTS)
        weight = _load_columns(values, masks, ranks, row_offsets, rows, columns, column, row)
        if BLOCK_TOKENS == 1:
            factor = tl.load(x + tl.program_id(2) * columns + column, mask=column < columns, other=0.0)
            total += factor.to(tl.float32)[:, None] * weight.to(tl.float32)
        else:
            inside = (token < tokens)[:, None] & (column < columns)[None, :]
            factor = tl.load(x + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
            total = tl.dot(factor, weight.to(factor.dtype), total, input_precision=FP32_DOT)
    part = tl.program_id(1).to(tl.int64) * tokens
    if BLOCK_TOKENS == 1:
        tl.store(parts + (part + tl.program_id(2)) * rows + row, tl.sum(total, 0), mask=row < rows)
    else:
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        tl.store(parts + (part + token)[:, None] * rows + row[None, :], total, mask=inside)


@triton.jit
def _spread_24(
    values, positions, scale, out, rows, columns, groups,
    HAS_SCALE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """out [rows, columns]: the dense matrix."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    first, second, first_place, second_place = _load_groups(values, positions, rows, groups, group, row)
    factor = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
    for j in tl.static_range(4):
        column = 4 * group + j
        weight = tl.where(first_place == j, first, 0) + tl.where(second_place == j, second, 0)
        inside = (column < columns)[:, None] & (row < rows)[None, :]
        to = out + row.to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(to, (weight.to(tl.float32) * factor[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread_bitmap(
    values, masks, ranks, row_offsets, scale, out, rows, columns,
    HAS_SCALE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """out [rows, columns]: the dense matrix."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    weight = _load_columns(values, masks, ranks, row_offsets, rows, columns, column, row).to(tl.float32)
    if HAS_SCALE:
        weight *= tl.load(scale + row, mask=row < rows, other=0.0)[None, :]
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    to = out + row.to(tl.int64)[None, :] * columns + column[:, None]
    tl.store(to, weight.to(out.dtype.element_ty), mask=inside)


def sparse_linear(x: torch.Tensor, layout, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], contiguous, times the weight of a `pyllmq.backends.triton_sparse.Layout`, plus bias: [M, N] in x's dtype."""
    tokens, rows, columns = x.shape[0], layout.out_features, layout.in_features
    tile = ONE_TOKEN if tokens == 1 else MORE_TOKENS
    groups = triton.cdiv(columns, 4)
    slots, block = (groups, tile.slots) if layout.is_24 else (columns, 2 * tile.slots)
    token_blocks = triton.cdiv(tokens, tile.tokens)
    given = Tile(tile.rows, block, tile.tokens, tile.warps, tile.stages, tile.programs)
    count, slots_per_split = splits(given, rows, slots, token_blocks)
    parts = torch.empty(count, tokens, rows, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    fixed = {
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "BLOCK_SLOTS": block, "FP32_DOT": FP32_DOT,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    grid = (triton.cdiv(rows, tile.rows), count, token_blocks)
    if layout.is_24:
        _multiply_24[grid](
            x, layout.values, layout.positions, parts, tokens, rows, columns, groups, slots_per_split, **fixed
        )
    else:
        _multiply_bitmap[grid](
            x, layout.values, layout.masks, layout.ranks, layout.row_offsets, parts, tokens, rows, columns,
            slots_per_split, **fixed,
        )  # fmt: skip
    _add_parts[(triton.cdiv(rows, 256), tokens)](
        parts, layout.scale, y if bias is None else bias, y, tokens, rows, count,
        HAS_ROW_SCALE=layout.has_scale, HAS_OUTLIERS=False, HAS_BIAS=bias is not None, BLOCK_ROWS=256,
    )  # fmt: skip
    return y


def sparse_dequantize(layout, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix [N, K] of a `pyllmq.backends.triton_sparse.Layout`."""
    rows, columns = layout.out_features, layout.in_features
    out = torch.empty(rows, columns, dtype=dtype, device=layout.values.device)
    groups = triton.cdiv(columns, 4)
    if layout.is_24:
        _spread_24[(triton.cdiv(rows, 32), triton.cdiv(groups, 32))](
            layout.values, layout.positions, layout.scale, out, rows, columns, groups,
            HAS_SCALE=layout.has_scale, BLOCK_ROWS=32, BLOCK_SLOTS=32,
        )  # fmt: skip
    else:
        _spread_bitmap[(triton.cdiv(rows, 32), triton.cdiv(columns, 64))](
            layout.values, layout.masks, layout.ranks, layout.row_offsets, layout.scale, out, rows, columns,
            HAS_SCALE=layout.has_scale, BLOCK_ROWS=32, BLOCK_SLOTS=64,
        )  # fmt: skip
    return out
