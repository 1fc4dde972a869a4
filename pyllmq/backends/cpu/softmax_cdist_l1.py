"""softmax_cdist_l1 and its gradient: probabilities only in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operations import SOFTMAX_CDIST_L1, SOFTMAX_CDIST_L1_BACKWARD
from . import runtime
from .runtime import DTYPE_CODE, ORDER


def _cdist_arguments(
    logits: Tensor, other_logits: Tensor, statistics: Tensor, other_statistics: Tensor, temperature: float
) -> tuple[int | float, ...]:
    batch, rows, columns = logits.shape
    return (
        logits.data_ptr(),
        DTYPE_CODE[logits.dtype],
        other_logits.data_ptr(),
        DTYPE_CODE[other_logits.dtype],
        batch,
        rows,
        other_logits.shape[1],
        columns,
        1 / temperature,
        statistics.data_ptr(),
        other_statistics.data_ptr(),
    )


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
    statistics, teacher_statistics = (
        torch.empty(*logits.shape[:2], 2, dtype=torch.float32, device=runtime.DEVICE)
        for logits in (student_logits, teacher_logits)
    )
    batch, rows, _ = student_logits.shape
    distance = torch.empty(batch, rows, teacher_logits.shape[1], dtype=torch.float32, device=runtime.DEVICE)
    runtime.kernels().softmax_cdist_l1(
        *_cdist_arguments(student_logits, teacher_logits, statistics, teacher_statistics, temperature),
        distance.data_ptr(),
    )
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    logits, other_logits, grad = logits.contiguous(), other_logits.contiguous(), grad.contiguous()
    statistics, other_statistics = statistics.contiguous(), other_statistics.contiguous()
    logits_grad = torch.empty_like(logits)
    runtime.kernels().softmax_cdist_l1_backward(
        *_cdist_arguments(logits, other_logits, statistics, other_statistics, temperature),
        grad.data_ptr(),
        logits_grad.data_ptr(),
    )
    return logits_grad


def register_kernels() -> None:
    supports = runtime.takes_activations
    because = "two instructions a pair, probabilities only in the cache"
    SOFTMAX_CDIST_L1.register("cpu.softmax_cdist_l1", ORDER, supports, softmax_cdist_l1, because)
    because = "three instructions a pair, probabilities only in the cache"
    SOFTMAX_CDIST_L1_BACKWARD.register(
        "cpu.softmax_cdist_l1_backward", ORDER, supports, softmax_cdist_l1_backward, because
    )
