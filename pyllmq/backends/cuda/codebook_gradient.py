"""codebook_gradient: dL/dW and the codes are read once, without atomics (csrc/codebook/cuda/codebook_gradient.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.codebook import CODES, CodebookWeight
from ...layouts import WeightOperand
from ...operations import CODEBOOK_GRADIENT, reads
from . import runtime
from .runtime import DTYPE_CODE, ORDER


def codebook_gradient(weight_gradient: Tensor, weight: WeightOperand) -> Tensor:
    """Sums in fp32, in one order: the same call gives the same bits. What the kernel looks up is found on the device."""
    field = {name: t.detach().contiguous() for name, t in CodebookWeight.named(weight).items()}
    device, column_bits, scale = weight_gradient.device, field["column_bits"].long(), field["row_scale"]
    weight_gradient = weight_gradient.contiguous()
    segments, entries = field["codebook"].shape
    segment_starts = torch.nn.functional.pad(field["segment_rows"].long().cumsum(0), (1, 0))
    sorted_columns = torch.argsort(column_bits, stable=True)
    widths = torch.arange(9, device=device)
    width_starts = (column_bits[None] <= widths[:, None]).sum(1)
    first_entry = (1 << column_bits).cumsum(0) - (1 << column_bits)
    codes = [field[name] for name in CODES]
    _cuda = runtime.extension()
    call = _cuda.GradientCall(
        rows=weight.shape[0],
        columns=weight.shape[1],
        segments=segments,
        entries=entries,
        segment_starts=segment_starts,
        sorted_columns=sorted_columns,
        width_starts=width_starts,
        first_entry=first_entry,
        codes=codes,
        code_bytes=[t.shape[1] if t.numel() else 0 for t in codes],
        row_scale=scale,
        row_scale_dtype=DTYPE_CODE[scale.dtype] if scale.numel() else 0,
        weight_gradient=weight_gradient,
    )
    gradient = torch.empty(segments, entries, dtype=torch.float32, device=device)
    with runtime.current(device):
        workspace = torch.empty(_cuda.codebook_gradient_workspace(call), dtype=torch.float32, device=device)
        _cuda.codebook_gradient(call, gradient.data_ptr(), workspace.data_ptr(), runtime.stream(device))
    return gradient


supports = reads("checkpoint.codebook", runtime.on_device)
because = "reads dL/dW and codes once, no atomics (predicted: at the speed of the loads)"
CODEBOOK_GRADIENT.register("cuda.codebook_gradient", ORDER, supports, codebook_gradient, because)
