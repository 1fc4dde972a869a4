"""The CUDA back end: C++ kernels for compute capability 8.0 and up, built with nvcc, without libtorch.

A machine layout is one uint8 blob in device memory, made on the host when a layer is loaded and moved there; it holds everything
but the bias. Nothing here waits for the device, so calls can be captured in CUDA graphs. See docs/kernels-cuda.md.
"""

from . import (  # noqa: F401  (for their rows)
    codebook,
    codebook_gradient,
    kmeans_1d,
    pack_codes,
    routed_experts,
    sinkhorn,
    softmax_cdist_l1,
    sparse,
)
from .runtime import available as available
