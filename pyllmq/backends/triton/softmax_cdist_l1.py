"""softmax_cdist_l1 and its gradient (triton_kernels/softmax_cdist_l1.py)."""

from __future__ import annotations

from torch import Tensor

from ...operations import SOFTMAX_CDIST_L1, SOFTMAX_CDIST_L1_BACKWARD
from . import runtime
from .runtime import ORDER


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    from ...triton_kernels.softmax_cdist_l1 import softmax_cdist_l1 as run

    with runtime.on_device_of(student_logits):
        return run(student_logits.contiguous(), teacher_logits.contiguous(), temperature)


def softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    from ...triton_kernels.softmax_cdist_l1 import softmax_cdist_l1_backward as run

    grad, logits, other_logits = grad.contiguous(), logits.contiguous(), other_logits.contiguous()
    with runtime.on_device_of(logits):
        return run(grad, logits, other_logits, statistics.contiguous(), other_statistics.contiguous(), temperature)


def register_kernels() -> None:
    supports = runtime.takes_activations
    because = "two instructions a pair, no probabilities in memory (not measured)"
    SOFTMAX_CDIST_L1.register("triton.softmax_cdist_l1", ORDER, supports, softmax_cdist_l1, because)
    because = "no probabilities in memory (not measured)"
    SOFTMAX_CDIST_L1_BACKWARD.register(
        "triton.softmax_cdist_l1_backward", ORDER, supports, softmax_cdist_l1_backward, because
    )
