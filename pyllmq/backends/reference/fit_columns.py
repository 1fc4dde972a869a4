"""fit_columns: column after column, each by `kmeans_1d` of this back end; the definition that csrc/cpu/fit_columns follows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operations import FIT_COLUMNS, ColumnBlock, Points, anything, finds_optimum
from .kmeans_1d import kmeans_1d
from .rows import BECAUSE, ORDER

TRIM_ROUNDS = 4


def fit_columns(columns: ColumnBlock, method: str, descend: bool) -> tuple[Tensor, float]:
    moves, decrease = torch.zeros_like(columns.block), 0.0
    for j in range(columns.block.shape[0]):
        pivot, values, before = columns.pivot[j], columns.block[j], columns.stored[j].clone()
        if descend and float(pivot) == 0:
            continue
        target = before - values / pivot if descend else values.clone()
        if not bool(torch.isfinite(target).all()):
            if descend:
                continue
            raise OverflowError(str(j))
        stored, codes, kept, centroids = _fit(columns, j, target, method)
        if descend:
            # One difference of squares: near convergence the two sums agree in all their digits.
            old, new = before.double(), stored.double()
            fell = float((columns.row_weights * (old - new) * (old + new - 2.0 * target)).sum())
            if not 0 < fell < float("inf"):
                continue
            decrease += float(pivot) * fell
            moves[j] = before - stored
        else:
            if not bool(torch.isfinite(stored).all()):
                raise OverflowError(str(j))
            moves[j] = (values - stored) / pivot
        columns.stored[j], columns.codes[j], columns.kept[j] = stored, codes, kept
        columns.centroids[j, : centroids.numel()] = centroids
        columns.block[j + 1 :] -= columns.coupling[j, j + 1 :, None] * moves[j]
    return moves, decrease


def _fit(columns: ColumnBlock, j: int, target: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Trimmed k-means, (stored, codes, kept, centroids): fit the others, keep the worst served, until that changes nothing.

    The first ones kept are those farthest from the mean: begun from the codebook of all, a single far weight would get a
    centroid of its own and hold it.
    """
    scale, keep = columns.row_scale, int(columns.kept_counts[j])
    points, importance = target / scale, columns.row_weights * scale.square()
    kept = columns.kept[j].clone()
    if keep and not bool(kept.any()):
        mean = (importance.double() * points).sum() / importance.sum(dtype=torch.float64)
        kept = _worst(importance * (points - mean.float()).square(), keep)
    for _ in range(TRIM_ROUNDS if keep else 1):
        weights = importance.masked_fill(kept, 0.0) if keep else importance
        column = Points(points[None], weights, [1 << int(columns.bits[j])], method)
        ((centroids, codes),) = kmeans_1d(column, 0, True, False)
        book, code = centroids[0], codes[0]
        if not keep:
            break
        worst = _worst(importance * (points - book[code.long()]).square(), keep)
        same, kept = torch.equal(worst, kept), worst
        if same:
            break
    stored = book[code.long()] * scale
    return torch.where(kept, target.half().float(), stored) if keep else stored, code, kept, book


def _worst(lost: Tensor, keep: int) -> Tensor:
    """The `keep` largest, the first ones at a tie."""
    order = lost.argsort(descending=True, stable=True)
    return torch.zeros_like(lost, dtype=torch.bool).index_fill_(0, order[:keep], True)


FIT_COLUMNS.register("reference.fit_columns", ORDER, finds_optimum(anything), fit_columns, BECAUSE)
