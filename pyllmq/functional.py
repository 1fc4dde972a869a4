"""The operations as functions; `pyllmq.ops` defines them and `torch.ops.pyllmq` holds them for compiled graphs."""

from .kmeans import kmeans_1d, kmeans_1d_errors
from .ops import codebook_dequantize, codebook_linear, pack_codes, softmax_cdist_l1, unpack_codes
from .transport import doubly_stochastic, sinkhorn

__all__ = [
    "codebook_dequantize",
    "codebook_linear",
    "doubly_stochastic",
    "kmeans_1d",
    "kmeans_1d_errors",
    "pack_codes",
    "sinkhorn",
    "softmax_cdist_l1",
    "unpack_codes",
]
