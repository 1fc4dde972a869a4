"""The layers of the dynamic program of 1-D k-means (docs/kernels-kmeans.md), one launch per level of each layer."""

import torch
import triton
import triton.language as tl


@triton.jit
def _share(sums, masses):
    return tl.where(masses > 0, sums * sums / tl.where(masses > 0, masses, 1.0), 0.0)


@triton.jit
def _level(
    sums, masses, gain, next_gain, before, best, n, best_row, clusters, stride, nodes,
    HAS_BEFORE: tl.constexpr, NODES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Ends clusters + stride - 1 + 2 stride i, between ends whose best splits are known: of the levels with larger strides."""
    problem = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1) * NODES + tl.arange(0, NODES)
    inside = node < nodes
    offset = stride - 1 + 2 * stride * node
    end = clusters + offset
    sums += problem * (n + 1)
    masses += problem * (n + 1)
    gain += problem * (n + 1)
    next_gain += problem * (n + 1)
    before += problem * best_row
    best += problem * best_row

    first = tl.load(best + end - stride, mask=inside & (offset >= stride), other=0)
    first = tl.maximum(first, clusters - 1)
    if HAS_BEFORE:
        first = tl.maximum(first, tl.load(before + end, mask=inside, other=0))
    last = tl.load(best + end + stride, mask=inside & (end + stride <= n), other=2147483647)
    last = tl.minimum(last, end - 1)
    first = tl.minimum(first, last)  # rounding of near ties
    sum_end = tl.load(sums + end, mask=inside, other=0.0)
    mass_end = tl.load(masses + end, mask=inside, other=0.0)

    best_gain = tl.full((NODES, CANDIDATES), -1.0, tl.float64)
    best_at = tl.full((NODES, CANDIDATES), 2147483647, tl.int32)
    for done in range(0, tl.max(tl.where(inside, last - first + 1, 0)), CANDIDATES):
        at = (first + done)[:, None] + tl.arange(0, CANDIDATES)[None, :]
        valid = inside[:, None] & (at <= last[:, None])
        share = _share(
            sum_end[:, None] - tl.load(sums + at, mask=valid, other=0.0),
            mass_end[:, None] - tl.load(masses + at, mask=valid, other=0.0),
        )
        value = tl.where(valid, tl.load(gain + at, mask=valid, other=0.0) + share, -1.0)
        better = value > best_gain
        best_gain = tl.where(better, value, best_gain)
        best_at = tl.where(better, at, best_at)
    found = tl.max(best_gain, 1)
    lowest = tl.min(tl.where(best_gain == found[:, None], best_at, 2147483647), 1)
    tl.store(next_gain + end, found, mask=inside)
    tl.store(best + end, lowest, mask=inside)


WIDE_STRIDE = 64
"""From this stride on ends are few and their candidates many: a program takes one end, below it 32. Predicted, not measured."""


def kmeans_1d_layers(sums: torch.Tensor, masses: torch.Tensor, k_max: int) -> torch.Tensor:
    """See `pyllmq.backends.reference.kmeans_1d.Layers`."""
    problems, n = sums.shape[0], sums.shape[1] - 1
    sums, masses = sums.contiguous(), masses.contiguous()
    gain = torch.where(masses > 0, sums.square() / masses, 0.0)
    next_gain = torch.empty(problems, n + 1, dtype=torch.float64, device=sums.device)
    best = torch.empty(problems, k_max + 1, n + 1, dtype=torch.int32, device=sums.device)
    if not problems:
        return best
    for clusters in range(2, k_max + 1):
        ends = n - clusters + 1
        stride = 1 << (ends.bit_length() - 1)
        while stride:
            nodes = (ends - stride) // (2 * stride) + 1
            at_once, candidates = (1, 256) if stride >= WIDE_STRIDE else (32, 8)
            _level[(problems, triton.cdiv(nodes, at_once))](
                sums, masses, gain, next_gain, best[:, clusters - 1], best[:, clusters], n, best.stride(0), clusters, stride, nodes,
                HAS_BEFORE=clusters > 2, NODES=at_once, CANDIDATES=candidates, num_warps=4,
            )  # fmt: skip
            stride //= 2
        gain, next_gain = next_gain, gain
    return best
