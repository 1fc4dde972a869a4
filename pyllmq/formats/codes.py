"""Parts of packed codes, whatever format they belong to."""

from __future__ import annotations

from torch import Tensor

from .. import ops


def cut_codes(packed: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """The codes start..stop-1 of every row, packed again: eight codes are whole bytes, so that only these are unpacked."""
    whole = start - start % 8
    part = packed[:, whole * bits // 8 : -(-stop * bits // 8)].contiguous()
    codes = ops.unpack_codes(part, bits, stop - whole)
    return ops.pack_codes(codes[:, start - whole :].contiguous(), bits)
