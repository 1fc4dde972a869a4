"""codebook_gradient, and both operations of a codebook weight in training: straight from the packed codes of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.codebook import CODES, CodebookWeight
from ...layouts import WeightOperand
from ...operations import CODEBOOK_GRADIENT, PACKED_DEQUANTIZE, PACKED_LINEAR, reads
from ...structure import outlier_places
from ..checkpoints import codebook_checkpoint
from . import runtime
from .runtime import ORDER


def _checkpoint(weight: WeightOperand) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """(what `codebook_decode` and `codebook_gradient` read, row_scale in fp32, the tensors by name); keep them during the call."""
    field = {name: tensor.detach().contiguous() for name, tensor in CodebookWeight.named(weight).items()}
    codes = {name: field[name] for name in (*CODES, "column_bits", "segment_rows")}
    return codebook_checkpoint(runtime.kernels(), codes, weight.shape), field["row_scale"].float(), field


def decode_checkpoint(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    checkpoint, row_scale, field = _checkpoint(weight)
    codebook = field["codebook"].float()
    dense = torch.empty(weight.shape, dtype=torch.float32, device=runtime.DEVICE)
    runtime.kernels().codebook_decode(checkpoint, row_scale.data_ptr(), codebook.data_ptr(), dense.data_ptr())
    if field["outlier_values"].numel():
        dense[outlier_places(field)] = field["outlier_values"].float()
    return dense.to(dtype)


def decode_checkpoint_and_matmul(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """The weight decoded to fp32, then torch's matmul in fp32, whatever `precision` says."""
    dense = decode_checkpoint(weight, torch.float32)
    return torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def codebook_gradient(weight_gradient: Tensor, weight: WeightOperand) -> Tensor:
    checkpoint, row_scale, field = _checkpoint(weight)
    weight_gradient = weight_gradient.contiguous()
    gradient = torch.empty(field["codebook"].shape, dtype=torch.float32, device=runtime.DEVICE)
    pointers = row_scale.data_ptr(), weight_gradient.data_ptr(), gradient.data_ptr()
    runtime.kernels().codebook_gradient(checkpoint, *pointers)
    return gradient


supports = reads("checkpoint.codebook", runtime.on_cpu)
because = "training: the codebook changes at every step, a layout would be made anew"
PACKED_LINEAR.register("cpu.decode_checkpoint_and_matmul", ORDER, supports, decode_checkpoint_and_matmul, because)
because = "threaded, straight from the packed codes"
PACKED_DEQUANTIZE.register("cpu.decode_checkpoint", ORDER, supports, decode_checkpoint, because)
because = "threaded by columns, straight from the packed codes; sums in fp64"
CODEBOOK_GRADIENT.register("cpu.codebook_gradient", ORDER, supports, codebook_gradient, because)
