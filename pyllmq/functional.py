"""The operations as functions; `pyllmq.ops` defines them and `torch.ops.pyllmq` holds them for compiled graphs."""

from .formats.codebook import codebook_gradient
from .kmeans import fit_columns, kmeans_1d, kmeans_1d_errors
from .ops import (
    bitmap_dequantize,
    bitmap_linear,
    codebook_dequantize,
    codebook_linear,
    pack_codes,
    packed_dequantize,
    packed_linear,
    packed_rows,
    routed_experts,
    softmax_cdist_l1,
    sparse24_codebook_dequantize,
    sparse24_codebook_linear,
    sparse24_dequantize,
    sparse24_linear,
    unpack_codes,
)
from .transport import doubly_stochastic, sinkhorn

__all__ = [
    "bitmap_dequantize",
    "bitmap_linear",
    "codebook_dequantize",
    "codebook_gradient",
    "codebook_linear",
    "doubly_stochastic",
    "fit_columns",
    "kmeans_1d",
    "kmeans_1d_errors",
    "pack_codes",
    "packed_dequantize",
    "packed_linear",
    "packed_rows",
    "routed_experts",
    "sinkhorn",
    "softmax_cdist_l1",
    "sparse24_codebook_dequantize",
    "sparse24_codebook_linear",
    "sparse24_dequantize",
    "sparse24_linear",
    "unpack_codes",
]
