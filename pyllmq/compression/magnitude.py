"""Which weights stay when nothing but their magnitude is known."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 4
KEPT = 2


def unstructured_mask(weight: Tensor, sparsity: float) -> Tensor:
    """bool [N, K]: all but the round(K * sparsity) smallest magnitudes of each row."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; allowed: 0 up to, but not including, 1")
    dropped = round(weight.shape[1] * sparsity)
    mask = torch.ones_like(weight, dtype=torch.bool)
    if dropped:
        mask.scatter_(1, weight.abs().topk(dropped, largest=False).indices, False)
    return mask


def mask_24(weight: Tensor) -> Tensor:
    """bool [N, K]: the two largest magnitudes of every four neighbours in a row, the earlier ones at a tie."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.abs(), (0, -k % GROUP), value=-1.0).view(n, -1, GROUP)
    order = groups.argsort(stable=True, dim=-1, descending=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :KEPT], True)
    return mask.view(n, -1)[:, :k].contiguous()
