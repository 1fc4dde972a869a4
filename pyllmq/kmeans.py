"""One-dimensional k-means of many problems at once: arguments are checked here, the kernel comes from the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .layouts import for_kernels
from .operations import FIT_COLUMNS, KMEANS_1D, KMEANS_1D_ERRORS, ColumnBlock, Points

METHODS = ("exact", "windowed", "lloyd")
MAX_CLUSTERS = 256
MAX_POINTS = 2**32 - 1


@overload
def kmeans_1d(
    values: Tensor,
    k: int,
    weights: Tensor | None = None,
    method: str = "exact",
    seed: int = 0,
    centroid_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def kmeans_1d(
    values: Tensor,
    k: Sequence[int],
    weights: Tensor | None = None,
    method: str = "exact",
    seed: int = 0,
    centroid_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> list[tuple[Tensor, Tensor]]: ...
def kmeans_1d(
    values: Tensor,
    k: int | Sequence[int],
    weights: Tensor | None = None,
    method: str = "exact",
    seed: int = 0,
    centroid_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
    """Cluster each row of `values` into k groups of the least (weighted) sum of squared distances to their centroids.

    `exact` finds the global optimum by divide-and-conquer dynamic programming (Gronlund et al. 2017, arXiv 1701.07204;
    Wang & Song 2011, Ckmeans.1d.dp). `windowed` does that over 128 or more cells of points, then over the points of
    windows around the cells' bounds, and moves the windows until no bound touches an edge: on average some 1e-5 above it.
    `lloyd` runs greedy k-means++ (Arthur & Vassilvitskii 2007) and Lloyd's iteration, the usual solver. The result does
    not depend on the number of threads. See docs/kernels-kmeans.md.

    Args:
        values: float [C, n], n >= 1; C problems. Worked on as float32, float64 values after their median is taken away and they
            are scaled, so that an offset costs no precision; the results lie where `values` lies.
        k: number of centroids, 1 to 256; or several numbers, which then share one sort and one dynamic program.
        weights: float [C, n] or [n] >= 0, each problem with one > 0. A point of weight 0 has a code, moves no centroid.
        method: "exact", "windowed" or "lloyd".
        seed: of k-means++ (each problem starts from the same one); unused by the other methods.
        centroid_dtype: torch.float64, torch.float32 or torch.float16; None is float64 for float64 values, float32 for others.
            fp16 centroids are rounded before the codes are assigned; with float32 or fp16, float64 values are rounded first.
        packed: codes as `pack_codes` packs them, with ceil(log2 k) bits (at least 1).

    Returns:
        (centroids, codes), or a list of such pairs, one for each number of centroids.
        centroids: `centroid_dtype` [C, k], ascending. With fewer distinct values than k the last one is repeated.
        codes: uint8 [C, n], the nearest centroid, the lower one at a tie; packed [C, ceil(n * bits / 8)].

    Raises:
        TypeError, ValueError: with what was given and what is allowed; for values and weights the first bad index.
    """
    ks = _clusters([k] if isinstance(k, int) else k)
    _check_method(method)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}; allowed: an integer from 0 to 2**64 - 1")
    if centroid_dtype not in (None, torch.float64, torch.float32, torch.float16):
        raise ValueError(
            f"centroid_dtype is {centroid_dtype}; allowed: None, torch.float64, torch.float32, torch.float16"
        )
    points, weights = _checked_points(values, weights)
    if centroid_dtype is None:
        centroid_dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    frame = _frame(values, points) if centroid_dtype == torch.float64 else None
    if frame is not None:
        points = frame.points

    half = centroid_dtype == torch.float16
    kernel = KMEANS_1D.kernel_for(points.device, points.dtype, method)
    found = kernel(Points(points, weights, ks, method), seed, half, packed)
    if half:
        _check_fits_half([centroids for centroids, _ in found], points)
    found = [(centroids.to(centroid_dtype), codes) for centroids, codes in found]
    if frame is not None:
        found = [(torch.ldexp(centroids, frame.exponent) + frame.centre, codes) for centroids, codes in found]
    return found[0] if isinstance(k, int) else found


def kmeans_1d_errors(values: Tensor, k: Sequence[int], weights: Tensor | None = None, method: str = "exact") -> Tensor:
    """The (weighted) sum of squared distances that `kmeans_1d` leaves with each number of centroids: float64 [C, len(k)].

    One dynamic program to max(k) gives them all: `kmeans_1d_errors(values, range(1, 17))` costs as much as 16 alone.
    Centroids are not rounded. Arguments as for `kmeans_1d`, with "exact" or "windowed" as the method.
    """
    if isinstance(k, int):
        raise TypeError(f"k is {k}; it must be a sequence of numbers, such as range(1, {k} + 1) or [{k}]")
    ks = _clusters(k)
    if method == "lloyd":
        raise ValueError("method is 'lloyd'; allowed: 'exact', 'windowed': one run gives the errors of every k")
    _check_method(method)
    points, weights = _checked_points(values, weights)
    frame = _frame(values, points)
    if frame is not None:
        points = frame.points
    kernel = KMEANS_1D_ERRORS.kernel_for(points.device, points.dtype, method)
    errors = kernel(Points(points, weights, ks, method))
    return errors if frame is None else torch.ldexp(errors, 2 * frame.exponent)


def fit_columns(
    block: Tensor,
    coupling: Tensor,
    pivot: Tensor,
    row_weights: Tensor,
    row_scale: Tensor,
    bits: Tensor,
    kept_counts: Tensor,
    stored: Tensor,
    codes: Tensor,
    kept: Tensor,
    centroids: Tensor,
    method: str = "exact",
    descend: bool = False,
) -> tuple[Tensor, float]:
    """Fit the B columns of a block, each by 1-D k-means and each taking up what those before it changed.

    A sweep fits column j to `block[j]`. A descent fits it to `stored[j] - block[j] / pivot[j]`, where `block` is half the
    objective's gradient, and takes the result if it lowers sum row_weights (stored - target)^2. Then, for every later column p,
    `block[p] -= coupling[j, p] * moves[j]`. This is the inner loop of the column sweep of GPTQ (arXiv 2210.17323) with
    k-means per column, and of block coordinate descent; pyllmq/compression has the loops around it.

    Args:
        block: float32 [B, N], changed in place.
        coupling: float32 [B, B], its rows may lie apart; what stands right of the diagonal is read.
        pivot: float32 [B]: sweep: U_jj of the inverse Hessian's factor; descent: H_jj, where 0 leaves the column as it is.
        row_weights, row_scale: float32 [N], > 0: importance of a row; centroids are those of values / row_scale.
        bits: uint8 [B], 1 to 8.
        kept_counts: int32 [B], less than N: how many weights of the column stay in fp16, those that the codebook serves worst.
        stored: float32 [B, N]: what a column decodes to; written, and read by the descent. Likewise
        codes: uint8 [B, N]; kept: bool [B, N]; centroids: float32 [B, 256], values of fp16, the first 2**bits of each.
        method: of k-means, see `kmeans_1d`.

    Returns:
        moves: float32 [B, N]; sweep: (value - stored) / U_jj; descent: stored before - stored after.
        decrease: by how much a descent lowered sum row_weights e H e^T, never negative.

    Raises:
        OverflowError: with the position of a column in which a sweep meets a value beyond fp16. ValueError: another argument.
    """
    _check_method(method)
    if block.dim() != 2:
        raise ValueError(f"block has the shape {tuple(block.shape)}; it must be [B, N]")
    columns, rows = block.shape
    for name, tensor, shape, dtype in (
        ("block", block, (columns, rows), torch.float32),
        ("coupling", coupling, (columns, columns), torch.float32),
        ("pivot", pivot, (columns,), torch.float32),
        ("row_weights", row_weights, (rows,), torch.float32),
        ("row_scale", row_scale, (rows,), torch.float32),
        ("bits", bits, (columns,), torch.uint8),
        ("kept_counts", kept_counts, (columns,), torch.int32),
        ("stored", stored, (columns, rows), torch.float32),
        ("codes", codes, (columns, rows), torch.uint8),
        ("kept", kept, (columns, rows), torch.bool),
        ("centroids", centroids, (columns, 256), torch.float32),
    ):
        laid_out = tensor.stride(-1) == 1 if name == "coupling" else tensor.is_contiguous()
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != block.device or not laid_out:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}; it must be {dtype} "
                f"{shape} on {block.device}, contiguous"
            )
    of_columns = ColumnBlock(
        block, coupling, pivot, row_weights, row_scale, bits, kept_counts, stored, codes, kept, centroids
    )
    if columns and not 1 <= int(bits.min()) <= int(bits.max()) <= 8:
        raise ValueError(f"bits range from {int(bits.min())} to {int(bits.max())}; allowed: 1 to 8")
    if columns and not 0 <= int(kept_counts.min()) <= int(kept_counts.max()) < max(rows, 1):
        raise ValueError(f"kept_counts range up to {int(kept_counts.max())}; allowed: 0 to {rows - 1}, fewer than rows")
    return FIT_COLUMNS.kernel_for(block.device, torch.float32, method)(of_columns, method, descend)


# ---- arguments ------------------------------------------------------------------------------------------------------


def _clusters(ks: Sequence[int]) -> tuple[int, ...]:
    several = isinstance(ks, Sequence) and not isinstance(ks, str | bytes)
    for k in ks if several else [ks]:
        if type(k) is not int or not 1 <= k <= MAX_CLUSTERS:
            raise ValueError(f"k is {k!r}; allowed: an integer from 1 to {MAX_CLUSTERS}, or a sequence of such")
    if not ks:
        raise ValueError("k is empty; it needs at least one number of centroids")
    return tuple(ks)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(map(repr, METHODS))}")


def _checked_points(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in float32, contiguous, on the device of `values`."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values is {given}; it must be a floating-point tensor [C, n]")
    if values.dim() != 2:
        hint = "; for one problem pass values.unsqueeze(0)" if values.dim() == 1 else ""
        raise ValueError(f"values has the shape {tuple(values.shape)}; it must be [C, n]: C problems of n values{hint}")
    problems, n = values.shape
    if not 1 <= n <= MAX_POINTS:
        raise ValueError(f"values has n = {n} values per problem; allowed: 1 to {MAX_POINTS}")
    points = for_kernels(values.detach().to(torch.float32))
    _require_range(points, "values", "finite in float32", float("-inf"))
    if weights is None:
        return points, None

    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        given = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights is {given}; it must be a floating-point tensor [C, n] or [n]")
    if tuple(weights.shape) not in ((problems, n), (n,)):
        raise ValueError(f"weights has the shape {tuple(weights.shape)}; allowed: [{problems}, {n}] or [{n}]")
    weights = for_kernels(weights.detach().to(points.device, torch.float32))
    _require_range(weights, "weights", "finite in float32 and >= 0", 0.0)
    if problems:
        largest = weights.amax(-1)
        if not bool(largest.all()):
            where = f"[{int((largest == 0).nonzero()[0])}]" if weights.dim() == 2 else ""
            raise ValueError(f"weights{where} are all 0; each problem needs at least one weight > 0")
    return points, weights


class _Frame(NamedTuple):
    """Float64 values as points * 2**exponent + centre, points in float32 [C, n] and at most 1; the others [C, 1]."""

    points: Tensor
    exponent: Tensor
    centre: Tensor


def _frame(values: Tensor, points: Tensor) -> _Frame | None:
    """None where float32 holds every value: 1.7e9 seconds lie 128 apart there, and 1e-50 is 0."""
    values = values.detach()
    if values.dtype != torch.float64 or not values.numel() or torch.equal(points.double(), values):
        return None
    centre = values.median(-1, keepdim=True).values  # not the mean, which one far value moves away from all others
    moved = values - centre
    exponent = torch.frexp(moved.abs().amax(-1, keepdim=True)).exponent
    return _Frame(torch.ldexp(moved, -exponent).float().contiguous(), exponent, centre)


def _require_range(tensor: Tensor, name: str, allowed: str, least: float) -> None:
    if tensor.numel() == 0:
        return
    low, high = (float(end) for end in torch.aminmax(tensor))  # NaN if there is one; half the time of isfinite().all()
    if low >= least and low > float("-inf") and high < float("inf"):
        return
    bad = ~torch.isfinite(tensor) | (tensor < least)
    index = tuple(bad.nonzero()[0].tolist())
    place = ", ".join(map(str, index))
    raise ValueError(f"{name}[{place}] is {float(tensor[index])}; allowed: {allowed}")


def _check_fits_half(found: list[Tensor], points: Tensor) -> None:
    for centroids in found:
        if not bool(torch.isfinite(centroids).all()):
            problem = int((~torch.isfinite(centroids)).any(1).nonzero()[0])
            raise ValueError(
                f"a centroid of values[{problem}] (up to {float(points[problem].abs().max()):g}) does not fit into fp16, "
                "which ends at 65504; rescale the values or ask for torch.float32"
            )
