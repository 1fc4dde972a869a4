"""The operations as functions; `pyllmq.ops` defines them and `torch.ops.pyllmq` holds them for compiled graphs."""

from .compression.kmeans import kmeans_1d
from .ops import (
    bitmap_dequantize,
    bitmap_linear,
    codebook_dequantize,
    codebook_linear,
    pack_codes,
    sparse24_codebook_dequantize,
    sparse24_codebook_linear,
    sparse24_dequantize,
    sparse24_linear,
    unpack_codes,
)

__all__ = [
    "bitmap_dequantize",
    "bitmap_linear",
    "codebook_dequantize",
    "codebook_linear",
    "kmeans_1d",
    "pack_codes",
    "sparse24_codebook_dequantize",
    "sparse24_codebook_linear",
    "sparse24_dequantize",
    "sparse24_linear",
    "unpack_codes",
]
