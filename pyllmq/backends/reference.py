"""Plain torch on any device: the oracle that every other back end is tested against. Reads the checkpoint layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..dispatch import (
    BITMAP,
    BITMAP_FIELDS,
    CHECKPOINT,
    CHECKPOINT_FIELDS,
    SPARSE24,
    SPARSE24_CODEBOOK,
    SPARSE24_CODEBOOK_FIELDS,
    SPARSE24_FIELDS,
    Kernel,
    Problem,
    Support,
    register,
)


def available() -> tuple[bool, str]:
    return True, "plain torch, any device"


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [rows, ceil(columns*bits/8)] -> uint8 [rows, columns]; a row is one bit stream, least significant bit first."""
    device = packed.device
    bit = torch.arange(columns * bits, device=device)
    stream = (packed[:, bit // 8] >> (bit % 8).to(torch.uint8)) & 1
    weight = (1 << torch.arange(bits, device=device)).to(torch.uint8)
    return (stream.view(packed.shape[0], columns, bits) * weight).sum(-1, dtype=torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] -> uint8 [rows, ceil(columns*bits/8)]; the inverse of `unpack_codes`, padding bits are zero."""
    rows, columns = codes.shape
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, but {bits}-bit codes must lie in 0..{2**bits - 1}")
    place = torch.arange(bits, device=codes.device).to(torch.uint8)
    stream = ((codes.unsqueeze(-1) >> place) & 1).view(rows, columns * bits)
    stream = torch.nn.functional.pad(stream, (0, -columns * bits % 8)).view(rows, -(-columns * bits // 8), 8)
    weight = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weight).sum(-1, dtype=torch.uint8)


def codebook_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(CHECKPOINT_FIELDS, tensors, strict=True))
    column_bits, codebook = field["column_bits"].long(), field["codebook"].float()
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    row_segment = torch.repeat_interleave(field["segment_rows"].long())
    weight = codebook.new_empty(out_features, in_features)
    for bits in range(1, 9):
        columns = torch.nonzero(column_bits == bits).flatten()
        if columns.numel():
            codes = unpack_codes(field[f"codes_b{bits}"], bits, columns.numel()).long()
            weight[:, columns] = codebook[row_segment[:, None], first_entry[columns] + codes]
    if field["row_scale"].numel():
        weight *= field["row_scale"].float()[:, None]
    if field["outlier_values"].numel():
        kept_per_row = field["outlier_row_offsets"].long().diff()
        row = torch.repeat_interleave(kept_per_row)
        weight[row, field["outlier_columns"].long()] = field["outlier_values"].float()
    return weight.to(dtype)


def bitmap_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(BITMAP_FIELDS, tensors, strict=True))
    weight = field["values"].new_zeros(out_features, in_features, dtype=torch.float32)
    if field["mask"].numel():
        weight[unpack_codes(field["mask"], 1, in_features).bool()] = field["values"].float()
    else:
        row = torch.repeat_interleave(field["row_offsets"].long().diff())
        weight[row, field["columns"].long()] = field["values"].float()
    return _scaled(weight, field["scale"]).to(dtype)


def sparse24_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(SPARSE24_FIELDS, tensors, strict=True))
    weight = _spread_24(field["values"].float(), field["positions"], in_features)
    return _scaled(weight, field["scale"]).to(dtype)


def sparse24_codebook_dequantize(
    tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(SPARSE24_CODEBOOK_FIELDS, tensors, strict=True))
    codebook = field["codebook"].float()
    bits = codebook.shape[1].bit_length() - 1
    kept = unpack_codes(field["codes"], bits, 2 * -(-in_features // 4))
    # A code's place in the row first, its value then: 0 says that nothing is kept there.
    place = _spread_24(kept.float() + 1, field["positions"], in_features).long()
    column = torch.arange(in_features, device=place.device)
    weight = torch.where(place > 0, codebook[column, (place - 1).clamp_min(0)], 0.0)
    if field["outlier_values"].numel():
        row = torch.repeat_interleave(field["outlier_row_offsets"].long().diff())
        weight[row, field["outlier_columns"].long()] = field["outlier_values"].float()
    return weight.to(dtype)


def _spread_24(kept: Tensor, positions: Tensor, in_features: int) -> Tensor:
    """Two numbers of each group [N, 2 G] -> [N, K], zero elsewhere."""
    groups = kept.shape[1] // 2
    code = unpack_codes(positions, 4, groups).long()
    spread = kept.new_zeros(kept.shape[0], groups, 4)
    spread.scatter_(2, torch.stack([code & 3, code >> 2], 2), kept.view(-1, groups, 2))
    return spread.view(kept.shape[0], -1)[:, :in_features]


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale[:, None] if scale.numel() else weight


Dequantize = Callable[[list[Tensor], int, int, torch.dtype], Tensor]


def linear(
    dequantize: Dequantize,
    x: Tensor,
    tensors: list[Tensor],
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """x [M, K] -> y [M, N] in x's dtype, multiplied and summed in fp32, whatever the precision asked."""
    weight = dequantize(tensors, out_features, in_features, torch.float32)
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _reads(layout: str) -> Callable[[Problem], Support]:
    def supports(problem: Problem) -> Support:
        if problem.layout != layout:
            return False, f"reads the layout {layout!r}, this weight is prepacked as {problem.layout!r}"
        return True, ""

    return supports


def _anything(problem: Problem) -> Support:
    return True, ""


_BECAUSE = "last row of each operation: runs anywhere, serves where nothing faster does"


def register_kernels() -> None:
    for name, layout, dequantize in (
        ("codebook", CHECKPOINT, codebook_dequantize),
        ("bitmap", BITMAP, bitmap_dequantize),
        ("sparse24", SPARSE24, sparse24_dequantize),
        ("sparse24_codebook", SPARSE24_CODEBOOK, sparse24_codebook_dequantize),
    ):
        run = partial(linear, dequantize)
        register(Kernel(f"{name}_linear", f"reference.{name}_linear", _reads(layout), run, _BECAUSE))
        register(Kernel(f"{name}_dequantize", f"reference.{name}_dequantize", _reads(layout), dequantize, _BECAUSE))
    register(Kernel("pack_codes", "reference.pack_codes", _anything, pack_codes, _BECAUSE))
    register(Kernel("unpack_codes", "reference.unpack_codes", _anything, unpack_codes, _BECAUSE))
