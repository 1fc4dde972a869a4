"""codebook_linear for few tokens: codes decoded on the way to the multiplication, nothing dense in memory.

Programs split rows and slots (split-K) and leave fp32 partial sums; one more launch adds them in order, so the same call gives the
same bits every time. There is one launch per width that occurs, one for the outliers, one for the sum.
"""

import torch
import triton
import triton.language as tl

from pyllmq.triton_kernels.codebook_decode import decode_tile
from pyllmq.triton_kernels.configs import Tile, tile_for

FP32_DOT = "ieee" if torch.version.hip else "tf32x3"
"""How fp32 tokens are multiplied. tf32x3 keeps 22 bits of a token and all of a centroid (fp16 has 11 bits, as tf32) and takes
tensor cores; "ieee" needs more registers than sm_90 has (576 bytes of stack at 16 tokens), but is all that every AMD GPU takes."""


@triton.jit
def add_product(total, factor, weight, FP32_DOT: tl.constexpr):
    """total + factor @ weight, neither rounded. fp16 and bf16 have no type of 16 bits in common: as tf32, which holds the 11 bits
    of the one and the 8 of the other, their product is one pass of tensor cores."""
    if factor.dtype == tl.float32 or weight.dtype == tl.float32:
        return tl.dot(factor.to(tl.float32), weight.to(tl.float32), total, input_precision=FP32_DOT)
    if factor.dtype == weight.dtype or weight.dtype == tl.int8:
        return tl.dot(factor, weight.to(factor.dtype), total)
    ONE_PASS: tl.constexpr = "ieee" if FP32_DOT == "ieee" else "tf32"
    return tl.dot(factor.to(tl.float32), weight.to(tl.float32), total, input_precision=ONE_PASS)


@triton.jit(do_not_specialize=["tokens", "slots_per_split", "first_part"])
def _multiply(
    x, codes, code_bytes, codebook, columns_of, row_segment, parts,
    tokens, rows, columns, slots, slots_per_split, first_part,
    BITS: tl.constexpr, ONE_SEGMENT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    CONSECUTIVE: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """parts[first_part + split] [tokens, rows] = x[:, slots of this split] times the decoded centroids, in fp32."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    begin = tl.program_id(1) * slots_per_split
    end = tl.minimum(begin + slots_per_split, slots)
    if BLOCK_TOKENS == 1:
        total = tl.zeros([BLOCK_SLOTS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    for first_slot in range(begin, end, BLOCK_SLOTS):
        tile = decode_tile(
            codes, code_bytes, codebook, row_segment, rows, slots, row, first_slot, BLOCK_SLOTS, BITS, ONE_SEGMENT
        )
        slot = first_slot + tl.arange(0, BLOCK_SLOTS)
        place = slot if CONSECUTIVE else tl.load(columns_of + slot, mask=slot < slots, other=0)
        if BLOCK_TOKENS == 1:
            # One product per thread and weight; a dot would pad the token to 16 and send the tile through shared memory.
            factor = tl.load(x + tl.program_id(2) * columns + place, mask=slot < slots, other=0.0)
            total += factor.to(tl.float32)[:, None] * tile.to(tl.float32)
        else:
            inside = (token < tokens)[:, None] & (slot < slots)[None, :]
            factor = tl.load(x + token[:, None] * columns + place[None, :], mask=inside, other=0.0)
            total = add_product(total, factor, tile, FP32_DOT)
    part = (first_part + tl.program_id(1)).to(tl.int64) * tokens
    if BLOCK_TOKENS == 1:
        tl.store(parts + (part + tl.program_id(2)) * rows + row, tl.sum(total, 0), mask=row < rows)
    else:
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        tl.store(parts + (part + token)[:, None] * rows + row[None, :], total, mask=inside)


@triton.jit
def outlier_product(
    x, of_token, there, row_offsets, outlier_columns, values, replaced, scale, row, rows, BLOCK: tl.constexpr,
):  # fmt: skip
    """fp32 [tokens, rows]: x times (the outliers' values - what the codes under them say). x of a token begins at `of_token`."""
    begin = tl.load(row_offsets + row, mask=row < rows, other=0)
    end = tl.load(row_offsets + row + 1, mask=row < rows, other=0)
    total = tl.zeros([of_token.shape[0], row.shape[0]], tl.float32)
    for done in range(0, tl.max(end - begin), BLOCK):
        outlier = (begin + done)[:, None] + tl.arange(0, BLOCK)[None, :]
        inside = outlier < end[:, None]
        column = tl.load(outlier_columns + outlier, mask=inside, other=0).to(tl.int32)
        value = tl.load(values + outlier, mask=inside, other=0.0).to(tl.float32)
        difference = value - scale[:, None] * tl.load(replaced + outlier, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(
            x + of_token[:, None, None] + column[None, :, :], mask=there[:, None, None] & inside[None, :, :], other=0.0
        )
        total += tl.sum(factor.to(tl.float32) * difference[None, :, :], 2)
    return total


@triton.jit(do_not_specialize=["tokens", "part"])
def multiply_outliers(
    x, row_offsets, outlier_columns, values, replaced, row_scale, parts, tokens, rows, columns, part,
    HAS_ROW_SCALE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[part] [tokens, rows] = what the outliers add."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if HAS_ROW_SCALE:
        scale = tl.load(row_scale + row, mask=row < rows, other=0.0).to(tl.float32)
    total = outlier_product(
        x, token * columns, token < tokens, row_offsets, outlier_columns, values, replaced, scale, row, rows, BLOCK
    )
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(parts + (part.to(tl.int64) * tokens + token)[:, None] * rows + row[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "parts_of_codes"])
def add_parts(
    parts, row_scale, bias, y, tokens, rows, parts_of_codes,
    HAS_ROW_SCALE: tl.constexpr, HAS_OUTLIERS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """y = row_scale * (parts of the codes, first to last) + part of the outliers + bias, rounded once."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    place = tl.program_id(1).to(tl.int64) * rows + row
    stride = tokens.to(tl.int64) * rows
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for part in range(parts_of_codes):
        total += tl.load(parts + part * stride + place, mask=inside, other=0.0)
    if HAS_ROW_SCALE:
        total *= tl.load(row_scale + row, mask=inside, other=0.0).to(tl.float32)
    if HAS_OUTLIERS:
        total += tl.load(parts + parts_of_codes * stride + place, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def splits(tile: Tile, rows: int, slots: int, token_blocks: int) -> tuple[int, int]:
    """(number of splits, slots in each): as many programs as the tile asks for, none of them empty."""
    steps = triton.cdiv(slots, tile.slots)
    wanted = triton.cdiv(tile.programs, triton.cdiv(rows, tile.rows) * token_blocks)
    steps_each = triton.cdiv(steps, min(wanted, steps))
    return triton.cdiv(steps, steps_each), steps_each * tile.slots


def codebook_linear(x: torch.Tensor, layout, bias: torch.Tensor | None, given: Tile | None = None) -> torch.Tensor:
    """x [M, K], contiguous, times the weight of a `pyllmq.backends.triton.codebook.CodebookLayout`, plus bias: [M, N] in x's dtype.

    A `given` tile takes the place of the one that configs/ has, for whoever measures them.
    """
    tokens, rows, columns = x.shape[0], layout.out_features, layout.in_features
    groups = [(group, given or tile_for("codebook_linear", group.bits, tokens, x.device)) for group in layout.groups]
    plans = [splits(tile, rows, group.slots, triton.cdiv(tokens, tile.tokens)) for group, tile in groups]
    parts_of_codes = sum(count for count, _ in plans)
    parts = torch.empty(parts_of_codes + (layout.outliers > 0), tokens, rows, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    first_part = 0
    for (group, tile), (count, slots_per_split) in zip(groups, plans, strict=True):
        _multiply[(triton.cdiv(rows, tile.rows), count, triton.cdiv(tokens, tile.tokens))](
            x, group.codes, group.codes.shape[0], group.codebook, group.columns, layout.row_segment, parts,
            tokens, rows, columns, group.slots, slots_per_split, first_part,
            BITS=group.bits, ONE_SEGMENT=group.one_segment, BLOCK_TOKENS=tile.tokens, BLOCK_ROWS=tile.rows, BLOCK_SLOTS=tile.slots,
            CONSECUTIVE=group.slots == columns, FP32_DOT=FP32_DOT, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        first_part += count
    if layout.outliers:
        block_tokens = 1 if tokens == 1 else 16
        multiply_outliers[(triton.cdiv(rows, 16), triton.cdiv(tokens, block_tokens))](
            x, layout.outlier_row_offsets, layout.outlier_columns, layout.outlier_values, layout.outlier_replaced,
            layout.row_scale, parts, tokens, rows, columns, parts_of_codes,
            HAS_ROW_SCALE=layout.has_row_scale, BLOCK_TOKENS=block_tokens, BLOCK_ROWS=16, BLOCK=16,
        )  # fmt: skip
    add_parts[(triton.cdiv(rows, 256), tokens)](
        parts, layout.row_scale, y if bias is None else bias, y, tokens, rows, parts_of_codes,
        HAS_ROW_SCALE=layout.has_row_scale, HAS_OUTLIERS=layout.outliers > 0, HAS_BIAS=bias is not None, BLOCK_ROWS=256,
    )  # fmt: skip
    return y
