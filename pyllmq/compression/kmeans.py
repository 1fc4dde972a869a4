"""One-dimensional k-means of many columns at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import kernels

METHODS = ("exact", "lloyd")
MAX_CLUSTERS = 256
MAX_POINTS = 2**32 - 1


def kmeans_1d(
    values: Tensor,
    k: int,
    weights: Tensor | None = None,
    method: str = "exact",
    seed: int = 0,
    centroid_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cluster each row of `values` into k groups of the least (weighted) sum of squared distances to their centroids.

    `exact` finds the global optimum by divide-and-conquer dynamic programming (Gronlund et al. 2017, arXiv 1701.07204;
    Wang & Song 2011, Ckmeans.1d.dp); `lloyd` runs greedy k-means++ (Arthur & Vassilvitskii 2007) and Lloyd's iteration,
    the usual and cheaper solver. The problems are spread over `torch.get_num_threads()` threads; the result does not
    depend on their number.

    Args:
        values: float [C, n], n >= 1; C problems. Worked on as float32, on the CPU; the results lie where `values` lies.
        k: number of centroids, 1 to 256.
        weights: float [C, n] or [n] >= 0, each problem with one > 0. A point of weight 0 has a code, moves no centroid.
        method: "exact" or "lloyd".
        seed: of k-means++ (each problem starts from the same one); unused by "exact".
        centroid_dtype: torch.float32, or torch.float16: centroids are rounded to it before the codes are assigned.

    Returns:
        centroids: `centroid_dtype` [C, k], ascending. With fewer distinct values than k the last one is repeated.
        codes: uint8 [C, n], the nearest centroid, the lower one at a tie.

    Raises:
        TypeError, ValueError: with what was given and what is allowed; for values and weights the first bad index.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values is {given}; it must be a floating-point tensor [C, n]")
    if values.dim() != 2:
        hint = "; for one problem pass values.unsqueeze(0)" if values.dim() == 1 else ""
        raise ValueError(f"values has the shape {tuple(values.shape)}; it must be [C, n]: C problems of n values{hint}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_CLUSTERS:
        raise ValueError(f"k is {k!r}; allowed: an integer from 1 to {MAX_CLUSTERS}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(map(repr, METHODS))}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}; allowed: an integer from 0 to 2**64 - 1")
    if centroid_dtype not in (torch.float32, torch.float16):
        raise ValueError(f"centroid_dtype is {centroid_dtype}; allowed: torch.float32, torch.float16")
    problems, n = values.shape
    if not 1 <= n <= MAX_POINTS:
        raise ValueError(f"values has n = {n} values per problem; allowed: 1 to {MAX_POINTS}")

    points = values.detach().to("cpu", torch.float32).contiguous()
    _require(torch.isfinite(points), points, "values", "finite in float32")
    stride = 0
    if weights is not None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            given = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights is {given}; it must be a floating-point tensor [C, n] or [n]")
        if tuple(weights.shape) not in ((problems, n), (n,)):
            raise ValueError(f"weights has the shape {tuple(weights.shape)}; allowed: [{problems}, {n}] or [{n}]")
        weights = weights.detach().to("cpu", torch.float32).contiguous()
        _require(torch.isfinite(weights) & (weights >= 0), weights, "weights", "finite in float32 and >= 0")
        empty = (weights == 0).all(-1)
        if bool(empty.any()):
            where = f"[{int(empty.nonzero()[0])}]" if weights.dim() == 2 else ""
            raise ValueError(f"weights{where} are all 0; each problem needs at least one weight > 0")
        stride = n if weights.dim() == 2 else 0

    centroids = torch.empty(problems, k, dtype=torch.float32)
    codes = torch.empty(problems, n, dtype=torch.uint8)
    half = centroid_dtype == torch.float16
    _solve(points, weights, stride, k, method, seed, half, centroids, codes)
    if half and not bool(torch.isfinite(centroids).all()):
        problem = int((~torch.isfinite(centroids)).any(1).nonzero()[0])
        raise ValueError(
            f"a centroid of values[{problem}] (up to {float(points[problem].abs().max()):g}) does not fit into fp16, "
            "which ends at 65504; rescale the values or ask for torch.float32"
        )
    return centroids.to(values.device, centroid_dtype), codes.to(values.device)


def solve_column(values: Tensor, weights: Tensor, centroids: Tensor, codes: Tensor) -> None:
    """`kmeans_1d` of one problem with fp16 centroids, without its checks: for columns that the caller made.

    Args:
        values, weights: contiguous float32 [n], finite, on the CPU; weights >= 0 and not all 0.
        centroids: float32 [k], codes: uint8 [n]: written. A centroid beyond fp16 becomes infinite.
    """
    _solve(values[None], weights, 0, len(centroids), "exact", 0, True, centroids, codes)


def _solve(
    points: Tensor,
    weights: Tensor | None,
    stride: int,
    k: int,
    method: str,
    seed: int,
    half_centroids: bool,
    centroids: Tensor,
    codes: Tensor,
) -> None:
    kernels().kmeans_1d(
        points.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        stride,
        *points.shape,
        k,
        method == "exact",
        seed,
        half_centroids,
        centroids.data_ptr(),
        codes.data_ptr(),
    )


def _require(good: Tensor, tensor: Tensor, name: str, allowed: str) -> None:
    if not bool(good.all()):
        index = tuple((~good).nonzero()[0].tolist())
        place = ", ".join(map(str, index))
        raise ValueError(f"{name}[{place}] is {float(tensor[index])}; allowed: {allowed}")
