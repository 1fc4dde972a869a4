"""sinkhorn and doubly_stochastic in C++ (csrc/sinkhorn/cpu/sinkhorn.h, doubly_stochastic.h): fp32.

sinkhorn works in the exponential domain, with offsets that move when scalings grow too far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Kernel, Problem, Support, register
from . import cpu


def laid_out(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """The tensors as the kernel reads them, and how far their problems lie apart: 0 where all share one."""
    read, strides = [], []
    for tensor in tensors:
        if tensor.is_contiguous():
            read.append(tensor)
            strides.append(tensor.stride(0))
        elif tensor.shape[0] > 1 and tensor.stride(0) == 0:
            read.append(tensor if tensor.dim() == 2 and tensor.stride(1) == 1 else tensor[0].contiguous())
            strides.append(0)
        else:
            read.append(tensor.contiguous())
            strides.append(read[-1].stride(0))
    return read, strides


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
    """(plan [B, n, m], u [B, n], v [B, m], count int32 [B]): count is negated where offsets moved, and the tape is no help."""
    problems, n, m = cost.shape
    plan, u, v = torch.empty(problems, n, m), torch.empty(problems, n), torch.empty(problems, m)
    count = torch.empty(problems, dtype=torch.int32)
    if not problems:
        return plan, u, v, count
    inputs, strides = laid_out(cost, a, b)
    epsilon = epsilon.contiguous()
    cpu.kernels().sinkhorn(
        [tensor.data_ptr() for tensor in (*inputs, epsilon)],
        strides,
        problems,
        n,
        m,
        iterations,
        tolerance,
        rho_a,
        rho_b,
        plan.data_ptr(),
        u.data_ptr(),
        v.data_ptr(),
        tape.data_ptr(),
        count.data_ptr(),
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
    grad_cost, grad_a, grad_b = torch.empty(problems, n, m), torch.empty(problems, n), torch.empty(problems, m)
    if not problems:
        return grad_cost, grad_a, grad_b
    inputs, strides = laid_out(cost, a, b)
    epsilon = epsilon.contiguous()
    cpu.kernels().sinkhorn_backward(
        [tensor.data_ptr() for tensor in (*inputs, epsilon)],
        strides,
        problems,
        n,
        m,
        tape.shape[1] if tape.numel() else int(count.abs().max()),
        rho_a,
        rho_b,
        tape.data_ptr(),
        count.data_ptr(),
        grad_plan.data_ptr(),
        grad_u.data_ptr(),
        grad_v.data_ptr(),
        grad_cost.data_ptr(),
        grad_a.data_ptr(),
        grad_b.data_ptr(),
    )
    return grad_cost, grad_a, grad_b


# ---- doubly_stochastic ----------------------------------------------------------------------------------------------

MAX_ENTRIES = 64
"""Of a matrix of doubly_stochastic: a problem is a vector lane."""

_SHIFTS = {"none": 0, "line": 1, "matrix": 2}


def _call(
    logits: Tensor, iterations: int, columns_first: bool, softmax_start: bool, shift: str, *epsilons: float
) -> Any:
    return cpu.kernels().DoublyStochastic(
        logits.data_ptr(), *logits.shape, iterations, columns_first, softmax_start, _SHIFTS[shift], *epsilons
    )


def doubly_stochastic(
    logits: Tensor,
    iterations: int,
    columns_first: bool,
    softmax_start: bool,
    shift: str,
    matrix_epsilon: float,
    division_epsilon: float,
) -> Tensor:
    logits = logits.contiguous()
    out = torch.empty(logits.shape)
    call = _call(logits, iterations, columns_first, softmax_start, shift, matrix_epsilon, division_epsilon)
    cpu.kernels().doubly_stochastic(call, out.data_ptr())
    return out


def doubly_stochastic_backward(
    logits: Tensor,
    grad: Tensor,
    iterations: int,
    columns_first: bool,
    softmax_start: bool,
    shift: str,
    matrix_epsilon: float,
    division_epsilon: float,
) -> Tensor:
    logits, grad = logits.contiguous(), grad.contiguous()
    logits_grad = torch.empty(logits.shape)
    call = _call(logits, iterations, columns_first, softmax_start, shift, matrix_epsilon, division_epsilon)
    cpu.kernels().doubly_stochastic_backward(call, grad.data_ptr(), logits_grad.data_ptr())
    return logits_grad


# ---- rows -----------------------------------------------------------------------------------------------------------


def _few_entries(problem: Problem) -> Support:
    if problem.tokens > MAX_ENTRIES:
        return False, f"holds up to {MAX_ENTRIES} entries of a matrix, here {problem.tokens}"
    return _fp32_on_cpu(problem)


def _fp32_on_cpu(problem: Problem) -> Support:
    if problem.device != cpu.DEVICE:
        return False, f"needs tensors on the CPU, these are on {problem.device}"
    if problem.dtype != torch.float32:
        return False, f"computes in fp32, asked for {problem.dtype}"
    return cpu.available()


def register_kernels() -> None:
    for op, supports, run, because in (
        ("sinkhorn", _fp32_on_cpu, sinkhorn, "no exponential inside the loop; small problems one to a vector lane"),
        ("sinkhorn_backward", _fp32_on_cpu, sinkhorn_backward, "the exact adjoint from T (n + m) saved numbers"),
        ("doubly_stochastic", _few_entries, doubly_stochastic, "a problem to a vector lane, 4 x 4 in registers"),
        (
            "doubly_stochastic_backward",
            _few_entries,
            doubly_stochastic_backward,
            "the exact adjoint, which undoes the divisions as it goes back: no matrix is kept",
        ),
    ):
        register(Kernel(op, f"cpu.{op}", supports, run, because))
