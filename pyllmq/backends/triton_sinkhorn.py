"""sinkhorn in Triton (triton_kernels/sinkhorn.py): matrices that one program holds in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Kernel, Problem, Support, register
from . import triton

MAX_ENTRIES = 16384
"""Of one matrix; triton_kernels/sinkhorn.py says why."""


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
    from ..triton_kernels.sinkhorn import sinkhorn as run

    cost, a, b, epsilon = (tensor.contiguous() for tensor in (cost, a, b, epsilon))
    with torch.cuda.device_of(cost):
        return run(cost, a, b, epsilon, iterations, tolerance, rho_a, rho_b, tape)


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
    from ..triton_kernels.sinkhorn import sinkhorn_backward as run

    cost, a, b, epsilon = (tensor.contiguous() for tensor in (cost, a, b, epsilon))
    with torch.cuda.device_of(cost):
        return run(cost, a, b, epsilon, tape, count, grad_plan, grad_u, grad_v, rho_a, rho_b)


def _in_registers(problem: Problem) -> Support:
    if problem.device != triton.DEVICE:
        return False, f"needs tensors on {triton.DEVICE}, these are on {problem.device}"
    if problem.dtype != torch.float32:
        return False, f"computes in fp32, asked for {problem.dtype}"
    if problem.tokens > MAX_ENTRIES:
        return False, f"holds up to {MAX_ENTRIES} entries of a matrix (padded to powers of two), here {problem.tokens}"
    return triton.available()


def register_kernels() -> None:
    for op, run in (("sinkhorn", sinkhorn), ("sinkhorn_backward", sinkhorn_backward)):
        because = "all iterations in one launch, the matrix in registers (limit predicted, not measured)"
        register(Kernel(op, f"triton.{op}", _in_registers, run, because))
