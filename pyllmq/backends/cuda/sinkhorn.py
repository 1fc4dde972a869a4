"""sinkhorn in CUDA (csrc/sinkhorn/cuda): a thread, a block or a team of blocks to a problem, all iterations in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import Support
from ...operations import SINKHORN, SINKHORN_BACKWARD, SinkhornProblem, Transport, takes
from ..batches import laid_out
from . import runtime
from .runtime import ORDER

MAX_ROWS, MAX_COLUMNS = 65536, 4096
"""A block keeps its rows' scalings and those of all columns in shared memory."""


def _call(transport: Transport, iterations: int) -> tuple[Any, list[Tensor], list[int]]:
    """(the call, tensors that must outlive it, addresses of workspace and counters and the stream). On the device of cost."""
    cost, a, b, epsilon, rho_a, rho_b = transport
    inputs, strides = laid_out(cost, a, b, epsilon)
    extension = runtime.extension()
    call = extension.SinkhornCall([tensor.data_ptr() for tensor in inputs], strides, *cost.shape, rho_a, rho_b)
    floats, counted = extension.sinkhorn_room(call, iterations)
    stream = runtime.stream(cost.device)
    workspace = torch.empty(floats, dtype=torch.float32, device=cost.device)
    counters = runtime.zero_counters(counted, cost.device, stream)
    return call, [*inputs, workspace, counters], [workspace.data_ptr(), counters.data_ptr(), stream]


class CudaSinkhorn:
    def tape_row(self, n: int, m: int) -> int:
        """The scalings of an iteration and their offsets, written only by problems whose offsets move."""
        return 2 * (n + m)

    def __call__(
        self, transport: Transport, iterations: int, tolerance: float, tape: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cost = transport.cost
        problems, n, m = cost.shape
        plan, u, v = (
            torch.empty(problems, *shape, dtype=torch.float32, device=cost.device) for shape in ((n, m), (n,), (m,))
        )
        count = torch.empty(problems, dtype=torch.int32, device=cost.device)
        if problems:
            with runtime.current(cost.device):
                call, _held, room = _call(transport, 0)
                runtime.extension().sinkhorn(
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
    transport: Transport, tape: Tensor, count: Tensor, grad_plan: Tensor, grad_u: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    cost = transport.cost
    problems, n, m = cost.shape
    grad_cost, grad_a, grad_b = (
        torch.empty(problems, *shape, dtype=torch.float32, device=cost.device) for shape in ((n, m), (n,), (m,))
    )
    if problems:
        with runtime.current(cost.device):
            call, _held, room = _call(transport, tape.shape[1])
            runtime.extension().sinkhorn_backward(
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


def has_room(n: int, m: int) -> bool:
    return runtime.extension().sinkhorn_fits(n, m)


_takes_fp32 = takes((torch.float32,), runtime.on_device)


def _fits(problem: SinkhornProblem) -> Support:
    fits, why = _takes_fp32(problem)
    if fits and not has_room(problem.n, problem.m):
        return False, (
            f"holds matrices of up to {MAX_ROWS} x {MAX_COLUMNS}, fewer columns where a block has less than 160 KiB of "
            f"shared memory; here {problem.n} x {problem.m}"
        )
    return fits, why


def register_kernels() -> None:
    because = "no exponential inside the loop, one pass and at most one meeting of blocks an iteration (predicted)"
    SINKHORN.register("cuda.sinkhorn", ORDER, _fits, CudaSinkhorn(), because)
    because = "the exact adjoint from the scalings of every iteration (predicted)"
    SINKHORN_BACKWARD.register("cuda.sinkhorn_backward", ORDER, _fits, sinkhorn_backward, because)
