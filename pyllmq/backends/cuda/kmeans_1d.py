"""kmeans_1d and kmeans_1d_errors: the dynamic program a block per problem; torch sorts and looks codes up."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...operations import KMEANS_1D, KMEANS_1D_ERRORS, finds_optimum
from ..reference.kmeans_1d import kmeans_1d, kmeans_1d_errors
from . import runtime
from .runtime import ORDER


def kmeans_1d_layers(sums: Tensor, masses: Tensor, k_max: int) -> Tensor:
    """The dynamic program, a block per problem; see `reference.kmeans_1d.Layers`."""
    problems, n = sums.shape[0], sums.shape[1] - 1
    sums, masses, device = sums.contiguous(), masses.contiguous(), sums.device
    gains = torch.empty(problems, 2, n + 1, dtype=torch.float64, device=device)
    best = torch.empty(problems, k_max + 1, n + 1, dtype=torch.int32, device=device)
    with runtime.current(device):
        runtime.extension().kmeans_1d_layers(
            sums.data_ptr(),
            masses.data_ptr(),
            gains.data_ptr(),
            best.data_ptr(),
            problems,
            n,
            k_max,
            runtime.stream(device),
        )
    return best


supports = finds_optimum(runtime.on_device)
because = "a block per problem; torch sorts and looks codes up"
KMEANS_1D.register("cuda.kmeans_1d", ORDER, supports, partial(kmeans_1d, find_layers=kmeans_1d_layers), because)
errors = partial(kmeans_1d_errors, find_layers=kmeans_1d_layers)
KMEANS_1D_ERRORS.register("cuda.kmeans_1d_errors", ORDER, supports, errors, "a block per problem; torch sorts")
