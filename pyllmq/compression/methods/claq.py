"""CLAQ: each column gets a k-means codebook, and the columns after it take up its error.

Source: CLAQ (arXiv 2405.17233) and its released code; the sweep is `solver.sweep`, the solver `kmeans_1d`.
In a column the Hessian weighs every row alike, so plain k-means is already the right one for the layer's output error.
Centroids and outliers are rounded to fp16 before the error is spread: what is optimised is what is stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ...config import Between, MethodConfig
from ...formats import CodebookWeight
from ...kmeans import kmeans_1d
from ...packing import count_not_finite
from ...structure import FP16_LEAST, FP16_LOSS, NEGLIGIBLE, power_of_two
from ..ranks import ALONE, Ranks
from ..solver import bits as allocation
from ..solver.hessian import PANEL, factor_hessian, output_error
from ..solver.sweep import ColumnQuantizer, sweep_columns
from ..statistics.inputs import InputStatistics
from ..statistics.run import CalibrationRun
from .method import CompressedLinear, Method, Needs

FULL_BITS = 16
MAX_OUTLIERS = 0.1
NAMED_OUTLIERS = {2.12: 0.005, 2.24: 0.01, 3.12: 0.005, 3.23: 0.01}
"""The fusion points: at these bits the paper keeps this share of the weights in fp16, and so does the command line."""

FP16_MAX = 65504.0
FP16_TINY = 2.0**-25 / FP16_LOSS
"""Where half the spacing of fp16's subnormals, 2^-25, is 1 % of the value."""


@dataclass(frozen=True)
class CLAQConfig(MethodConfig):
    """CLAQ: a k-means codebook per input column, more bits for columns with many outliers, outliers kept in fp16.

    Source: CLAQ (arXiv 2405.17233) and its released code. The points that the paper names, as `bits` / `outliers`:
    2, 3, 4 (one width); 2.1, 2.2, 2.5, 3.1 (Adaptive Precision); 2.12 / 0.005, 2.24 / 0.01, 3.12 / 0.005, 3.23 / 0.01
    (with Outlier Reservation).

    A Linear whose columns are too small for fp16 (below 3e-6) gets one power of two as its scale, and keeps no outliers, which have
    none.
    """

    bits: Annotated[float, Between(1, 8)]
    """1 to 8, in the paper's way of counting: code bits + (16 - base width) * outliers. Codebooks and the positions of
    the outliers are not in it; `CodebookWeight.bits_per_weight` counts everything."""
    outliers: Annotated[float, Between(0, MAX_OUTLIERS)] = 0.0
    """Share of the weights that is kept in fp16, 0 to 0.1. The top 10 % of the columns keep 2.8 times this share, the
    others 0.8 times."""
    kmeans: Literal["exact", "windowed", "lloyd"] = "exact"
    """"exact" (optimal) or "lloyd" (the kind of solver that the paper used)."""
    act_order: bool = True
    """Process the columns by falling diagonal of the Hessian."""
    block_size: Annotated[int, Between(1)] = 128
    """Columns between two updates of all later columns."""
    damping: Annotated[float, Between(0, 1)] = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""
    true_sequential: bool = True
    """Calibrate q/k/v, o, gate/up, down one after the other, each on the outputs of those before."""
    outlier_order_threshold: Annotated[float, Between(0)] = 13.0
    """S: a weight is an outlier if its magnitude is at least S times the mean magnitude of its matrix."""
    share_bits: bool = True
    """Linears with the same input (q/k/v, gate/up) get the same width in each column: serving engines merge them."""
    published: bool = False
    """Choose columns and outliers as the released code does, oversights included: outliers from the top AND from the
    bottom (twice the share), k-means over the outliers too, shares read by the position in the block, allocation
    in each matrix by itself (`share_bits` is ignored). `kmeans` stays a free choice; "lloyd" is what was released."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code_bits < 1:
            raise ValueError(
                f"bits = {self.bits:g} with outliers = {self.outliers:g} leaves {self.code_bits:g} bits for the codes, "
                f"which need at least 1; raise bits to {1 + (FULL_BITS - 1) * self.outliers:g} or keep fewer outliers"
            )

    @property
    def base_bits(self) -> int:
        """Width of the columns that get no extra bits."""
        return self._split_bits()[0]

    @property
    def code_bits(self) -> float:
        """Average width of the codes: bits without the outliers' share."""
        return self._split_bits()[1]

    @property
    def high_bits(self) -> int:
        """Width of the columns that get extra bits. The paper defines 2 -> 4 and 3 -> 4; elsewhere it is one bit
        more, an extension of this library."""
        return {2: 4, 8: 8}.get(self.base_bits, self.base_bits + 1)

    @property
    def high_fraction(self) -> float:
        """Share of the columns that get `high_bits`."""
        extra = self.high_bits - self.base_bits
        return (self.code_bits - self.base_bits) / extra if extra else 0.0

    def _split_bits(self) -> tuple[int, float]:
        """(base width, code bits). An outlier costs 16 - base, and the base follows from the code bits: search down."""
        for base in range(math.floor(self.bits + 1e-9), 0, -1):
            code_bits = self.bits - (FULL_BITS - base) * self.outliers
            if code_bits > base - 1e-9:
                # 2.07 - 14 * 0.005 is 2 less 2e-16: decimal settings must not fall below their width.
                return base, float(base) if abs(code_bits - base) < 1e-9 else code_bits
        return 1, self.bits - (FULL_BITS - 1) * self.outliers


class CLAQ(Method[CLAQConfig]):
    config_type = CLAQConfig
    defaults = {"bits": 3.12}

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> CLAQConfig:
        settings = {**cls.defaults, **given}
        return CLAQConfig(**{"outliers": NAMED_OUTLIERS.get(settings["bits"], 0.0), **settings})

    def without_effect(self) -> dict[str, str]:
        return {"share_bits": "published allocates in each matrix by itself"} if self.config.published else {}

    @property
    def needs(self) -> Needs:
        return Needs(sequential=self.config.true_sequential)

    def summary(self) -> str:
        return f"{self.config.bits:.3g} bits"

    def compress_group(
        self, weights: Mapping[str, Tensor], inputs: InputStatistics, run: CalibrationRun
    ) -> dict[str, CompressedLinear]:
        floats = {name: weight.float() for name, weight in weights.items()}
        return compress_linears(floats, inputs.hessian, self.config, run.ranks)


def compress_linears(
    weights: Mapping[str, Tensor], hessian: Tensor, config: CLAQConfig, ranks: Ranks = ALONE
) -> dict[str, CompressedLinear]:
    """Compress Linears that share one input (q/k/v, gate/up, or a single one); the Hessian is factored once.

    Args:
        weights: name -> float [N_i, K].
        hessian: float [K, K], sum of x x^T over the calibration tokens, on any scale.
        config: settings; `share_bits` gives all of `weights` the same `column_bits`.
        ranks: the processes among which the Linears are shared out; all are given the same arguments and return the same.

    Returns:
        name -> CompressedLinear, in the order of `weights`.

    Raises:
        ValueError: no weights, shapes that do not fit, values that are not finite or outside fp16, a hessian that
            cannot be factored; the message names the layer.
    """
    if not weights:
        raise ValueError("weights is empty; it must map at least one name to a tensor [N, K]")
    for name, weight in weights.items():
        check_weight(name, weight, hessian, row_scale=True)

    started = time.perf_counter()
    factor = factor_hessian(hessian, config.damping, config.act_order)
    plans = column_plans(weights, factor.order, config)
    shared_seconds = (time.perf_counter() - started) / len(weights)

    compressed = {}
    for name, weight in ranks.mine(weights).items():
        started = time.perf_counter()
        bits, shares = plans[name]
        columns = CodebookColumns(name, weight, bits, shares, config, factor.order)
        swept = sweep_columns(weight, factor, columns, config.block_size)
        packed = columns.pack()
        seconds = time.perf_counter() - started + shared_seconds

        outlier_share = float(columns.outlier_mask.float().mean())
        counted = outlier_share / 2 if config.published else outlier_share
        paper_bits = float(bits.float().mean()) + (FULL_BITS - config.base_bits) * counted
        error = output_error(weight, swept.quantized, hessian)
        compressed[name] = CompressedLinear(packed, error, seconds, paper_bits)
    return ranks.merge(compressed, list(weights))


def column_plans(weights: Mapping[str, Tensor], order: Tensor, config: CLAQConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (column bits uint8 [K], share of each column's weights that are outliers, float64 [K])."""
    counts = {name: allocation.outlier_order(w, config.outlier_order_threshold) for name, w in weights.items()}

    def plan(ranked: Tensor) -> tuple[Tensor, Tensor]:
        bits = allocation.column_bits(ranked, config.base_bits, config.high_bits, config.high_fraction)
        return bits, allocation.outlier_shares(ranked, config.outliers)

    if config.published:
        return {name: plan(allocation.rank_columns_released(count, order)) for name, count in counts.items()}
    sizes = {name: allocation.largest_magnitude(w) for name, w in weights.items()}
    if not config.share_bits:
        return {name: plan(allocation.rank_columns(counts[name], sizes[name])) for name in weights}
    count, size = torch.stack(list(counts.values())).sum(0), torch.stack(list(sizes.values())).amax(0)
    return dict.fromkeys(weights, plan(allocation.rank_columns(count, size)))


class CodebookColumns(ColumnQuantizer):
    """Fits a codebook to each column that the sweep offers and remembers codes, codebooks and outliers."""

    def __init__(
        self,
        name: str,
        weight: Tensor,
        bits: Tensor,
        shares: Tensor,
        config: CLAQConfig,
        order: Tensor,
        zero_entry: bool = False,
    ) -> None:
        rows, size = weight.shape
        by_column = _largest_of_columns(weight)
        self.scale = power_of_two(float(by_column.max())) if bool(_too_small(by_column, FP16_TINY).any()) else 1.0
        """Codebooks hold the weights divided by it."""
        if self.scale != 1:
            shares = torch.zeros_like(shares)
        self.zero_entry = zero_entry
        self.name, self.method, self.column_bits = name, config.kmeans, bits
        self.bits, self.shares = bits.tolist(), shares.tolist()
        # Released: shares stand in processing order and are read by the index inside the block, so every block reuses
        # those of the first.
        self.shares_at = shares[order].tolist() if config.published else None
        # Columns as rows, as the sweep has them.
        self.codes = torch.empty(size, rows, dtype=torch.uint8, device=weight.device)
        self.outlier_mask = torch.zeros(size, rows, dtype=torch.bool, device=weight.device)
        self.outlier_values = (
            torch.zeros(size, rows, dtype=torch.float16, device=weight.device) if any(self.shares) else None
        )
        self.codebooks: dict[int, Tensor] = {}

    def column(self, position: int, column: int, values: Tensor, pruned: Tensor | None = None) -> Tensor:
        """What is stored; weights that `pruned` (bool [N]) names become 0 and take no part in the clustering.

        With `zero_entry` their code is 0, and entry 0 of the codebook is the value 0; without, the format knows where they are.
        """
        share = self.shares[column] if self.shares_at is None else self.shares_at[position]
        clusters = 1 << self.bits[column]
        values = values / self.scale
        if pruned is not None:
            values, clusters = values.masked_fill(pruned, 0), clusters - self.zero_entry
        outliers = None
        if share > 0:
            outliers = _both_tails_released(values, share) if self.shares_at is not None else _extremes(values, share)
        # Released: k-means spends centroids on the outliers too, though they stay in fp16.
        inliers = None if outliers is None or self.shares_at is not None else (~outliers).float()
        if pruned is not None:
            inliers = (~pruned).float() if inliers is None else inliers.masked_fill(pruned, 0)
            outliers = None if outliers is None else outliers & ~pruned
        centroids, codes = self._cluster(column, values, clusters, inliers)
        if self.zero_entry:
            centroids, codes = torch.cat([centroids.new_zeros(1), centroids]), codes + 1
        if pruned is not None:
            codes = codes.masked_fill(pruned, 0)
        self.codebooks[column], self.codes[column] = centroids, codes
        # index_select, not indexing: that and bucketize start torch's threads even for 4096 elements.
        stored = centroids.float().index_select(0, codes.int())
        if pruned is not None:
            stored = stored.masked_fill(pruned, 0)
        if outliers is not None and self.outlier_values is not None:
            half = values.half()
            self.outlier_mask[column], self.outlier_values[column] = outliers, half
            stored = torch.where(outliers, half.float(), stored)
            if not bool(torch.isfinite(stored).all()):
                raise outgrown(self.name, column, values)
        return stored * self.scale

    def _cluster(self, column: int, values: Tensor, clusters: int, inliers: Tensor | None) -> tuple[Tensor, Tensor]:
        """fp16 [clusters] and uint8 [N]."""
        if inliers is not None and not bool(inliers.any()):
            return values.new_zeros(clusters, dtype=torch.float16), torch.zeros_like(values, dtype=torch.uint8)
        try:
            centroids, codes = kmeans_1d(
                values[None], clusters, inliers, method=self.method, centroid_dtype=torch.float16
            )
        except ValueError as error:
            raise outgrown(self.name, column, values) from error
        return centroids[0], codes[0]

    def state(self, column: int) -> tuple[Tensor, ...]:
        """What the column holds; `restore` brings it back."""
        outliers = (
            (self.outlier_mask[column].clone(), self.outlier_values[column].clone())
            if self.outlier_values is not None
            else ()
        )
        return self.codebooks[column], self.codes[column].clone(), *outliers

    def restore(self, column: int, state: tuple[Tensor, ...]) -> None:
        self.codebooks[column], self.codes[column] = state[:2]
        if self.outlier_values is not None:
            self.outlier_mask[column], self.outlier_values[column] = state[2:]

    def pack(self) -> CodebookWeight:
        codebook = torch.cat([self.codebooks[column] for column in range(len(self.bits))])
        scale = None if self.scale == 1 else torch.full((self.codes.shape[1],), self.scale)
        return CodebookWeight.pack(
            self.codes.t().contiguous(), codebook, self.column_bits, row_scale=scale, **self.outliers()
        )

    def outliers(self) -> dict[str, Tensor]:
        """The arguments of a format's `pack`; none where there are no outliers."""
        if self.outlier_values is None or not bool(self.outlier_mask.any()):
            return {}
        return {"outlier_mask": self.outlier_mask.t(), "outlier_weight": self.outlier_values.t()}


def _extremes(values: Tensor, share: float) -> Tensor | None:
    """Mask of round(N * share) values: half the lowest, half the highest, an odd one where it lies further from 0."""
    count = min(round(share * values.numel()), values.numel() - 1)
    if count < 1:
        return None
    side = count // 2
    highest, lowest = values.topk(side + 1), values.topk(side + 1, largest=False)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[highest.indices[:side]] = True
    mask[lowest.indices[:side]] = True
    if count % 2:
        further = highest if abs(float(highest.values[side])) >= abs(float(lowest.values[side])) else lowest
        mask[further.indices[side]] = True
    return mask


def _both_tails_released(values: Tensor, share: float) -> Tensor:
    """Mask as released: `share` from the top and `share` from the bottom by signed value, limits included."""
    count = values.numel()
    falling = values.sort(descending=True).values
    top = falling[min(round(count * share), count - 1)]
    bottom = falling[min(round(count * (1 - share)), count - 1)]
    return (values >= top) | (values <= bottom)


def outgrown(name: str, column: int, values: Tensor) -> ValueError:
    return ValueError(
        f"column {column} of {name!r} grew to {float(values.abs().max()):g} while it took up the errors of "
        f"the columns before it; fp16 ends at {FP16_MAX:g}. Rescale the weight, or raise damping"
    )


def check_weight(name: str, weight: Tensor, hessian: Tensor, row_scale: bool = False) -> None:
    """`check_matrix`, and that fp16 codebooks can hold the weight, each row divided by a scale in fp16 if there are such."""
    check_matrix(name, weight, hessian)
    by_column = _largest_of_columns(weight)
    largest = float(by_column.max())
    if largest > FP16_MAX:
        raise ValueError(
            f"{name!r} holds a weight of magnitude {largest:g}; codebooks are fp16, which ends at {FP16_MAX:g}. "
            "Rescale the weight first"
        )
    limit = FP16_TINY * (FP16_LEAST if row_scale else 1)
    tiny = _too_small(by_column, limit)
    if bool(tiny.any()):
        column = int(tiny.nonzero()[0])
        raise ValueError(
            f"{int(tiny.sum())} columns of {name!r} are so small that fp16 codebooks lose more than 1 % of them "
            f"(column {column}: at most {float(by_column[column]):g}, limit {limit:.2g}). Rescale the weight"
            f"{'' if row_scale else ', or take a format that scales rows: no 2:4 pattern beside codes'}"
        )


def _largest_of_columns(weight: Tensor) -> Tensor:
    """The largest magnitude of each column, float32 [K]."""
    return torch.stack([part.detach().abs().amax(0) for part in weight.split(PANEL)]).amax(0).float()


def _too_small(by_column: Tensor, limit: float) -> Tensor:
    """Bool [K]: columns below `limit` that count beside the largest."""
    return (by_column > 0) & (by_column < limit) & (by_column > NEGLIGIBLE * by_column.max())


def check_matrix(name: str, weight: Tensor, hessian: Tensor) -> None:
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"{name!r} is {weight.dtype} {tuple(weight.shape)}; it must be a non-empty float [N, K]")
    if tuple(hessian.shape) != (weight.shape[1],) * 2:
        raise ValueError(
            f"{name!r} is {tuple(weight.shape)} and the hessian {tuple(hessian.shape)}; with [N, K] it must be [K, K]"
        )
    bad = count_not_finite(weight)
    if bad:
        raise ValueError(f"{name!r} holds {bad} of {weight.numel()} weights that are not finite; check the checkpoint")
