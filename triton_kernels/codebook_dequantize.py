"""codebook_dequantize: codes -> the dense matrix [N, K], one launch per width that occurs, then the outliers over it."""

import torch
import triton
import triton.language as tl

from pyllmq.triton_kernels.codebook_decode import decode_tile
from pyllmq.triton_kernels.configs import Tile, tile_for


@triton.jit
def _decode(
    codes, code_bytes, codebook, columns_of, row_segment, row_scale, out, rows, columns, slots,
    BITS: tl.constexpr, ONE_SEGMENT: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, CONSECUTIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_slot = tl.program_id(1) * BLOCK_SLOTS
    tile = decode_tile(
        codes, code_bytes, codebook, row_segment, rows, slots, row, first_slot, BLOCK_SLOTS, BITS, ONE_SEGMENT
    )
    # Transposed before the store, so that neighbouring threads write neighbouring columns of a row.
    weight = tl.trans(tile).to(tl.float32)
    if HAS_ROW_SCALE:
        weight *= tl.load(row_scale + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    slot = first_slot + tl.arange(0, BLOCK_SLOTS)
    # With one width slot = column, and a compiler that knows it stores 16 bytes at once.
    place = slot if CONSECUTIVE else tl.load(columns_of + slot, mask=slot < slots, other=0)
    inside = (row < rows)[:, None] & (slot < slots)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * columns + place[None, :], weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _put_outliers(
    row_offsets, outlier_columns, values, out, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Row by row over the decoded matrix. Each position occurs once, so the order does not matter."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    begin = tl.load(row_offsets + row, mask=row < rows, other=0)
    end = tl.load(row_offsets + row + 1, mask=row < rows, other=0)
    for done in range(0, tl.max(end - begin), BLOCK):
        outlier = (begin + done)[:, None] + tl.arange(0, BLOCK)[None, :]
        inside = outlier < end[:, None]
        column = tl.load(outlier_columns + outlier, mask=inside, other=0).to(tl.int32)
        value = tl.load(values + outlier, mask=inside, other=0.0)
        place = out + row.to(tl.int64)[:, None] * columns + column
        tl.store(place, value.to(tl.float32).to(out.dtype.element_ty), mask=inside)


def codebook_dequantize(layout, dtype: torch.dtype, given: Tile | None = None) -> torch.Tensor:
    """The dense matrix of a `CodebookLayout` (backends/triton/codebook.py). A `given` tile takes the place of that in configs/."""
    rows, columns = layout.out_features, layout.in_features
    out = torch.empty(rows, columns, dtype=dtype, device=layout.blob.device)
    for group in layout.groups:
        tile = given or tile_for("codebook_dequantize", group.bits, 0, out.device)
        _decode[(triton.cdiv(rows, tile.rows), triton.cdiv(group.slots, tile.slots))](
            group.codes, group.codes.shape[0], group.codebook, group.columns, layout.row_segment, layout.row_scale,
            out, rows, columns, group.slots,
            BITS=group.bits, ONE_SEGMENT=group.one_segment, HAS_ROW_SCALE=layout.has_row_scale, CONSECUTIVE=group.slots == columns,
            BLOCK_ROWS=tile.rows, BLOCK_SLOTS=tile.slots, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if layout.outliers:
        _put_outliers[(triton.cdiv(rows, 8),)](
            layout.outlier_row_offsets, layout.outlier_columns, layout.outlier_values, out, rows, columns,
            BLOCK_ROWS=8, BLOCK=16,
        )  # fmt: skip
    return out
