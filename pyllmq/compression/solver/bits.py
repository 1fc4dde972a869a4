"""Which columns get more bits, and how many outliers each keeps: by CLAQ's Outlier Order (arXiv 2405.17233)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...formats import CodebookStructure

TOP_SHARE = 0.1
TOP_OUTLIERS = 2.8
OTHER_OUTLIERS = 0.8  # 0.1 * 2.8 + 0.9 * 0.8 = 1: the shares average to the one asked for

LEFT_OVER = 2e-4
"""Share of a budget that may stay unspent: what is left passes to the next Linears, and aiming closer doubles the time."""


def outlier_order(weight: Tensor, threshold: float) -> Tensor:
    """R_j = number of i with |W_ij| >= threshold * mean|W|, the mean over the whole matrix [N, K]: int64 [K]."""
    magnitude = weight.detach().float().abs()
    return (magnitude >= threshold * magnitude.mean(dtype=torch.float64).float()).sum(0)


def largest_magnitude(weight: Tensor) -> Tensor:
    """max_i |W_ij| / mean|W|, float32 [K]: comparable between matrices; 0 for a matrix of zeros."""
    magnitude = weight.detach().float().abs()
    mean = magnitude.mean(dtype=torch.float64).float()
    return magnitude.amax(0) / mean if float(mean) > 0 else torch.zeros_like(magnitude[0])


def rank_columns(counts: Tensor, magnitude: Tensor) -> Tensor:
    """Column indices by falling count, ties by falling magnitude, then by index: int64 [K].

    Nearly all R_j are 0 (13 * mean|w| is 10.4 sigma of a Gaussian), so ties decide. Against the released tie-break the
    relative output error of five Linears of a small encoder is 2 to 8 % lower at 2.1 bits, 11 to 27 % at 2.5 bits.
    """
    by_magnitude = torch.argsort(magnitude, descending=True, stable=True)
    return by_magnitude[torch.argsort(counts[by_magnitude], descending=True, stable=True)]


def rank_columns_released(counts: Tensor, order: Tensor) -> Tensor:
    """As the released code ranks: torch.sort of the counts in processing order. That sort is not stable."""
    return order[torch.sort(counts[order].float(), descending=True).indices]


def column_bits(ranked: Tensor, base_bits: int, high_bits: int, high_fraction: float) -> Tensor:
    """uint8 [K]: `high_bits` for the first round(high_fraction * K) columns of the ranking, else `base_bits`."""
    bits = torch.full_like(ranked, base_bits, dtype=torch.uint8)
    bits[ranked[: round(high_fraction * ranked.numel())]] = high_bits
    return bits


def outlier_shares(ranked: Tensor, outliers: float) -> Tensor:
    """float64 [K]: share of each column's weights that are outliers; 3.5 times as much in the top 10 % of the ranking."""
    shares = torch.full_like(ranked, OTHER_OUTLIERS * outliers, dtype=torch.float64)
    shares[ranked[: round(TOP_SHARE * ranked.numel())]] = TOP_OUTLIERS * outliers
    return shares


# ---- one price for code bits, codebooks and outliers ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ColumnErrors:
    """What each column of one Linear would lose at each width: the sum over its weights, in one unit for all Linears."""

    rows: int
    widths: tuple[int, ...]
    error: Tensor
    """float64 [K, widths]."""
    worst: Tensor
    """float64 [K, widths, T]: the losses of the T weights that the codebook serves worst, falling. T = 0: no outliers."""

    @classmethod
    def joined(cls, parts: Sequence[ColumnErrors]) -> ColumnErrors:
        """Consecutive columns of one Linear."""
        error, worst = torch.cat([p.error for p in parts]), torch.cat([p.worst for p in parts])
        return cls(parts[0].rows, parts[0].widths, error, worst)


@dataclass(frozen=True, eq=False)
class Allocation:
    column_bits: Tensor
    """uint8 [K], common to all Linears of the group."""
    outlier_counts: list[Tensor]
    """int64 [K] for each Linear: how many weights of the column stay in fp16."""
    predicted: float
    """Sum of the losses that `ColumnErrors` predict."""


def spend(groups: Sequence[ColumnErrors], nbytes: float, row_scale: bool) -> Allocation:
    """Widths and outliers of Linears with one input, for the least predicted loss in at most `nbytes` in all.

    Everything is bought at one price (loss per byte): a bit more for a column of all the Linears, with the larger codebook
    that it brings, and single weights in fp16. The price is found by bisection; what it leaves over is spent on the columns
    that would change next. Linears in which outliers do not earn their row offsets have none.
    """
    plain = [replace(g, worst=g.worst[:, :, :0]) for g in groups]
    found = _spend(plain, nbytes - fixed_bytes(plain, row_scale, outliers=False))
    if any(g.worst.shape[2] for g in groups):
        with_outliers = _spend(groups, nbytes - fixed_bytes(groups, row_scale, outliers=True))
        if with_outliers is not None and (found is None or with_outliers.predicted < found.predicted):
            found = with_outliers
    if found is None:
        least = least_bytes(groups[0].widths[0], [g.rows for g in groups], len(groups[0].error), row_scale)
        raise ValueError(
            f"{nbytes:.0f} bytes do not hold {len(groups)} Linears of {len(groups[0].error)} columns: {least} is the least, "
            f"with {groups[0].widths[0]} bits in every column; ask for more bits"
        )
    return found


def fixed_bytes(groups: Sequence[ColumnErrors], row_scale: bool, outliers: bool) -> float:
    """Bytes that do not depend on widths: the widths themselves, one segment, row scales, row offsets of outliers."""
    none = 0 if outliers else None
    return sum(CodebookStructure.bytes_of(g.rows, len(g.error), {}, none, row_scale) for g in groups)


def least_bytes(width: int, rows: Sequence[int], columns: int, row_scale: bool) -> int:
    """Bytes of Linears [rows_i, columns] with `width` bits in every column and no outliers."""
    return sum(
        CodebookStructure(n, columns, tuple(columns * (b == width) for b in range(1, 9)), row_scale=row_scale).nbytes
        for n in rows
    )


def _spend(groups: Sequence[ColumnErrors], budget: float) -> Allocation | None:
    bytes_of = CodebookStructure.bytes_of
    widths, columns = groups[0].widths, len(groups[0].error)
    rows = sum(g.rows for g in groups)
    of_all = {b: sum(bytes_of(g.rows, columns, {b: 1}) - bytes_of(g.rows, columns, {}) for g in groups) for b in widths}
    cost = torch.tensor(list(of_all.values()), dtype=torch.float64)
    outlier = int(bytes_of(rows, columns, {}, 1) - bytes_of(rows, columns, {}, 0))
    if budget < float(cost[0]) * columns:
        return None
    error = torch.stack([g.error for g in groups]).sum(0)
    found = None
    for whole in (True, False):
        # What the ends of rows take is known only afterwards: aim again at what is left over.
        allowed = budget
        for _ in range(6):
            choice, prices = _at_budget(allowed, error, [g.worst for g in groups], cost, outlier)
            if whole:
                choice = _whole_bytes(choice, error, widths)
            tried, used = _allocation(choice, prices * outlier, groups, error, outlier)
            left = budget - used
            if left >= 0 and (found is None or tried.predicted < found.predicted):
                found = tried
            if 0 <= left <= LEFT_OVER * budget:
                break
            allowed += 0.9 * left if left > 0 else left - rows / 2
    return found


def _allocation(
    choice: Tensor, worth: Tensor, groups: Sequence[ColumnErrors], error: Tensor, outlier: int
) -> tuple[Allocation, int]:
    """What these widths (indices [K]) come to, weights that lose more than `worth` [K, 1] staying in fp16; and its bytes."""
    place = torch.arange(len(error))
    bits = torch.tensor(groups[0].widths, dtype=torch.uint8)[choice]
    counts = torch.bincount(bits.long(), minlength=9)[1:9].tolist()
    loss, counts_of = error[place, choice].sum(), []
    for g in groups:
        chosen = g.worst[place, choice]
        outliers = chosen > worth
        loss = loss - (chosen * outliers).sum()
        counts_of.append(outliers.sum(-1))
    codes = sum(-(-count * width // 8) for width, count in enumerate(counts, 1)) * sum(g.rows for g in groups)
    books = sum(2 * len(groups) * count << width for width, count in enumerate(counts, 1))
    return Allocation(bits, counts_of, float(loss)), codes + books + outlier * sum(int(c.sum()) for c in counts_of)


def _whole_bytes(choice: Tensor, error: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Narrow the columns that lose least by it, until the codes of each width but the first fill whole bytes.

    A row of codes ends on a byte, for each width: unfilled ones would cost 0.03 bits per weight at K = 384. Where there are
    few columns this costs more than it gains; `_spend` tries both.
    """
    choice = choice.clone()
    for index in range(len(widths) - 1, 0, -1):
        members = (choice == index).nonzero()[:, 0]
        spare = len(members) % (8 // math.gcd(8, widths[index]))
        if spare:
            gains = error[members, index - 1] - error[members, index]
            choice[members[gains.topk(spare, largest=False).indices]] -= 1
    return choice


def _at_budget(
    budget: float, error: Tensor, worst: Sequence[Tensor], cost: Tensor, outlier: int
) -> tuple[Tensor, Tensor]:
    """Index of each column's width [K] and the price it pays [K, 1], for `budget` bytes, ends of rows left out."""
    place = torch.arange(len(error))
    # How many losses exceed a price is searched, and what they sum to is looked up: tensors this small start no threads, which
    # took two thirds of the time of a Linear [1024, 1024] where the cores were busy.
    rising = [-w for w in worst if w.shape[2]]
    sums = [torch.nn.functional.pad(w.cumsum(2), (1, 0)) for w in worst if w.shape[2]]

    def at(price: float) -> tuple[Tensor, Tensor]:
        gain, count_of = -error, torch.zeros_like(error)
        limit = torch.full((*error.shape, 1), -price * outlier, dtype=torch.float64)
        for losses, total in zip(rising, sums, strict=True):
            count = torch.searchsorted(losses, limit)
            gain = gain + (total.gather(2, count) + count * limit)[:, :, 0]
            count_of += count[:, :, 0]
        choice = (gain - price * cost).argmax(1)
        return choice, cost[choice] + outlier * count_of[place, choice]

    # Losses span many magnitudes: bisect the exponent.
    high = math.log(float(error.max() / cost.min()) + 1e-280) + 1
    low = high - 100
    while high - low > 1e-6:
        middle = (low + high) / 2
        if float(at(math.exp(middle))[1].sum()) > budget:
            low = middle
        else:
            high = middle
    choice, nbytes = at(math.exp(high))
    richer, richer_bytes = at(math.exp(low))
    prices = torch.full((len(error), 1), math.exp(high), dtype=torch.float64)
    left = budget - float(nbytes.sum())
    for column in (richer_bytes > nbytes).nonzero()[:, 0].tolist():
        extra = float(richer_bytes[column] - nbytes[column])
        if extra <= left:
            left -= extra
            choice[column], prices[column] = richer[column], math.exp(low)
    return choice, prices


def share_out(shapes: Mapping[str, tuple[int, int]], nbytes: float, row_scale: bool) -> dict[str, float]:
    """name -> bytes: as many for each Linear [rows, columns] as one width, a fraction of a bit included, would take in all."""

    def at(width: float) -> dict[str, float]:
        return {
            name: CodebookStructure.bytes_of(rows, columns, {width: columns}, row_scale=row_scale)
            for name, (rows, columns) in shapes.items()
        }

    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(at(middle).values()) > nbytes:
            high = middle
        else:
            low = middle
    return at(low)
