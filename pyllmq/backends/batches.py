"""How the C++ and CUDA kernels of sinkhorn read a batch: in place where its problems share one tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..operations import Transport


def problem(transport: Transport) -> dict[str, Any]:
    """The fields of SinkhornProblem (csrc/sinkhorn/problem.h)."""
    problems, n, m = transport.cost.shape
    fields: dict[str, Any] = {"problems": problems, "n": n, "m": m, "rho_a": transport.rho_a, "rho_b": transport.rho_b}
    for name, tensor in zip(("cost", "a", "b", "epsilon"), transport[:4], strict=True):
        fields[name], fields[name + "_stride"] = _laid_out(tensor)
    return fields


def room(cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, a row and a column of each problem, uninitialised."""
    problems, n, m = cost.shape  # torch.empty with dtype and device takes 1 us more for each
    return cost.new_empty(problems, n, m), cost.new_empty(problems, n), cost.new_empty(problems, m)


def _laid_out(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor as the kernel reads it, and how far its problems lie apart: 0 where all share one."""
    if tensor.is_contiguous():
        return tensor, tensor.stride(0)
    if tensor.shape[0] > 1 and tensor.stride(0) == 0:
        return tensor if tensor.dim() == 2 and tensor.stride(1) == 1 else tensor[0].contiguous(), 0
    tensor = tensor.contiguous()
    return tensor, tensor.stride(0)
