"""softmax_cdist_l1 and its gradient (csrc/softmax_cdist/cuda/softmax_cdist_l1.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...operations import SOFTMAX_CDIST_L1, SOFTMAX_CDIST_L1_BACKWARD
from . import runtime
from .runtime import DTYPE_CODE, ORDER


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
    device, (batch, rows, _) = student_logits.device, student_logits.shape
    statistics, teacher_statistics = (
        torch.empty(*logits.shape[:2], 2, dtype=torch.float32, device=device)
        for logits in (student_logits, teacher_logits)
    )
    distance = torch.empty(batch, rows, teacher_logits.shape[1], dtype=torch.float32, device=device)
    if distance.numel():
        _cuda = runtime.extension()
        call = _cdist_call(student_logits, teacher_logits, statistics, teacher_statistics, temperature)
        with runtime.current(device):
            workspace = torch.empty(_cuda.softmax_cdist_l1_workspace(call), dtype=torch.float32, device=device)
            _cuda.softmax_cdist_l1(call, distance.data_ptr(), workspace.data_ptr(), runtime.stream(device))
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    if not grad.numel():
        return torch.zeros_like(logits)
    logits, other_logits, grad = logits.contiguous(), other_logits.contiguous(), grad.contiguous()
    device = logits.device
    _cuda = runtime.extension()
    call = _cdist_call(logits, other_logits, statistics.contiguous(), other_statistics.contiguous(), temperature)
    logits_grad = torch.empty(logits.shape, dtype=logits.dtype, device=device)
    with runtime.current(device):
        elements = _cuda.softmax_cdist_l1_backward_workspace(call)
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
        _cuda.softmax_cdist_l1_backward(
            call, grad.data_ptr(), logits_grad.data_ptr(), workspace.data_ptr(), runtime.stream(device)
        )
    return logits_grad


def _cdist_call(
    logits: Tensor, other_logits: Tensor, statistics: Tensor, other_statistics: Tensor, temperature: float
) -> Any:
    return runtime.extension().CdistCall(
        logits.data_ptr(),
        DTYPE_CODE[logits.dtype],
        other_logits.data_ptr(),
        DTYPE_CODE[other_logits.dtype],
        logits.shape[0],
        logits.shape[1],
        other_logits.shape[1],
        logits.shape[2],
        1 / temperature,
        statistics.data_ptr(),
        other_statistics.data_ptr(),
    )


def register_kernels() -> None:
    supports = runtime.takes_activations
    because = "two instructions a pair, probabilities only in shared memory (predicted)"
    SOFTMAX_CDIST_L1.register("cuda.softmax_cdist_l1", ORDER, supports, softmax_cdist_l1, because)
    because = "probabilities only in registers (predicted)"
    SOFTMAX_CDIST_L1_BACKWARD.register(
        "cuda.softmax_cdist_l1_backward", ORDER, supports, softmax_cdist_l1_backward, because
    )
