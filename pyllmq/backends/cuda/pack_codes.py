"""pack_codes and unpack_codes, a thread for each byte."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operations import PACK_CODES, UNPACK_CODES
from . import runtime
from .runtime import ORDER


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, but {bits}-bit codes must lie in 0..{2**bits - 1}")
    codes = codes.contiguous()
    packed = torch.empty(rows, -(-columns * bits // 8), dtype=torch.uint8, device=codes.device)
    with runtime.current(codes.device):
        runtime.extension().pack_codes(
            codes.data_ptr(), packed.data_ptr(), rows, columns, bits, runtime.stream(codes.device)
        )
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    packed = packed.contiguous()
    rows = packed.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    with runtime.current(packed.device):
        runtime.extension().unpack_codes(
            packed.data_ptr(), codes.data_ptr(), rows, columns, bits, runtime.stream(packed.device)
        )
    return codes


PACK_CODES.register("cuda.pack_codes", ORDER, runtime.on_device, pack_codes, "one thread per byte")
UNPACK_CODES.register("cuda.unpack_codes", ORDER, runtime.on_device, unpack_codes, "one thread per byte")
