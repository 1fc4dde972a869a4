"""packed_linear, packed_dequantize and packed_rows of the format codebook (docs/kernels-cuda.md)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Support
from ...formats.codebook import CODES, pack_widths
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, PACKED_ROWS, WeightProblem, reads
from ..checkpoints import codebook_checkpoint
from . import runtime
from .runtime import ORDER

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
    checkpoint = codebook_checkpoint(_cuda, field, shape)
    blob = torch.empty(_cuda.codebook_layout_bytes(checkpoint), dtype=torch.uint8, device="cpu")
    _cuda.codebook_layout_pack(blob.data_ptr(), blob.numel(), checkpoint)
    return from_blob(blob.to(device), shape)


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    device, blob = weight.tensors[0].device, weight.tensors[0].cpu()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device="cpu")
    runtime.extension().codebook_layout_codes(blob.data_ptr(), blob.numel(), *weight.shape, codes.data_ptr())
    return pack_widths(codes.to(device), beside["column_bits"])


# ---- kernels --------------------------------------------------------------------------------------------------------


def operand(weight: WeightOperand) -> Any:
    """Codes decoded in registers, multiplied by tensor cores."""
    (blob,) = weight.tensors
    return runtime.extension().CodebookOperand(blob.data_ptr(), blob.numel(), *weight.shape)


def tables(weight: WeightOperand) -> Any:
    """One token: sums of several columns' products are looked up in tables made from x; all in fp32."""
    (blob,) = weight.tensors
    return runtime.extension().CodebookTables(blob.data_ptr(), blob.numel(), *weight.shape)


packed_linear = partial(runtime.run_linear, operand)
packed_linear_tables = partial(runtime.run_linear, tables)
packed_dequantize = partial(runtime.dequantize, operand)
dequantize_matmul = partial(runtime.dequantize_matmul, operand)


def dequantize_rows(weight: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole matrix decoded, which torch's allocator takes back at once."""
    outside = (ids < 0) | (ids >= weight.shape[0])
    rows = packed_dequantize(weight, dtype)[ids.clamp(0, weight.shape[0] - 1)]
    return rows.masked_fill(outside[:, None], torch.nan)


def tables_fit() -> bool:
    return runtime.extension().CodebookTables.fit()


_any_number = reads(LAYOUT, runtime.takes_activations)


def _one_token(problem: WeightProblem) -> Support:
    if problem.tokens != 1:
        return False, f"serves one token, here {problem.tokens}"
    fits, why = _any_number(problem)
    with runtime.on(problem.device):
        if fits and not tables_fit():
            return False, "needs 129 KiB of shared memory for a block, more than this device has"
    return fits, why


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
