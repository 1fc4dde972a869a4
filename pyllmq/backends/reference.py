"""Plain torch on any device: the oracle that every other back end is tested against. Reads the checkpoint layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..dispatch import CHECKPOINT, CHECKPOINT_FIELDS, Kernel, Problem, Support, register


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
        weight[outlier_places(field)] = field["outlier_values"].float()
    return weight.to(dtype)


def outlier_places(field: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(row, column) of every outlier, in the order of `outlier_values`."""
    row = torch.repeat_interleave(field["outlier_row_offsets"].long().diff())
    return row, field["outlier_columns"].long()


def codebook_gradient(weight_gradient: Tensor, tensors: list[Tensor], out_features: int, in_features: int) -> Tensor:
    """dL/dcodebook [segments, entries] from dL/dW [N, K]: for each entry the sum over the weights that use it."""
    field = dict(zip(CHECKPOINT_FIELDS, tensors, strict=True))
    column_bits = field["column_bits"].long()
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    row_segment = torch.repeat_interleave(field["segment_rows"].long())
    scaled = weight_gradient.double()
    if field["row_scale"].numel():
        scaled = scaled * field["row_scale"].double()[:, None]
    if field["outlier_values"].numel():
        scaled = scaled.clone()
        scaled[outlier_places(field)] = 0
    gradient = torch.zeros(field["codebook"].shape, dtype=torch.float64, device=weight_gradient.device)
    for bits in range(1, 9):
        columns = torch.nonzero(column_bits == bits).flatten()
        if columns.numel():
            codes = unpack_codes(field[f"codes_b{bits}"], bits, columns.numel()).long()
            entry = row_segment[:, None] * gradient.shape[1] + first_entry[columns] + codes
            gradient.view(-1).index_add_(0, entry.flatten(), scaled[:, columns].flatten())
    return gradient.float()


def codebook_linear(
    x: Tensor, tensors: list[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """x [M, K] -> y [M, N] in x's dtype, multiplied and summed in fp32, whatever the precision asked."""
    weight = codebook_dequantize(tensors, out_features, in_features, torch.float32)
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _reads_checkpoint(problem: Problem) -> Support:
    if problem.layout != CHECKPOINT:
        return False, f"reads the layout {CHECKPOINT!r}, this weight is prepacked as {problem.layout!r}"
    return True, ""


def _anything(problem: Problem) -> Support:
    return True, ""


_BECAUSE = "last row of each operation: runs anywhere, serves where nothing faster does"


def register_kernels() -> None:
    for op, run, supports in (
        ("codebook_linear", codebook_linear, _reads_checkpoint),
        ("codebook_dequantize", codebook_dequantize, _reads_checkpoint),
        ("codebook_gradient", codebook_gradient, _reads_checkpoint),
        ("pack_codes", pack_codes, _anything),
        ("unpack_codes", unpack_codes, _anything),
    ):
        register(Kernel(op, f"reference.{op}", supports, run, _BECAUSE))
