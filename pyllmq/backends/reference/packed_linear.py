"""packed_linear and packed_dequantize of every format that is registered, by the format's own `decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Support
from ...layouts import CHECKPOINT, WeightOperand
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, WeightProblem
from ...structure import weight_type
from .rows import BECAUSE, ORDER


def packed_dequantize(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    of_kind = weight_type(weight.kind)
    return of_kind.decode(of_kind.named(weight), weight.shape).to(dtype)


def packed_linear(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """Multiplied and summed in fp32, whatever the precision asked."""
    y = x.float() @ packed_dequantize(weight, torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def reads_checkpoint(problem: WeightProblem) -> Support:
    if not problem.layout.startswith(f"{CHECKPOINT}."):
        return False, f"reads the layouts '{CHECKPOINT}.*', this weight is prepacked as {problem.layout!r}"
    return True, ""


PACKED_LINEAR.register("reference.packed_linear", ORDER, reads_checkpoint, packed_linear, BECAUSE)
PACKED_DEQUANTIZE.register("reference.packed_dequantize", ORDER, reads_checkpoint, packed_dequantize, BECAUSE)
