"""packed_linear and packed_dequantize of the sparse formats: layouts made on the host (csrc/sparse/cuda/layout.h).

Kernels must know before their launch what a layout's header says, and a header on the device cannot be read without waiting for
it: so `meta` of an operand says it (see `Meta`). See docs/kernels-cuda.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch import Support
from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, WeightProblem, reads
from ...structure import weight_type
from ..checkpoints import SPARSE_KINDS, sparse_checkpoint
from . import runtime
from .runtime import ORDER

FEW_KEPT = 0.25
"""A bitmap that keeps a smaller share of its weights is laid out as column numbers. Predicted from the bytes: at 25 % kept in 16
bits a mask and values take 5.9 bits a weight, padding included, values and steps between columns 6.0."""

MAX_FUSED_TOKENS = 64
"""Predicted from the bytes: 16 tokens read the packed weight once, at 2:4 in 16 bits 9 bits a weight, so 64 read 36; the dense
matrix is written and read again: 9 + 32."""

MAX_COLUMNS_TOKENS = 16
"""Predicted from the bytes: 4 tokens read the entries once, 6 bits a weight at 25 % kept, so 16 read 24 where the dense matrix
takes 6 + 32; fp32 values at 50 % kept 80 where it takes 84."""


# ---- the layouts ----------------------------------------------------------------------------------------------------


class Meta(NamedTuple):
    """What a launch must know of a layout."""

    columns: int
    """1: of few kept weights, and of fp32 values, it holds column numbers whatever the format."""
    values: int
    """Their type: 0 fp32, 1 bf16, 2 fp16, 3 int8."""
    bits: int
    """Of a code, 3 laid out as 4; 0 where values are values."""
    stage_bytes: int
    """Of the largest cell."""


def prepack(kind: str, field: Fields, shape: Shape) -> WeightOperand:
    _cuda = runtime.extension()
    device = next(iter(field.values())).device
    field = {name: tensor.contiguous().cpu() for name, tensor in field.items()}
    checkpoint = sparse_checkpoint(_cuda, kind, field, shape)
    size = _cuda.sparse_layout_bytes(checkpoint, FEW_KEPT)
    blob = torch.empty(size, dtype=torch.uint8, device="cpu")
    _cuda.sparse_layout_pack(blob.data_ptr(), size, checkpoint, FEW_KEPT)
    return WeightOperand(kind, f"cuda.{kind}", (blob.to(device),), _meta(kind, blob, shape), shape)


def from_blob(kind: str, blob: Tensor, shape: Shape) -> WeightOperand:
    """Raises ValueError if the blob is no such layout, is cut off, or holds a weight of another shape."""
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"a layout 'cuda.{kind}' is a uint8 vector, given: {blob.dtype} of shape {tuple(blob.shape)}")
    return WeightOperand(kind, f"cuda.{kind}", (blob,), _meta(kind, blob, shape), shape)


def _meta(kind: str, blob: Tensor, shape: Shape) -> Meta:
    header = blob[: runtime.extension().sparse_header_bytes].cpu()
    found, values, bits, stage_bytes, _ = runtime.extension().sparse_layout_describe(
        header.data_ptr(), blob.numel(), *shape
    )
    if found != kind and (found != "columns" or kind == "sparse24_codebook"):
        raise ValueError(f"this blob is no layout 'cuda.{kind}', but of {found!r}")
    coded = kind == "sparse24_codebook"
    return Meta(int(found == "columns"), 0 if coded else values, 0 if not coded else 2 if bits == 2 else 4, stage_bytes)


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    device, blob = weight.tensors[0].device, weight.tensors[0].cpu()
    field = {key: torch.empty(shape, dtype=dtype, device="cpu") for key, (shape, dtype) in shapes.items()}
    checkpoint = sparse_checkpoint(runtime.extension(), weight.kind, field, weight.shape)
    runtime.extension().sparse_layout_unpack(blob.data_ptr(), blob.numel(), checkpoint)
    return {key: tensor.to(device) for key, tensor in field.items()}


# ---- kernels --------------------------------------------------------------------------------------------------------


def operand(weight: WeightOperand) -> Any:
    """Values as they are."""
    (blob,) = weight.tensors
    meta = Meta(*weight.meta)
    kind = "columns" if meta.columns else weight.kind
    return runtime.extension().SparseOperand(blob.data_ptr(), blob.numel(), *weight.shape, kind, *meta[1:])


def products(weight: WeightOperand) -> Any:
    """One token, codes of 2 bits: products of codebooks and x as integers, looked up and added a byte at a time."""
    (blob,) = weight.tensors
    return runtime.extension().SparseProducts(
        blob.data_ptr(), blob.numel(), *weight.shape, Meta(*weight.meta).stage_bytes
    )


def tables(weight: WeightOperand) -> Any:
    """One token, codes of 3 and 4 bits: products of codebooks and x, looked up in shared memory and added in fp32."""
    (blob,) = weight.tensors
    return runtime.extension().SparseTables(
        blob.data_ptr(), blob.numel(), *weight.shape, Meta(*weight.meta).stage_bytes
    )


packed_linear = partial(runtime.run_linear, operand)
packed_linear_products = partial(runtime.run_linear, products)
packed_linear_tables = partial(runtime.run_linear, tables)
packed_dequantize = partial(runtime.dequantize, operand)
dequantize_matmul = partial(runtime.dequantize_matmul, operand)


# ---- the table ------------------------------------------------------------------------------------------------------


_FUSED = {
    "bitmap": "masks spread values into operands of dense tensor cores, in registers (predicted: best to 64 tokens)",
    "sparse24": "mma.sp takes values and positions as they are: the time is that of reading them (predicted)",
    "sparse24_codebook": "codes are looked up in registers (2 bits) or a lane's own table, for mma.sp (predicted)",
}


def _as_columns(problem: WeightProblem) -> Support:
    if not problem.meta[0]:
        return False, "reads column numbers, this weight has masks or positions"
    return runtime.takes_activations(problem)


def _as_cells(problem: WeightProblem) -> Support:
    if problem.meta[0]:
        return False, "reads masks or positions, this weight has column numbers"
    return runtime.takes_activations(problem)


def _of_2_bits_and_not_exact(problem: WeightProblem) -> Support:
    if problem.precision == "exact":
        return False, "errs by up to 2e-4 of the result, and precision is 'exact'"
    if Meta(*problem.meta).bits != 2:
        return False, "serves codes of 2 bits: of more, a group's products do not fit into two permutations"
    return runtime.takes_activations(problem)


def _of_3_and_4_bits(problem: WeightProblem) -> Support:
    if Meta(*problem.meta).bits == 2:
        return False, "serves codes of 3 and 4 bits: the 16 entries of a group of 2 bits fit into registers"
    return runtime.takes_activations(problem)


layout = "cuda.sparse24_codebook"
because = "a lookup is a product and an operand of integer tensor cores: 2.7 instructions of the integer pipe for 4.4 (counted)"
one = reads(layout, _of_2_bits_and_not_exact, 1)
PACKED_LINEAR.register(f"{layout}_products", ORDER, one, packed_linear_products, because)
because = "a lookup is a product that is added: 7.5 instructions a kept weight for 11.4 (counted)"
PACKED_LINEAR.register(f"{layout}_tables", ORDER, reads(layout, _of_3_and_4_bits, 1), packed_linear_tables, because)
for kind in SPARSE_KINDS:
    make, back = partial(prepack, kind), partial(from_blob, kind)
    register_layout(Layout("cuda", kind, ORDER, weight_type(kind).fields, runtime.serves, make, unpack, back))
    layout = f"cuda.{kind}"
    few, any_number = reads(layout, _as_cells, MAX_FUSED_TOKENS), reads(layout, runtime.takes_activations)
    PACKED_LINEAR.register(f"{layout}_fused", ORDER + 1, few, packed_linear, _FUSED[kind])
    if kind != "sparse24_codebook":
        few = reads(layout, _as_columns, MAX_COLUMNS_TOKENS)
        because = "the work is that of the kept weights: predicted best below 25 % kept, and for fp32 values"
        PACKED_LINEAR.register(f"{layout}_columns", ORDER + 1, few, packed_linear, because)
    because = "spreading is paid once, the product is cuBLAS's (predicted)"
    PACKED_LINEAR.register(f"{layout}_matmul", ORDER + 2, any_number, dequantize_matmul, because)
    because = "one pass over the packed weight (predicted)"
    PACKED_DEQUANTIZE.register(f"{layout}_dequantize", ORDER, any_number, packed_dequantize, because)
