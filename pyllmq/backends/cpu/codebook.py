"""packed_linear and packed_dequantize of the format codebook: tables of partial products, or decoded once (docs/kernels-cpu.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.codebook import CODES, pack_widths
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, reads
from . import runtime
from .runtime import DTYPE_CODE, ORDER, PRECISION_CODE, address

LAYOUT = "cpu.codebook"

AUTOMATIC = 2
"""`path` of _cpu.codebook_linear (LinearPath in csrc/cpu/codebook_linear.h): tables or decoding, by a table of measured costs."""


def from_blob(blob: Tensor, shape: Shape) -> WeightOperand:
    return WeightOperand("codebook", LAYOUT, (blob,), (), shape)


def prepack(field: Fields, shape: Shape) -> WeightOperand:
    _cpu = runtime.kernels()
    field = {name: tensor.contiguous() for name, tensor in field.items()}
    rows, columns = shape
    segment_rows, outlier_columns = field["segment_rows"], field.get("outlier_columns")
    outliers = 0 if outlier_columns is None else outlier_columns.numel()
    size = _cpu.codebook_layout_bytes(
        rows, columns, field["column_bits"].data_ptr(), segment_rows.data_ptr(), segment_rows.numel(), outliers
    )
    blob = runtime.empty_layout(size)
    _cpu.codebook_layout_pack(
        blob.data_ptr(),
        size,
        rows,
        columns,
        field["column_bits"].data_ptr(),
        segment_rows.data_ptr(),
        segment_rows.numel(),
        [address(field.get(name)) for name in CODES],
        field["codebook"].data_ptr(),
        address(field.get("row_scale")),
        address(field.get("outlier_row_offsets")) if outliers else 0,
        address(outlier_columns),
        2 if outlier_columns is None else outlier_columns.element_size(),
        address(field.get("outlier_values")),
    )
    return from_blob(blob, shape)


def _checked_blob(weight: WeightOperand) -> Tensor:
    """The layout, after its header was compared with the shape that the caller believes in: kernels read x and write y by it."""
    (blob,) = weight.tensors
    shape = runtime.extension().codebook_layout_shape(blob.data_ptr(), blob.numel())
    if shape != weight.shape:
        raise ValueError(f"the layout holds a weight of shape {list(shape)}, but was given as {list(weight.shape)}")
    return blob


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    _cpu = runtime.kernels()
    blob = _checked_blob(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=runtime.DEVICE)
    _cpu.codebook_layout_codes(blob.data_ptr(), blob.numel(), codes.data_ptr())
    return pack_widths(codes, beside["column_bits"])


def packed_linear(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    blob = weight.tensors[0]
    out_features, in_features = weight.shape
    x = x.contiguous()
    tokens, dtype = x.shape[0], x.dtype
    y = x.new_empty(tokens, out_features)  # in the dtype and on the device of x; torch.empty with both costs 1 us more
    runtime.kernels().codebook_linear(
        blob.data_ptr(),
        blob.numel(),
        out_features,
        in_features,
        x.data_ptr(),
        DTYPE_CODE[dtype],
        tokens,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODE[bias.dtype],
        y.data_ptr(),
        AUTOMATIC,
        PRECISION_CODE[precision],
    )
    return y


def linear_path(weight: WeightOperand, dtype: torch.dtype, tokens: int, precision: str) -> str:
    """What `packed_linear` does for this many tokens: "tables" of partial products, or "decode" once and multiply."""
    (blob,) = weight.tensors
    return runtime.extension().codebook_linear_path(
        blob.data_ptr(), blob.numel(), DTYPE_CODE[dtype], tokens, PRECISION_CODE[precision]
    )


def packed_dequantize(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    blob = _checked_blob(weight)
    dense = torch.empty(weight.shape, dtype=dtype, device=runtime.DEVICE)
    runtime.kernels().codebook_dequantize(
        blob.data_ptr(), blob.numel(), 0, weight.shape[0], dense.data_ptr(), DTYPE_CODE[dtype]
    )
    return dense


def register_kernels() -> None:
    register_layout(Layout("cpu", "codebook", ORDER, CODES, runtime.serves, prepack, unpack, from_blob))
    supports = reads(LAYOUT, runtime.takes_activations)
    because = "tables of partial products or decode-once, by widths, tokens and precision (kPathCost)"
    PACKED_LINEAR.register("cpu.codebook_linear", ORDER, supports, packed_linear, because)
    because = "decodes at the speed of the stores"
    PACKED_DEQUANTIZE.register("cpu.codebook_dequantize", ORDER, supports, packed_dequantize, because)
