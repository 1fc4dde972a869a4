"""sinkhorn of matrices that no program holds: two launches an iteration, in tiles of any number of rows and columns.

Words as in sinkhorn.py. A program of `_rows` has some rows: their alpha, and for every column the logsumexp of its rows. A program
of `_columns` has some columns and puts those of all rows together. The scalings of iteration t stand in slot t % slots: the tape
has one for every iteration, without a tape there are two. A problem that has settled is passed over: nothing waits for the host.
"""

import math

import torch
import triton
import triton.language as tl

from .sinkhorn import price

ROWS, COLUMNS, WARPS = 16, 128, 4


@triton.jit
def _join(most, total, x, axis: tl.constexpr):
    """(largest, sum of exp(. - largest)) of what came before and of x along the axis; -inf and 0 of nothing."""
    larger = tl.maximum(most, tl.max(x, axis))
    base = tl.where(larger == float("-inf"), 0.0, larger)
    total = total * tl.exp(most - base) + tl.sum(tl.exp(x - tl.expand_dims(base, axis)), axis)
    return larger, total


@triton.jit
def _log_of(most, total):
    return tl.where(total > 0, most + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def _logits(cost, problem, row, column, n, m, scale, mass_a, mass_b):
    inside = (row < n)[:, None] & (column < m)[None, :]
    place = problem * n * m + row[:, None] * m + column[None, :]
    logits = -tl.load(cost + place, mask=inside, other=float("inf")) / scale
    logits = tl.where((mass_a > 0)[:, None] & (mass_b > 0)[None, :], logits, float("-inf"))
    return logits, place, inside


@triton.jit
def _before(history, slot, column, m, mass_b, step):
    """beta of the iteration before; at first 0."""
    beta = tl.load(history + slot + column, mask=(column < m) & (step > 0), other=0.0)
    return tl.where(mass_b > 0, beta, float("-inf"))


@triton.jit
def _rows(
    cost, a, b, epsilon, history, largest, totals, missed, count, n, m, slots, step, row_blocks, rho_a,
    BALANCED_A: tl.constexpr, STOPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    problem, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(count + problem) > step:
        row = block * ROWS + tl.arange(0, ROWS)
        mass_a = tl.load(a + problem * n + row, mask=row < n, other=0.0)
        scale = tl.load(epsilon + problem)
        damp = 1.0 if BALANCED_A else rho_a / (rho_a + scale)
        now = (problem * slots + step % slots) * (n + m)
        before = (problem * slots + (step + slots - 1) % slots) * (n + m)
        most, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        for first in range(0, m, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
            logits, _, _ = _logits(cost, problem, row, column, n, m, scale, mass_a, mass_b)
            beta = _before(history, before + n, column, m, mass_b, step)
            most, total = _join(most, total, logits + beta[None, :], 1)
        log_sum = _log_of(most, total)
        open_rows = log_sum != float("-inf")
        log_a = tl.log(tl.where(mass_a > 0, mass_a, 1.0))
        alpha = tl.where(open_rows, log_a - damp * tl.where(open_rows, log_sum, 0.0), float("-inf"))
        tl.store(history + now + row, alpha, mask=row < n)
        if STOPS:
            old = tl.load(history + before + row, mask=(row < n) & (step > 0), other=0.0)
            change = tl.where(open_rows, tl.exp(old - tl.where(open_rows, alpha, 0.0)) - 1.0, 0.0)
            tl.store(missed + problem * row_blocks + block, tl.sum(mass_a * tl.abs(change), 0))
        part = (problem * row_blocks + block) * m
        for first in range(0, m, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
            logits, _, _ = _logits(cost, problem, row, column, n, m, scale, mass_a, mass_b)
            none = tl.full([COLUMNS], float("-inf"), tl.float32)
            column_most, column_total = _join(none, tl.zeros([COLUMNS], tl.float32), logits + alpha[:, None], 0)
            tl.store(largest + part + column, column_most, mask=column < m)
            tl.store(totals + part + column, column_total, mask=column < m)


@triton.jit
def _columns(
    b, epsilon, history, largest, totals, missed, mass, count, n, m, slots, step, row_blocks, tolerance, rho_b,
    BALANCED_B: tl.constexpr, STOPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    taken = tl.load(count + problem)
    going = taken > step
    if STOPS:
        # programs of one launch may see the count already lowered to this step: they come to the same end below
        going = taken >= step
        off = 0.0
        for block in range(0, row_blocks):
            off += tl.load(missed + problem * row_blocks + block)
        settled = going & (step > 0) & (off <= tolerance * tl.load(mass + problem))
        tl.store(count + problem, step, mask=settled)
        going = going & (settled == 0)
    if going:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        scale = tl.load(epsilon + problem)
        damp = 1.0 if BALANCED_B else rho_b / (rho_b + scale)
        mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
        most, total = tl.full([COLUMNS], float("-inf"), tl.float32), tl.zeros([COLUMNS], tl.float32)
        for block in range(0, row_blocks):
            part = (problem * row_blocks + block) * m + column
            other = tl.load(largest + part, mask=column < m, other=float("-inf"))
            more = tl.load(totals + part, mask=column < m, other=0.0)
            larger = tl.maximum(most, other)
            base = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(most - base) + more * tl.exp(other - base)
            most = larger
        log_sum = _log_of(most, total)
        open_columns = log_sum != float("-inf")
        log_b = tl.log(tl.where(mass_b > 0, mass_b, 1.0))
        beta = tl.where(open_columns, log_b - damp * tl.where(open_columns, log_sum, 0.0), float("-inf"))
        now = (problem * slots + step % slots) * (n + m)
        tl.store(history + now + n + column, beta, mask=column < m)


@triton.jit
def _results(
    cost, a, b, epsilon, history, count, plan, u, v, n, m, slots, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(epsilon + problem)
    slot = (problem * slots + (tl.load(count + problem) - 1) % slots) * (n + m)
    mass_a = tl.load(a + problem * n + row, mask=row < n, other=0.0)
    alpha = tl.load(history + slot + row, mask=row < n, other=float("-inf"))
    tl.store(u + problem * n + row, scale * alpha, mask=row < n)
    for first in range(0, m, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
        beta = tl.load(history + slot + n + column, mask=column < m, other=float("-inf"))
        logits, place, inside = _logits(cost, problem, row, column, n, m, scale, mass_a, mass_b)
        tl.store(plan + place, tl.exp(alpha[:, None] + logits + beta[None, :]), mask=inside)
        tl.store(v + problem * m + column, scale * beta, mask=(column < m) & (tl.program_id(1) == 0))


@triton.jit
def _share(gradient, log_scaling, mass, damp):
    """damp * gradient over what the plan of that half step sums to in the line: the mass, or what its price made of it."""
    there = log_scaling != float("-inf")
    log_scaling = tl.where(there, log_scaling, 0.0)
    sums = tl.exp(log_scaling + (tl.log(tl.where(there, mass, 1.0)) - log_scaling) / damp)
    return tl.where(there, damp * gradient / sums, 0.0)


@triton.jit
def _adjoint_rows(
    cost, a, b, epsilon, history, count, grad_plan, grad_u, grad_cost, grad_a, shares, parts, n, m, slots, step, row_blocks,
    rho_a, BALANCED_A: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of iteration `step`; before the last one (step = iterations taken) only what comes through the plan."""
    problem, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    taken = tl.load(count + problem)
    row = block * ROWS + tl.arange(0, ROWS)
    part = (problem * row_blocks + block) * m
    if taken >= step:
        scale = tl.load(epsilon + problem)
        mass_a = tl.load(a + problem * n + row, mask=row < n, other=0.0)
        damp = 1.0 if BALANCED_A else rho_a / (rho_a + scale)
        slot = (problem * slots + tl.maximum(tl.minimum(step, taken - 1), 0)) * (n + m)
        alpha = tl.load(history + slot + row, mask=row < n, other=float("-inf"))
        if taken == step:
            d_u = tl.load(grad_u + problem * n + row, mask=row < n, other=0.0)
            d_alpha = tl.where(alpha != float("-inf"), scale * d_u, 0.0)
            for first in range(0, m, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
                logits, place, inside = _logits(cost, problem, row, column, n, m, scale, mass_a, mass_b)
                beta = tl.load(history + slot + n + column, mask=column < m, other=float("-inf"))
                d_plan = tl.load(grad_plan + place, mask=inside, other=0.0)
                through = d_plan * tl.exp(alpha[:, None] + logits + beta[None, :])
                d_alpha += tl.sum(through, 1)
                tl.store(grad_cost + place, -through / scale, mask=inside)
                tl.store(parts + part + column, tl.sum(through, 0), mask=column < m)
            tl.store(grad_a + problem * n + row, d_alpha, mask=row < n)  # kept here until the step below takes it
        else:
            last = taken - 1 == step
            kept = tl.load(grad_a + problem * n + row, mask=row < n, other=0.0)
            d_alpha = tl.where(last, kept, 0.0)
            for first in range(0, m, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
                logits, place, inside = _logits(cost, problem, row, column, n, m, scale, mass_a, mass_b)
                beta = tl.load(history + slot + n + column, mask=column < m, other=float("-inf"))
                share = tl.load(shares + problem * m + column, mask=column < m, other=0.0)
                passed = tl.exp(alpha[:, None] + logits + beta[None, :]) * share[None, :]
                d_alpha -= tl.sum(passed, 1)
                old = tl.load(grad_cost + place, mask=inside, other=0.0)
                tl.store(grad_cost + place, old + passed / scale, mask=inside)
            there = alpha != float("-inf")
            more = tl.where(there, d_alpha / tl.where(there, mass_a, 1.0), 0.0)
            tl.store(grad_a + problem * n + row, tl.where(last, 0.0, kept) + more, mask=row < n)
            share_a = _share(d_alpha, alpha, mass_a, damp)
            tl.debug_barrier()  # grad_cost is read again, by other threads than wrote it
            for first in range(0, m, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
                logits, place, inside = _logits(cost, problem, row, column, n, m, scale, mass_a, mass_b)
                beta = _before(history, slot - m, column, m, mass_b, step)
                passed = tl.exp(alpha[:, None] + logits + beta[None, :]) * share_a[:, None]
                old = tl.load(grad_cost + place, mask=inside, other=0.0)
                tl.store(grad_cost + place, old + passed / scale, mask=inside)
                tl.store(parts + part + column, -tl.sum(passed, 0), mask=column < m)


@triton.jit
def _adjoint_columns(
    b, epsilon, history, count, grad_v, grad_b, shares, parts, n, m, slots, step, row_blocks, rho_b,
    BALANCED_B: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to beta of iteration step - 1, and what of it goes on."""
    problem = tl.program_id(0).to(tl.int64)
    taken = tl.load(count + problem)
    if (taken >= step) & (step > 0):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        scale = tl.load(epsilon + problem)
        damp = 1.0 if BALANCED_B else rho_b / (rho_b + scale)
        mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
        beta = tl.load(
            history + (problem * slots + step - 1) * (n + m) + n + column, mask=column < m, other=float("-inf")
        )
        there = beta != float("-inf")
        d_beta = tl.zeros([COLUMNS], tl.float32)
        for block in range(0, row_blocks):
            d_beta += tl.load(parts + (problem * row_blocks + block) * m + column, mask=column < m, other=0.0)
        if taken == step:
            d_v = tl.load(grad_v + problem * m + column, mask=column < m, other=0.0)
            d_beta += tl.where(there, scale * d_v, 0.0)
        old = tl.load(grad_b + problem * m + column, mask=(column < m) & (taken > step), other=0.0)
        more = tl.where(there, d_beta / tl.where(there, mass_b, 1.0), 0.0)
        tl.store(grad_b + problem * m + column, old + more, mask=column < m)
        tl.store(shares + problem * m + column, _share(d_beta, beta, mass_b, damp), mask=column < m)


def _grids(cost):
    problems, n, m = cost.shape
    row_blocks = triton.cdiv(n, ROWS)
    return row_blocks, (problems, row_blocks), (problems, triton.cdiv(m, COLUMNS))


def sinkhorn(cost, a, b, epsilon, iterations, tolerance, rho_a, rho_b, tape):
    """(plan, u, v, count); the tape [B, iterations, ...] is filled if it is there."""
    problems, n, m = cost.shape
    plan, u, v = torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b)
    count = torch.full((problems,), iterations, dtype=torch.int32, device=cost.device)
    if not problems:
        return plan, u, v, count
    row_blocks, of_rows, of_columns = _grids(cost)
    slots = iterations if tape.numel() else 2
    history = tape if tape.numel() else cost.new_empty(problems, slots, n + m)
    largest, totals = (cost.new_empty(problems, row_blocks, m) for _ in range(2))
    missed, mass = cost.new_empty(problems, row_blocks), a.sum(-1)
    fixed = {"STOPS": tolerance > 0, "COLUMNS": COLUMNS, "num_warps": WARPS}
    for step in range(iterations):
        _rows[of_rows](
            cost, a, b, epsilon, history, largest, totals, missed, count, n, m, slots, step, row_blocks, price(rho_a),
            BALANCED_A=math.isinf(rho_a), ROWS=ROWS, **fixed,
        )  # fmt: skip
        _columns[of_columns](
            b, epsilon, history, largest, totals, missed, mass, count, n, m, slots, step, row_blocks, tolerance, price(rho_b),
            BALANCED_B=math.isinf(rho_b), **fixed,
        )  # fmt: skip
    _results[of_rows](
        cost, a, b, epsilon, history, count, plan, u, v, n, m, slots, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )
    return plan, u, v, count


def sinkhorn_backward(cost, a, b, epsilon, tape, count, grad_plan, grad_u, grad_v, rho_a, rho_b):
    """(grad_cost, grad_a, grad_b) of the loop as it ran."""
    problems, n, m = cost.shape
    grad_cost, grad_a, grad_b = torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b)
    if not problems:
        return grad_cost, grad_a, grad_b
    row_blocks, of_rows, of_columns = _grids(cost)
    shares, parts = torch.empty_like(b), cost.new_empty(problems, row_blocks, m)
    slots = tape.shape[1]
    for step in range(slots, -1, -1):
        _adjoint_rows[of_rows](
            cost, a, b, epsilon, tape, count, grad_plan, grad_u, grad_cost, grad_a, shares, parts,
            n, m, slots, step, row_blocks, price(rho_a),
            BALANCED_A=math.isinf(rho_a), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        _adjoint_columns[of_columns](
            b, epsilon, tape, count, grad_v, grad_b, shares, parts, n, m, slots, step, row_blocks, price(rho_b),
            BALANCED_B=math.isinf(rho_b), COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return grad_cost, grad_a, grad_b
