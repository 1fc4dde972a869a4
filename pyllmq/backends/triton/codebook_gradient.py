"""codebook_gradient (triton_kernels/codebook_gradient.py)."""

from __future__ import annotations

from torch import Tensor

from ...formats.codebook import CodebookWeight
from ...layouts import WeightOperand
from ...operations import CODEBOOK_GRADIENT, reads
from . import runtime
from .runtime import ORDER


def codebook_gradient(weight_gradient: Tensor, weight: WeightOperand) -> Tensor:
    field = CodebookWeight.named(weight)
    return runtime.launch("codebook_gradient.codebook_gradient", weight_gradient, weight_gradient, field)


supports = reads("checkpoint.codebook", runtime.on_device)
because = "sums in registers, 16 centroids at a time, no atomics (predicted, not measured)"
CODEBOOK_GRADIENT.register("triton.codebook_gradient", ORDER, supports, codebook_gradient, because)
