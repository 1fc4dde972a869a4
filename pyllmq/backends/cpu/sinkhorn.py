"""sinkhorn in C++ (csrc/sinkhorn/cpu): fp32, in the exponential domain, with offsets that move when scalings grow too far."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operations import SINKHORN, SINKHORN_BACKWARD, Arriving, Transport
from ..batches import problem, room
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
        plan, u, v = room(transport.cost)
        problems = transport.cost.shape[0]  # len() of a tensor asks whether torch.jit traces: 2 us
        count = torch.empty(problems, dtype=torch.int32, device=runtime.DEVICE)
        if problems:
            results = {"plan": plan, "u": u, "v": v, "tape": tape, "count": count}
            runtime.kernels().sinkhorn(**problem(transport), iterations=iterations, tolerance=tolerance, **results)
        return plan, u, v, count


def sinkhorn_backward(transport: Transport, arriving: Arriving) -> tuple[Tensor, Tensor, Tensor]:
    grad_cost, grad_a, grad_b = room(transport.cost)
    if grad_cost.shape[0]:
        tape, count = arriving.tape, arriving.count
        gradients = {"grad_cost": grad_cost, "grad_a": grad_a, "grad_b": grad_b}
        given = problem(transport) | arriving._asdict() | gradients
        iterations = tape.shape[1] if tape.numel() else int(count.abs().max())
        runtime.kernels().sinkhorn_backward(iterations=iterations, **given)
    return grad_cost, grad_a, grad_b


because = "no exponential inside the loop; small problems one to a vector lane"
SINKHORN.register("cpu.sinkhorn", ORDER, runtime.takes_fp32, CpuSinkhorn(), because)
because = "the exact adjoint from T (n + m) saved numbers"
SINKHORN_BACKWARD.register("cpu.sinkhorn_backward", ORDER, runtime.takes_fp32, sinkhorn_backward, because)
