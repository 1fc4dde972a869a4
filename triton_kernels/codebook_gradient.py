"""codebook_gradient: for each centroid the sum of row_scale * dL/dW over the weights that use it, from packed codes.

A program takes columns of one width, 16 of their centroids and a run of rows of one segment. Scattering dL/dW would be an atomic
for every weight; here every centroid's sum is a masked reduction over a tile of rows in registers. Runs of rows are added in order,
so the same call gives the same bits. Above 4 bits each 16 centroids read dL/dW anew: 16 times at 8 bits.
"""

import torch
import triton
import triton.language as tl

BLOCK_ROWS, BLOCK_SLOTS, ROWS_PER_PROGRAM, MOST_ENTRIES = 64, 16, 1024, 16


@triton.jit
def _gradient(
    codes, code_bytes, columns_of, first_entry, row_scale, of_weight, parts, begin, end, columns, slots, entries,
    BITS: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """parts[run of rows, entries]: this run's share of every centroid's sum."""
    slot = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    column = tl.load(columns_of + slot, mask=slot < slots, other=0)
    bit = slot * BITS
    entry = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.zeros([BLOCK_SLOTS, ENTRIES], tl.float32)
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
        total += tl.sum(tl.where(code[:, :, None] == entry[None, None, :], value[:, :, None], 0.0), 0)
    goal = tl.load(first_entry + slot, mask=slot < slots, other=0)[:, None] + entry[None, :]
    tl.store(
        parts + tl.program_id(1).to(tl.int64) * entries + goal,
        total,
        mask=(slot < slots)[:, None] & (entry >= 0)[None, :],
    )


def codebook_gradient(of_weight: torch.Tensor, field: dict[str, torch.Tensor]) -> torch.Tensor:
    """`of_weight` fp32 [N, K], zero at outliers; `field` the tensors of a checkpoint by name."""
    column_bits, segment_rows = field["column_bits"].long(), field["segment_rows"].tolist()
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    out = torch.empty(field["codebook"].shape, dtype=torch.float32, device=of_weight.device)
    scale, entries, begin = field["row_scale"], out.shape[1], 0
    widths = [(bits, torch.nonzero(column_bits == bits).flatten()) for bits in column_bits.unique().tolist()]
    for segment, rows in enumerate(segment_rows):
        runs = triton.cdiv(rows, ROWS_PER_PROGRAM)
        parts = torch.empty(runs, entries, dtype=torch.float32, device=of_weight.device)
        for bits, members in widths:
            codes, each = field[f"codes_b{bits}"], min(1 << bits, MOST_ENTRIES)
            _gradient[(triton.cdiv(len(members), BLOCK_SLOTS), runs, (1 << bits) // each)](
                codes, codes.shape[1], members.int(), first_entry[members].int(), scale, of_weight, parts, begin, begin + rows,
                of_weight.shape[1], len(members), entries,
                BITS=bits, HAS_ROW_SCALE=scale.numel() > 0, BLOCK_ROWS=BLOCK_ROWS if bits <= 2 else BLOCK_ROWS // 4,
                BLOCK_SLOTS=BLOCK_SLOTS, ROWS_PER_PROGRAM=ROWS_PER_PROGRAM, ENTRIES=each,
            )  # fmt: skip
        torch.sum(parts, 0, out=out[segment])
        begin += rows
    return out
