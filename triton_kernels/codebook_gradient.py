"""codebook_gradient: for each centroid the sum of row_scale * dL/dW over the weights that use it, from packed codes.

A program takes columns of one width and a run of rows of one segment. Scattering dL/dW would be an atomic for every weight; here
every centroid's sum is a masked reduction over a tile of rows in registers, and one atomic per run of rows.
"""

import torch
import triton
import triton.language as tl

BLOCK_ROWS, BLOCK_SLOTS, ROWS_PER_PROGRAM = 64, 16, 1024


@triton.jit
def _gradient(
    codes, code_bytes, columns_of, first_entry, row_scale, of_weight, out, begin, end, columns, slots,
    BITS: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    column = tl.load(columns_of + slot, mask=slot < slots, other=0)
    bit = slot * BITS
    entry = tl.arange(0, 1 << BITS)
    total = tl.zeros([BLOCK_SLOTS, 1 << BITS], tl.float32)
    first = begin + tl.program_id(1) * ROWS_PER_PROGRAM
    for start in range(first, tl.minimum(first + ROWS_PER_PROGRAM, end), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & (slot < slots)[None, :]
        place = codes + row.to(tl.int64)[:, None] * code_bytes + (bit // 8)[None, :]
        word = tl.load(place, mask=inside, other=0).to(tl.int32)
        # A code may straddle two bytes; the last one of a row does not.
        straddles = inside & (bit % 8 + BITS > 8)[None, :]
        word |= tl.load(place + 1, mask=straddles, other=0).to(tl.int32) << 8
        code = (word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)
        value = tl.load(of_weight + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
        if HAS_ROW_SCALE:
            value *= tl.load(row_scale + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
        if BITS <= 4:
            total += tl.sum(tl.where(code[:, :, None] == entry[None, None, :], value[:, :, None], 0.0), 0)
        else:
            goal = out + tl.load(first_entry + slot, mask=slot < slots, other=0)[None, :] + code
            tl.atomic_add(goal, value, mask=inside)
    if BITS <= 4:
        goal = out + tl.load(first_entry + slot, mask=slot < slots, other=0)[:, None] + entry[None, :]
        tl.atomic_add(goal, total, mask=(slot < slots)[:, None] & (entry >= 0)[None, :])


def codebook_gradient(of_weight: torch.Tensor, field: dict[str, torch.Tensor]) -> torch.Tensor:
    """`of_weight` fp32 [N, K], zero at outliers; `field` the tensors of a checkpoint by name."""
    column_bits, segment_rows = field["column_bits"].long(), field["segment_rows"].tolist()
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    out = torch.zeros(field["codebook"].shape, dtype=torch.float32, device=of_weight.device)
    scale = field["row_scale"]
    for bits in column_bits.unique().tolist():
        members = torch.nonzero(column_bits == bits).flatten()
        codes, columns_of, entries = field[f"codes_b{bits}"], members.int(), first_entry[members].int()
        begin = 0
        for segment, rows in enumerate(segment_rows):
            grid = (triton.cdiv(len(members), BLOCK_SLOTS), triton.cdiv(rows, ROWS_PER_PROGRAM))
            _gradient[grid](
                codes, codes.shape[1], columns_of, entries, scale, of_weight, out[segment], begin, begin + rows,
                of_weight.shape[1], len(members),
                BITS=bits, HAS_ROW_SCALE=scale.numel() > 0, BLOCK_ROWS=BLOCK_ROWS if bits <= 2 else BLOCK_ROWS // 4,
                BLOCK_SLOTS=BLOCK_SLOTS, ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
            )  # fmt: skip
            begin += rows
    return out
