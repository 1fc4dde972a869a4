"""packed_linear, packed_dequantize and packed_rows of the format codebook: codes transposed (triton_kernels/codebook_decode.py),
and for each width a table of its columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.codebook import CODES, WIDTHS
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, PACKED_ROWS, reads
from ...structure import OUTLIER_KEYS
from . import runtime
from .runtime import ORDER, Blob, LayoutKernels, Section, outlier_sections, outlier_words

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


def _sections(rows: int, columns: int, header: list[int]) -> list[Section]:
    segments, row_scale, outliers, wide, *counts = header
    sections: list[Section] = [((rows,), torch.int32), ((rows * row_scale,), torch.float16)]
    sections += outlier_sections(rows, outliers, wide)
    for bits, count in zip(WIDTHS, counts, strict=True):
        if count:
            sections.append(((-(-count * bits // 8), rows), torch.uint8))
            sections.append(((count,), torch.int32))
            sections.append(((segments, count, 1 << bits), torch.float16))
    return sections


_BLOB = Blob("codebook", 4 + len(WIDTHS), _sections)
from_blob = _BLOB.open


def prepack(field: Fields, shape: Shape) -> WeightOperand:
    column_bits, segment_rows = field["column_bits"].long(), field["segment_rows"].long()
    counts = torch.bincount(column_bits, minlength=9)[1:9].tolist()
    header = [len(segment_rows), int("row_scale" in field), *outlier_words(field), *counts]
    packed = _BLOB.make(shape, header, column_bits.device)
    layout = CodebookLayout.of(packed)

    layout.row_segment.copy_(torch.repeat_interleave(segment_rows))
    if layout.has_row_scale:
        layout.row_scale.copy_(field["row_scale"])
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    for group in layout.groups:
        columns_of = torch.nonzero(column_bits == group.bits).flatten()
        group.codes.copy_(field[f"codes_b{group.bits}"].T)
        group.columns.copy_(columns_of)
        entry = first_entry[columns_of, None] + torch.arange(1 << group.bits, device=layout.blob.device)
        group.codebook.copy_(field["codebook"][:, entry])
    if layout.outliers:
        for name in OUTLIER_KEYS:
            getattr(layout, name).copy_(field[name])
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


KERNELS = LayoutKernels(CodebookLayout.of, "codebook_linear.codebook_linear", "codebook_dequantize.codebook_dequantize")


def packed_rows(weight: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return runtime.launch("codebook_rows.codebook_rows", ids, CodebookLayout.of(weight), ids, dtype)


register_layout(Layout("triton", "codebook", ORDER, CODES, runtime.serves, prepack, unpack, from_blob))
because = "decodes on the way to the multiplication (limit predicted, not measured)"
few = reads(_BLOB.name, runtime.on_device, runtime.MAX_FUSED_TOKENS)
PACKED_LINEAR.register("triton.fused", ORDER, few, KERNELS.packed_linear, because)
any_number = reads(_BLOB.name, runtime.on_device)
because = "decoding is paid once for all tokens"
PACKED_LINEAR.register("triton.decode_and_matmul", ORDER + 1, any_number, KERNELS.decode_and_matmul, because)
because = "one pass over the codes, on any GPU that Triton knows"
PACKED_DEQUANTIZE.register("triton.dequantize", ORDER, any_number, KERNELS.packed_dequantize, because)
because = "reads the codes of those rows, by lines of neighbouring rows"
PACKED_ROWS.register("triton.rows", ORDER, any_number, packed_rows, because)
