"""kmeans_1d and kmeans_1d_errors: a problem per thread. Values on another device come here, and the results go back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import Problem, Support
from ...operations import KMEANS_1D, KMEANS_1D_ERRORS, Points
from . import runtime
from .runtime import KMEANS_CODE, ORDER

ORDER_MOVED = 400
"""Behind the rows of the back ends that serve other devices themselves."""


def kmeans_1d(points: Points, seed: int, half_centroids: bool, packed: bool) -> list[tuple[Tensor, Tensor]]:
    """Values on another device travel here and the results back: 5 bytes a value."""
    problems, n = points.values.shape
    row_bytes = [-(-n * max(1, (k - 1).bit_length()) // 8) if packed else n for k in points.ks]
    centroids = [torch.empty(problems, k, dtype=torch.float32, device=runtime.DEVICE) for k in points.ks]
    codes = [torch.empty(problems, nbytes, dtype=torch.uint8, device=runtime.DEVICE) for nbytes in row_bytes]
    how: dict[str, Any] = {"seed": seed, "half_centroids": half_centroids, "packed": packed}
    _kmeans_1d(points, **how, centroids=centroids, codes=codes, errors=None)
    device = points.values.device
    return [(c.to(device), q.to(device)) for c, q in zip(centroids, codes, strict=True)]


def kmeans_1d_errors(points: Points) -> Tensor:
    errors = torch.empty(len(points.values), len(points.ks), dtype=torch.float64, device=runtime.DEVICE)
    _kmeans_1d(points, seed=0, half_centroids=False, packed=False, centroids=[], codes=[], errors=errors)
    return errors.to(points.values.device)


def _kmeans_1d(points: Points, **rest: Any) -> None:
    values = points.values.to(runtime.DEVICE)
    weights = None if points.weights is None else points.weights.to(runtime.DEVICE)
    runtime.kernels().kmeans_1d(
        values=values,
        weights=weights,
        weights_stride=values.shape[1] if weights is not None and weights.dim() == 2 else 0,
        problems=values.shape[0],
        n=values.shape[1],
        ks=list(points.ks),
        method=KMEANS_CODE[points.method],
        **rest,
    )


def _from_another_device(problem: Problem) -> Support:
    return (False, "needs values, not a meta tensor") if problem.device == "meta" else runtime.available()


because = "a problem per thread"
KMEANS_1D.register("cpu.kmeans_1d", ORDER, runtime.on_cpu, kmeans_1d, because)
KMEANS_1D_ERRORS.register("cpu.kmeans_1d_errors", ORDER, runtime.on_cpu, kmeans_1d_errors, because)
because = "moving a value (5 bytes there and back) costs less than clustering it by plain torch"
KMEANS_1D.register("cpu.kmeans_1d_moved", ORDER_MOVED, _from_another_device, kmeans_1d, because)
KMEANS_1D_ERRORS.register("cpu.kmeans_1d_errors_moved", ORDER_MOVED, _from_another_device, kmeans_1d_errors, because)
