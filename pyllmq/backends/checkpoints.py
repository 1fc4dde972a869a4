"""Checkpoint tensors as the extensions `_cpu` and `_cuda` take them, to pack a layout or to fill them from one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ..formats.codebook import CODES
from ..layouts import Fields, Shape

SPARSE_KINDS = ("bitmap", "sparse24", "sparse24_codebook")

VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Place: ValueType in csrc/sparse/shape.h."""


def codebook_checkpoint(extension: ModuleType, field: Fields, shape: Shape) -> Any:
    """The extension's CodebookCheckpoint of contiguous tensors on the CPU; what is no number of a checkpoint may be absent."""
    outlier_columns = field.get("outlier_columns")
    names = ("column_bits", "segment_rows", "codebook", "row_scale", "outlier_row_offsets", "outlier_values")
    return extension.CodebookCheckpoint(
        rows=shape[0],
        columns=shape[1],
        segments=field["segment_rows"].numel(),
        codes=[field.get(name) for name in CODES],
        outlier_columns=outlier_columns,
        outlier_columns_bytes=2 if outlier_columns is None else outlier_columns.element_size(),
        **{name: field.get(name) for name in names},
    )


def sparse_checkpoint(extension: ModuleType, kind: str, field: Fields, shape: Shape) -> Any:
    """The extension's SparseCheckpoint of contiguous tensors on the CPU."""
    values, codebook, outliers = (field.get(name) for name in ("values", "codebook", "outlier_values"))
    numbers = field.get("columns", field.get("outlier_columns"))
    return extension.SparseCheckpoint(
        kind=kind,
        value_type=0 if values is None else VALUE_TYPES.index(values.dtype),
        rows=shape[0],
        columns=shape[1],
        kept=0 if values is None else values.numel(),
        bits=0 if codebook is None else codebook.shape[1].bit_length() - 1,
        outliers=0 if outliers is None else outliers.numel(),
        column_bytes=0 if numbers is None else numbers.element_size(),
        tensors=dict(field),
    )
