"""kmeans_1d and kmeans_1d_errors: the optimum, by the full dynamic program; a GPU back end replaces its layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...formats.codes import pack_codes
from ...operations import KMEANS_1D, KMEANS_1D_ERRORS, Points, anything, finds_optimum
from .rows import BECAUSE, ORDER

SPLIT_BYTES = 1 << 22
"""The gains of all splits of some ends, fp64, that are tried at once: they should stay in cache."""

Layers = Callable[[Tensor, Tensor, int], Tensor]
"""Prefix sums and masses, fp64 [C, n + 1], and k_max -> best splits, integers [C, k_max + 1, n + 1].

Entry [:, l, end] is where the last of l clusters of the first `end` points begins, 2 <= l <= end; the others are free.
"""


def layers(sums: Tensor, masses: Tensor, k_max: int) -> Tensor:
    """Every split of every end is tried: k_max n^2 steps. docs/kernels-kmeans.md has the formula."""
    problems, ends = sums.shape
    best = torch.zeros(problems, k_max + 1, ends, dtype=torch.int64, device=sums.device)
    gain, place = _share(sums, masses), torch.arange(ends, device=sums.device)
    step = max(1, SPLIT_BYTES // (8 * problems * ends))
    for clusters in range(2, k_max + 1):
        next_gain = torch.zeros_like(gain)
        for begin in range(clusters, ends, step):
            end, at = slice(begin, begin + step), slice(clusters - 1, min(begin + step, ends) - 1)
            share = _share(sums[:, end, None] - sums[:, None, at], masses[:, end, None] - masses[:, None, at])
            total = (gain[:, None, at] + share).masked_fill(place[at] >= place[end, None], -torch.inf)
            next_gain[:, end], split = total.max(2)
            best[:, clusters, end] = split + clusters - 1
        gain = next_gain
    return best


def _share(sums: Tensor, masses: Tensor) -> Tensor:
    """What clusters of these sums and masses add to the gain; nothing if there is no mass."""
    return torch.where(masses > 0, sums.square() / masses, 0.0)


def kmeans_1d(
    points: Points, seed: int, half_centroids: bool, packed: bool, find_layers: Layers = layers
) -> list[tuple[Tensor, Tensor]]:
    """The optimum, for "windowed", too. `find_layers` is all that a GPU back end has to replace."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in points.ks]
    for part in _parts(points):
        for i, (k, means, _) in enumerate(_clusterings(part, find_layers)):
            centroids = _distinct_first(means.float())
            if half_centroids:
                centroids = centroids.half().float()
            codes = _nearest(part.values, centroids)
            bits = max(1, (k - 1).bit_length())
            found[i].append((centroids, pack_codes(codes, bits) if packed else codes))
    return [(torch.cat([c for c, _ in parts]), torch.cat([q for _, q in parts])) for parts in found]


def kmeans_1d_errors(points: Points, find_layers: Layers = layers) -> Tensor:
    parts = _parts(points)
    return torch.cat([torch.stack([error for _, _, error in _clusterings(part, find_layers)], 1) for part in parts])


KMEANS_TABLE_BYTES = 1 << 30
"""Problems are solved in parts whose tables of best splits, 4 bytes each on a GPU, take at most this: 3800 columns of 4096 at
k = 16, 28 for each multiprocessor of the largest devices."""


def _parts(points: Points) -> Iterator[Points]:
    (problems, n), weights = points.values.shape, points.weights
    step = max(1, KMEANS_TABLE_BYTES // (4 * (n + 1) * (max(points.ks) + 1)))
    for begin in range(0, max(problems, 1), step):
        part = slice(begin, begin + step)
        of_part = weights if weights is None or weights.dim() == 1 else weights[part]
        yield points._replace(values=points.values[part], weights=of_part)


def _clusterings(part: Points, find_layers: Layers) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(k, means [C, k] ascending, errors [C]) in fp64 for each k."""
    values, weights, ks, _ = part
    points, order = values.double().sort(1)
    mass = torch.ones_like(points) if weights is None else weights.double().expand_as(points).gather(1, order)
    if weights is not None:  # a point without weight is made a copy of the last one that has some: it changes nothing
        last = torch.where(mass > 0, points, -torch.inf).amax(1, keepdim=True)
        points, order = torch.where(mass > 0, points, last).sort(1)
        mass = mass.gather(1, order)
    shift = points[:, points.shape[1] // 2, None]
    sums = _prefix(mass * (points - shift))
    masses = _prefix(mass)
    squares = _prefix(mass * (points - shift).square())
    count = points.shape[1]
    k_max = min(max(ks), count)
    best = find_layers(sums, masses, k_max)
    for k in ks:
        bounds = torch.full((len(points), k + 1), count, device=points.device)
        for clusters in range(min(k, count), 1, -1):
            end = bounds[:, clusters, None]
            bounds[:, clusters - 1] = best[:, clusters].gather(1, end)[:, 0].long()
        bounds[:, 0] = 0
        mean_shift, cluster_mass = sums.gather(1, bounds).diff(dim=1), masses.gather(1, bounds).diff(dim=1)
        first = points.gather(1, bounds[:, :-1].clamp_max(count - 1))
        means = torch.where(cluster_mass > 0, shift + mean_shift / cluster_mass, first)
        left = squares.gather(1, bounds).diff(dim=1) - _share(mean_shift, cluster_mass)
        yield k, means, left.clamp_min(0).sum(1)


def _prefix(terms: Tensor) -> Tensor:
    return torch.nn.functional.pad(terms.cumsum(1), (1, 0))


def _distinct_first(ascending: Tensor) -> Tensor:
    """Equal values of a row [C, k] once, then the last one repeated."""
    new = torch.ones_like(ascending, dtype=torch.bool)
    new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    place = new.cumsum(1) - 1
    return ascending[:, -1:].expand_as(ascending).scatter(1, place, ascending)


def _nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid, the lower one at a tie, the first of equal ones: uint8 [C, n]."""
    middles = (centroids[:, 1:].double() + centroids[:, :-1].double()) / 2
    code = torch.searchsorted(middles, values.double())
    first = torch.searchsorted(centroids, centroids.gather(1, code))
    return first.to(torch.uint8)


supports = finds_optimum(anything)
KMEANS_1D.register("reference.kmeans_1d", ORDER, supports, kmeans_1d, BECAUSE)
KMEANS_1D_ERRORS.register("reference.kmeans_1d_errors", ORDER, supports, kmeans_1d_errors, BECAUSE)
