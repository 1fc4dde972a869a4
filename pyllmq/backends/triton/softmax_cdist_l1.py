"""softmax_cdist_l1 and its gradient (triton_kernels/softmax_cdist_l1.py)."""

from __future__ import annotations

from torch import Tensor

from ...operations import SOFTMAX_CDIST_L1, SOFTMAX_CDIST_L1_BACKWARD, Cdist
from . import runtime
from .runtime import ORDER


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    given = (student_logits, teacher_logits, temperature)
    return runtime.launch("softmax_cdist_l1.softmax_cdist_l1", student_logits, *given)


def softmax_cdist_l1_backward(grad: Tensor, sides: Cdist) -> Tensor:
    return runtime.launch("softmax_cdist_l1.softmax_cdist_l1_backward", grad, grad, *sides)


supports = runtime.takes_activations
because = "two instructions a pair, no probabilities in memory (not measured)"
SOFTMAX_CDIST_L1.register("triton.softmax_cdist_l1", ORDER, supports, softmax_cdist_l1, because)
because = "no probabilities in memory (not measured)"
SOFTMAX_CDIST_L1_BACKWARD.register(
    "triton.softmax_cdist_l1_backward", ORDER, supports, softmax_cdist_l1_backward, because
)
