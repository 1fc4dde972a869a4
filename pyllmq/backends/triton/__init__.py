"""The Triton back end: GPUs that `_cuda` was not built for, other vendors' included. triton is imported at the first call.

A machine layout is one uint8 blob that starts with a header, and views of it that kernels take one by one; made once by torch
operations. With TRITON_INTERPRET=1 the kernels run on the CPU, slowly, for tests; the interpreter's bfloat16 is wrong. See
docs/kernels-triton.md.
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
