"""The CUDA back end's sparse formats: machine layouts made on the host when a layer is loaded (csrc/sparse/cuda/layout.h).

A layout is one uint8 blob in device memory that starts with a header and holds everything but the bias. Kernels must know before
their launch what the header says, and a header on the device cannot be read without waiting for it: so an operand has a second
tensor, a view of the blob as long as its largest cell and of the values' dtype (uint8 for codes). See docs/kernels-cuda.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

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
from . import cuda

NAME = "cuda"
DEVICE = cuda.DEVICE
LAYOUTS = {BITMAP: "cuda.bitmap", SPARSE24: "cuda.sparse24", SPARSE24_CODEBOOK: "cuda.sparse24_codebook"}
"""Checkpoint layout -> machine layout; or, of few kept weights and of fp32 values,"""
COLUMNS = "cuda.columns"

FEW_KEPT = 0.25
"""A bitmap that keeps a smaller share of its weights is laid out as column numbers. Predicted from the bytes: at 25 % kept in 16
bits a mask and values take 5.9 bits a weight, padding included, values and steps between columns 6.0."""

MAX_FUSED_TOKENS = 64
"""Predicted from the bytes: 16 tokens read the packed weight once, at 2:4 in 16 bits 9 bits a weight, so 64 read 36; the dense
matrix is written and read again: 9 + 32."""

MAX_COLUMNS_TOKENS = 16
"""Predicted from the bytes: 4 tokens read the entries once, 6 bits a weight at 25 % kept, so 16 read 24 where the dense matrix
takes 6 + 32; fp32 values at 50 % kept 80 where it takes 84."""

_FIELDS = {BITMAP: BITMAP_FIELDS, SPARSE24: SPARSE24_FIELDS, SPARSE24_CODEBOOK: SPARSE24_CODEBOOK_FIELDS}
_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_TWO_BIT_CELL = 1024
"""Bytes of a cell of 2-bit codes; wider ones have cells of 768."""

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def available() -> tuple[bool, str]:
    return cuda.available()


# ---- the layouts ----------------------------------------------------------------------------------------------------


def prepack(operand: WeightOperand) -> WeightOperand:
    """Checkpoint layout -> machine layout on the same device. The checkpoint tensors are read, not kept."""
    _cuda = cuda._extension()
    device = operand.tensors[0].device
    field = {
        name: tensor.contiguous().cpu()
        for name, tensor in zip(_FIELDS[operand.layout], operand.tensors, strict=True)
        if tensor.numel()
    }
    checkpoint = _checkpoint(operand.layout, field, operand.out_features, operand.in_features)
    size = _cuda.sparse_layout_bytes(checkpoint, FEW_KEPT)
    blob = torch.empty(size, dtype=torch.uint8)
    _cuda.sparse_layout_pack(blob.data_ptr(), size, checkpoint, FEW_KEPT)
    return _operand(_header(blob, operand.out_features, operand.in_features), blob.to(device), operand)


def operand_from_blob(layout: str, blob: Tensor, out_features: int, in_features: int) -> WeightOperand:
    """The operand whose machine layout is `blob`. Reads the header, so it waits for the device: at load, never in a call.

    Raises ValueError if the blob is no such layout, is cut off, or holds a weight of another shape.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"a layout {layout!r} is a uint8 vector, given: {blob.dtype} of shape {tuple(blob.shape)}")
    header = _header(blob, out_features, in_features)
    if f"cuda.{header[0]}" != layout:
        raise ValueError(f"this blob is no layout {layout!r}, but 'cuda.{header[0]}'")
    return _operand(header, blob, WeightOperand(layout, (blob,), out_features, in_features))


def _header(blob: Tensor, rows: int, columns: int) -> tuple[str, int, int, int, int]:
    """(kind, type of values, bits, bytes of the largest cell, where the data begin)."""
    header = blob[: cuda._extension().sparse_header_bytes].cpu()
    return cuda._extension().sparse_layout_describe(header.data_ptr(), blob.numel(), rows, columns)


def _operand(header: tuple[str, int, int, int, int], blob: Tensor, of: WeightOperand) -> WeightOperand:
    kind, values, _, stage_bytes, begin = header
    dtype = torch.uint8 if kind == SPARSE24_CODEBOOK else _VALUE_TYPES[values]
    cell = blob[begin : begin + (stage_bytes or dtype.itemsize)].view(dtype)
    return WeightOperand(f"cuda.{kind}", (blob, cell), of.out_features, of.in_features)


def _checkpoint(kind: str, field: dict[str, Tensor], rows: int, columns: int) -> Any:
    values, codebook, outliers = (field.get(name) for name in ("values", "codebook", "outlier_values"))
    numbers = field.get("columns", field.get("outlier_columns"))
    return cuda._extension().SparseCheckpoint(
        kind=kind,
        value_type=0 if values is None else _VALUE_TYPES.index(values.dtype),
        rows=rows,
        columns=columns,
        kept=0 if values is None else values.numel(),
        bits=0 if codebook is None else codebook.shape[1].bit_length() - 1,
        outliers=0 if outliers is None else outliers.numel(),
        column_bytes=0 if numbers is None else numbers.element_size(),
        tensors={name: tensor.data_ptr() for name, tensor in field.items()},
    )


def unpack_layout(operand: WeightOperand, shapes: Shapes) -> dict[str, Tensor]:
    """Exactly the tensors that were prepacked, whose shapes and dtypes are `shapes`, on the operand's device."""
    device, blob = operand.tensors[0].device, operand.tensors[0].cpu()
    kind = next(
        (checkpoint for checkpoint, layout in LAYOUTS.items() if layout == operand.layout),
        SPARSE24 if "positions" in shapes else BITMAP,
    )
    field = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()}
    checkpoint = _checkpoint(kind, field, operand.out_features, operand.in_features)
    cuda._extension().sparse_layout_unpack(blob.data_ptr(), blob.numel(), checkpoint)
    return {key: tensor.to(device) for key, tensor in field.items()}


# ---- kernels --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _described(layout: str, dtype: torch.dtype, nbytes: int) -> Any:
    """What a launch must know of an operand, from its second tensor."""
    kind = layout.removeprefix("cuda.")
    codes = kind == SPARSE24_CODEBOOK
    return cuda._extension().SparseOperand(
        kind,
        0 if codes else _VALUE_TYPES.index(dtype),
        0 if not codes else 2 if nbytes == _TWO_BIT_CELL else 4,
        0 if layout == COLUMNS else nbytes,
    )


@lru_cache(maxsize=4096)
def _workspace_sizes(
    device: torch.device, operand: Any, rows: int, columns: int, tokens: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Elements of the fp32 workspace and of the counters; they depend on the device."""
    with cuda._current(device):
        return cuda._extension().sparse_linear_workspace(operand, rows, columns, tokens, cuda._DTYPE_CODE[dtype])


def sparse_linear(
    layout: str,
    x: Tensor,
    tensors: Sequence[Tensor],
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """Values as they are, sums in fp32, whatever the precision asked."""
    blob, cell = tensors
    x = x.contiguous()
    tokens, dtype, device = x.shape[0], x.dtype, x.device
    y = torch.empty(tokens, out_features, dtype=dtype, device=device)
    if tokens == 0:
        return y
    operand = _described(layout, cell.dtype, cell.nbytes)
    partials, counters = _workspace_sizes(device, operand, out_features, in_features, tokens, dtype)
    workspace = torch.empty(partials, dtype=torch.float32, device=device)
    with cuda._current(device):
        stream = cuda._stream(device)
        cuda._extension().sparse_linear(
            operand,
            blob.data_ptr(),
            blob.numel(),
            out_features,
            in_features,
            x.data_ptr(),
            cuda._DTYPE_CODE[dtype],
            tokens,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else cuda._DTYPE_CODE[bias.dtype],
            y.data_ptr(),
            workspace.data_ptr(),
            cuda._zero_counters(counters, device, stream).data_ptr(),
            stream,
        )
    return y


def sparse_dequantize(
    layout: str, tensors: Sequence[Tensor], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    blob, cell = tensors
    weight = torch.empty(out_features, in_features, dtype=dtype, device=blob.device)
    with cuda._current(blob.device):
        cuda._extension().sparse_dequantize(
            _described(layout, cell.dtype, cell.nbytes),
            blob.data_ptr(),
            blob.numel(),
            out_features,
            in_features,
            weight.data_ptr(),
            cuda._DTYPE_CODE[dtype],
            cuda._stream(blob.device),
        )
    return weight


def dequantize_matmul(
    layout: str,
    x: Tensor,
    tensors: Sequence[Tensor],
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """The dense matrix in x's dtype, which torch's allocator takes back at once, and torch's matmul."""
    weight = sparse_dequantize(layout, tensors, out_features, in_features, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


# ---- the table ------------------------------------------------------------------------------------------------------


_FUSED = {
    "cuda.bitmap": "masks spread values into operands of dense tensor cores, in registers (predicted: best to 64 tokens)",
    "cuda.sparse24": "mma.sp takes values and positions as they are: the time is that of reading them (predicted)",
    "cuda.sparse24_codebook": "codes are looked up in registers (2 bits) or a lane's own table, for mma.sp (predicted)",
    COLUMNS: "the work is that of the kept weights: predicted best below 25 % kept, and for fp32 values",
}


def register_kernels() -> None:
    for kind, own_layout in LAYOUTS.items():
        for layout in (own_layout, COLUMNS) if kind != SPARSE24_CODEBOOK else (own_layout,):
            most = MAX_COLUMNS_TOKENS if layout == COLUMNS else MAX_FUSED_TOKENS
            few, any_number = reads(layout, cuda._takes_dtype, most), reads(layout, cuda._takes_dtype)
            fused, matmul = partial(sparse_linear, layout), partial(dequantize_matmul, layout)
            register(Kernel(f"{kind}_linear", f"{layout}_fused", few, fused, _FUSED[layout]))
            once = "spreading is paid once, the product is cuBLAS's (predicted)"
            register(Kernel(f"{kind}_linear", f"{layout}_matmul", any_number, matmul, once))
            spread = partial(sparse_dequantize, layout)
            one_pass = "one pass over the packed weight (predicted)"
            register(Kernel(f"{kind}_dequantize", f"{layout}_dequantize", any_number, spread, one_pass))
