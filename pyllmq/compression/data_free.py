"""Codebooks from the weights alone: exact 1-D k-means in every column, no calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import CodebookWeight, Sparse24CodebookWeight
from ..formats.sparse24 import GROUP, KEPT
from ..formats.sparse24_codebook import BITS
from ..kmeans import kmeans_1d
from .solver.hessian import count_not_finite

MAX_OUTLIER_FRACTION = 0.5


def pack_columns(
    weight: Tensor, column_bits: Tensor, *, outlier_fraction: float = 0.0, row_scale: bool = False
) -> CodebookWeight:
    """Pack `weight` [N, K] with `column_bits` [K] bits per column; least squared error for the widths asked for.

    Outliers are the round(N * outlier_fraction) weights of each column that lie farthest out, half of them at either end;
    codebooks are fitted to the others. With `row_scale` each row is divided by the root mean square of its other weights, and
    k-means weights the rows by its square, so that the squared error of W itself stays what is minimised.
    """
    n, k = weight.shape
    bad = count_not_finite(weight)
    if bad:
        raise ValueError(
            f"the weight [{n}, {k}] holds {bad} values that are not finite; repair the model before packing it"
        )
    if column_bits.is_floating_point() or tuple(column_bits.shape) != (k,):
        raise ValueError(
            f"column_bits is {column_bits.dtype} {tuple(column_bits.shape)}; it must be {k} integers, one per column"
        )
    if k and not 1 <= int(column_bits.min()) <= int(column_bits.max()) <= 8:
        raise ValueError(f"bits range from {int(column_bits.min())} to {int(column_bits.max())}; allowed: 1 to 8")
    if not 0.0 <= outlier_fraction <= MAX_OUTLIER_FRACTION:
        raise ValueError(f"outlier_fraction is {outlier_fraction}; allowed: 0 to {MAX_OUTLIER_FRACTION}")
    device = weight.device
    columns = weight.float().T.contiguous().cpu()
    column_bits = column_bits.cpu()

    kept = outlier_mask(columns, outlier_fraction)
    importance = (~kept).float()
    scale = None
    if row_scale:
        inliers = importance.sum(0).clamp_min(1.0)
        # Rounded to fp16 first: what is fitted is what is stored. A row of zeros, or one below fp16, keeps scale 1.
        scale = ((columns * importance).square().sum(0) / inliers).sqrt().half().float()
        scale[scale == 0] = 1.0
        importance *= scale.square()

    codes = torch.empty(k, n, dtype=torch.uint8)
    centroids: list[Tensor] = [torch.empty(0)] * k
    scaled = columns if scale is None else columns / scale
    for bits in column_bits.unique().tolist():
        members = torch.nonzero(column_bits == bits).flatten()
        fitted, codes[members] = kmeans_1d(scaled[members], 1 << bits, weights=importance[members])
        for column, codebook in zip(members.tolist(), fitted, strict=True):
            centroids[column] = codebook
    packed = CodebookWeight.pack(
        codes.T.contiguous(),
        torch.cat(centroids),
        column_bits,
        outlier_mask=kept.T if outlier_fraction else None,
        outlier_weight=columns.T if outlier_fraction else None,
        row_scale=scale,
    )
    return packed if device.type == "cpu" else packed.to(device)


def pack_columns_24(
    weight: Tensor, mask: Tensor, bits: int, *, outlier_fraction: float = 0.0
) -> Sparse24CodebookWeight:
    """Pack `weight` [N, K], of which `mask` keeps two of every four neighbours, with `bits` bits per kept weight.

    Each column's codebook is the best one for the weights that the column keeps. Outliers are the `outlier_fraction` of them
    that lie farthest out.
    """
    n, k = weight.shape
    bad = count_not_finite(weight)
    if bad:
        raise ValueError(
            f"the weight [{n}, {k}] holds {bad} values that are not finite; repair the model before packing it"
        )
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, BITS))}")
    if not 0.0 <= outlier_fraction <= MAX_OUTLIER_FRACTION:
        raise ValueError(f"outlier_fraction is {outlier_fraction}; allowed: 0 to {MAX_OUTLIER_FRACTION}")
    device = weight.device
    columns, kept = weight.float().T.contiguous().cpu(), mask.T.contiguous().cpu()
    far = outlier_mask(columns.masked_fill(~kept, 0.0), outlier_fraction * KEPT / GROUP) & kept
    importance = (kept & ~far).float()
    importance[importance.sum(1) == 0] = 1.0  # a column that keeps nothing: any codebook will do
    codebook, codes = kmeans_1d(columns, 1 << bits, weights=importance)
    packed = Sparse24CodebookWeight.pack(
        codes.T.contiguous(), kept.T, codebook, outlier_mask=far.T, outlier_weight=columns.T
    )
    return packed if device.type == "cpu" else packed.to(device)


def outlier_mask(columns: Tensor, fraction: float) -> Tensor:
    """Bool [K, n]: in each row of `columns` the round(n * fraction) extreme values, half at either end (the odd one on top)."""
    count = round(columns.shape[1] * fraction)
    mask = torch.zeros_like(columns, dtype=torch.bool)
    low = count // 2
    high = count - low
    if low:
        mask.scatter_(1, columns.topk(low, largest=False).indices, True)
    if high:
        mask.scatter_(1, columns.topk(high).indices, True)
    return mask
