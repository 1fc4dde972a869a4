"""packed_linear and packed_dequantize of the sparse formats (csrc/sparse/cpu/layout.h, docs/kernels-sparse.md)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...layouts import Fields, Layout, Shape, Shapes, WeightOperand, register_layout
from ...operations import PACKED_DEQUANTIZE, PACKED_LINEAR, reads
from ...structure import weight_type
from ..checkpoints import SPARSE_KINDS, sparse_checkpoint
from . import runtime
from .runtime import DTYPE_CODE, ORDER

FEW_KEPT = {"scalar": 0.12, "avx2": 0.22, "avx_vnni": 0.22, "avx512": 0.12, "amx": 0.12}
"""A bitmap that keeps a smaller share of its weights is laid out as column numbers: gathers cost by the kept weight, masks by
the weight, and most with AVX2. 4096 x 4096, M = 1, masks and numbers in the same run: with AVX2 at 20 % kept 1229 and 989 us in
fp32, 1108 and 726 in bf16, but at 30 % 1159 and 1049 for 5.8 and 9.6 bits a weight; with AVX-512 at 15 % 529 and 488, at 10 %
482 and 360. AMX multiplies what masks spread, not column numbers: 512 tokens in bf16 at 15 % take 14 ms and 72."""


def prepack(kind: str, field: Fields, shape: Shape) -> WeightOperand:
    field = {name: tensor.contiguous() for name, tensor in field.items()}
    _cpu = runtime.kernels()
    checkpoint, few_kept = sparse_checkpoint(_cpu, kind, field, shape), FEW_KEPT.get(_cpu.isa(), FEW_KEPT["scalar"])
    size = _cpu.sparse_layout_bytes(checkpoint, few_kept)
    blob = runtime.empty_layout(size)
    _cpu.sparse_layout_pack(blob.data_ptr(), size, checkpoint, few_kept)
    return runtime.from_blob(kind, blob, shape)


def unpack(weight: WeightOperand, shapes: Shapes, beside: Fields) -> dict[str, Tensor]:
    field = {key: torch.empty(shape, dtype=dtype, device=runtime.DEVICE) for key, (shape, dtype) in shapes.items()}
    runtime.bound(weight).unpack(sparse_checkpoint(runtime.kernels(), weight.kind, field, weight.shape))
    return field


def packed_dequantize(weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    operand = runtime.bound(weight)
    runtime.kernels()
    dense = torch.empty(weight.shape, dtype=dtype, device=runtime.DEVICE)
    operand.dequantize(dense.data_ptr(), DTYPE_CODE[dtype])
    return dense


because = "the packed weight is read once for few tokens; expanded to the L1 cache and multiplied for more"
for kind in SPARSE_KINDS:
    holds = weight_type(kind).fields
    make, back = partial(prepack, kind), partial(runtime.from_blob, kind)
    register_layout(Layout("cpu", kind, ORDER, holds, runtime.serves, make, unpack, back, runtime.settle))
    supports = reads(f"cpu.{kind}", runtime.takes_activations)
    PACKED_LINEAR.register(f"cpu.{kind}_linear", ORDER, supports, runtime.packed_linear, because)
    PACKED_DEQUANTIZE.register(f"cpu.{kind}_dequantize", ORDER, supports, packed_dequantize, because)
