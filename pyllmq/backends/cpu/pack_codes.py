"""pack_codes and unpack_codes, threaded by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operations import PACK_CODES, UNPACK_CODES
from . import runtime
from .runtime import ORDER


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    _cpu = runtime.kernels()
    rows, columns = codes.shape
    codes = codes.contiguous()
    packed = torch.empty(rows, -(-columns * bits // 8), dtype=torch.uint8, device=runtime.DEVICE)
    _cpu.pack_codes(codes.data_ptr(), packed.data_ptr(), rows, columns, bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    _cpu = runtime.kernels()
    packed = packed.contiguous()
    codes = torch.empty(packed.shape[0], columns, dtype=torch.uint8, device=runtime.DEVICE)
    _cpu.unpack_codes(packed.data_ptr(), codes.data_ptr(), packed.shape[0], columns, bits)
    return codes


PACK_CODES.register("cpu.pack_codes", ORDER, runtime.on_cpu, pack_codes, "threaded")
UNPACK_CODES.register("cpu.unpack_codes", ORDER, runtime.on_cpu, unpack_codes, "threaded")
