"""packed_linear and packed_dequantize of the sparse formats: kernels for GPUs, compiled at the first call (docs/kernels-triton.md).

The views of a layout's blob:

    sparse24            values [2, G, N] (first and second of each group), positions [ceil(G / 2), N], scale
    sparse24_codebook   values: codes of b bits uint8 [2, ceil(G b / 8), N], positions, codebook, outliers as (value, what the code
                        under it says)
    bitmap              values as in the checkpoint, masks int32 [ceil(K / 32), N], ranks [ceil(K / 32), N] (how many values of
                        the row stand before a word), row offsets, scale
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...formats.codes import pack_codes, unpack_codes
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, reads
from ...structure import OUTLIER_KEYS, weight_type
from ..checkpoints import SPARSE_KINDS
from . import runtime
from .runtime import ORDER, Blob, LayoutKernels, Section, outlier_sections, outlier_words

_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class SparseLayout:
    """The tensors of an operand by name, in their order; those that the format lacks are empty."""

    blob: Tensor
    values: Tensor
    positions: Tensor
    masks: Tensor
    ranks: Tensor
    row_offsets: Tensor
    scale: Tensor
    codebook: Tensor
    outlier_row_offsets: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor
    outlier_replaced: Tensor
    out_features: int
    in_features: int

    @classmethod
    def of(cls, weight: WeightOperand) -> SparseLayout:
        parts: Any = (*weight.tensors, *weight.shape)
        return cls(*parts)

    @property
    def is_24(self) -> bool:
        return self.positions.numel() > 0

    @property
    def has_scale(self) -> bool:
        return self.scale.shape[0] > 0

    @property
    def bits(self) -> int:
        """Of a code; 0 where `values` are values."""
        return self.codebook.shape[1].bit_length() - 1 if self.codebook.numel() else 0

    @property
    def outliers(self) -> int:
        return self.outlier_values.shape[0]


def _sections(rows: int, columns: int, header: list[int]) -> list[Section]:
    is_24, kept, value_type, has_scale, bits, outliers, wide = header
    groups, words, dtype = -(-columns // 4), -(-columns // 32), _VALUE_TYPES[value_type]
    scale = ((rows * has_scale,), torch.float32)
    none, none_int = ((0,), torch.uint8), ((0,), torch.int32)
    codebook = ((columns, 1 << bits) if bits else (0,), torch.float16)
    coded = [codebook, *outlier_sections(rows, outliers, wide)]
    if is_24:
        values = ((2, -(-groups * bits // 8) if bits else groups, rows), dtype)
        return [values, ((-(-groups // 2), rows), torch.uint8), none_int, none_int, none_int, scale, *coded]
    ranks = ((words, rows), torch.uint16 if columns < 1 << 16 else torch.int32)
    return [((kept,), dtype), none, ((words, rows), torch.int32), ranks, ((rows + 1,), torch.int32), scale, *coded]


def prepack(blob: Blob, field: Fields, shape: Shape) -> WeightOperand:
    codes, scale = "codes" in field, field.get("scale")
    values = field["codes" if codes else "values"]
    header = [int(blob.kind != "bitmap"), values.numel(), _VALUE_TYPES.index(values.dtype), int(scale is not None)]
    header += [field["codebook"].shape[1].bit_length() - 1 if codes else 0, *outlier_words(field)]
    packed = blob.make(shape, header, values.device)
    layout = SparseLayout.of(packed)
    if scale is not None:
        layout.scale.copy_(scale)
    if layout.is_24:
        layout.positions.copy_(field["positions"].T)
    if codes:
        _copy_codes(layout, field)
        return packed
    if layout.is_24:
        layout.values.copy_(values.view(shape[0], -1, 2).permute(2, 1, 0))
        return packed
    layout.values.copy_(values)
    layout.row_offsets.copy_(field["row_offsets"])
    words = _mask_bytes(field, shape).view(torch.int32)
    layout.masks.copy_(words.T)
    set_bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1).sum(-1)
    layout.ranks.copy_((set_bits.cumsum(1) - set_bits).T)
    return packed


def _copy_codes(layout: SparseLayout, field: Fields) -> None:
    rows, groups = layout.out_features, -(-layout.in_features // 4)
    codes = unpack_codes(field["codes"], layout.bits, 2 * groups).view(rows, groups, 2)
    for kept in (0, 1):
        layout.values[kept].copy_(pack_codes(codes[:, :, kept], layout.bits).T)
    layout.codebook.copy_(field["codebook"])
    if not layout.outliers:
        return
    for name in OUTLIER_KEYS:
        getattr(layout, name).copy_(field[name])
    row = torch.repeat_interleave(field["outlier_row_offsets"].long().diff())
    column = field["outlier_columns"].long()
    group = column // 4
    place = field["positions"][row, group // 2] >> group % 2 * 4
    layout.outlier_replaced.zero_()
    for kept in (0, 1):
        here = (place >> 2 * kept & 3) == column % 4
        code = codes[row[here], group[here], kept].long()
        layout.outlier_replaced[here] = layout.codebook[column[here], code]


def _mask_bytes(field: Fields, shape: Shape) -> Tensor:
    """uint8 [rows, bytes], bytes a multiple of four."""
    rows, columns = shape
    words = -(-columns // 32)
    if "mask" in field:
        mask = field["mask"]
        return torch.nn.functional.pad(mask, (0, 4 * words - mask.shape[1]))
    bits = torch.zeros(rows, 32 * words, dtype=torch.uint8, device=field["columns"].device)
    bits[torch.repeat_interleave(field["row_offsets"].long().diff()), field["columns"].long()] = 1
    return pack_codes(bits, 1)


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    layout = SparseLayout.of(weight)
    if layout.bits:
        return _checkpoint_of_codes(layout, shapes)
    found = {"scale": layout.scale.clone()} if layout.has_scale else {}
    if layout.is_24:
        values = layout.values.permute(2, 1, 0).reshape(weight.shape[0], -1).contiguous()
        return found | {"values": values, "positions": layout.positions.T.contiguous()}
    found |= {"values": layout.values.clone(), "row_offsets": layout.row_offsets.clone()}
    mask = layout.masks.T.contiguous().view(torch.uint8)[:, : -(-weight.shape[1] // 8)].contiguous()
    if "mask" in shapes:
        return found | {"mask": mask}
    kept = unpack_codes(mask, 1, weight.shape[1])
    return found | {"columns": torch.nonzero(kept)[:, 1].to(shapes["columns"][1])}


def _checkpoint_of_codes(layout: SparseLayout, shapes: Shapes) -> dict[str, Tensor]:
    groups = -(-layout.in_features // 4)
    kept = [unpack_codes(half.T, layout.bits, groups) for half in layout.values]
    found = {
        "codes": pack_codes(torch.stack(kept, 2).view(layout.out_features, -1), layout.bits),
        "positions": layout.positions.T.contiguous(),
    }
    return found | {name: getattr(layout, name).clone() for name in shapes if name not in found}


# ---- kernels --------------------------------------------------------------------------------------------------------


KERNELS = LayoutKernels(SparseLayout.of, "sparse_linear.sparse_linear", "sparse_linear.sparse_dequantize")


for kind in SPARSE_KINDS:
    blob = Blob(kind, 7, _sections)
    holds, make, layout = weight_type(kind).fields, partial(prepack, blob), blob.name
    register_layout(Layout("triton", kind, ORDER, holds, runtime.serves, make, unpack, blob.open))
    few, any_number = reads(layout, runtime.on_device, runtime.MAX_FUSED_TOKENS), reads(layout, runtime.on_device)
    because = "spreads on the way to the multiplication (limit predicted, not measured)"
    PACKED_LINEAR.register(f"{layout}_fused", ORDER, few, KERNELS.packed_linear, because)
    because = "spreading is paid once for all tokens"
    PACKED_LINEAR.register(f"{layout}_matmul", ORDER + 1, any_number, KERNELS.decode_and_matmul, because)
    because = "one pass over the packed weight"
    PACKED_DEQUANTIZE.register(f"{layout}_dequantize", ORDER, any_number, KERNELS.packed_dequantize, because)
