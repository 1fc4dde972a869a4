"""softmax_cdist_l1 and its gradient: probabilities only in the cache."""

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
    _cpu = runtime.kernels()
    student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
    distance, statistics, teacher_statistics = room(student_logits, teacher_logits)
    call = bound(_cpu, Cdist(student_logits, teacher_logits, statistics, teacher_statistics, temperature))
    _cpu.softmax_cdist_l1(call, distance.data_ptr())
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(grad: Tensor, sides: Cdist) -> Tensor:
    _cpu = runtime.kernels()
    call, grad = bound(_cpu, sides), grad.contiguous()
    logits_grad = torch.empty(sides.logits.shape, dtype=sides.logits.dtype, device=runtime.DEVICE)
    _cpu.softmax_cdist_l1_backward(call, grad.data_ptr(), logits_grad.data_ptr())
    return logits_grad


supports = runtime.takes_activations
because = "two instructions a pair, probabilities only in the cache"
SOFTMAX_CDIST_L1.register("cpu.softmax_cdist_l1", ORDER, supports, softmax_cdist_l1, because)
because = "three instructions a pair, probabilities only in the cache"
SOFTMAX_CDIST_L1_BACKWARD.register("cpu.softmax_cdist_l1_backward", ORDER, supports, softmax_cdist_l1_backward, because)
