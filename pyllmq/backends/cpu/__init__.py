"""The C++ back end: scalar, AVX2 and AVX-512 kernels chosen at run time, on a thread pool of its own.

A machine layout is one uint8 blob that starts with a header (magic, version, sizes); it is made once when a layer is loaded and
holds everything but the bias. See docs/kernels-cpu.md.
"""

from . import (  # noqa: F401  (for their rows)
    codebook,
    codebook_gradient,
    doubly_stochastic,
    fit_columns,
    kmeans_1d,
    pack_codes,
    routed_experts,
    sinkhorn,
    softmax_cdist_l1,
    sparse,
)
from .runtime import available as available
