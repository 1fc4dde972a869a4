"""softmax_cdist_l1 and its gradient: one teacher row at a time, since all of them are [batch, B, C, V]."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operations import SOFTMAX_CDIST_L1, SOFTMAX_CDIST_L1_BACKWARD, Cdist, anything
from .rows import BECAUSE, ORDER


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, B, V] and [batch, C, V] -> distances [batch, B, C], and for each row (largest logit, 1 / sum of exponentials)."""
    statistics = _softmax_statistics(student_logits, temperature)
    teacher_statistics = _softmax_statistics(teacher_logits, temperature)
    student = _probabilities(student_logits, statistics, temperature)
    teacher = _probabilities(teacher_logits, teacher_statistics, temperature)
    distance = student.new_empty(*student.shape[:2], teacher.shape[1])
    for row in range(teacher.shape[1]):  # torch.cdist sums in one long chain: errors of 1e-5 at V = 50257
        distance[:, :, row] = (student - teacher[:, row, None]).abs().sum(-1)
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(grad: Tensor, sides: Cdist) -> Tensor:
    mine = _probabilities(sides.logits, sides.statistics, sides.temperature)
    other = _probabilities(sides.other_logits, sides.other_statistics, sides.temperature)
    grad_mine = torch.zeros_like(mine)
    for row in range(other.shape[1]):  # one at a time: all of them are [batch, B, C, V]
        grad_mine += grad[:, :, row, None] * (mine - other[:, row, None]).sign()
    centred = grad_mine - (mine * grad_mine).sum(-1, keepdim=True)
    return (mine * centred / sides.temperature).to(sides.logits.dtype)


def _softmax_statistics(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    largest = wide.amax(-1)
    return torch.stack([largest, 1 / ((wide - largest[..., None]) / temperature).exp().sum(-1)], -1)


def _probabilities(logits: Tensor, statistics: Tensor, temperature: float) -> Tensor:
    largest, inverse_sum = statistics[..., :1], statistics[..., 1:]
    return ((logits.to(statistics.dtype) - largest) / temperature).exp() * inverse_sum


SOFTMAX_CDIST_L1.register("reference.softmax_cdist_l1", ORDER, anything, softmax_cdist_l1, BECAUSE)
SOFTMAX_CDIST_L1_BACKWARD.register(
    "reference.softmax_cdist_l1_backward", ORDER, anything, softmax_cdist_l1_backward, BECAUSE
)
