"""softmax_cdist_l1 and its gradient (csrc/softmax_cdist/cuda/softmax_cdist_l1.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operations import SOFTMAX_CDIST_L1, SOFTMAX_CDIST_L1_BACKWARD, Cdist
from ..distances import bound, room
from . import runtime
from .runtime import ORDER


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    _cuda, device = runtime.extension(), student_logits.device
    distance, statistics, teacher_statistics = room(student_logits, teacher_logits)
    if distance.numel():
        call = bound(_cuda, Cdist(student_logits, teacher_logits, statistics, teacher_statistics, temperature))
        with runtime.current(device):
            workspace = torch.empty(_cuda.softmax_cdist_l1_workspace(call), dtype=torch.float32, device=device)
            _cuda.softmax_cdist_l1(call, distance.data_ptr(), workspace.data_ptr(), runtime.stream(device))
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(grad: Tensor, sides: Cdist) -> Tensor:
    if not grad.numel():
        return torch.zeros_like(sides.logits)
    _cuda, device, grad = runtime.extension(), grad.device, grad.contiguous()
    call = bound(_cuda, sides)
    logits_grad = torch.empty(sides.logits.shape, dtype=sides.logits.dtype, device=device)
    with runtime.current(device):
        elements = _cuda.softmax_cdist_l1_backward_workspace(call)
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
        _cuda.softmax_cdist_l1_backward(
            call, grad.data_ptr(), logits_grad.data_ptr(), workspace.data_ptr(), runtime.stream(device)
        )
    return logits_grad


supports = runtime.takes_activations
because = "two instructions a pair, probabilities only in shared memory (predicted)"
SOFTMAX_CDIST_L1.register("cuda.softmax_cdist_l1", ORDER, supports, softmax_cdist_l1, because)
because = "probabilities only in registers (predicted)"
SOFTMAX_CDIST_L1_BACKWARD.register(
    "cuda.softmax_cdist_l1_backward", ORDER, supports, softmax_cdist_l1_backward, because
)
