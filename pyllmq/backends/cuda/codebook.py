"""packed_linear, packed_dequantize and packed_rows of the format codebook (docs/kernels-cuda.md)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...dispatch import Support
from ...formats.codebook import CODES, pack_widths
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, PACKED_ROWS, WeightProblem, reads
from . import runtime
from .runtime import DTYPE_CODE, ORDER, address

LAYOUT = "cuda.codebook"

MAX_FUSED_TOKENS = 64
"""Up to this many tokens the codes are decoded anew for every 16 tokens (8 in fp32), beyond that once for all of them.

Predicted from instruction counts, for 4 bits at 4.3 TB/s: 16 tokens cost at most 2.2 times the reading of the codes, so 64
cost 2.2 times the reading of an fp16 matrix; decoding to memory and multiplying from there moves 2.25 times as much.
"""


# ---- the layout -----------------------------------------------------------------------------------------------------


def from_blob(blob: Tensor, shape: Shape) -> WeightOperand:
    return WeightOperand("codebook", LAYOUT, (blob,), (), shape)


def prepack(field: Fields, shape: Shape) -> WeightOperand:
    _cuda = runtime.extension()
    device = field["column_bits"].device
    field = {name: tensor.contiguous().cpu() for name, tensor in field.items()}
    outlier_columns = field.get("outlier_columns")
    outliers, scaled = 0 if outlier_columns is None else outlier_columns.numel(), "row_scale" in field
    rows, columns = shape
    segment_rows = field["segment_rows"]
    size = _cuda.codebook_layout_bytes(
        rows, columns, field["column_bits"].data_ptr(), segment_rows.data_ptr(), segment_rows.numel(), outliers, scaled
    )
    blob = torch.empty(size, dtype=torch.uint8, device="cpu")
    _cuda.codebook_layout_pack(
        blob.data_ptr(),
        size,
        rows,
        columns,
        field["column_bits"].data_ptr(),
        segment_rows.data_ptr(),
        segment_rows.numel(),
        [address(field.get(name)) for name in CODES],
        field["codebook"].data_ptr(),
        address(field.get("row_scale")),
        address(field.get("outlier_row_offsets")) if outliers else 0,
        address(outlier_columns),
        2 if outlier_columns is None else outlier_columns.element_size(),
        address(field.get("outlier_values")),
    )
    return from_blob(blob.to(device), shape)


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    _cuda = runtime.extension()
    device, blob = weight.tensors[0].device, weight.tensors[0].cpu()
    shape = _cuda.codebook_layout_shape(blob.data_ptr(), blob.numel())
    if shape != weight.shape:
        raise ValueError(f"the layout holds a weight of shape {list(shape)}, but was given as {list(weight.shape)}")
    codes = torch.empty(shape, dtype=torch.uint8, device="cpu")
    _cuda.codebook_layout_codes(blob.data_ptr(), blob.numel(), codes.data_ptr())
    return pack_widths(codes.to(device), beside["column_bits"])


# ---- kernels --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def tables_workspace_sizes(rows: int, columns: int) -> tuple[int, int]:
    return runtime.extension().codebook_linear_tables_workspace(rows, columns)


@lru_cache(maxsize=4096)
def workspace_sizes(device: torch.device, rows: int, columns: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Elements of the fp32 workspace and of the counters; they depend on the device's number of multiprocessors."""
    with runtime.current(device):
        return runtime.extension().codebook_linear_workspace(rows, columns, tokens, DTYPE_CODE[dtype])


def packed_linear(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """Codes decoded in registers, multiplied by tensor cores and summed in fp32, whatever the precision asked."""
    blob, x = weight.tensors[0], x.contiguous()
    out_features, in_features = weight.shape
    tokens, dtype, device = x.shape[0], x.dtype, x.device
    y = torch.empty(tokens, out_features, dtype=dtype, device=device)
    if tokens == 0:
        return y
    partials, counters = workspace_sizes(device, out_features, in_features, tokens, dtype)
    workspace = torch.empty(partials, dtype=torch.float32, device=device)
    with runtime.current(device):
        stream = runtime.stream(device)
        runtime.extension().codebook_linear(
            blob.data_ptr(),
            blob.numel(),
            out_features,
            in_features,
            x.data_ptr(),
            DTYPE_CODE[dtype],
            tokens,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPE_CODE[bias.dtype],
            y.data_ptr(),
            workspace.data_ptr(),
            runtime.zero_counters(counters, device, stream).data_ptr(),
            stream,
        )
    return y


def packed_linear_tables(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """One token: sums of several columns' products are looked up in tables made from x; all in fp32."""
    blob, x = weight.tensors[0], x.contiguous()
    out_features, in_features = weight.shape
    dtype, device = x.dtype, x.device
    y = torch.empty(1, out_features, dtype=dtype, device=device)
    partials, counters = tables_workspace_sizes(out_features, in_features)
    workspace = torch.empty(partials, dtype=torch.float32, device=device)
    with runtime.current(device):
        stream = runtime.stream(device)
        runtime.extension().codebook_linear_tables(
            blob.data_ptr(),
            blob.numel(),
            out_features,
            in_features,
            x.data_ptr(),
            DTYPE_CODE[dtype],
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPE_CODE[bias.dtype],
            y.data_ptr(),
            workspace.data_ptr(),
            runtime.zero_counters(counters, device, stream).data_ptr(),
            stream,
        )
    return y


def packed_dequantize(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    blob = weight.tensors[0]
    dense = torch.empty(weight.shape, dtype=dtype, device=blob.device)
    with runtime.current(blob.device):
        runtime.extension().codebook_dequantize(
            blob.data_ptr(),
            blob.numel(),
            *weight.shape,
            dense.data_ptr(),
            DTYPE_CODE[dtype],
            runtime.stream(blob.device),
        )
    return dense


def dequantize_rows(weight: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole matrix decoded, which torch's allocator takes back at once."""
    outside = (ids < 0) | (ids >= weight.shape[0])
    rows = packed_dequantize(weight, dtype)[ids.clamp(0, weight.shape[0] - 1)]
    return rows.masked_fill(outside[:, None], torch.nan)


def dequantize_matmul(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """The dense matrix in x's dtype, which torch's allocator takes back at once, and torch's matmul."""
    dense = packed_dequantize(weight, x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def tables_fit() -> bool:
    return runtime.extension().linear_tables_fit()


_any_number = reads(LAYOUT, runtime.takes_activations)


def _one_token(problem: WeightProblem) -> Support:
    if problem.tokens != 1:
        return False, f"serves one token, here {problem.tokens}"
    fits, why = _any_number(problem)
    if fits and not tables_fit():
        return False, "needs 129 KiB of shared memory for a block, more than this device has"
    return fits, why


def register_kernels() -> None:
    register_layout(Layout("cuda", "codebook", ORDER, CODES, runtime.serves, prepack, unpack, from_blob))
    because = (
        "for one token a lookup replaces 2 or 4 products: at 2 and 4 bits half the integer work of cuda.fused (counted)"
    )
    PACKED_LINEAR.register("cuda.tables", ORDER, _one_token, packed_linear_tables, because)
    because = "reads only the codes, decodes in registers (predicted: best to 64 tokens)"
    few = reads(LAYOUT, runtime.takes_activations, MAX_FUSED_TOKENS)
    PACKED_LINEAR.register("cuda.fused", ORDER + 1, few, packed_linear, because)
    because = "decoding is paid once, the product is cuBLAS's (predicted)"
    PACKED_LINEAR.register("cuda.dequantize_matmul", ORDER + 2, _any_number, dequantize_matmul, because)
    because = "decodes at the speed of the stores (predicted)"
    PACKED_DEQUANTIZE.register("cuda.dequantize", ORDER, _any_number, packed_dequantize, because)
    because = "the only one for this layout: it decodes the whole vocabulary for any number of ids"
    PACKED_ROWS.register("cuda.dequantize_rows", ORDER, _any_number, dequantize_rows, because)
