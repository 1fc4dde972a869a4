"""Pruning: which weights of a Linear become 0, and how the others make up for it.

Scores, small ones go first; H = X^T X, and U is the factor of its damped inverse that the column sweep works with:

    magnitude   |w|
    wanda       |w| * |X_j|                            Sun et al. 2023 (arXiv 2306.11695); |X_j|^2 = H_jj
    sparsegpt   w^2 / U_jj^2                           Frantar & Alistarh 2023 (arXiv 2301.00774)
    mixed       w^2 * (H_jj + 1 / U_jj^2)              Shao et al. 2023 (arXiv 2310.09499), their eq. 4

The first two keep the other weights as they are. The last two choose inside the sweep, on weights that already make up for
the columns pruned before, and so does every method that quantizes as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import SparseConfig
from ..formats import BitmapWeight, CodebookWeight, Sparse24CodebookWeight, Sparse24Weight
from .claq import CodebookColumns, CompressedLinear, check_matrix, check_weight, column_plans
from .column_loop import (
    LAZY_COLUMNS,
    ColumnQuantizer,
    HessianFactor,
    factor_hessian,
    output_error,
    refine_columns,
    sweep_columns,
)
from .ranks import ALONE, Ranks

CHOICE_COLUMNS = LAZY_COLUMNS // 2
"""Columns that are chosen from at once; fewer gain nothing, 32 lose 2 to 14 % (output error of four Linears at 50 %). Half of a
run of the sweep, so that 4096 rows stay below the size from which torch starts its threads."""


def prune_linears(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    config: SparseConfig,
    sparsity: Mapping[str, float],
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> dict[str, CompressedLinear]:
    """Prune (and quantize, if the config says so) Linears that share one input; the Hessian is factored once.

    Args:
        weights: name -> float [N_i, K].
        hessian: float [K, K], sum of x x^T over the calibration tokens, on any scale.
        config: settings.
        sparsity: name -> share of the weights to prune; unused with an N:M pattern, which fixes it.
        dtype: of the dense weights; the kept ones are stored in it unless the config names another.
        ranks: the processes among which the Linears are shared out.

    Raises:
        ValueError: no weights, shapes that do not fit, values that are not finite, a hessian that cannot be factored.
    """
    if not weights:
        raise ValueError("weights is empty; it must map at least one name to a tensor [N, K]")
    for name, weight in weights.items():
        (check_matrix if config.quantize is None else check_weight)(name, weight, hessian)
    started = time.perf_counter()
    factor, plans = None, {}
    if config.sweeps:
        factor = factor_hessian(hessian, config.damping, act_order=False)
        if config.quantize is not None:
            plans = column_plans(weights, factor.order, config.quantize)
    shared_seconds = (time.perf_counter() - started) / len(weights)

    value_dtype = dtype if config.values is None else getattr(torch, config.values)
    compressed = {}
    for name, weight in ranks.mine(weights).items():
        started = time.perf_counter()
        codebooks = None
        if factor is None:
            pruned = pruning_mask(weight, hessian, config, sparsity[name])
            stored = weight.float().masked_fill(pruned, 0)
        else:
            if config.quantize is not None:
                zero_entry = config.pattern != "2:4"
                codebooks = CodebookColumns(name, weight, *plans[name], config.quantize, factor.order, zero_entry)
            columns = _PrunedColumns(weight, hessian, factor, config, sparsity[name], value_dtype, codebooks)
            stored = sweep_columns(weight, factor, columns, config.block_size).quantized
            if config.refine and not config.published:
                stored = refine_columns(weight, stored, factor, columns, config.refine).quantized
            pruned = columns.pruned.t()
        packed = pack_kept(stored, pruned, codebooks, config, value_dtype)
        error = output_error(weight, packed.dequantize(), hessian)
        seconds = time.perf_counter() - started + shared_seconds
        value_bits = 8.0 * value_dtype.itemsize if codebooks is None else float(codebooks.column_bits.float().mean())
        share = float(pruned.double().mean())
        compressed[name] = CompressedLinear(packed, error, seconds, value_bits * (1 - share), pruned=share)
    return ranks.merge(compressed, list(weights))


def pack_kept(
    stored: Tensor, pruned: Tensor, codebooks: CodebookColumns | None, config: SparseConfig, dtype: torch.dtype
) -> BitmapWeight | Sparse24Weight | CodebookWeight | Sparse24CodebookWeight:
    """What is kept of a matrix [N, K], in the format that the config asks for."""
    if codebooks is None:
        if config.pattern == "2:4":
            return Sparse24Weight.pack(stored, ~pruned, dtype)
        return BitmapWeight.pack(stored, None, dtype)
    if config.pattern != "2:4":
        return codebooks.pack()
    codebook = torch.stack([codebooks.codebooks[column] for column in range(stored.shape[1])])
    codes = codebooks.codes.t().contiguous()
    return Sparse24CodebookWeight.pack(codes, ~pruned, codebook, **codebooks.outliers())


def pruning_mask(weight: Tensor, hessian: Tensor, config: SparseConfig, sparsity: float) -> Tensor:
    """Bool [N, K], True where `config.method` ("magnitude" or "wanda") prunes a weight, without any sweep.

    As published: magnitudes compete across the matrix, Wanda's scores within each row.
    """
    scores = weight.detach().float().abs()
    if config.method == "wanda":
        scores = scores * hessian.diagonal().float().sqrt()
    if config.kept_of is not None:
        return least_of_groups(scores, *config.kept_of)
    if config.method == "wanda":
        return least(scores, round(sparsity * scores.shape[1]))
    return least(scores.reshape(1, -1), round(sparsity * scores.numel())).reshape(scores.shape)


def least(scores: Tensor, count: int) -> Tensor:
    """Bool [R, C]: the `count` least scores of each row, exactly; of equal ones the first."""
    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values
    below, tied = scores < limit, scores == limit
    missing = count - below.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > missing).any()):
        tied &= tied.cumsum(1) <= missing
    return below | tied


def least_of_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """Bool [R, C]: in each run of `group` scores all but the `kept` largest. A shorter run at the end keeps as many."""
    rows, columns = scores.shape
    short = -columns % group
    padded = torch.nn.functional.pad(scores, (0, short), value=-1.0).reshape(rows, -1, group)
    order = padded.argsort(dim=2, descending=True, stable=True)
    mask = torch.ones_like(padded, dtype=torch.bool).scatter_(2, order[..., :kept], False)
    return mask.reshape(rows, -1)[:, :columns]


class _PrunedColumns(ColumnQuantizer):
    """Chooses what goes, a few columns at a time, and gives the sweep the columns with their zeros.

    Published SparseGPT takes the same share from every `block_size` columns. Here the scores of the whole matrix say how many
    go from each run of CHOICE_COLUMNS: on four Linears of a small encoder the output error is 22 to 29 % lower at 50 %.
    """

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor,
        factor: HessianFactor,
        config: SparseConfig,
        sparsity: float,
        dtype: torch.dtype,
        codebooks: CodebookColumns | None,
    ) -> None:
        rows, size = weight.shape
        self.kept_of, self.dtype, self.codebooks = config.kept_of, dtype, codebooks
        # Columns as rows, as the sweep has them.
        self.pruned = torch.zeros(size, rows, dtype=torch.bool, device=weight.device)
        self.step = 0
        if config.method in ("magnitude", "wanda"):
            self.pruned = pruning_mask(weight, hessian, config, sparsity).t().contiguous()
            return
        # A change of d in column j costs d^2 * cost_j.
        self.cost = factor.square.diagonal().square().reciprocal()
        diagonal = hessian.diagonal().float()
        if config.method == "mixed":
            self.cost = self.cost + diagonal + factor.damping * diagonal.mean()
        # Inputs that were always 0 in the calibration data lose their weights first.
        self.cost = self.cost * (diagonal > 0)
        if self.kept_of is not None:
            self.step = self.kept_of[1]
            return
        self.step = config.block_size if config.published else CHOICE_COLUMNS
        total = round(sparsity * weight.numel())
        if config.published:
            before = [round(sparsity * rows * column) for column in range(size)]
        else:
            scores = weight.detach().float().t().square() * self.cost[:, None]
            by_column = least(scores.reshape(1, -1), total).reshape(scores.shape).sum(1)
            before = (by_column.cumsum(0) - by_column).tolist()
        self.before = [*before, total]
        """How many weights go from the columns before each column."""

    def begin_block(self, columns: Tensor, block: Tensor, upper_diagonal: Tensor) -> None:
        self.block = block

    def column(self, position: int, column: int, values: Tensor) -> Tensor:
        if self.step and position % self.step == 0:
            # The sweep has brought these up to date: N:M groups and CHOICE_COLUMNS lie within one run of LAZY_COLUMNS.
            chosen = self.block[position : position + self.step]
            end = column + chosen.shape[0]
            scores = chosen.square() * self.cost[column:end, None]
            if self.kept_of is not None:
                self.pruned[column:end] = least_of_groups(scores.t(), *self.kept_of).t()
            else:
                count = self.before[end] - self.before[column]
                self.pruned[column:end] = least(scores.reshape(1, -1), count).reshape(scores.shape)
        return self._stored(column, values)

    def refit(self, column: int, target: Tensor, stored: Tensor) -> tuple[Tensor, float]:
        before = None if self.codebooks is None else self.codebooks.state(column)
        new = self._stored(column, target)
        fell = float((stored - target).square().sum() - (new - target).square().sum())
        if fell <= 0 and self.codebooks is not None and before is not None:
            self.codebooks.restore(column, before)
        return new, fell

    def _stored(self, column: int, values: Tensor) -> Tensor:
        if self.codebooks is not None:
            return self.codebooks.fit(column, column, values, self.pruned[column])
        # What is optimised is what is stored; int8 is rounded by row at the end.
        rounded = values.to(self.dtype).float() if self.dtype.is_floating_point else values
        return rounded.masked_fill(self.pruned[column], 0)
