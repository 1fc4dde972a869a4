"""sinkhorn: one program per problem, its matrix in registers, all iterations in one launch. Log domain: a GPU has a unit for exp.

Log scalings alpha [n], beta [m] as in backends/reference/sinkhorn.py; the tape holds them for every iteration. Nothing waits
for the host: a problem that is settled leaves its loop by itself.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _logsumexp(x, axis: tl.constexpr):
    most = tl.max(x, axis)
    most = tl.where(most == float("-inf"), 0.0, most)
    return most + tl.log(tl.sum(tl.exp(x - tl.expand_dims(most, axis)), axis))


@triton.jit
def _load_problem(
    cost, a, b, epsilon, rho_a, rho_b, problem, n, m,
    BALANCED_A: tl.constexpr, BALANCED_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    mass_a = tl.load(a + problem * n + row, mask=row < n, other=0.0)
    mass_b = tl.load(b + problem * m + column, mask=column < m, other=0.0)
    inside = (row < n)[:, None] & (column < m)[None, :]
    place = problem * n * m + row[:, None] * m + column[None, :]
    scale = tl.load(epsilon + problem)
    logits = -tl.load(cost + place, mask=inside, other=float("inf")) / scale
    logits = tl.where((mass_a > 0)[:, None] & (mass_b > 0)[None, :], logits, float("-inf"))
    rows = (mass_a > 0) & (tl.max(logits, 1) > float("-inf"))
    columns = (mass_b > 0) & (tl.max(logits, 0) > float("-inf"))
    damp_a = 1.0 if BALANCED_A else rho_a / (rho_a + scale)
    damp_b = 1.0 if BALANCED_B else rho_b / (rho_b + scale)
    return logits, mass_a, mass_b, rows, columns, damp_a, damp_b, scale, place, inside


@triton.jit
def _forward(
    cost, a, b, epsilon, plan, u, v, tape, count, n, m, iterations, tolerance, rho_a, rho_b,
    BALANCED_A: tl.constexpr, BALANCED_B: tl.constexpr, TAPE: tl.constexpr, STOPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    logits, mass_a, mass_b, rows, columns, damp_a, damp_b, scale, place, inside = _load_problem(
        cost, a, b, epsilon, rho_a, rho_b, problem, n, m, BALANCED_A, BALANCED_B, BLOCK_N, BLOCK_M
    )
    log_a, log_b = tl.log(tl.where(rows, mass_a, 1.0)), tl.log(tl.where(columns, mass_b, 1.0))
    beta = tl.where(columns, 0.0, float("-inf"))
    alpha = tl.where(rows, 0.0, float("-inf"))
    step, going = 0, 1
    while (step < iterations) & (going == 1):
        before = alpha
        alpha = tl.where(rows, log_a - damp_a * _logsumexp(logits + beta[None, :], 1), float("-inf"))
        if STOPS:
            change = tl.where(rows, tl.exp(before - alpha) - 1.0, 0.0)
            missed = tl.sum(mass_a * tl.abs(change), 0)
            going = tl.where((step > 0) & (missed <= tolerance * tl.sum(mass_a, 0)), 0, 1)
            alpha = tl.where(going == 1, alpha, before)
        after = tl.where(columns, log_b - damp_b * _logsumexp(logits + alpha[:, None], 0), float("-inf"))
        beta = tl.where(going == 1, after, beta)
        if TAPE:
            slot = tape + (problem * iterations + step) * (n + m)
            tl.store(slot + row, alpha, mask=(row < n) & (going == 1))
            tl.store(slot + n + column, beta, mask=(column < m) & (going == 1))
        step += going
    tl.store(count + problem, step)
    tl.store(plan + place, tl.exp(alpha[:, None] + logits + beta[None, :]), mask=inside)
    tl.store(u + problem * n + row, scale * alpha, mask=row < n)
    tl.store(v + problem * m + column, scale * beta, mask=column < m)


@triton.jit
def _backward(
    cost, a, b, epsilon, tape, count, grad_plan, grad_u, grad_v, grad_cost, grad_a, grad_b, n, m, iterations, rho_a, rho_b,
    BALANCED_A: tl.constexpr, BALANCED_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    logits, mass_a, mass_b, rows, columns, damp_a, damp_b, scale, place, inside = _load_problem(
        cost, a, b, epsilon, rho_a, rho_b, problem, n, m, BALANCED_A, BALANCED_B, BLOCK_N, BLOCK_M
    )
    inverse_a = tl.where(rows, 1.0 / tl.where(rows, mass_a, 1.0), 0.0)
    inverse_b = tl.where(columns, 1.0 / tl.where(columns, mass_b, 1.0), 0.0)
    last = tl.load(count + problem) - 1
    slot = tape + (problem * iterations + last) * (n + m)
    alpha = tl.load(slot + row, mask=row < n, other=float("-inf"))
    beta = tl.load(slot + n + column, mask=column < m, other=float("-inf"))
    d_plan = tl.load(grad_plan + place, mask=inside, other=0.0)
    d_logits = d_plan * tl.exp(alpha[:, None] + logits + beta[None, :])
    d_u = tl.load(grad_u + problem * n + row, mask=row < n, other=0.0)
    d_v = tl.load(grad_v + problem * m + column, mask=column < m, other=0.0)
    d_alpha = tl.where(rows, scale * d_u, 0.0) + tl.sum(d_logits, 1)
    d_beta = tl.where(columns, scale * d_v, 0.0) + tl.sum(d_logits, 0)
    d_a, d_b = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for back in range(0, last + 1):
        step = last - back
        slot = tape + (problem * iterations + step) * (n + m)
        alpha = tl.load(slot + row, mask=row < n, other=float("-inf"))
        beta = tl.load(slot + n + column, mask=column < m, other=float("-inf"))
        d_b += d_beta * inverse_b
        plan = tl.exp(alpha[:, None] + logits + beta[None, :])
        sums = tl.sum(plan, 0)
        share = tl.where(columns, damp_b * d_beta / tl.where(sums > 0, sums, 1.0), 0.0)
        passed = plan * share[None, :]
        d_logits -= passed
        d_alpha -= tl.sum(passed, 1)

        d_a += d_alpha * inverse_a
        earlier = tl.load(slot - m + column, mask=(column < m) & (step > 0), other=0.0)
        beta = tl.where(columns, earlier, float("-inf"))
        plan = tl.exp(alpha[:, None] + logits + beta[None, :])
        sums = tl.sum(plan, 1)
        share = tl.where(rows, damp_a * d_alpha / tl.where(sums > 0, sums, 1.0), 0.0)
        passed = plan * share[:, None]
        d_logits -= passed
        d_beta = -tl.sum(passed, 0)
        d_alpha = tl.zeros([BLOCK_N], tl.float32)
    tl.store(grad_cost + place, -d_logits / scale, mask=inside)
    tl.store(grad_a + problem * n + row, d_a, mask=row < n)
    tl.store(grad_b + problem * m + column, d_b, mask=column < m)


def blocks(n: int, m: int) -> tuple[int, int]:
    return triton.next_power_of_2(n), triton.next_power_of_2(m)


def warps(n: int, m: int) -> int:
    """8 entries a thread: with 16 the adjoint of 64 x 64 takes 255 registers, with 8 it takes 128 (sm_90)."""
    entries = math.prod(blocks(n, m))
    return 1 if entries <= 64 else max(2, entries // 256)


def _price(rho: float) -> float:
    return 0.0 if math.isinf(rho) else rho


def sinkhorn(cost, a, b, epsilon, iterations, tolerance, rho_a, rho_b, tape):
    """(plan, u, v, count); the tape [B, iterations, n + m] is filled if it is there."""
    problems, n, m = cost.shape
    plan, u, v = torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b)
    count = torch.empty(problems, dtype=torch.int32, device=cost.device)
    if problems:
        block_n, block_m = blocks(n, m)
        _forward[(problems,)](
            cost, a, b, epsilon, plan, u, v, tape, count, n, m, iterations, tolerance, _price(rho_a), _price(rho_b),
            BALANCED_A=math.isinf(rho_a), BALANCED_B=math.isinf(rho_b), TAPE=tape.numel() > 0, STOPS=tolerance > 0,
            BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps(n, m),
        )  # fmt: skip
    return plan, u, v, count


def sinkhorn_backward(cost, a, b, epsilon, tape, count, grad_plan, grad_u, grad_v, rho_a, rho_b):
    """(grad_cost, grad_a, grad_b) of the loop as it ran."""
    problems, n, m = cost.shape
    grad_cost, grad_a, grad_b = torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b)
    if problems:
        block_n, block_m = blocks(n, m)
        _backward[(problems,)](
            cost, a, b, epsilon, tape, count, grad_plan, grad_u, grad_v, grad_cost, grad_a, grad_b,
            n, m, tape.shape[1], _price(rho_a), _price(rho_b),
            BALANCED_A=math.isinf(rho_a), BALANCED_B=math.isinf(rho_b),
            BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps(n, m),
        )  # fmt: skip
    return grad_cost, grad_a, grad_b
