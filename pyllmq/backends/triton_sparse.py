"""The Triton back end's `sparse24` and `bitmap`: kernels for GPUs, compiled at the first call. See docs/kernels-triton.md.

A machine layout is one uint8 blob that starts with a header, and views of it that kernels take one by one:

    sparse24   values [2, G, N] (first and second of each group), positions [ceil(G / 2), N], scale
    bitmap     values as in the checkpoint, masks int32 [ceil(K / 32), N], ranks [ceil(K / 32), N] (how many values of the row
               stand before a word), row offsets, scale
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
    SPARSE24_FIELDS,
    Kernel,
    WeightOperand,
    reads,
    register,
)
from . import triton

NAME = "triton"
DEVICE = triton.DEVICE
LAYOUTS = {SPARSE24: "triton.sparse24", BITMAP: "triton.bitmap"}
"""Checkpoint layout -> machine layout."""

MAX_FUSED_TOKENS = 64
"""Predicted, not measured, as for codes (triton.py)."""

_MAGIC, _VERSION, _HEADER_BYTES = 0x53545250, 1, 256
_HEADER = ("magic", "version", "is_24", "rows", "columns", "kept", "value_type", "has_scale")
_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)

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
    out_features: int
    in_features: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], out_features: int, in_features: int) -> Layout:
        _, values, positions, masks, ranks, row_offsets, scale = tensors
        is_24 = positions.numel() > 0
        return cls(is_24, values, positions, masks, ranks, row_offsets, scale, out_features, in_features)

    @property
    def has_scale(self) -> bool:
        return self.scale.shape[0] > 0


def _sections(header: Sequence[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every tensor in the blob, in the order of `Layout`."""
    _, _, is_24, rows, columns, kept, value_type, has_scale = header
    groups, words, dtype = -(-columns // 4), -(-columns // 32), _VALUE_TYPES[value_type]
    scale = ((rows * has_scale,), torch.float32)
    none, none_int = ((0,), torch.uint8), ((0,), torch.int32)
    if is_24:
        positions = ((-(-groups // 2), rows), torch.uint8)
        return [((2, groups, rows), dtype), positions, none_int, none_int, none_int, scale]
    ranks = ((words, rows), torch.uint16 if columns < 1 << 16 else torch.int32)
    return [((kept,), dtype), none, ((words, rows), torch.int32), ranks, ((rows + 1,), torch.int32), scale]


def operand_from_blob(layout: str, blob: Tensor, out_features: int, in_features: int) -> WeightOperand:
    """The operand whose tensors are views of `blob`. Reads the header, so it waits for the device: at load, never in a call.

    Raises ValueError if the blob is no such layout, is cut off, or holds a weight of another shape.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() < _HEADER_BYTES:
        raise ValueError(
            f"a layout {layout!r} is a uint8 vector of at least {_HEADER_BYTES} bytes, given: {blob.dtype}"
        )
    header = blob[: 8 * len(_HEADER)].view(torch.int64).tolist()
    if header[:2] != [_MAGIC, _VERSION] or LAYOUTS[SPARSE24 if header[2] else BITMAP] != layout:
        raise ValueError(f"this blob is no layout {layout!r} of version {_VERSION}: it begins with {header[:3]}")
    if header[3:5] != [out_features, in_features]:
        raise ValueError(f"the layout holds a weight {header[3:5]}, but was given as [{out_features}, {in_features}]")
    views = triton.blob_views(blob, _HEADER_BYTES, _sections(header))
    return WeightOperand(layout, (blob, *views), out_features, in_features)


def prepack(operand: WeightOperand) -> WeightOperand:
    """Checkpoint layout -> machine layout, on the device where the tensors lie. They are read, not kept."""
    rows, columns, is_24 = operand.out_features, operand.in_features, operand.layout == SPARSE24
    field = dict(zip(SPARSE24_FIELDS if is_24 else BITMAP_FIELDS, operand.tensors, strict=True))
    values, scale = field["values"], field["scale"]
    kept, value_type = values.numel(), _VALUE_TYPES.index(values.dtype)
    header = [_MAGIC, _VERSION, int(is_24), rows, columns, kept, value_type, int(scale.numel() > 0)]
    nbytes = _HEADER_BYTES + sum(
        triton.aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in _sections(header)
    )
    blob = torch.zeros(nbytes, dtype=torch.uint8, device=values.device)
    blob[: 8 * len(header)] = torch.tensor(header).view(torch.uint8).to(blob.device)
    packed = operand_from_blob(LAYOUTS[operand.layout], blob, rows, columns)
    layout = Layout.of(packed.tensors, rows, columns)
    layout.scale.copy_(scale)
    if is_24:
        layout.values.copy_(values.view(rows, -1, 2).permute(2, 1, 0))
        layout.positions.copy_(field["positions"].T)
        return packed
    layout.values.copy_(values)
    layout.row_offsets.copy_(field["row_offsets"])
    words = _mask_bytes(field, rows, columns).view(torch.int32)
    layout.masks.copy_(words.T)
    set_bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1).sum(-1)
    layout.ranks.copy_((set_bits.cumsum(1) - set_bits).T)
    return packed


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
