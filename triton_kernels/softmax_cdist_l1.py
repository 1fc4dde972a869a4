"""softmax_cdist_l1 and its gradient: probabilities of a tile at a time, from the logits and two numbers per row.

Each tile is [rows of one side, rows of the other, columns]; every exponential serves a block of rows. No atomics: parts of the sums
are added in order, so the same call gives the same bits.
"""

import torch
import triton
import triton.language as tl

STATISTICS_BLOCK = 1024
ROWS, OTHER_ROWS, COLUMNS = 16, 16, 32
"""Tile of distances: 64 sums a thread with 4 warps, no spills on sm_80 and sm_90."""
SIGN_ROWS, SIGN_OTHER_ROWS, SIGN_COLUMNS = 8, 8, 64
PROGRAMS = 1056
"""Split the columns until there are about this many programs: 8 for each multiprocessor of an H100."""
STAGED_BYTES = 32 << 20
"""h of 16-bit gradients lies in a buffer of its own, for so many rows at a time."""


@triton.jit
def _row_statistics(logits, statistics, columns, scale, BLOCK: tl.constexpr):
    """statistics[row] = (largest logit, 1 / sum of exp((logit - largest) * scale)); both NaN where there is no softmax."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * columns + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * columns + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        total += tl.exp((x - top) * scale)
    tl.store(statistics + 2 * row, top)
    tl.store(statistics + 2 * row + 1, 1.0 / tl.sum(total, 0))


@triton.jit
def _probabilities(logits, statistics, columns, scale, first_row, row, rows, column):
    """[rows, columns] of softmax; 0 outside."""
    inside_row = row < rows
    place = first_row + row
    top = tl.load(statistics + 2 * place, mask=inside_row, other=0.0)
    inverse_sum = tl.load(statistics + 2 * place + 1, mask=inside_row, other=0.0)
    inside = inside_row[:, None] & (column < columns)[None, :]
    x = tl.load(logits + place[:, None] * columns + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp((x - top[:, None]) * scale) * inverse_sum[:, None]
    return tl.where(inside, p, 0.0)


@triton.jit
def _distances(
    x, y, x_statistics, y_statistics, parts, x_rows, y_rows, columns, scale, batch, columns_per_split,
    ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts[split, batch, x_rows, y_rows]: sums of |p - q| over the columns of this split."""
    x_blocks, y_blocks = tl.cdiv(x_rows, ROWS), tl.cdiv(y_rows, OTHER_ROWS)
    of_batch = (tl.program_id(0) // (x_blocks * y_blocks)).to(tl.int64)  # the other axes of a grid end at 65535
    row = tl.program_id(0) // y_blocks % x_blocks * ROWS + tl.arange(0, ROWS)
    other = tl.program_id(0) % y_blocks * OTHER_ROWS + tl.arange(0, OTHER_ROWS)
    begin = tl.program_id(1) * columns_per_split
    end = tl.minimum(begin + columns_per_split, columns)
    total = tl.zeros([ROWS, OTHER_ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        p = _probabilities(x, x_statistics, columns, scale, of_batch * x_rows, row, x_rows, column)
        q = _probabilities(y, y_statistics, columns, scale, of_batch * y_rows, other, y_rows, column)
        total += tl.abs(p[:, None, :] - q[None, :, :])
    place = ((tl.program_id(1) * batch + of_batch) * x_rows + row)[:, None] * y_rows + other[None, :]
    tl.store(parts + place, tl.sum(total, 2), mask=(row < x_rows)[:, None] & (other < y_rows)[None, :])


@triton.jit
def _signs(
    x, y, x_statistics, y_statistics, gradient, h, dots, x_rows, y_rows, columns, scale, first_block, all_rows,
    IN_PLACE: tl.constexpr, ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h = sum over the other side's rows of gradient * sign(p - q); dots[block of columns, row] = <p, h> there."""
    x_blocks = tl.cdiv(x_rows, ROWS)
    block = first_block + tl.program_id(0)
    of_batch = (block // x_blocks).to(tl.int64)
    row = block % x_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    p = _probabilities(x, x_statistics, columns, scale, of_batch * x_rows, row, x_rows, column)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, y_rows, OTHER_ROWS):
        other = first + tl.arange(0, OTHER_ROWS)
        q = _probabilities(y, y_statistics, columns, scale, of_batch * y_rows, other, y_rows, column)
        inside = (row < x_rows)[:, None] & (other < y_rows)[None, :]
        weight = tl.load(
            gradient + (of_batch * x_rows + row)[:, None] * y_rows + other[None, :], mask=inside, other=0.0
        )
        difference = p[:, None, :] - q[None, :, :]
        signed = tl.where(difference > 0, weight[:, :, None], -weight[:, :, None])
        total += tl.sum(tl.where(difference == 0, 0.0, signed), 1)
    row_of_all = of_batch * x_rows + row
    held = row_of_all if IN_PLACE else tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < x_rows)[:, None] & (column < columns)[None, :]
    tl.store(h + held[:, None] * columns + column[None, :], total, mask=inside)
    tl.store(dots + tl.program_id(1) * all_rows + row_of_all, tl.sum(p * total, 1), mask=row < x_rows)


@triton.jit
def _softmax_gradient(
    x, x_statistics, h, dots, out, x_rows, columns, scale, first_block,
    IN_PLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = p * (h - <p, h>) * scale."""
    x_blocks = tl.cdiv(x_rows, ROWS)
    block = first_block + tl.program_id(0)
    of_batch = (block // x_blocks).to(tl.int64)
    row = block % x_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    p = _probabilities(x, x_statistics, columns, scale, of_batch * x_rows, row, x_rows, column)
    row_of_all = of_batch * x_rows + row
    held = row_of_all if IN_PLACE else tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < x_rows)[:, None] & (column < columns)[None, :]
    dot = tl.load(dots + row_of_all, mask=row < x_rows, other=0.0)
    signed = tl.load(h + held[:, None] * columns + column[None, :], mask=inside, other=0.0)
    value = p * (signed - dot[:, None]) * scale
    tl.store(out + row_of_all[:, None] * columns + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def softmax_cdist_l1(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous [batch, B, V] and [batch, C, V] -> fp32 distances [batch, B, C] and the statistics of both sides' rows."""
    batch, rows, columns = student.shape
    other_rows, scale, device = teacher.shape[1], 1.0 / temperature, student.device
    statistics = []
    for logits in (student, teacher):
        found = torch.empty(*logits.shape[:2], 2, dtype=torch.float32, device=device)
        if found.numel():
            _row_statistics[(found.numel() // 2,)](logits, found, columns, scale, BLOCK=STATISTICS_BLOCK)
        statistics.append(found)
    blocks = triton.cdiv(rows, ROWS) * triton.cdiv(other_rows, OTHER_ROWS)
    if not batch * blocks:
        return torch.empty(batch, rows, other_rows, dtype=torch.float32, device=device), statistics[0], statistics[1]
    steps = triton.cdiv(columns, COLUMNS)
    steps_each = triton.cdiv(steps, min(triton.cdiv(PROGRAMS, batch * blocks), steps))
    splits = triton.cdiv(steps, steps_each)
    parts = torch.empty(splits, batch, rows, other_rows, dtype=torch.float32, device=device)
    _distances[(batch * blocks, splits)](
        student, teacher, *statistics, parts, rows, other_rows, columns, scale, batch, steps_each * COLUMNS,
        ROWS=ROWS, OTHER_ROWS=OTHER_ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return parts.sum(0), statistics[0], statistics[1]


def softmax_cdist_l1_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    other_logits: torch.Tensor,
    statistics: torch.Tensor,
    other_statistics: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Contiguous gradient [batch, B, C] of the distances -> gradient of `logits` [batch, B, V]."""
    batch, rows, columns = logits.shape
    other_rows, scale, device = other_logits.shape[1], 1.0 / temperature, logits.device
    out = torch.empty_like(logits)
    blocks = batch * triton.cdiv(rows, SIGN_ROWS)
    if not blocks:
        return out
    column_blocks = triton.cdiv(columns, SIGN_COLUMNS)
    in_place = logits.dtype == torch.float32
    at_once = blocks if in_place else min(blocks, max(1, STAGED_BYTES // (4 * SIGN_ROWS * columns)))
    h = out if in_place else torch.empty(at_once * SIGN_ROWS, columns, dtype=torch.float32, device=device)
    dots = torch.empty(column_blocks, batch * rows, dtype=torch.float32, device=device)
    block = {"IN_PLACE": in_place, "ROWS": SIGN_ROWS, "COLUMNS": SIGN_COLUMNS}
    for first in range(0, blocks, at_once):
        grid = (min(at_once, blocks - first), column_blocks)
        _signs[grid](
            logits, other_logits, statistics, other_statistics, grad, h, dots,
            rows, other_rows, columns, scale, first, batch * rows,
            OTHER_ROWS=SIGN_OTHER_ROWS, num_warps=4, **block,
        )  # fmt: skip
        _softmax_gradient[grid](
            logits, statistics, h, dots.sum(0), out, rows, columns, scale, first, num_warps=4, **block
        )
    return out
