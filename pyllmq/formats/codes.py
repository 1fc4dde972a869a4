"""Codes packed densely: what defines the bytes, in plain torch on any device, and parts of them, whatever the format."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..structure import FormatError


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
    stream = ((codes.unsqueeze(-1) >> place) & 1).reshape(rows, columns * bits)
    stream = torch.nn.functional.pad(stream, (0, -columns * bits % 8)).view(rows, -(-columns * bits // 8), 8)
    weight = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weight).sum(-1, dtype=torch.uint8)


def expect_codes(codes: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2 or not codes.numel():
        raise FormatError(
            f"codes is {codes.dtype} {tuple(codes.shape)}; it must be a non-empty torch.uint8 matrix [N, K]"
        )


def cut_codes(packed: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """The codes start..stop-1 of every row, packed again: eight codes are whole bytes, so that only these are unpacked."""
    whole = start - start % 8
    part = packed[:, whole * bits // 8 : -(-stop * bits // 8)].contiguous()
    codes = ops.unpack_codes(part, bits, stop - whole)
    return ops.pack_codes(codes[:, start - whole :].contiguous(), bits)
