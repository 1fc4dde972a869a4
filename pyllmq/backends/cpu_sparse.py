"""The C++ back end's sparse formats: three layouts of one kind, made once when a layer is loaded (csrc/sparse/cpu/layout.h).

A layout is one uint8 blob that starts with a header and holds everything but the bias. See docs/kernels-sparse.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import (
    BITMAP,
    BITMAP_FIELDS,
    SPARSE24,
    SPARSE24_CODEBOOK,
    SPARSE24_CODEBOOK_FIELDS,
    SPARSE24_FIELDS,
    Kernel,
    WeightOperand,
    reads,
    register,
)
from . import cpu

NAME = "cpu"
DEVICE = "cpu"
LAYOUTS = {BITMAP: "cpu.bitmap", SPARSE24: "cpu.sparse24", SPARSE24_CODEBOOK: "cpu.sparse24_codebook"}
"""Checkpoint layout -> machine layout."""

FEW_KEPT = {"scalar": 0.12, "avx2": 0.22, "avx512": 0.12, "amx": 0.12}
"""A bitmap that keeps a smaller share of its weights is laid out as column numbers: gathers cost by the kept weight, masks by
the weight, and most with AVX2. 4096 x 4096, M = 1, masks and numbers in the same run: with AVX2 at 20 % kept 1229 and 989 us in
fp32, 1108 and 726 in bf16, but at 30 % 1159 and 1049 for 5.8 and 9.6 bits a weight; with AVX-512 at 15 % 529 and 488, at 10 %
482 and 360. AMX multiplies what masks spread, not column numbers: 512 tokens in bf16 at 15 % take 14 ms and 72."""

_FIELDS = {BITMAP: BITMAP_FIELDS, SPARSE24: SPARSE24_FIELDS, SPARSE24_CODEBOOK: SPARSE24_CODEBOOK_FIELDS}
_VALUE_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def available() -> tuple[bool, str]:
    return cpu.available()


def prepack(operand: WeightOperand) -> WeightOperand:
    """Checkpoint layout -> machine layout. The checkpoint tensors are read, not kept."""
    field = {
        name: tensor.contiguous()
        for name, tensor in zip(_FIELDS[operand.layout], operand.tensors, strict=True)
        if tensor.numel()
    }
    checkpoint = _checkpoint(operand.layout, field, operand.out_features, operand.in_features)
    _cpu = cpu.kernels()
    few_kept = FEW_KEPT[_cpu.isa()]
    size = _cpu.sparse_layout_bytes(checkpoint, few_kept)
    blob = cpu.empty_layout(size)
    _cpu.sparse_layout_pack(blob.data_ptr(), size, checkpoint, few_kept)
    return WeightOperand(LAYOUTS[operand.layout], (blob,), operand.out_features, operand.in_features)


def _checkpoint(kind: str, field: dict[str, Tensor], rows: int, columns: int) -> Any:
    values, codebook, outliers = (field.get(name) for name in ("values", "codebook", "outlier_values"))
    numbers = field.get("columns", field.get("outlier_columns"))
    return cpu.kernels().SparseCheckpoint(
        kind=kind,
        value_type=0 if values is None else _VALUE_TYPE[values.dtype],
        rows=rows,
        columns=columns,
        kept=0 if values is None else values.numel(),
        bits=0 if codebook is None else codebook.shape[1].bit_length() - 1,
        outliers=0 if outliers is None else outliers.numel(),
        column_bytes=0 if numbers is None else numbers.element_size(),
        tensors={name: tensor.data_ptr() for name, tensor in field.items()},
    )


def unpack_layout(operand: WeightOperand, shapes: Shapes) -> dict[str, Tensor]:
    """Exactly the tensors that were prepacked, whose shapes and dtypes are `shapes`."""
    (blob,) = operand.tensors
    kind = next(checkpoint for checkpoint, layout in LAYOUTS.items() if layout == operand.layout)
    field = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()}
    checkpoint = _checkpoint(kind, field, operand.out_features, operand.in_features)
    cpu.bound("SparseOperand", blob, operand.out_features, operand.in_features).unpack(checkpoint)
    return field


def sparse_linear(
    x: Tensor, tensors: list[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    return cpu.run_linear("SparseOperand", x, tensors[0], out_features, in_features, bias, precision)


def sparse_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    cpu.kernels()
    operand = cpu.bound("SparseOperand", tensors[0], out_features, in_features)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=DEVICE)
    operand.dequantize(weight.data_ptr(), cpu.DTYPE_CODE[dtype])
    return weight


_BECAUSE = "the packed weight is read once for few tokens; expanded to the L1 cache and multiplied for more"


def register_kernels() -> None:
    for kind, layout in LAYOUTS.items():
        supports = reads(layout, cpu._takes_dtype)
        register(Kernel(f"{kind}_linear", f"cpu.{kind}_linear", supports, sparse_linear, _BECAUSE))
        register(Kernel(f"{kind}_dequantize", f"cpu.{kind}_dequantize", supports, sparse_dequantize, _BECAUSE))
