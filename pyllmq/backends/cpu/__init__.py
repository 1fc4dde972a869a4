"""The C++ back end: scalar, AVX2 and AVX-512 kernels chosen at run time, on a thread pool of its own.

A machine layout is one uint8 blob that starts with a header (magic, version, sizes); it is made once when a layer is loaded and
holds everything but the bias. See docs/kernels-cpu.md.
"""

from . import (
    codebook,
    codebook_gradient,
    doubly_stochastic,
    fit_columns,
    kmeans_1d,
    pack_codes,
    sinkhorn,
    softmax_cdist_l1,
    sparse,
)
from .runtime import available as available


def register_kernels() -> None:
    for module in (
        codebook,
        codebook_gradient,
        sparse,
        pack_codes,
        softmax_cdist_l1,
        kmeans_1d,
        fit_columns,
        sinkhorn,
        doubly_stochastic,
    ):
        module.register_kernels()
