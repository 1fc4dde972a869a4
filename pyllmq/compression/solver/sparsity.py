"""How much of each Linear is kept: by rank of a sensitivity (arXiv 2310.09499), or by layer-wise outliers (OWL, 2310.05175).

Both give shares whose mean over all weights is exactly the one asked for; as published, the mean over matrices is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OWL_THRESHOLD = 5.0


def by_rank(
    sensitivity: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    """name -> share to prune, falling linearly from `sparsity + spread` to `sparsity - spread` as the sensitivity rises.

    Only ranks count, not magnitudes. A matrix stands at the middle of its weights on the line of all weights, sorted; for
    matrices of one size that is the published allocation, drawn in by half a step at either end.
    """
    total = sum(sizes.values())
    spread = min(spread, sparsity, 1 - sparsity)
    shares, before = {}, 0
    for name in sorted(sensitivity, key=lambda name: sensitivity[name]):
        middle = (before + sizes[name] / 2) / total
        shares[name] = sparsity + spread * (1 - 2 * middle)
        before += sizes[name]
    return {name: shares[name] for name in sensitivity}


def outlier_share(scores: Mapping[str, Tensor], threshold: float = OWL_THRESHOLD) -> float:
    """Share of a layer's Wanda scores |w| * |X_j| that exceed `threshold` times their mean over the whole layer."""
    total = sum(s.numel() for s in scores.values())
    mean = sum(float(s.double().sum()) for s in scores.values()) / total
    return sum(int((s > threshold * mean).sum()) for s in scores.values()) / total


def by_outliers(
    outliers: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    """name -> share to prune: layers with more outliers keep more, in proportion, within a range of `2 * spread`."""
    low, high = min(outliers.values()), max(outliers.values())
    spread = min(spread, sparsity / 2, (1 - sparsity) / 2)
    kept = {name: 2 * spread * (share - low) / (high - low or 1.0) for name, share in outliers.items()}
    mean = sum(kept[name] * sizes[name] for name in kept) / sum(sizes[name] for name in kept)
    return {name: sparsity + mean - more for name, more in kept.items()}


def wanda_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """|w| * |X_j|, float32 [N, K]; `input_norms` [K]."""
    return weight.detach().float().abs() * input_norms.to(torch.float32)
