"""Plain torch on any device: the oracle that every other back end is tested against. Reads the checkpoint layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..dispatch import (
    BITMAP,
    BITMAP_FIELDS,
    CHECKPOINT,
    CHECKPOINT_FIELDS,
    SPARSE24,
    SPARSE24_CODEBOOK,
    SPARSE24_CODEBOOK_FIELDS,
    SPARSE24_FIELDS,
    Kernel,
    Problem,
    Support,
    register,
)


def available() -> tuple[bool, str]:
    return True, "plain torch, any device"


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [rows, ceil(columns*bits/8)] -> uint8 [rows, columns]; a row is one bit stream, least significant bit first."""
    device = packed.device
    bit = torch.arange(columns * bits, device=device)
    stream = (packed[:, bit // 8] >> (bit % 8).to(torch.uint8)) & 1
    weight = (1 << torch.arange(bits, device=device)).to(torch.uint8)
    return (stream.view(packed.shape[0], columns, bits) * weight).sum(-1, dtype=torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] -> uint8 [rows, ceil(columns*bits/8)]; the inverse of `unpack_codes`, padding bits are zero."""
    rows, columns = codes.shape
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, but {bits}-bit codes must lie in 0..{2**bits - 1}")
    place = torch.arange(bits, device=codes.device).to(torch.uint8)
    stream = ((codes.unsqueeze(-1) >> place) & 1).view(rows, columns * bits)
    stream = torch.nn.functional.pad(stream, (0, -columns * bits % 8)).view(rows, -(-columns * bits // 8), 8)
    weight = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weight).sum(-1, dtype=torch.uint8)


def codebook_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(CHECKPOINT_FIELDS, tensors, strict=True))
    column_bits, codebook = field["column_bits"].long(), field["codebook"].float()
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    row_segment = torch.repeat_interleave(field["segment_rows"].long())
    weight = codebook.new_empty(out_features, in_features)
    for bits in range(1, 9):
        columns = torch.nonzero(column_bits == bits).flatten()
        if columns.numel():
            codes = unpack_codes(field[f"codes_b{bits}"], bits, columns.numel()).long()
            weight[:, columns] = codebook[row_segment[:, None], first_entry[columns] + codes]
    if field["row_scale"].numel():
        weight *= field["row_scale"].float()[:, None]
    if field["outlier_values"].numel():
        kept_per_row = field["outlier_row_offsets"].long().diff()
        row = torch.repeat_interleave(kept_per_row)
        weight[row, field["outlier_columns"].long()] = field["outlier_values"].float()
    return weight.to(dtype)


def bitmap_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(BITMAP_FIELDS, tensors, strict=True))
    weight = field["values"].new_zeros(out_features, in_features, dtype=torch.float32)
    if field["mask"].numel():
        weight[unpack_codes(field["mask"], 1, in_features).bool()] = field["values"].float()
    else:
        row = torch.repeat_interleave(field["row_offsets"].long().diff())
        weight[row, field["columns"].long()] = field["values"].float()
    return _scaled(weight, field["scale"]).to(dtype)


def sparse24_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(SPARSE24_FIELDS, tensors, strict=True))
    weight = _spread_24(field["values"].float(), field["positions"], in_features)
    return _scaled(weight, field["scale"]).to(dtype)


def sparse24_codebook_dequantize(
    tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Checkpoint tensors -> the dense matrix [out_features, in_features] in `dtype`."""
    field = dict(zip(SPARSE24_CODEBOOK_FIELDS, tensors, strict=True))
    codebook = field["codebook"].float()
    bits = codebook.shape[1].bit_length() - 1
    kept = unpack_codes(field["codes"], bits, 2 * -(-in_features // 4))
    # A code's place in the row first, its value then: 0 says that nothing is kept there.
    place = _spread_24(kept.float() + 1, field["positions"], in_features).long()
    column = torch.arange(in_features, device=place.device)
    weight = torch.where(place > 0, codebook[column, (place - 1).clamp_min(0)], 0.0)
    if field["outlier_values"].numel():
        row = torch.repeat_interleave(field["outlier_row_offsets"].long().diff())
        weight[row, field["outlier_columns"].long()] = field["outlier_values"].float()
    return weight.to(dtype)


def _spread_24(kept: Tensor, positions: Tensor, in_features: int) -> Tensor:
    """Two numbers of each group [N, 2 G] -> [N, K], zero elsewhere."""
    groups = kept.shape[1] // 2
    code = unpack_codes(positions, 4, groups).long()
    spread = kept.new_zeros(kept.shape[0], groups, 4)
    spread.scatter_(2, torch.stack([code & 3, code >> 2], 2), kept.view(-1, groups, 2))
    return spread.view(kept.shape[0], -1)[:, :in_features]


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale[:, None] if scale.numel() else weight


Dequantize = Callable[[list[Tensor], int, int, torch.dtype], Tensor]


def linear(
    dequantize: Dequantize,
    x: Tensor,
    tensors: list[Tensor],
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """x [M, K] -> y [M, N] in x's dtype, multiplied and summed in fp32, whatever the precision asked."""
    weight = dequantize(tensors, out_features, in_features, torch.float32)
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, B, V] and [batch, C, V] -> distances [batch, B, C], and for each row (largest logit, 1 / sum of exponentials)."""
    statistics = _softmax_statistics(student_logits, temperature)
    teacher_statistics = _softmax_statistics(teacher_logits, temperature)
    student = _probabilities(student_logits, statistics, temperature)
    teacher = _probabilities(teacher_logits, teacher_statistics, temperature)
    distance = student.new_empty(*student.shape[:2], teacher.shape[1])
    for row in range(teacher.shape[1]):  # torch.cdist sums in one long chain: errors of 1e-5 at V = 50257
        distance[:, :, row] = (student - teacher[:, row, None]).abs().sum(-1)
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    mine = _probabilities(logits, statistics, temperature)
    other = _probabilities(other_logits, other_statistics, temperature)
    grad_mine = torch.zeros_like(mine)
    for row in range(other.shape[1]):  # one at a time: all of them are [batch, B, C, V]
        grad_mine += grad[:, :, row, None] * (mine - other[:, row, None]).sign()
    centred = grad_mine - (mine * grad_mine).sum(-1, keepdim=True)
    return (mine * centred / temperature).to(logits.dtype)


def _softmax_statistics(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    largest = wide.amax(-1)
    return torch.stack([largest, 1 / ((wide - largest[..., None]) / temperature).exp().sum(-1)], -1)


def _probabilities(logits: Tensor, statistics: Tensor, temperature: float) -> Tensor:
    largest, inverse_sum = statistics[..., :1], statistics[..., 1:]
    return ((logits.to(statistics.dtype) - largest) / temperature).exp() * inverse_sum


# ---- kmeans_1d ------------------------------------------------------------------------------------------------------

Layers = Callable[[Tensor, Tensor, int], Tensor]
"""Prefix sums and masses, fp64 [C, n + 1], and k_max -> best splits, integers [C, k_max + 1, n + 1].

Entry [:, l, end] is where the last of l clusters of the first `end` points begins, 2 <= l <= end; the others are free.
"""


def layers(sums: Tensor, masses: Tensor, k_max: int) -> Tensor:
    """Every split of every end is tried: k_max n^2 steps. docs/kernels-kmeans.md has the formula."""
    problems, points = sums.shape[0], sums.shape[1] - 1
    best = torch.zeros(problems, k_max + 1, points + 1, dtype=torch.int64, device=sums.device)
    gain = _share(sums, masses)
    for clusters in range(2, k_max + 1):
        next_gain = torch.zeros_like(gain)
        for end in range(clusters, points + 1):
            at = slice(clusters - 1, end)
            share = _share(sums[:, end, None] - sums[:, at], masses[:, end, None] - masses[:, at])
            next_gain[:, end], split = (gain[:, at] + share).max(1)
            best[:, clusters, end] = split + clusters - 1
        gain = next_gain
    return best


def _share(sums: Tensor, masses: Tensor) -> Tensor:
    """What clusters of these sums and masses add to the gain; nothing if there is no mass."""
    return torch.where(masses > 0, sums.square() / masses, 0.0)


def kmeans_1d(
    values: Tensor,
    weights: Tensor | None,
    ks: Sequence[int],
    method: str,
    seed: int,
    half_centroids: bool,
    packed: bool,
    find_layers: Layers = layers,
) -> list[tuple[Tensor, Tensor]]:
    """The optimum, for "windowed", too. `find_layers` is all that a GPU back end has to replace."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ks]
    for part, part_weights in _parts(values, weights, max(ks)):
        for i, (k, means, _) in enumerate(_clusterings(part, part_weights, ks, find_layers)):
            centroids = _distinct_first(means.float())
            if half_centroids:
                centroids = centroids.half().float()
            codes = _nearest(part, centroids)
            bits = max(1, (k - 1).bit_length())
            found[i].append((centroids, pack_codes(codes, bits) if packed else codes))
    return [(torch.cat([c for c, _ in parts]), torch.cat([q for _, q in parts])) for parts in found]


def kmeans_1d_errors(
    values: Tensor, weights: Tensor | None, ks: Sequence[int], method: str, find_layers: Layers = layers
) -> Tensor:
    parts = _parts(values, weights, max(ks))
    return torch.cat(
        [torch.stack([error for _, _, error in _clusterings(*part, ks, find_layers)], 1) for part in parts]
    )


KMEANS_TABLE_BYTES = 1 << 30
"""Problems are solved in parts whose tables of best splits, 4 bytes each on a GPU, take at most this: 3800 columns of 4096 at
k = 16, 28 for each multiprocessor of the largest devices."""


def _parts(values: Tensor, weights: Tensor | None, k_max: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    problems, n = values.shape
    step = max(1, KMEANS_TABLE_BYTES // (4 * (n + 1) * (k_max + 1)))
    for begin in range(0, max(problems, 1), step):
        part = slice(begin, begin + step)
        yield values[part], weights if weights is None or weights.dim() == 1 else weights[part]


def _clusterings(
    values: Tensor, weights: Tensor | None, ks: Sequence[int], find_layers: Layers
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(k, means [C, k] ascending, errors [C]) in fp64 for each k."""
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


def _finds_optimum(problem: Problem) -> Support:
    if problem.layout == "lloyd":
        return False, "finds the optimum, not what k-means++ and Lloyd's iteration find"
    return True, ""


def _reads(layout: str) -> Callable[[Problem], Support]:
    def supports(problem: Problem) -> Support:
        if problem.layout != layout:
            return False, f"reads the layout {layout!r}, this weight is prepacked as {problem.layout!r}"
        return True, ""

    return supports


def _anything(problem: Problem) -> Support:
    return True, ""


_BECAUSE = "last row of each operation: runs anywhere, serves where nothing faster does"


def register_kernels() -> None:
    for name, layout, dequantize in (
        ("codebook", CHECKPOINT, codebook_dequantize),
        ("bitmap", BITMAP, bitmap_dequantize),
        ("sparse24", SPARSE24, sparse24_dequantize),
        ("sparse24_codebook", SPARSE24_CODEBOOK, sparse24_codebook_dequantize),
    ):
        run = partial(linear, dequantize)
        register(Kernel(f"{name}_linear", f"reference.{name}_linear", _reads(layout), run, _BECAUSE))
        register(Kernel(f"{name}_dequantize", f"reference.{name}_dequantize", _reads(layout), dequantize, _BECAUSE))
    for op, run_op, supports in (
        ("pack_codes", pack_codes, _anything),
        ("unpack_codes", unpack_codes, _anything),
        ("softmax_cdist_l1", softmax_cdist_l1, _anything),
        ("softmax_cdist_l1_backward", softmax_cdist_l1_backward, _anything),
        ("kmeans_1d", kmeans_1d, _finds_optimum),
        ("kmeans_1d_errors", kmeans_1d_errors, _finds_optimum),
    ):
        register(Kernel(op, f"reference.{op}", supports, run_op, _BECAUSE))
