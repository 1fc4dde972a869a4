"""CLAQ as its authors released it, rewritten in a few lines as an oracle: slow, plain, with its quirks. Test use only.

Source: CLAQ (arXiv 2405.17233) and the behaviour of its released code: k-means of scikit-learn on each compensated
column, one width or two by Outlier Order, outliers kept from both ends. Everything in fp64 but the inputs of k-means.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER_THRESHOLD = 13.0
BLOCK = 128


def kmeans_of_sklearn(values: Tensor, clusters: int) -> Tensor:
    """Centroids [clusters] of one column, as released: one greedy k-means++ start from a fixed seed."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # 0.6 against 10 s for a small matrix where the cores are busy
        fitted = KMeans(n_clusters=clusters, random_state=10, n_init="auto").fit(values.float().reshape(-1, 1).numpy())
    return torch.from_numpy(fitted.cluster_centers_).double().flatten()


def published_claq(
    weight: Tensor, hessian: Tensor, bits: float, keep: tuple[float, float] | None = None, damping: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize weight [N, K] to an average of `bits` (2 to 4), keeping `keep` = (share in the top tenth of the columns,
    share in the others) of each column from above and as much from below.

    Returns:
        quantized fp64 [N, K], column bits [K], kept mask [N, K].
    """
    rows, size = weight.shape
    order = hessian.diagonal().argsort(descending=True, stable=True)
    work = weight.double()[:, order]
    damped = hessian.double()[order][:, order]
    damped = damped + damping * damped.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)

    # Outlier Order, counted after the columns were put in processing order; ties are left to torch's sort of floats.
    count = (work.abs() >= OUTLIER_THRESHOLD * work.abs().mean()).sum(0)
    ranked = count.float().sort(descending=True).indices
    base, high = (2, 4) if bits < 3 else (3, 4) if bits < 4 else (4, 4)
    share = (bits - base) / (high - base) if high > base else 0.0
    width = torch.full((size,), base)
    width[ranked[: round(size * share)]] = high
    ends = torch.zeros(size, dtype=torch.float64)
    if keep is not None:
        ends[:] = keep[1]
        ends[ranked[: round(size * 0.1)]] = keep[0]

    quantized, kept = torch.empty_like(work), torch.zeros(rows, size, dtype=torch.bool)
    for j in range(size):
        column = work[:, j]
        centroids = kmeans_of_sklearn(column, 2 ** int(width[j]))
        stored = centroids[(column[:, None] - centroids).abs().argmin(1)]
        rho = float(ends[j % BLOCK])  # the released slip: the place inside the block, not the column
        if rho:
            falling = column.sort(descending=True).values
            kept[:, j] = (column >= falling[round(rows * rho)]) | (column <= falling[round(rows * (1 - rho))])
            stored = torch.where(kept[:, j], column, stored)
        quantized[:, j] = stored
        error = (column - stored) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
    back = order.argsort()
    return quantized[:, back], width[back], kept[:, back]
