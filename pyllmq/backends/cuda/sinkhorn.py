"""sinkhorn in CUDA (csrc/sinkhorn/cuda): a thread, a block or a team of blocks to a problem, all iterations in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import Support
from ...operations import SINKHORN, SINKHORN_BACKWARD, Arriving, SinkhornProblem, Transport, takes
from ..batches import problem, room
from . import runtime
from .runtime import ORDER

MAX_ROWS, MAX_COLUMNS = 65536, 4096
"""A block keeps its rows' scalings and those of all columns in shared memory."""


def _call(transport: Transport, iterations: int) -> tuple[Any, dict[str, Any]]:
    """(the problem, workspace, counters and stream). On the device of cost. Only blocks that share a problem count each other:
    one large problem waits for a fill of a few words."""
    _cuda, device = runtime.extension(), transport.cost.device
    call = _cuda.SinkhornProblem(**problem(transport))
    floats, counted = _cuda.sinkhorn_room(call, iterations)
    stream = runtime.stream(device)
    workspace = torch.empty(floats, dtype=torch.float32, device=device)
    counters = torch.zeros(counted, dtype=torch.int32, device=device)
    return call, {"workspace": workspace, "counters": counters, "stream": stream}


class CudaSinkhorn:
    def tape_row(self, n: int, m: int) -> int:
        """The scalings of an iteration and their offsets, written only by problems whose offsets move."""
        return 2 * (n + m)

    def __call__(
        self, transport: Transport, iterations: int, tolerance: float, tape: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cost = transport.cost
        plan, u, v = room(cost)
        problems = transport.cost.shape[0]  # len() of a tensor asks whether torch.jit traces: 2 us
        count = torch.empty(problems, dtype=torch.int32, device=cost.device)
        if problems:
            results = {"plan": plan, "u": u, "v": v, "tape": tape, "count": count}
            with runtime.current(cost.device):
                call, around = _call(transport, 0)
                runtime.extension().sinkhorn(call, iterations=iterations, tolerance=tolerance, **results, **around)
        return plan, u, v, count


def sinkhorn_backward(transport: Transport, arriving: Arriving) -> tuple[Tensor, Tensor, Tensor]:
    grad_cost, grad_a, grad_b = room(transport.cost)
    if grad_cost.shape[0]:
        with runtime.current(grad_cost.device):
            iterations = arriving.tape.shape[1]
            call, around = _call(transport, iterations)
            given = {**arriving._asdict(), "grad_cost": grad_cost, "grad_a": grad_a, "grad_b": grad_b, **around}
            runtime.extension().sinkhorn_backward(call, iterations=iterations, **given)
    return grad_cost, grad_a, grad_b


def has_room(n: int, m: int) -> bool:
    return runtime.extension().sinkhorn_fits(n, m)


_takes_fp32 = takes((torch.float32,), runtime.on_device)


def _fits(problem: SinkhornProblem) -> Support:
    fits, why = _takes_fp32(problem)
    with runtime.on(problem.device):
        if fits and not has_room(problem.n, problem.m):
            return False, (
                f"holds matrices of up to {MAX_ROWS} x {MAX_COLUMNS}, fewer columns where a block has less than 160 KiB of "
                f"shared memory; here {problem.n} x {problem.m}"
            )
    return fits, why


because = "no exponential inside the loop, one pass and at most one meeting of blocks an iteration (predicted)"
SINKHORN.register("cuda.sinkhorn", ORDER, _fits, CudaSinkhorn(), because)
because = "the exact adjoint from the scalings of every iteration (predicted)"
SINKHORN_BACKWARD.register("cuda.sinkhorn_backward", ORDER, _fits, sinkhorn_backward, because)
