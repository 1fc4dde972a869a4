"""packed_rows: the format's own decoding of the rows asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import WeightOperand
from ...operations import PACKED_ROWS
from ...structure import weight_type
from .packed_linear import reads_checkpoint
from .rows import BECAUSE, ORDER


def packed_rows(weight: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    n, of_kind = weight.shape[0], weight_type(weight.kind)
    outside = (ids < 0) | (ids >= n)
    if ids.device.type == "cpu" and bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise IndexError(f"id {int(ids[place])} at place {place}; allowed: 0 to {n - 1}")
    rows = of_kind.decode_rows(of_kind.named(weight), weight.shape, ids.clamp(0, n - 1)).to(dtype)
    return rows.masked_fill(outside[:, None], torch.nan)


PACKED_ROWS.register("reference.packed_rows", ORDER, reads_checkpoint, packed_rows, BECAUSE)
