"""packed_linear, packed_dequantize and packed_rows of the format codebook (docs/kernels-cuda.md)."""

from __future__ import annotations

import os
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
from .runtime import DTYPE_CODE, ORDER

LAYOUT = "cuda.codebook"

MAX_FUSED_TOKENS = 64
"""Up to this many tokens the codes are decoded anew for every 16 tokens (8 in fp32), beyond that once for all of them.

Predicted from instruction counts, for 4 bits at 4.3 TB/s: 16 tokens cost at most 2.2 times the reading of the codes, so 64
cost 2.2 times the reading of an fp16 matrix; decoding to memory and multiplying from there moves 2.25 times as much.
"""


MIN_WGMMA_TOKENS, MAX_WGMMA_TOKENS = 9, 2048
"""From here on decoding for all tokens at once takes fewer instructions than decoding for 16 of them (counted). It is predicted to
give 0.90 to 0.95 of cuBLAS on dense weights from 256 tokens on; decoding to memory first 0.83 at 1024 and 0.91 at 2048."""

MAX_REGISTER_COLUMNS = 32
"""Columns of the product that wgmma from registers serves: tokens, or twice the tokens in fp32. Half of what tensor cores multiply
there are zeros, so 64 tokens take longer than by `cuda.wgmma` (counted)."""

MIN_REGISTER_TOKENS, MIN_REGISTER_TOKENS_4_BITS, MIN_REGISTER_TOKENS_FP32 = 9, 17, 5
"""From here on it is predicted to be faster than the rows behind it, by clocks for 256 rows and 64 columns at 2, 3 and 4 bits. 16
tokens: 425, 481 and 829, `cuda.wgmma` 676, 760 and 768. 32 tokens: 512, 580 and 829, `cuda.wgmma` 756, 840 and 848. 16 tokens in
fp32 as 32 tokens, `cuda.fused` 1850. Up to 8 tokens `cuda.fused` takes 435, 480 and 820, without a first kernel for x."""

MAX_PLANE_BITS = 4
"""Widths that have byte planes (csrc/codebook/cuda/layout.h): more entries than two permutations hold are looked up in memory."""

MAX_PLANE_TOKENS = 2
"""The two bytes of x and four rows fill the eight columns of an instruction, so each token is an instruction of its own."""


# ---- the layout -----------------------------------------------------------------------------------------------------


def from_blob(blob: Tensor, shape: Shape) -> WeightOperand:
    """`meta` is the largest width of a column, and whether the layout has patches, which it lacks where an outlier over its row's
    scale is too large for fp16. Raises ValueError if the blob is no such layout, is cut off, or holds a weight of
    another shape."""
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"a layout {LAYOUT!r} is a uint8 vector, given: {blob.dtype} of shape {tuple(blob.shape)}")
    header = blob[: runtime.extension().codebook_header_bytes].to("cpu", copy=True)  # aligned, wherever the blob begins
    meta = runtime.extension().codebook_layout_meta(header.data_ptr(), blob.numel(), *shape)
    return WeightOperand("codebook", LAYOUT, (blob,), meta, shape)


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


def byte_planes(weight: WeightOperand) -> Any:
    """One or two tokens: codebooks and x as integers, looked up and multiplied a byte at a time."""
    (blob,) = weight.tensors
    return runtime.extension().CodebookBytePlanes(blob.data_ptr(), blob.numel(), *weight.shape, weight.meta[0])


def wgmma(weight: WeightOperand) -> Any:
    """Many tokens: codes decoded once for all of them, multiplied by warp groups."""
    (blob,) = weight.tensors
    return runtime.extension().CodebookWgmma(blob.data_ptr(), blob.numel(), *weight.shape)


def wgmma_registers(weight: WeightOperand) -> Any:
    """Codes decoded in registers once for up to 32 tokens, multiplied from there by warp groups."""
    (blob,) = weight.tensors
    return runtime.extension().CodebookWgmmaRegisters(blob.data_ptr(), blob.numel(), *weight.shape)


packed_linear = partial(runtime.run_linear, operand)
packed_linear_byte_planes = partial(runtime.run_linear, byte_planes)
packed_linear_wgmma = partial(runtime.run_linear, wgmma)
packed_linear_wgmma_registers = partial(runtime.run_linear, wgmma_registers)
packed_dequantize = partial(runtime.dequantize, operand)
dequantize_matmul = partial(runtime.dequantize_matmul, operand)


def packed_rows(weight: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    device = weight.tensors[0].device
    rows = torch.empty(ids.shape[0], weight.shape[1], dtype=dtype, device=device)
    with runtime.current(device):
        found = runtime.bound(operand, weight)
        found.row_values(ids.data_ptr(), ids.shape[0], rows.data_ptr(), DTYPE_CODE[dtype], runtime.stream(device))
    return rows


_any_number = reads(LAYOUT, runtime.takes_activations)


def _narrow_and_not_exact(problem: WeightProblem) -> Support:
    if problem.precision == "exact":
        return False, "errs by up to 2e-4 of the result, and precision is 'exact'"
    fits, why = runtime.takes_activations(problem)
    if fits and problem.meta[0] > MAX_PLANE_BITS:
        return False, f"serves columns of up to {MAX_PLANE_BITS} bits, this weight has one of {problem.meta[0]}"
    return fits, why


def has_wgmma(device: str) -> bool:
    with runtime.on(device):
        return bool(runtime.extension().CodebookWgmma.runs())


def _takes_wgmma(problem: WeightProblem) -> Support:
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return False, f"takes float16, bfloat16, not {problem.dtype}"
    if problem.tokens < MIN_WGMMA_TOKENS:
        return False, f"serves {MIN_WGMMA_TOKENS} tokens and more, here {problem.tokens}"
    if os.environ.get("PYLLMQ_CUDA_WGMMA") == "0":
        return False, "is switched off by PYLLMQ_CUDA_WGMMA=0"
    fits, why = runtime.on_device(problem)
    if not fits:
        return fits, why
    if not has_wgmma(problem.device):
        return False, "needs compute capability 9.0, and a build for it (sm_90a)"
    if not problem.meta[1]:
        return False, "an outlier over its row's scale is too large for fp16"
    return True, ""


def _takes_wgmma_registers(problem: WeightProblem) -> Support:
    fits, why = runtime.takes_activations(problem)
    if not fits:
        return fits, why
    fp32 = problem.dtype == torch.float32
    if problem.meta[0] > MAX_PLANE_BITS:
        return False, f"serves columns of up to {MAX_PLANE_BITS} bits, this weight has one of {problem.meta[0]}"
    fewest = MIN_REGISTER_TOKENS_4_BITS if problem.meta[0] == MAX_PLANE_BITS else MIN_REGISTER_TOKENS
    fewest = MIN_REGISTER_TOKENS_FP32 if fp32 else fewest
    if problem.tokens < fewest:
        return False, f"serves {fewest} tokens and more of this dtype and width, here {problem.tokens}"
    if problem.tokens * (2 if fp32 else 1) > MAX_REGISTER_COLUMNS:
        return False, f"serves up to {MAX_REGISTER_COLUMNS} tokens, half as many in float32, here {problem.tokens}"
    if os.environ.get("PYLLMQ_CUDA_WGMMA") == "0":
        return False, "is switched off by PYLLMQ_CUDA_WGMMA=0"
    if not has_wgmma(problem.device):
        return False, "needs compute capability 9.0, and a build for it (sm_90a)"
    return True, ""


register_layout(Layout("cuda", "codebook", ORDER, CODES, runtime.serves, prepack, unpack, from_blob))
because = "a lookup is an operand of integer tensor cores: a third to a half of cuda.fused's instructions (counted)"
one_or_two = reads(LAYOUT, _narrow_and_not_exact, MAX_PLANE_TOKENS)
PACKED_LINEAR.register("cuda.byte_planes", ORDER, one_or_two, packed_linear_byte_planes, because)
because = (
    "decodes once for up to 32 tokens, in registers: 425 clocks where cuda.wgmma takes 676 (2 bits, 16 tokens; counted)"
)
some = reads(LAYOUT, _takes_wgmma_registers, MAX_REGISTER_COLUMNS)
PACKED_LINEAR.register("cuda.wgmma_registers", ORDER, some, packed_linear_wgmma_registers, because)
because = (
    "decodes once for all tokens, into shared memory that warp groups multiply from (counted; predicted best to 2048)"
)
many = reads(LAYOUT, _takes_wgmma, MAX_WGMMA_TOKENS)
PACKED_LINEAR.register("cuda.wgmma", ORDER + 1, many, packed_linear_wgmma, because)
because = "reads only the codes, decodes in registers (predicted: best to 64 tokens)"
few = reads(LAYOUT, runtime.takes_activations, MAX_FUSED_TOKENS)
PACKED_LINEAR.register("cuda.fused", ORDER + 2, few, packed_linear, because)
because = "decoding is paid once, the product is cuBLAS's (predicted)"
PACKED_LINEAR.register("cuda.dequantize_matmul", ORDER + 3, _any_number, dequantize_matmul, because)
because = "decodes at the speed of the stores (predicted)"
PACKED_DEQUANTIZE.register("cuda.dequantize", ORDER, _any_number, packed_dequantize, because)
because = "reads the codes of those rows and the entries that they name"
PACKED_ROWS.register("cuda.rows", ORDER, _any_number, packed_rows, because)
