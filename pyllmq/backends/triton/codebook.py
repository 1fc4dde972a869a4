"""packed_linear, packed_dequantize and packed_rows of the format codebook: codes transposed (triton_kernels/codebook_decode.py),
and for each width a table of its columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.codebook import CODES, WIDTHS
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, PACKED_ROWS, reads
from . import runtime
from .runtime import ORDER

LAYOUT = "triton.codebook"
_MAGIC, _VERSION = 0x54524C50, 1
_HEADER = ("magic", "version", "rows", "columns", "segments", "outliers", "row_scale", "wide_outlier_columns")

Section = tuple[tuple[int, ...], torch.dtype]


# ---- the layout -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """The columns of one width; a slot is a place among them."""

    codes: Tensor
    """uint8 [ceil(slots * bits / 8), N], the checkpoint's codes transposed."""
    columns: Tensor
    """int32 [slots]: the column of each slot."""
    codebook: Tensor
    """fp16 [segments, slots, 2**bits]."""

    @property
    def slots(self) -> int:
        return self.columns.shape[0]

    @property
    def one_segment(self) -> bool:
        return self.codebook.shape[0] == 1

    @property
    def bits(self) -> int:
        return self.codebook.shape[2].bit_length() - 1


@dataclass(frozen=True, eq=False)
class CodebookLayout:
    """The tensors of an operand by name; absent ones are empty."""

    blob: Tensor
    row_segment: Tensor
    row_scale: Tensor
    outlier_row_offsets: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor
    outlier_replaced: Tensor
    """fp16 [outliers]: the centroid that the code under each outlier says."""
    groups: tuple[Group, ...]
    """One for each width that occurs, narrow to wide."""
    out_features: int
    in_features: int

    @classmethod
    def of(cls, weight: WeightOperand) -> CodebookLayout:
        blob, row_segment, row_scale, row_offsets, columns, values, replaced, *rest = weight.tensors
        groups = tuple(Group(*rest[i : i + 3]) for i in range(0, len(rest), 3))
        outliers = (row_offsets, columns, values, replaced)
        return cls(blob, row_segment, row_scale, *outliers, groups, *weight.shape)

    @property
    def outliers(self) -> int:
        return self.outlier_values.shape[0]

    @property
    def has_row_scale(self) -> bool:
        return self.row_scale.shape[0] > 0


def _sections(header: list[int]) -> list[Section]:
    """(shape, dtype) of every tensor in the blob, in order, behind the header."""
    _, _, rows, columns, segments, outliers, row_scale, wide, *counts = header
    sections: list[Section] = [
        ((rows,), torch.int32),
        ((rows * row_scale,), torch.float16),
        ((rows + 1 if outliers else 0,), torch.int32),
        ((outliers,), torch.int32 if wide else torch.uint16),
        ((outliers,), torch.float16),
        ((outliers,), torch.float16),
    ]
    for bits, count in zip(WIDTHS, counts, strict=True):
        if count:
            sections.append(((-(-count * bits // 8), rows), torch.uint8))
            sections.append(((count,), torch.int32))
            sections.append(((segments, count, 1 << bits), torch.float16))
    return sections


def _header_bytes() -> int:
    return runtime.aligned(8 * (len(_HEADER) + len(WIDTHS)))


def from_blob(blob: Tensor, shape: Shape) -> WeightOperand:
    """Raises ValueError if the blob is no such layout, is cut off, or holds a weight of another shape."""
    words = len(_HEADER) + len(WIDTHS)
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() < _header_bytes():
        raise ValueError(
            f"a layout {LAYOUT!r} is a uint8 vector of at least {_header_bytes()} bytes, given: {blob.dtype} {tuple(blob.shape)}"
        )
    header = blob[: 8 * words].view(torch.int64).tolist()
    if header[:2] != [_MAGIC, _VERSION]:
        raise ValueError(f"this blob is no layout {LAYOUT!r} of version {_VERSION}: it begins with {header[:2]}")
    if header[2:4] != list(shape):
        raise ValueError(f"the layout holds a weight of shape {header[2:4]}, but was given as {list(shape)}")
    views = runtime.blob_views(blob, _header_bytes(), _sections(header))
    return WeightOperand("codebook", LAYOUT, (blob, *views), (), shape)


def prepack(field: Fields, shape: Shape) -> WeightOperand:
    column_bits, segment_rows = field["column_bits"].long(), field["segment_rows"].long()
    counts = torch.bincount(column_bits, minlength=9)[1:9].tolist()
    outliers = field["outlier_values"].numel() if "outlier_values" in field else 0
    wide = bool(outliers) and field["outlier_columns"].dtype == torch.int32
    header = [_MAGIC, _VERSION, *shape, len(segment_rows), outliers, int("row_scale" in field), int(wide), *counts]
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in _sections(header))
    nbytes = _header_bytes() + sum(runtime.aligned(size) for size in sizes)
    blob = torch.zeros(nbytes, dtype=torch.uint8, device=column_bits.device)
    runtime.write_header(blob, header)
    packed = from_blob(blob, shape)
    layout = CodebookLayout.of(packed)

    layout.row_segment.copy_(torch.repeat_interleave(segment_rows))
    if layout.has_row_scale:
        layout.row_scale.copy_(field["row_scale"])
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    for group in layout.groups:
        columns_of = torch.nonzero(column_bits == group.bits).flatten()
        group.codes.copy_(field[f"codes_b{group.bits}"].T)
        group.columns.copy_(columns_of)
        entry = first_entry[columns_of, None] + torch.arange(1 << group.bits, device=blob.device)
        group.codebook.copy_(field["codebook"][:, entry])
    if outliers:
        layout.outlier_row_offsets.copy_(field["outlier_row_offsets"])
        layout.outlier_columns.copy_(field["outlier_columns"])
        layout.outlier_values.copy_(field["outlier_values"])
        layout.outlier_replaced.copy_(_centroids_under_outliers(layout))
    return packed


def _centroids_under_outliers(layout: CodebookLayout) -> Tensor:
    row = torch.repeat_interleave(layout.outlier_row_offsets.long().diff())
    column = layout.outlier_columns.int()
    found = torch.empty_like(layout.outlier_values)
    for group in layout.groups:
        here = torch.isin(column, group.columns)
        slot, of_row = torch.searchsorted(group.columns, column[here]), row[here]
        bit, last = slot * group.bits, group.codes.shape[0] - 1
        two_bytes = group.codes[bit // 8, of_row].int() | group.codes[(bit // 8 + 1).clamp_max(last), of_row].int() << 8
        code = two_bytes >> bit % 8 & (1 << group.bits) - 1
        found[here] = group.codebook[layout.row_segment[of_row].long(), slot, code.long()]
    return found


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    layout = CodebookLayout.of(weight)
    return {f"codes_b{group.bits}": group.codes.T.contiguous() for group in layout.groups}


# ---- kernels --------------------------------------------------------------------------------------------------------


def packed_linear(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """Sums in fp32 whatever `precision` says: a GPU gains nothing from coarser tables."""
    from ...triton_kernels.codebook_linear import codebook_linear as run

    if not x.shape[0]:
        return x.new_empty(0, weight.shape[0])
    with runtime.on_device_of(x):
        return run(x.contiguous(), CodebookLayout.of(weight), bias)


def packed_dequantize(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    from ...triton_kernels.codebook_dequantize import codebook_dequantize as run

    with runtime.on_device_of(weight.tensors[0]):
        return run(CodebookLayout.of(weight), dtype)


def packed_rows(weight: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    from ...triton_kernels.codebook_rows import codebook_rows as run

    with runtime.on_device_of(ids):
        return run(CodebookLayout.of(weight), ids, dtype)


def decode_and_matmul(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """The weight decoded to x's dtype, then torch's matmul. Where that dtype cannot hold a decoded weight it is rounded."""
    dense = packed_dequantize(weight, x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def register_kernels() -> None:
    register_layout(Layout("triton", "codebook", ORDER, CODES, runtime.serves, prepack, unpack, from_blob))
    because = "decodes on the way to the multiplication (limit predicted, not measured)"
    few = reads(LAYOUT, runtime.on_device, runtime.MAX_FUSED_TOKENS)
    PACKED_LINEAR.register("triton.fused", ORDER, few, packed_linear, because)
    any_number = reads(LAYOUT, runtime.on_device)
    because = "decoding is paid once for all tokens"
    PACKED_LINEAR.register("triton.decode_and_matmul", ORDER + 1, any_number, decode_and_matmul, because)
    because = "one pass over the codes, on any GPU that Triton knows"
    PACKED_DEQUANTIZE.register("triton.dequantize", ORDER, any_number, packed_dequantize, because)
    because = "reads the codes of those rows, by lines of neighbouring rows"
    PACKED_ROWS.register("triton.rows", ORDER, any_number, packed_rows, because)
