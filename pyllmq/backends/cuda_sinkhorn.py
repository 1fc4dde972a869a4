"""sinkhorn in CUDA (csrc/sinkhorn/cuda): a thread, a block or a team of blocks to a problem, all iterations in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Kernel, Problem, Support, register
from . import cuda
from .cpu_sinkhorn import laid_out

MAX_ROWS, MAX_COLUMNS = 65536, 4096
"""A block keeps its rows' scalings and those of all columns in shared memory."""


def _call(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, rho_a: float, rho_b: float, iterations: int
) -> tuple[Any, list[Tensor], list[int]]:
    """(the call, tensors that must outlive it, addresses of workspace and counters and the stream). On the device of cost."""
    inputs, strides = laid_out(cost, a, b, epsilon)
    extension = cuda._extension()
    call = extension.SinkhornCall([tensor.data_ptr() for tensor in inputs], strides, *cost.shape, rho_a, rho_b)
    floats, counted = extension.sinkhorn_room(call, iterations)
    stream = cuda._stream(cost.device)
    workspace = torch.empty(floats, dtype=torch.float32, device=cost.device)
    counters = cuda._zero_counters(counted, cost.device, stream)
    return call, [*inputs, workspace, counters], [workspace.data_ptr(), counters.data_ptr(), stream]


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    iterations: int,
    tolerance: float,
    rho_a: float,
    rho_b: float,
    tape: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(plan [B, n, m], u [B, n], v [B, m], count int32 [B]): count is negated where offsets moved."""
    problems, n, m = cost.shape
    plan, u, v = (
        torch.empty(problems, *shape, dtype=torch.float32, device=cost.device) for shape in ((n, m), (n,), (m,))
    )
    count = torch.empty(problems, dtype=torch.int32, device=cost.device)
    if problems:
        with cuda._current(cost.device):
            call, _held, room = _call(cost, a, b, epsilon, rho_a, rho_b, 0)
            cuda._extension().sinkhorn(
                call,
                iterations,
                tolerance,
                plan.data_ptr(),
                u.data_ptr(),
                v.data_ptr(),
                tape.data_ptr() if tape.numel() else 0,
                count.data_ptr(),
                *room,
            )
    return plan, u, v, count


def sinkhorn_backward(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    tape: Tensor,
    count: Tensor,
    grad_plan: Tensor,
    grad_u: Tensor,
    grad_v: Tensor,
    rho_a: float,
    rho_b: float,
) -> tuple[Tensor, Tensor, Tensor]:
    problems, n, m = cost.shape
    grad_cost, grad_a, grad_b = (
        torch.empty(problems, *shape, dtype=torch.float32, device=cost.device) for shape in ((n, m), (n,), (m,))
    )
    if problems:
        with cuda._current(cost.device):
            call, _held, room = _call(cost, a, b, epsilon, rho_a, rho_b, tape.shape[1])
            cuda._extension().sinkhorn_backward(
                call,
                tape.shape[1],
                tape.data_ptr(),
                count.data_ptr(),
                grad_plan.data_ptr(),
                grad_u.data_ptr(),
                grad_v.data_ptr(),
                grad_cost.data_ptr(),
                grad_a.data_ptr(),
                grad_b.data_ptr(),
                *room,
            )
    return grad_cost, grad_a, grad_b


def _has_room(n: int, m: int) -> bool:
    return cuda._extension().sinkhorn_fits(n, m)


def _fits(problem: Problem) -> Support:
    if problem.device != cuda.DEVICE:
        return False, f"needs tensors on a {cuda.DEVICE} device, these are on {problem.device}"
    if problem.dtype != torch.float32:
        return False, f"computes in fp32, asked for {problem.dtype}"
    works, why = cuda.available()
    if not works:
        return False, why
    n, m = map(int, problem.layout.split("x"))
    if not _has_room(n, m):
        return False, (
            f"holds matrices of up to {MAX_ROWS} x {MAX_COLUMNS}, fewer columns where a block has less than 160 KiB of "
            f"shared memory; here {problem.layout}"
        )
    return True, why


def register_kernels() -> None:
    for op, run, because in (
        (
            "sinkhorn",
            sinkhorn,
            "no exponential inside the loop, one pass and at most one meeting of blocks an iteration",
        ),
        ("sinkhorn_backward", sinkhorn_backward, "the exact adjoint from the scalings of every iteration"),
    ):
        register(Kernel(op, f"cuda.{op}", _fits, run, f"{because} (predicted)"))
