"""codebook_gradient, and both operations of a codebook weight in training: straight from the packed codes of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.codebook import CODES, CodebookWeight
from ...layouts import WeightOperand
from ...operations import CODEBOOK_GRADIENT, PACKED_DEQUANTIZE, PACKED_LINEAR, reads
from ...structure import outlier_places
from . import runtime
from .runtime import ORDER, address


def _checkpoint_arguments(weight: WeightOperand) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """(arguments that `codebook_decode` and `codebook_gradient` share, the tensors by name, which must outlive the call)."""
    field = {name: tensor.detach().contiguous() for name, tensor in CodebookWeight.named(weight).items()}
    field["row_scale"] = field["row_scale"].float()
    arguments = (
        *weight.shape,
        field["column_bits"].data_ptr(),
        field["segment_rows"].data_ptr(),
        field["segment_rows"].numel(),
        [address(field[name]) for name in CODES],
        address(field["row_scale"]),
    )
    return arguments, field


def decode_checkpoint(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    arguments, field = _checkpoint_arguments(weight)
    codebook = field["codebook"].float()
    dense = torch.empty(weight.shape, dtype=torch.float32, device=runtime.DEVICE)
    runtime.kernels().codebook_decode(*arguments, codebook.data_ptr(), dense.data_ptr())
    if field["outlier_values"].numel():
        dense[outlier_places(field)] = field["outlier_values"].float()
    return dense.to(dtype)


def decode_checkpoint_and_matmul(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """The weight decoded to fp32, then torch's matmul in fp32, whatever `precision` says."""
    dense = decode_checkpoint(weight, torch.float32)
    return torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def codebook_gradient(weight_gradient: Tensor, weight: WeightOperand) -> Tensor:
    arguments, field = _checkpoint_arguments(weight)
    if field["outlier_values"].numel():
        weight_gradient = weight_gradient.clone()
        weight_gradient[outlier_places(field)] = 0
    weight_gradient = weight_gradient.contiguous()
    gradient = torch.empty(field["codebook"].shape, dtype=torch.float32, device=runtime.DEVICE)
    runtime.kernels().codebook_gradient(*arguments, weight_gradient.data_ptr(), gradient.data_ptr())
    return gradient


def register_kernels() -> None:
    supports = reads("checkpoint.codebook", runtime.on_cpu)
    because = "training: the codebook changes at every step, a layout would be made anew"
    PACKED_LINEAR.register("cpu.decode_checkpoint_and_matmul", ORDER, supports, decode_checkpoint_and_matmul, because)
    because = "threaded, straight from the packed codes"
    PACKED_DEQUANTIZE.register("cpu.decode_checkpoint", ORDER, supports, decode_checkpoint, because)
    because = "threaded by columns, straight from the packed codes; sums in fp64"
    CODEBOOK_GRADIENT.register("cpu.codebook_gradient", ORDER, supports, codebook_gradient, because)
