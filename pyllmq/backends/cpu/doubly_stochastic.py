"""doubly_stochastic in C++ (csrc/sinkhorn/cpu/doubly_stochastic.h): fp32, a problem to a vector lane."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import Support
from ...operations import DOUBLY_STOCHASTIC, DOUBLY_STOCHASTIC_BACKWARD, Normalisation, SinkhornProblem
from . import runtime
from .runtime import ORDER

MAX_ENTRIES = 64
"""Of a matrix: a problem is a vector lane."""

_SHIFTS = {"none": 0, "line": 1, "matrix": 2}


def _call(logits: Tensor, how: Normalisation) -> Any:
    problems, n, m = logits.shape
    numbers = {**how._asdict(), "shift": _SHIFTS[how.shift]}
    return runtime.kernels().DoublyStochastic(logits=logits, problems=problems, n=n, m=m, **numbers)


def doubly_stochastic(logits: Tensor, how: Normalisation) -> Tensor:
    logits = logits.contiguous()
    out = torch.empty(logits.shape, dtype=torch.float32, device=runtime.DEVICE)
    runtime.kernels().doubly_stochastic(_call(logits, how), out.data_ptr())
    return out


def doubly_stochastic_backward(logits: Tensor, grad: Tensor, how: Normalisation) -> Tensor:
    logits, grad = logits.contiguous(), grad.contiguous()
    logits_grad = torch.empty(logits.shape, dtype=torch.float32, device=runtime.DEVICE)
    runtime.kernels().doubly_stochastic_backward(_call(logits, how), grad.data_ptr(), logits_grad.data_ptr())
    return logits_grad


def _few_entries(problem: SinkhornProblem) -> Support:
    if problem.n * problem.m > MAX_ENTRIES:
        return False, f"holds up to {MAX_ENTRIES} entries of a matrix, here {problem.n * problem.m}"
    return runtime.takes_fp32(problem)


because = "a problem to a vector lane, 4 x 4 in registers"
DOUBLY_STOCHASTIC.register("cpu.doubly_stochastic", ORDER, _few_entries, doubly_stochastic, because)
because = "the exact adjoint, which undoes the divisions as it goes back: no matrix is kept"
DOUBLY_STOCHASTIC_BACKWARD.register(
    "cpu.doubly_stochastic_backward", ORDER, _few_entries, doubly_stochastic_backward, because
)
