"""sinkhorn in C++ (csrc/sinkhorn/cpu): fp32, in the exponential domain, with offsets that move when scalings grow too far."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...operations import SINKHORN, SINKHORN_BACKWARD, Transport
from ..batches import laid_out
from . import runtime
from .runtime import ORDER

SMALL = 64
"""Entries of a matrix."""


class CpuSinkhorn:
    def tape_row(self, n: int, m: int) -> int:
        """The scalings of an iteration. Of small problems the loop again costs less than reading them from memory."""
        return n + m if n * m > SMALL else 0

    def __call__(
        self, transport: Transport, iterations: int, tolerance: float, tape: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cost, a, b, epsilon, rho_a, rho_b = transport
        problems, n, m = cost.shape
        plan, u, v = _of_problems(cost)
        count = torch.empty(problems, dtype=torch.int32, device=runtime.DEVICE)
        if not problems:
            return plan, u, v, count
        inputs, strides = laid_out(cost, a, b)
        epsilon = epsilon.contiguous()
        runtime.kernels().sinkhorn(
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
    transport: Transport, tape: Tensor, count: Tensor, grad_plan: Tensor, grad_u: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    cost, a, b, epsilon, rho_a, rho_b = transport
    problems, n, m = cost.shape
    grad_cost, grad_a, grad_b = _of_problems(cost)
    if not problems:
        return grad_cost, grad_a, grad_b
    inputs, strides = laid_out(cost, a, b)
    epsilon = epsilon.contiguous()
    runtime.kernels().sinkhorn_backward(
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


def _of_problems(cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for a matrix, a row and a column of each problem."""
    problems, n, m = cost.shape
    empty = partial(torch.empty, dtype=torch.float32, device=runtime.DEVICE)
    return empty(problems, n, m), empty(problems, n), empty(problems, m)


def register_kernels() -> None:
    because = "no exponential inside the loop; small problems one to a vector lane"
    SINKHORN.register("cpu.sinkhorn", ORDER, runtime.takes_fp32, CpuSinkhorn(), because)
    because = "the exact adjoint from T (n + m) saved numbers"
    SINKHORN_BACKWARD.register("cpu.sinkhorn_backward", ORDER, runtime.takes_fp32, sinkhorn_backward, because)
