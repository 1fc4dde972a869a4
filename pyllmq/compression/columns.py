"""Column codebooks at their best: the sweep of CLAQ, then block coordinate descent, with bits and outliers at one price.

Same format and kernels as CLAQ (arXiv 2405.17233). The objective of a Linear is sum_r omega_r e_r H e_r^T, with e_r the error of
row r, H the Hessian of its input and omega_r the weight that guidance gives the row. Each column is an exact weighted 1-D
k-means problem in it, in the sweep and in the descent alike, so codes and codebook are the best for everything else as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import ColumnCodebookConfig
from ..formats import CodebookWeight
from ..kmeans import fit_columns, kmeans_1d
from . import allocate
from .claq import CompressedLinear, check_weight, outgrown
from .column_loop import (
    PANEL,
    ColumnQuantizer,
    HessianFactor,
    as_columns,
    as_matrix,
    factor_hessian,
    refine_,
    squared_columns,
    sweep_,
    times_inverse,
)
from .drift import Drift
from .ranks import ALONE, Ranks

MAX_KEPT = 0.02
"""Largest share of a column's weights that may stay in fp16."""


@dataclass(eq=False)
class InputStatistics:
    """What calibration knows of the common input x of some Linears."""

    hessian: Tensor
    """float [K, K]: mean of x x^T over the tokens, on any scale."""
    mean: Tensor | None = None
    """float [K]: mean of x, where the Hessian is the plain mean of x x^T: their difference is the covariance. None: biases stay."""
    drifts: Mapping[str, Drift] = field(default_factory=dict)
    """name -> what its output should make up for; Linears that are not named: nothing."""

    def take_hessian(self) -> Tensor:
        """The Hessian, to be written on. Raises RuntimeError the second time."""
        if not self.hessian.numel():
            raise RuntimeError("the Hessian of these statistics was taken; make them anew")
        hessian, self.hessian = self.hessian, torch.empty(0)
        return hessian


def compress_linears(
    weights: Mapping[str, Tensor],
    inputs: InputStatistics,
    nbytes: float,
    config: ColumnCodebookConfig,
    row_weights: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, CompressedLinear]:
    """Compress Linears that share one input into at most `nbytes` in all.

    Args:
        weights: name -> float [N_i, K].
        inputs: statistics of the input, used up: a second [K, K] would be 0.5 GB at K = 11008. With a `mean`, each result says
            what to add to the bias.
        nbytes: bytes for all tensors of all the packed weights.
        config: settings; `share_bits` gives all of `weights` the same `column_bits`.
        row_weights: name -> float [N_i] > 0, the omega_r of the objective; None is 1 everywhere.
        ranks: the processes among which the work is shared out; all are given the same arguments and return the same.

    Raises:
        ValueError: no weights, shapes that do not fit, values that are not finite or outside fp16, a Hessian that cannot be
            factored, too few bytes; the message names the layer.
    """
    if not weights:
        raise ValueError("weights is empty; it must map at least one name to a tensor [N, K]")
    hessian = inputs.take_hessian()
    for name, weight in weights.items():
        check_weight(name, weight, hessian)
    # k-means runs on the CPU, whatever device the model is on.
    dense = {name: weight.detach().cpu() for name, weight in weights.items()}
    hessian, mean = hessian.cpu(), None if inputs.mean is None else inputs.mean.cpu()
    started = time.perf_counter()
    if mean is not None:
        # Where the bias takes up the mean error, only the input's covariance matters. An input that never changes has none;
        # rounding may leave it a little below zero.
        hessian.addr_(mean, mean, alpha=-1)
        hessian.diagonal().clamp_(min=0)
    factor = factor_hessian(hessian, config.damping, config.act_order, in_place=True)
    del hessian
    fits = {}
    for name, weight in dense.items():
        target = _target(weight, inputs.drifts.get(name), mean, factor, config.propagation)
        fits[name] = ColumnFits(name, target, (row_weights or {}).get(name), config.row_scale, config.kmeans)
    plans = _plan(fits, factor, nbytes, config, ranks)
    shared_seconds = (time.perf_counter() - started) / len(weights)

    compressed = {}
    for name, weight in ranks.mine(dense).items():
        started = time.perf_counter()
        columns = fits.pop(name)
        columns.plan(*plans[name])
        target = columns.target
        output = columns.squared_outputs(factor).sum()
        if mean is not None:
            output += (mean[factor.order] @ target).double().square().sum()
        stored = target.clone()
        sweep_(stored, factor, columns, config.block_size)
        # The error takes the memory of the target: a [K, N] is 0.2 GB where K is 11008 and N 4096.
        error = torch.sub(stored, target, out=target)
        if config.cycles:
            refine_(stored, error, factor, columns, config.cycles, config.tolerance, config.block_size)
        left = squared_columns(error, factor).sum()
        del target, error, columns.target
        quantized = as_matrix(stored, factor.order)
        packed = columns.pack(quantized)
        bias_change = None
        if mean is not None:
            bias_change = _mean_output(weight, quantized, mean)
            if name in inputs.drifts:
                bias_change += inputs.drifts[name].mean.cpu()
        seconds = time.perf_counter() - started + shared_seconds
        error_share = _relative_error(float(left), float(output))
        compressed[name] = CompressedLinear(packed, error_share, seconds, packed.bits_per_weight, bias_change)
    return ranks.merge(compressed, list(weights))


def _target(weight: Tensor, drift: Drift | None, mean: Tensor | None, factor: HessianFactor, share: float) -> Tensor:
    """W + share * mean(e x^T) H^-1, H damped, in the form of `as_columns`: its output comes closest to W x + e.

    Means are left to the bias, if there is one.
    """
    rows = as_columns(weight, factor.order)
    if drift is None or share == 0:
        return rows
    products = drift.take_products().cpu()
    for part, of_outputs, shift in zip(
        rows.split(PANEL, 1), products.split(PANEL), drift.mean.cpu().split(PANEL), strict=True
    ):
        if mean is not None:
            of_outputs = of_outputs - torch.outer(shift, mean)
        part.add_(times_inverse(of_outputs[:, factor.order].t(), factor), alpha=share)
    return rows


def _mean_output(dense: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
    """(dense - quantized) mean, float32 [N]."""
    parts = zip(dense.split(PANEL), quantized.split(PANEL), strict=True)
    return torch.cat([(before.float() - after) @ mean for before, after in parts])


def _relative_error(error: float, output: float) -> float:
    """Squared error of the output that the bias leaves, relative to the squared output."""
    if output <= 0:
        return 0.0 if error <= 0 else float("inf")
    return max(0.0, error) / output


def _plan(
    fits: Mapping[str, ColumnFits],
    factor: HessianFactor,
    nbytes: float,
    config: ColumnCodebookConfig,
    ranks: Ranks,
) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (column bits uint8 [K], how many weights of each column to keep, int64 [K])."""
    cost = factor.square.diagonal().double().pow(-2)
    cost[factor.diagonal == 0] = 0
    names = list(fits)
    # Each process fits some columns of every Linear: those are alike in cost, whatever the number of Linears.
    part = ranks.slice_of(len(cost))
    owned = ranks.mine({name: fits[name].target for name in names})
    outputs = ranks.merge(
        {name: float((fits[name].squared_outputs(factor) * fits[name].row_weights).sum()) for name in owned}, names
    )
    mine = [fits[n].errors(config.allowed_widths, cost, outputs[n], config.outliers, part) for n in names]
    errors = [allocate.ColumnErrors.joined(parts) for parts in zip(*ranks.gather(mine), strict=True)]
    # Back from processing order.
    place = factor.order.argsort()
    plans = ranks.from_first(lambda: _spend(names, errors, nbytes, config))
    return {name: (bits[place], kept[place]) for name, (bits, kept) in plans.items()}


def _spend(
    names: list[str], errors: list[allocate.ColumnErrors], nbytes: float, config: ColumnCodebookConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    if config.share_bits:
        found = allocate.spend(errors, nbytes, config.row_scale)
        return {name: (found.column_bits, kept) for name, kept in zip(names, found.kept, strict=True)}
    plans = {}
    rows = sum(e.rows for e in errors)
    for name, error in zip(names, errors, strict=True):
        alone = allocate.spend([error], nbytes * error.rows / rows, config.row_scale)
        plans[name] = (alone.column_bits, alone.kept[0])
    return plans


class ColumnFits(ColumnQuantizer):
    """Codes, codebook and kept weights of every column of one Linear, fitted by weighted k-means."""

    def __init__(self, name: str, target: Tensor, row_weights: Tensor | None, row_scale: bool, method: str) -> None:
        """`target`: the matrix in the form of `as_columns`, [K, N]."""
        size, rows = target.shape
        self.name, self.target, self.method = name, target, method
        self.row_weights = torch.ones(rows) if row_weights is None else row_weights.float().cpu()
        self.scale = torch.ones(rows)
        if row_scale:
            rms = torch.linalg.vector_norm(target, dim=0) / size**0.5
            # Rounded to fp16 first: what is fitted is what is stored. A row of zeros keeps scale 1.
            self.scale = rms.half().float()
            self.scale[self.scale == 0] = 1.0
        self.row_scale = self.scale if row_scale else None
        self.importance = self.row_weights * self.scale.square()
        self.codes = torch.zeros(size, rows, dtype=torch.uint8)
        self._squared: Tensor | None = None

    def squared_outputs(self, factor: HessianFactor) -> Tensor:
        """Of each row of the target, float64 [N]."""
        if self._squared is None:
            self._squared = squared_columns(self.target, factor)
        return self._squared

    def errors(
        self, widths: tuple[int, ...], cost: Tensor, output: float, outliers: bool, part: slice = slice(None)
    ) -> allocate.ColumnErrors:
        """Losses of the columns in `part`, in processing order, at each width, in units of `output`.

        `cost` [K] is that of a squared error of 1.
        """
        rows = len(self.row_weights)
        most = round(MAX_KEPT * rows) if outliers else 0
        found = []
        for target, price in zip(self.target[part].split(PANEL), cost[part].split(PANEL), strict=True):
            points = target / self.scale
            unit = (price / max(output, 1e-300))[:, None]
            error, worst = [], []
            # One dynamic programme to the largest width gives them all.
            for centroids, codes in kmeans_1d(points, [1 << bits for bits in widths], self.importance, self.method):
                lost = (points - centroids.gather(1, codes.long())).square_().mul_(self.importance)
                error.append(lost.sum(1, dtype=torch.float64)[:, None] * unit)
                worst.append(lost.topk(most, 1).values.double() * unit)
            found.append(allocate.ColumnErrors(rows, widths, torch.cat(error, 1), torch.stack(worst, 1)))
        return allocate.ColumnErrors.joined(found)

    def plan(self, bits: Tensor, kept_counts: Tensor) -> None:
        """Widths and numbers of kept weights, [K]: before the sweep."""
        size, rows = self.codes.shape
        self.bits, self.kept_counts = bits, kept_counts.int()
        self.kept = torch.zeros(size, rows, dtype=torch.bool)
        self.centroids = torch.zeros(size, 256)

    def sweep_block(
        self, columns: list[int], block: Tensor, coupling: Tensor, upper_diagonal: Tensor
    ) -> tuple[Tensor, Tensor]:
        stored = torch.empty_like(block)
        errors, _ = self._fit(columns, stored, block, coupling, upper_diagonal, descend=False)
        return stored, errors

    def refine_block(
        self, columns: list[int], stored: Tensor, gradient: Tensor, coupling: Tensor, curvature: Tensor
    ) -> tuple[Tensor, float]:
        return self._fit(columns, stored, gradient, coupling, curvature, descend=True)

    def _fit(
        self, columns: list[int], stored: Tensor, block: Tensor, coupling: Tensor, pivot: Tensor, descend: bool
    ) -> tuple[Tensor, float]:
        place = torch.tensor(columns)
        codes, kept, centroids = self.codes[place], self.kept[place], self.centroids[place]
        try:
            moves, decrease = fit_columns(
                block, coupling, pivot.contiguous(), self.row_weights, self.scale, self.bits[place],
                self.kept_counts[place], stored, codes, kept, centroids, self.method, descend,
            )  # fmt: skip
        except OverflowError as error:
            position = int(str(error))
            raise outgrown(self.name, columns[position], block[position]) from error
        self.codes[place], self.kept[place], self.centroids[place] = codes, kept, centroids
        return moves, decrease

    def pack(self, quantized: Tensor) -> CodebookWeight:
        """What the last sweep or descent stored, which decodes to `quantized`, [N, K]."""
        used = torch.arange(256) < (1 << self.bits.int())[:, None]
        outliers = {}
        if bool(self.kept.any()):
            outliers = {"outlier_mask": self.kept.t(), "outlier_weight": quantized}
        return CodebookWeight.pack(
            self.codes.t().contiguous(), self.centroids[used], self.bits, row_scale=self.row_scale, **outliers
        )
