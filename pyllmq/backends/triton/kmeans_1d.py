"""kmeans_1d and kmeans_1d_errors: the dynamic program a launch per level; torch sorts and looks codes up."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...operations import KMEANS_1D, KMEANS_1D_ERRORS, finds_optimum
from ..reference.kmeans_1d import kmeans_1d, kmeans_1d_errors
from . import runtime
from .runtime import ORDER


def kmeans_1d_layers(sums: Tensor, masses: Tensor, k_max: int) -> Tensor:
    """The dynamic program, a launch per level; see `reference.kmeans_1d.Layers`."""
    return runtime.launch("kmeans_1d.kmeans_1d_layers", sums, sums, masses, k_max)


supports = finds_optimum(runtime.on_device)
because = "a launch per level of the dynamic program; torch sorts and looks codes up"
KMEANS_1D.register("triton.kmeans_1d", ORDER, supports, partial(kmeans_1d, find_layers=kmeans_1d_layers), because)
errors = partial(kmeans_1d_errors, find_layers=kmeans_1d_layers)
because = "a launch per level of the dynamic program; torch sorts"
KMEANS_1D_ERRORS.register("triton.kmeans_1d_errors", ORDER, supports, errors, because)
