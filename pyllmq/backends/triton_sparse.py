"""The Triton back end's sparse formats: kernels for GPUs, compiled at the first call. See docs/kernels-triton.md.

A machine layout is one uint8 blob that starts with a header, and views of it that kernels take one by one:

    sparse24            values [2, G, N] (first and second of each group), positions [ceil(G / 2), N], scale
    sparse24_codebook   values: codes of b bits uint8 [2, ceil(G b / 8), N], positions, codebook, outliers as (value, what the code
                        under it says)
    bitmap              values as in the checkpoint, masks int32 [ceil(K / 32), N], ranks [ceil(K / 32), N] (how many values of
                        the row stand before a word), row offsets, scale
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
from . import triton

NAME = "triton"
DEVICE = triton.DEVICE
LAYOUTS = {SPARSE24: "triton.sparse24", BITMAP: "triton.bitmap", SPARSE24_CODEBOOK: "triton.sparse24_codebook"}
"""Checkpoint layout -> machine layout."""

MAX_FUSED_TOKENS = 64
"""Predicted, not measured, as for codes (triton.py)."""

_MAGIC, _VERSION, _HEADER_BYTES = 0x53545250, 1, 256
_FIELDS = {BITMAP: BITMAP_FIELDS, SPARSE24: SPARSE24_FIELDS, SPARSE24_CODEBOOK: SPARSE24_CODEBOOK_FIELDS}
_HEADER = (
    *("magic", "version", "is_24", "rows", "columns", "kept", "value_type", "has_scale"),
    *("bits", "outliers", "wide_outlier_columns"),
)
_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def available() -> tuple[bool, str]:
    return triton.available()


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of an operand by name; those that the format lacks are empty."""

    is_24: bool
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
    def of(cls, tensors: Sequence[Tensor], out_features: int, in_features: int) -> Layout:
        (
            _, values, positions, masks, ranks, row_offsets, scale,
            codebook, offsets, outlier_columns, outliers, replaced,
        ) = tensors  # fmt: skip
        return cls(
            positions.numel() > 0, values, positions, masks, ranks, row_offsets, scale, codebook,
            offsets, outlier_columns, outliers, replaced, out_features, in_features,
        )  # fmt: skip

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


def _kind(header: Sequence[int]) -> str:
    is_24, bits = header[2], header[8]
    return SPARSE24_CODEBOOK if bits else SPARSE24 if is_24 else BITMAP


def _sections(header: Sequence[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every tensor in the blob, in the order of `Layout`."""
    _, _, is_24, rows, columns, kept, value_type, has_scale, bits, outliers, wide = header
    groups, words, dtype = -(-columns // 4), -(-columns // 32), _VALUE_TYPES[value_type]
    scale = ((rows * has_scale,), torch.float32)
    none, none_int, none_half = ((0,), torch.uint8), ((0,), torch.int32), ((0,), torch.float16)
    coded = [
        ((columns, 1 << bits), torch.float16) if bits else none_half,
        ((rows + 1 if outliers else 0,), torch.int32),
        ((outliers,), torch.int32 if wide else torch.uint16),
        ((outliers,), torch.float16),
        ((outliers,), torch.float16),
    ]
    if is_24:
        values = ((2, -(-groups * bits // 8) if bits else groups, rows), dtype)
        return [values, ((-(-groups // 2), rows), torch.uint8), none_int, none_int, none_int, scale, *coded]
    ranks = ((words, rows), torch.uint16 if columns < 1 << 16 else torch.int32)
    return [((kept,), dtype), none, ((words, rows), torch.int32), ranks, ((rows + 1,), torch.int32), scale, *coded]


def operand_from_blob(layout: str, blob: Tensor, out_features: int, in_features: int) -> WeightOperand:
    """The operand whose tensors are views of `blob`. Reads the header, so it waits for the device: at load, never in a call.

    Raises ValueError if the blob is no such layout, is cut off, or holds a weight of another shape.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() < _HEADER_BYTES:
        raise ValueError(
            f"a layout {layout!r} is a uint8 vector of at least {_HEADER_BYTES} bytes, given: {blob.dtype}"
        )
    header = blob[: 8 * len(_HEADER)].view(torch.int64).tolist()
    if header[:2] != [_MAGIC, _VERSION] or LAYOUTS[_kind(header)] != layout:
        raise ValueError(f"this blob is no layout {layout!r} of version {_VERSION}: it begins with {header[:3]}")
    if header[3:5] != [out_features, in_features]:
        raise ValueError(f"the layout holds a weight {header[3:5]}, but was given as [{out_features}, {in_features}]")
    views = triton.blob_views(blob, _HEADER_BYTES, _sections(header))
    return WeightOperand(layout, (blob, *views), out_features, in_features)


def prepack(operand: WeightOperand) -> WeightOperand:
    """Checkpoint layout -> machine layout, on the device where the tensors lie. They are read, not kept."""
    rows, columns = operand.out_features, operand.in_features
    field = dict(zip(_FIELDS[operand.layout], operand.tensors, strict=True))
    codes, scale = operand.layout == SPARSE24_CODEBOOK, field.get("scale", operand.tensors[0].new_empty(0))
    values = field["codes" if codes else "values"]
    header = [_MAGIC, _VERSION, int(operand.layout != BITMAP), rows, columns, values.numel()]
    header += [_VALUE_TYPES.index(values.dtype), int(scale.numel() > 0)]
    if codes:
        outliers, wide = field["outlier_values"].numel(), field["outlier_columns"].dtype == torch.int32
        header += [field["codebook"].shape[1].bit_length() - 1, outliers, int(wide)]
    else:
        header += [0, 0, 0]
    nbytes = _HEADER_BYTES + sum(
        triton.aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in _sections(header)
    )
    blob = torch.zeros(nbytes, dtype=torch.uint8, device=values.device)
    blob[: 8 * len(header)] = torch.tensor(header).view(torch.uint8).to(blob.device)
    packed = operand_from_blob(LAYOUTS[operand.layout], blob, rows, columns)
    layout = Layout.of(packed.tensors, rows, columns)
    layout.scale.copy_(scale)
    if layout.is_24:
        layout.positions.copy_(field["positions"].T)
    if codes:
        _copy_codes(layout, field)
        return packed
    if layout.is_24:
        layout.values.copy_(values.view(rows, -1, 2).permute(2, 1, 0))
        return packed
    layout.values.copy_(values)
    layout.row_offsets.copy_(field["row_offsets"])
    words = _mask_bytes(field, rows, columns).view(torch.int32)
    layout.masks.copy_(words.T)
    set_bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1).sum(-1)
    layout.ranks.copy_((set_bits.cumsum(1) - set_bits).T)
    return packed


def _copy_codes(layout: Layout, field: dict[str, Tensor]) -> None:
    rows, groups = layout.out_features, -(-layout.in_features // 4)
    codes = triton.reference.unpack_codes(field["codes"], layout.bits, 2 * groups).view(rows, groups, 2)
    for kept in (0, 1):
        layout.values[kept].copy_(triton.reference.pack_codes(codes[:, :, kept], layout.bits).T)
    layout.codebook.copy_(field["codebook"])
    if not layout.outliers:
        return
    for name in ("outlier_row_offsets", "outlier_columns", "outlier_values"):
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


def _mask_bytes(field: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """uint8 [rows, bytes], bytes a multiple of four."""
    words = -(-columns // 32)
    if field["mask"].numel():
        mask = field["mask"]
        return torch.nn.functional.pad(mask, (0, 4 * words - mask.shape[1]))
    bits = torch.zeros(rows, 32 * words, dtype=torch.uint8, device=field["columns"].device)
    bits[torch.repeat_interleave(field["row_offsets"].long().diff()), field["columns"].long()] = 1
    return triton.reference.pack_codes(bits, 1)


def unpack_layout(operand: WeightOperand, shapes: Shapes) -> dict[str, Tensor]:
    """Exactly the tensors that were prepacked, whose shapes and dtypes are `shapes`."""
    layout = Layout.of(operand.tensors, operand.out_features, operand.in_features)
    if layout.bits:
        return _checkpoint_of_codes(layout, shapes)
    found = {"scale": layout.scale.clone()} if layout.has_scale else {}
    if layout.is_24:
        values = layout.values.permute(2, 1, 0).reshape(operand.out_features, -1).contiguous()
        return found | {"values": values, "positions": layout.positions.T.contiguous()}
    found |= {"values": layout.values.clone(), "row_offsets": layout.row_offsets.clone()}
    mask = layout.masks.T.contiguous().view(torch.uint8)[:, : -(-operand.in_features // 8)].contiguous()
    if "mask" in shapes:
        return found | {"mask": mask}
    kept = triton.reference.unpack_codes(mask, 1, operand.in_features)
    return found | {"columns": torch.nonzero(kept)[:, 1].to(shapes["columns"][1])}


def _checkpoint_of_codes(layout: Layout, shapes: Shapes) -> dict[str, Tensor]:
    groups = -(-layout.in_features // 4)
    kept = [triton.reference.unpack_codes(half.T, layout.bits, groups) for half in layout.values]
    found = {
        "codes": triton.reference.pack_codes(torch.stack(kept, 2).view(layout.out_features, -1), layout.bits),
        "positions": layout.positions.T.contiguous(),
    }
    return found | {name: getattr(layout, name).clone() for name in shapes if name not in found}


# ---- kernels --------------------------------------------------------------------------------------------------------


def sparse_linear(
    x: Tensor, tensors: Sequence[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """Sums in fp32 whatever `precision` says."""
    from ..triton_kernels.sparse_linear import sparse_linear as run

    if not x.shape[0]:
        return x.new_empty(0, out_features)
    with triton._on_device_of(x):
        return run(x.contiguous(), Layout.of(tensors, out_features, in_features), bias)


def sparse_dequantize(tensors: Sequence[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    from ..triton_kernels.sparse_linear import sparse_dequantize as run

    with triton._on_device_of(tensors[0]):
        return run(Layout.of(tensors, out_features, in_features), dtype)


def spread_and_matmul(
    x: Tensor, tensors: Sequence[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """The dense weight in x's dtype, then torch's matmul."""
    weight = sparse_dequantize(tensors, out_features, in_features, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def register_kernels() -> None:
    for kind, layout in LAYOUTS.items():
        few, any_number = reads(layout, triton._on_device, MAX_FUSED_TOKENS), reads(layout, triton._on_device)
        fused = "spreads on the way to the multiplication (limit predicted, not measured)"
        register(Kernel(f"{kind}_linear", f"triton.{kind}_fused", few, sparse_linear, fused))
        once = "spreading is paid once for all tokens"
        register(Kernel(f"{kind}_linear", f"triton.{kind}_matmul", any_number, spread_and_matmul, once))
        one_pass = "one pass over the packed weight"
        register(Kernel(f"{kind}_dequantize", f"triton.{kind}_dequantize", any_number, sparse_dequantize, one_pass))
