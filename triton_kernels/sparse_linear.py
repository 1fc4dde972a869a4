"""The linear operations of the sparse formats: weights spread on the way to the multiplication, the dense matrix for many tokens.

Programs split rows and columns (split-K) and leave fp32 partial sums, which one more launch adds in order. Sizes of tiles are
fixed: they were never measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from pyllmq.triton_kernels.codebook_dequantize import put_outliers
from pyllmq.triton_kernels.codebook_linear import FP32_DOT, add_parts, multiply_outliers, splits
from pyllmq.triton_kernels.configs import Tile
from pyllmq.triton_kernels.sparse_decode import add_columns, add_groups, load_columns, load_groups

ONE_TOKEN = Tile(rows=64, slots=32, tokens=1, warps=4, stages=3, programs=264)
MORE_TOKENS = Tile(rows=64, slots=32, tokens=16, warps=4, stages=3, programs=264)
MORE_TOKENS_CODES = Tile(rows=64, slots=16, tokens=16, warps=4, stages=3, programs=264)
"""`slots` are groups of four columns in 2:4, columns / 4 in a bitmap. With fp32 tokens, 32 slots of 4-bit codes need 16 bytes
of stack."""


@triton.jit(do_not_specialize=["tokens", "groups", "slots_per_split"])
def _multiply_24(
    x, values, codebook, positions, parts, tokens, rows, columns, groups, slots_per_split,
    BITS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """parts[split] [tokens, rows] = x[:, groups of this split] times the weights there."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    begin = tl.program_id(1) * slots_per_split
    end = tl.minimum(begin + slots_per_split, groups)
    if BLOCK_TOKENS == 1:
        total = tl.zeros([BLOCK_SLOTS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    for slot in range(begin, end, BLOCK_SLOTS):
        total = add_groups(
            total, x, token * columns, token < tokens, values, codebook, positions, rows, columns, groups, slot, row,
            BITS, BLOCK_TOKENS, BLOCK_SLOTS, FP32_DOT,
        )  # fmt: skip
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
        total = add_columns(
            total, x, token * columns, token < tokens, values, masks, ranks, row_offsets, rows, columns, slot, row,
            BLOCK_TOKENS, BLOCK_SLOTS, FP32_DOT,
        )  # fmt: skip
    part = tl.program_id(1).to(tl.int64) * tokens
    if BLOCK_TOKENS == 1:
        tl.store(parts + (part + tl.program_id(2)) * rows + row, tl.sum(total, 0), mask=row < rows)
    else:
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        tl.store(parts + (part + token)[:, None] * rows + row[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["groups"])
def _spread_24(
    values, codebook, positions, scale, out, rows, columns, groups,
    BITS: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """out [rows, columns]: the dense matrix, without outliers."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slot = tl.program_id(1) * BLOCK_SLOTS
    first, second, first_column, second_column = load_groups(
        values, codebook, positions, rows, columns, groups, slot, row, BITS, BLOCK_SLOTS, False
    )
    factor = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
    for j in tl.static_range(4):
        column = 4 * (slot + tl.arange(0, BLOCK_SLOTS)) + j
        weight = tl.where(first_column == column[:, None], first, 0)
        weight += tl.where(second_column == column[:, None], second, 0)
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
    weight = load_columns(values, masks, ranks, row_offsets, rows, columns, column, row).to(tl.float32)
    if HAS_SCALE:
        weight *= tl.load(scale + row, mask=row < rows, other=0.0)[None, :]
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    to = out + row.to(tl.int64)[None, :] * columns + column[:, None]
    tl.store(to, weight.to(out.dtype.element_ty), mask=inside)


def sparse_linear(x: torch.Tensor, layout, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], contiguous, times the weight of a `pyllmq.backends.triton.sparse.SparseLayout`, plus bias: [M, N] in x's dtype."""
    tokens, rows, columns = x.shape[0], layout.out_features, layout.in_features
    # Codes of a single row and more tokens: triton 3.6's compiler aborts.
    token_by_token = tokens == 1 or (rows == 1 and layout.bits > 0)
    tile = ONE_TOKEN if token_by_token else MORE_TOKENS_CODES if layout.bits else MORE_TOKENS
    groups = triton.cdiv(columns, 4)
    slots, block = (groups, tile.slots) if layout.is_24 else (columns, 2 * tile.slots)
    token_blocks = triton.cdiv(tokens, tile.tokens)
    given = Tile(tile.rows, block, tile.tokens, tile.warps, tile.stages, tile.programs)
    count, slots_per_split = splits(given, rows, slots, token_blocks)
    parts = torch.empty(count + (layout.outliers > 0), tokens, rows, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    fixed = {
        "BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "BLOCK_SLOTS": block, "FP32_DOT": FP32_DOT,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    grid = (triton.cdiv(rows, tile.rows), count, token_blocks)
    if layout.is_24:
        _multiply_24[grid](
            x, layout.values, layout.codebook, layout.positions, parts, tokens, rows, columns, groups, slots_per_split,
            BITS=layout.bits, **fixed,
        )  # fmt: skip
    else:
        _multiply_bitmap[grid](
            x, layout.values, layout.masks, layout.ranks, layout.row_offsets, parts, tokens, rows, columns,
            slots_per_split, **fixed,
        )  # fmt: skip
    if layout.outliers:
        block_tokens = 1 if tokens == 1 else 16
        multiply_outliers[(triton.cdiv(rows, 16), triton.cdiv(tokens, block_tokens))](
            x, layout.outlier_row_offsets, layout.outlier_columns, layout.outlier_values, layout.outlier_replaced,
            layout.scale, parts, tokens, rows, columns, count,
            HAS_ROW_SCALE=False, BLOCK_TOKENS=block_tokens, BLOCK_ROWS=16, BLOCK=16,
        )  # fmt: skip
    add_parts[(triton.cdiv(rows, 256), tokens)](
        parts, layout.scale, y if bias is None else bias, y, tokens, rows, count,
        HAS_ROW_SCALE=layout.has_scale, HAS_OUTLIERS=layout.outliers > 0, HAS_BIAS=bias is not None, BLOCK_ROWS=256,
    )  # fmt: skip
    return y


def sparse_dequantize(layout, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix [N, K] of a `pyllmq.backends.triton.sparse.SparseLayout`."""
    rows, columns = layout.out_features, layout.in_features
    out = torch.empty(rows, columns, dtype=dtype, device=layout.values.device)
    groups = triton.cdiv(columns, 4)
    if layout.is_24:
        _spread_24[(triton.cdiv(rows, 32), triton.cdiv(groups, 32))](
            layout.values, layout.codebook, layout.positions, layout.scale, out, rows, columns, groups,
            BITS=layout.bits, HAS_SCALE=layout.has_scale, BLOCK_ROWS=32, BLOCK_SLOTS=32,
        )  # fmt: skip
    else:
        _spread_bitmap[(triton.cdiv(rows, 32), triton.cdiv(columns, 64))](
            layout.values, layout.masks, layout.ranks, layout.row_offsets, layout.scale, out, rows, columns,
            HAS_SCALE=layout.has_scale, BLOCK_ROWS=32, BLOCK_SLOTS=64,
        )  # fmt: skip
    if layout.outliers:
        put_outliers[(triton.cdiv(rows, 8),)](
            layout.outlier_row_offsets, layout.outlier_columns, layout.outlier_values, out, rows, columns,
            BLOCK_ROWS=8, BLOCK=16,
        )  # fmt: skip
    return out
