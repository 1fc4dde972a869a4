"""What the C++ and CUDA kernels of softmax_cdist_l1 read and write."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..operations import ACTIVATION_DTYPES, Cdist


def room(logits: Tensor, other_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distances [batch, rows, other rows], statistics [batch, rows, 2] of either side), uninitialised."""
    batch, rows, _ = logits.shape
    others = other_logits.shape[1]
    one = logits if logits.dtype == torch.float32 else logits.new_empty(0, dtype=torch.float32)
    return one.new_empty(batch, rows, others), one.new_empty(batch, rows, 2), one.new_empty(batch, others, 2)


def bound(extension: ModuleType, sides: Cdist) -> Any:
    """The extension's Cdist, the sides x and y; it keeps the tensors alive. Statistics that are written must be contiguous."""
    logits, other_logits, statistics, other_statistics, temperature = sides
    batch, rows, columns = logits.shape
    return extension.Cdist(
        x=logits.contiguous(),
        x_dtype=ACTIVATION_DTYPES.index(logits.dtype),
        y=other_logits.contiguous(),
        y_dtype=ACTIVATION_DTYPES.index(other_logits.dtype),
        batch=batch,
        x_rows=rows,
        y_rows=other_logits.shape[1],
        columns=columns,
        scale=1 / temperature,
        x_statistics=statistics.contiguous(),
        y_statistics=other_statistics.contiguous(),
    )
