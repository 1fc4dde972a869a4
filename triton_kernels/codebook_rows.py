"""codebook_rows: the rows of W that ids name, one launch per width that occurs, then the outliers over them."""

import torch
import triton
import triton.language as tl

from pyllmq.triton_kernels.codebook_decode import decode_tile

BLOCK_IDS, BLOCK_SLOTS, BLOCK_OUTLIERS = 16, 64, 16
"""Few ids a program, so that 128 ids of a short row fill a GPU (chosen by counting, not measured)."""


@triton.jit
def _decode_rows(
    ids, count, codes, code_bytes, codebook, columns_of, row_segment, row_scale, out, rows, columns, slots,
    BITS: tl.constexpr, ONE_SEGMENT: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
    BLOCK_IDS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
    row = tl.load(ids + place, mask=place < count, other=0)
    inside = (row >= 0) & (row < rows)
    row = tl.where(inside, row, rows)
    first_slot = tl.program_id(1) * BLOCK_SLOTS
    tile = decode_tile(
        codes, code_bytes, codebook, row_segment, rows, slots, row, first_slot, BLOCK_SLOTS, BITS, ONE_SEGMENT
    )
    weight = tl.trans(tile).to(tl.float32)
    if HAS_ROW_SCALE:
        weight *= tl.load(row_scale + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    weight = tl.where(inside[:, None], weight, float("nan"))
    slot = first_slot + tl.arange(0, BLOCK_SLOTS)
    column = tl.load(columns_of + slot, mask=slot < slots, other=0)
    wanted = (place < count)[:, None] & (slot < slots)[None, :]
    to = out + place.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(to, weight.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _put_outliers(
    ids, count, row_offsets, outlier_columns, values, out, rows, columns,
    BLOCK_IDS: tl.constexpr, BLOCK_OUTLIERS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
    row = tl.load(ids + place, mask=place < count, other=-1)
    inside = (row >= 0) & (row < rows)
    begin = tl.load(row_offsets + row, mask=inside, other=0)
    end = tl.load(row_offsets + row + 1, mask=inside, other=0)
    for done in range(0, tl.max(end - begin), BLOCK_OUTLIERS):
        outlier = (begin + done)[:, None] + tl.arange(0, BLOCK_OUTLIERS)[None, :]
        there = outlier < end[:, None]
        column = tl.load(outlier_columns + outlier, mask=there, other=0).to(tl.int32)
        value = tl.load(values + outlier, mask=there, other=0.0)
        to = out + place.to(tl.int64)[:, None] * columns + column
        tl.store(to, value.to(tl.float32).to(out.dtype.element_ty), mask=there)


def codebook_rows(layout, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids`, int64 [M], of a `CodebookLayout` (backends/triton/codebook.py); NaN for an id outside of it."""
    rows, columns, count = layout.out_features, layout.in_features, ids.shape[0]
    out = torch.empty(count, columns, dtype=dtype, device=layout.blob.device)
    if not count:
        return out
    for group in layout.groups:
        _decode_rows[(triton.cdiv(count, BLOCK_IDS), triton.cdiv(group.slots, BLOCK_SLOTS))](
            ids, count, group.codes, group.codes.shape[0], group.codebook, group.columns, layout.row_segment, layout.row_scale,
            out, rows, columns, group.slots,
            BITS=group.bits, ONE_SEGMENT=group.one_segment, HAS_ROW_SCALE=layout.has_row_scale,
            BLOCK_IDS=BLOCK_IDS, BLOCK_SLOTS=BLOCK_SLOTS,
        )  # fmt: skip
    if layout.outliers:
        _put_outliers[(triton.cdiv(count, BLOCK_IDS),)](
            ids, count, layout.outlier_row_offsets, layout.outlier_columns, layout.outlier_values, out, rows, columns,
            BLOCK_IDS=BLOCK_IDS, BLOCK_OUTLIERS=BLOCK_OUTLIERS,
        )  # fmt: skip
    return out
