"""packed_linear, packed_dequantize and packed_rows of the format codebook (docs/kernels-cpu.md): tables of partial products, or
decoded once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...formats.codebook import CODES, pack_widths
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, PACKED_ROWS, reads
from ..checkpoints import codebook_checkpoint
from . import runtime
from .runtime import DTYPE_CODE, ORDER

from_blob = partial(runtime.from_blob, "codebook")


def prepack(field: Fields, shape: Shape) -> WeightOperand:
    _cpu = runtime.kernels()
    field = {name: tensor.contiguous() for name, tensor in field.items()}
    checkpoint = codebook_checkpoint(_cpu, field, shape)
    blob = runtime.empty_layout(_cpu.codebook_layout_bytes(checkpoint))
    _cpu.codebook_layout_pack(blob.data_ptr(), blob.numel(), checkpoint)
    return from_blob(blob, shape)


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    runtime.kernels()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=runtime.DEVICE)
    runtime.bound(weight).codes(codes.data_ptr())
    return pack_widths(codes, beside["column_bits"])


def packed_dequantize(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    operand = runtime.bound(weight)
    runtime.kernels()
    dense = torch.empty(weight.shape, dtype=dtype, device=runtime.DEVICE)
    operand.dequantize(0, weight.shape[0], dense.data_ptr(), DTYPE_CODE[dtype])
    return dense


def packed_rows(weight: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    operand = runtime.bound(weight)
    runtime.kernels()
    rows = torch.empty(ids.shape[0], weight.shape[1], dtype=dtype, device=runtime.DEVICE)
    operand.row_values(ids.data_ptr(), ids.shape[0], rows.data_ptr(), DTYPE_CODE[dtype])
    return rows


register_layout(Layout("cpu", "codebook", ORDER, CODES, runtime.serves, prepack, unpack, from_blob, runtime.settle))
supports = reads("cpu.codebook", runtime.takes_activations)
because = "tables of partial products or decode-once, by widths, tokens and precision (path_cost.h)"
PACKED_LINEAR.register("cpu.codebook_linear", ORDER, supports, runtime.packed_linear, because)
because = "decodes at the speed of the stores"
PACKED_DEQUANTIZE.register("cpu.codebook_dequantize", ORDER, supports, packed_dequantize, because)
because = "reads the codes of those rows alone"
PACKED_ROWS.register("cpu.codebook_rows", ORDER, supports, packed_rows, because)
