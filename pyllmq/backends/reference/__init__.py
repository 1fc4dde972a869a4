"""Plain torch on any device: the oracle that every other back end is tested against. Reads the checkpoint layouts.

Its rows are the last of each operation: they run anywhere, and serve where nothing faster does.
"""

from . import (  # noqa: F401  (for their rows)
    codebook_gradient,
    doubly_stochastic,
    fit_columns,
    kmeans_1d,
    pack_codes,
    packed_linear,
    packed_rows,
    routed_experts,
    sinkhorn,
    softmax_cdist_l1,
)


def available() -> tuple[bool, str]:
    return True, "plain torch, any device"
