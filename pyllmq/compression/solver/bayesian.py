"""Bayesian optimisation in a box: a Gaussian process with a Matern kernel, asked where the expected improvement is largest."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LENGTH = 1.0
"""Length scale of the kernel, as a share of the box's half side for one dimension; it grows with the root of their number."""
NOISE = 1e-4
CANDIDATES = 2048


def bayesian_minimum(
    measure: Callable[[Tensor], float], dimensions: int, reach: float, evaluations: int, random: int, seed: int = 0
) -> tuple[int, list[float]]:
    """Search the box [-reach, reach]^dimensions for the least value of `measure`.

    Args:
        measure: is given a point float64 [dimensions]; called once for the origin, `random` - 1 times at random, then where the
            process expects the most.

    Returns:
        (which evaluation gave the least value, all values). The origin is number 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def anywhere(count: int) -> Tensor:
        return (torch.rand(count, dimensions, generator=generator, dtype=torch.float64) * 2 - 1) * reach

    points = torch.zeros(1, dimensions, dtype=torch.float64)
    values = [measure(points[0])]
    while len(values) < evaluations:
        if len(values) < random:
            chosen = anywhere(1)
        else:
            near = points[values.index(min(values))] + 0.2 * anywhere(CANDIDATES // 4)
            candidates = torch.cat([anywhere(CANDIDATES), near.clamp(-reach, reach)])
            gain = _expected_improvement(points / reach, torch.tensor(values, dtype=torch.float64), candidates / reach)
            chosen = candidates[gain.argmax()][None]
        points = torch.cat([points, chosen])
        values.append(measure(chosen[0]))
    return values.index(min(values)), values


def _expected_improvement(points: Tensor, values: Tensor, candidates: Tensor) -> Tensor:
    """Below the least of `values`, for each candidate [C]."""
    scale = values.std(correction=0).clamp_min(1e-12)
    normal = (values - values.mean()) / scale
    factor = torch.linalg.cholesky(_matern(points, points) + NOISE * torch.eye(len(points), dtype=torch.float64))
    across = _matern(points, candidates)
    mean = across.t() @ torch.cholesky_solve(normal[:, None], factor)[:, 0]
    explained = torch.linalg.solve_triangular(factor, across, upper=False).square().sum(0)
    spread = (1 - explained).clamp_min(1e-12).sqrt()
    z = (normal.min() - mean) / spread
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return spread * (z * torch.special.ndtr(z) + density)


def _matern(a: Tensor, b: Tensor) -> Tensor:
    """Matern 5/2."""
    distance = torch.cdist(a, b) / (LENGTH * a.shape[1] ** 0.5) * math.sqrt(5)
    return (1 + distance + distance.square() / 3) * (-distance).exp()
