"""kmeans_1d and kmeans_1d_errors: a problem per thread. Values on another device come here, and the results go back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Problem, Support
from ...operations import KMEANS_1D, KMEANS_1D_ERRORS
from . import runtime
from .runtime import KMEANS_CODE, ORDER

ORDER_MOVED = 400
"""Behind the rows of the back ends that serve other devices themselves."""


def kmeans_1d(
    values: Tensor,
    weights: Tensor | None,
    ks: Sequence[int],
    method: str,
    seed: int,
    half_centroids: bool,
    packed: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Values on another device travel here and the results back: 5 bytes a value."""
    problems, n = values.shape
    row_bytes = [-(-n * max(1, (k - 1).bit_length()) // 8) if packed else n for k in ks]
    centroids = [torch.empty(problems, k, dtype=torch.float32, device=runtime.DEVICE) for k in ks]
    codes = [torch.empty(problems, nbytes, dtype=torch.uint8, device=runtime.DEVICE) for nbytes in row_bytes]
    how: dict[str, Any] = {"method": method, "seed": seed, "half_centroids": half_centroids, "packed": packed}
    _kmeans_1d(values, weights, ks, **how, centroids=centroids, codes=codes, errors=None)
    return [(c.to(values.device), q.to(values.device)) for c, q in zip(centroids, codes, strict=True)]


def kmeans_1d_errors(values: Tensor, weights: Tensor | None, ks: Sequence[int], method: str) -> Tensor:
    errors = torch.empty(values.shape[0], len(ks), dtype=torch.float64, device=runtime.DEVICE)
    how: dict[str, Any] = {"method": method, "seed": 0, "half_centroids": False, "packed": False}
    _kmeans_1d(values, weights, ks, **how, centroids=[], codes=[], errors=errors)
    return errors.to(values.device)


def _kmeans_1d(values: Tensor, weights: Tensor | None, ks: Sequence[int], method: str, **rest: Any) -> None:
    values = values.to(runtime.DEVICE)
    weights = None if weights is None else weights.to(runtime.DEVICE)
    runtime.kernels().kmeans_1d(
        values=values,
        weights=weights,
        weights_stride=values.shape[1] if weights is not None and weights.dim() == 2 else 0,
        problems=values.shape[0],
        n=values.shape[1],
        ks=list(ks),
        method=KMEANS_CODE[method],
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
