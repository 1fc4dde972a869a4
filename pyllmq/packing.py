"""Packing from the weights alone, without calibration data: which weights stay, and exact 1-D k-means in every column.

What comes out are the arguments of the formats' `pack`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kmeans import kmeans_1d
from .structure import FP16_LEAST, NEGLIGIBLE, lost_in_fp16, power_of_two

MAX_OUTLIER_FRACTION = 0.5

GROUP, KEPT = 4, 2
"""2:4 keeps two of every four neighbouring weights of a row."""


def count_not_finite(matrix: Tensor) -> int:
    """By rows: `isfinite` makes another matrix, 0.5 GB for a Hessian of K = 11008."""
    return sum(int((~torch.isfinite(part)).sum()) for part in matrix.split(1024))


def _check(weight: Tensor, outlier_fraction: float) -> None:
    bad = count_not_finite(weight)
    if bad:
        raise ValueError(
            f"the weight {list(weight.shape)} holds {bad} values that are not finite; repair the model before packing it"
        )
    if not 0.0 <= outlier_fraction <= MAX_OUTLIER_FRACTION:
        raise ValueError(f"outlier_fraction is {outlier_fraction}; allowed: 0 to {MAX_OUTLIER_FRACTION}")


def unstructured_mask(weight: Tensor, sparsity: float) -> Tensor:
    """bool [N, K]: all but the round(K * sparsity) smallest magnitudes of each row."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; allowed: 0 up to, but not including, 1")
    dropped = round(weight.shape[1] * sparsity)
    mask = torch.ones_like(weight, dtype=torch.bool)
    if dropped:
        mask.scatter_(1, weight.abs().topk(dropped, largest=False).indices, False)
    return mask


def largest_of_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """bool [N, K]: the `kept` largest scores (>= 0) of every `group` neighbours in a row, the earlier ones at a tie."""
    n, k = scores.shape
    groups = torch.nn.functional.pad(scores, (0, -k % group), value=-1.0).reshape(n, -1, group)
    order = groups.argsort(stable=True, dim=-1, descending=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :kept], True)
    return mask.view(n, -1)[:, :k].contiguous()


def mask_24(weight: Tensor) -> Tensor:
    """bool [N, K]: the two largest magnitudes of every four neighbours in a row, the earlier ones at a tie."""
    return largest_of_groups(weight.abs(), KEPT, GROUP)


def outlier_mask(columns: Tensor, fraction: float) -> Tensor:
    """Bool [K, n]: in each row of `columns` the round(n * fraction) extreme values, half at either end (the odd one on top)."""
    count = round(columns.shape[1] * fraction)
    mask = torch.zeros_like(columns, dtype=torch.bool)
    mask.scatter_(1, columns.topk(count // 2, largest=False).indices, True)
    return mask.scatter_(1, columns.topk(count - count // 2).indices, True)


def column_codes(
    weight: Tensor,
    column_bits: Tensor,
    outlier_fraction: float,
    row_scale: bool,
    row_weights: Tensor | None = None,
) -> dict[str, Any]:
    """What `CodebookWeight.pack` takes for `weight` [N, K] with `column_bits` [K] bits per column, in CPU memory.

    Least squared error for the widths asked for. Outliers are the round(N * outlier_fraction) weights of each column that lie
    farthest out, half of them at either end; codebooks are fitted to the others. With `row_scale` each row is divided by the
    root mean square of its other weights, and k-means weights the rows by its square, so that the squared error of W itself
    stays what is minimised; `row_weights` [N] weight the rows besides. Where fp16 cannot hold a codebook without it, all rows get
    one power of two as their scale.
    """
    n, k = weight.shape
    _check(weight, outlier_fraction)
    if column_bits.is_floating_point() or tuple(column_bits.shape) != (k,):
        raise ValueError(
            f"column_bits is {column_bits.dtype} {tuple(column_bits.shape)}; it must be {k} integers, one per column"
        )
    if k and not 1 <= int(column_bits.min()) <= int(column_bits.max()) <= 8:
        raise ValueError(f"bits range from {int(column_bits.min())} to {int(column_bits.max())}; allowed: 1 to 8")
    columns = weight.float().T.contiguous().cpu()
    column_bits = column_bits.cpu()

    kept = outlier_mask(columns, outlier_fraction)
    importance = (~kept).float()
    scale = None
    if row_scale:
        inliers = importance.sum(0).clamp_min(1.0)
        # Rounded to fp16 first: what is fitted is what is stored.
        rms = ((columns * importance).square().sum(0) / inliers).sqrt()
        scale = torch.where(rms > 0, rms.half().float().clamp_min(FP16_LEAST), 1.0)
        importance *= scale.square() * (rms > 0)
    if row_weights is not None:
        if tuple(row_weights.shape) != (n,) or bool((row_weights < 0).any()) or not bool((row_weights > 0).any()):
            raise ValueError(
                f"row_weights is {list(row_weights.shape)}; it must be {n} numbers >= 0, not all of them 0"
            )
        importance *= row_weights.float().cpu()

    scaled = columns if scale is None else columns / scale
    centroids, codes = _fit(scaled, column_bits, importance)
    by_column = scaled.abs().amax(1)
    reach = float(by_column.max())
    counts = (by_column > NEGLIGIBLE * reach).tolist()
    if (
        scale is None
        and reach < 1
        and any(c and bool(lost_in_fp16(b[None])) for c, b in zip(counts, centroids, strict=True))
    ):
        scale = torch.full((n,), power_of_two(reach))
        centroids, codes = _fit(columns / scale, column_bits, importance)
    # A dead column is what fp16 leaves of it, and no reason to refuse the weight.
    centroids = [book if c else book.half().float() for c, book in zip(counts, centroids, strict=True)]
    return {
        "codes": codes.T.contiguous(),
        "codebook": torch.cat(centroids),
        "column_bits": column_bits,
        "outlier_mask": kept.T if outlier_fraction else None,
        "outlier_weight": columns.T if outlier_fraction else None,
        # That of a row of zeros is 0, so that it stays one: padding in an embedding is.
        "row_scale": scale * (rms > 0) if row_scale and scale is not None else scale,
    }


def _fit(columns: Tensor, column_bits: Tensor, importance: Tensor) -> tuple[list[Tensor], Tensor]:
    """Centroids of each column, and codes uint8 [K, n]."""
    codes = torch.empty(columns.shape, dtype=torch.uint8, device="cpu")
    centroids: dict[int, Tensor] = {}
    for bits in column_bits.unique().tolist():
        members = torch.nonzero(column_bits == bits).flatten()
        fitted, codes[members] = kmeans_1d(columns[members], 1 << bits, weights=importance[members])
        centroids |= dict(zip(members.tolist(), fitted, strict=True))
    return [centroids[column] for column in range(len(columns))], codes


def column_codes_24(weight: Tensor, mask: Tensor, bits: int, outlier_fraction: float) -> dict[str, Any]:
    """What `Sparse24CodebookWeight.pack` takes for `weight` [N, K], of which `mask` keeps two of every four neighbours.

    Each column's codebook is the best one for the weights that the column keeps. Outliers are the `outlier_fraction` of them
    that lie farthest out.
    """
    _check(weight, outlier_fraction)
    columns, kept = weight.float().T.contiguous().cpu(), mask.T.contiguous().cpu()
    far = outlier_mask(columns.masked_fill(~kept, 0.0), outlier_fraction * KEPT / GROUP) & kept
    importance = (kept & ~far).float()
    importance[importance.sum(1) == 0] = 1.0  # a column that keeps nothing: any codebook will do
    codebook, codes = kmeans_1d(columns, 1 << bits, weights=importance)
    return {
        "codes": codes.T.contiguous(),
        "mask": kept.T,
        "codebook": codebook,
        "outlier_mask": far.T,
        "outlier_weight": columns.T,
    }
