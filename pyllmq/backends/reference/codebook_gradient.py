"""codebook_gradient: for each centroid the sum of row_scale * dL/dW over the weights that use it, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.codebook import WIDTHS, CodebookWeight
from ...formats.codes import unpack_codes
from ...layouts import WeightOperand
from ...operations import CODEBOOK_GRADIENT, anything, reads
from .rows import BECAUSE, ORDER


def codebook_gradient(weight_gradient: Tensor, weight: WeightOperand) -> Tensor:
    field = CodebookWeight.named(weight)
    column_bits = field["column_bits"].long()
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    row_segment = torch.repeat_interleave(field["segment_rows"].long())
    scaled = weight_gradient.double()
    if field["row_scale"].numel():
        scaled = scaled * field["row_scale"].double()[:, None]
    gradient = torch.zeros(field["codebook"].shape, dtype=torch.float64, device=weight_gradient.device)
    for bits in WIDTHS:
        columns = torch.nonzero(column_bits == bits).flatten()
        if columns.numel():
            codes = unpack_codes(field[f"codes_b{bits}"], bits, columns.numel()).long()
            entry = row_segment[:, None] * gradient.shape[1] + first_entry[columns] + codes
            gradient.view(-1).index_add_(0, entry.flatten(), scaled[:, columns].flatten())
    return gradient.float()


supports = reads("checkpoint.codebook", anything)
CODEBOOK_GRADIENT.register("reference.codebook_gradient", ORDER, supports, codebook_gradient, BECAUSE)
