"""Column codebooks at their best: the sweep of CLAQ, then block coordinate descent, with bits and outliers at one price.

Same format and kernels as CLAQ (arXiv 2405.17233). The objective of a Linear is sum_r omega_r e_r H e_r^T, with e_r the error of
row r, H the Hessian of its input and omega_r the weight of the row by the loss's gradient. Each column is an exact weighted
1-D k-means problem in it, in the sweep and in the descent alike, so codes and codebook are the best for everything else as it
is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ...config import Between, MethodConfig, Option, Word
from ...formats import CodebookWeight
from ...kmeans import fit_columns, kmeans_1d
from ...linears import dense_weight
from ...structure import FP16_LEAST
from ..ranks import ALONE, Ranks
from ..solver import bits as allocation
from ..solver.hessian import (
    PANEL,
    HessianFactor,
    as_columns,
    as_matrix,
    centre_,
    factor_hessian,
    relative_error,
    squared_columns,
    times_inverse,
)
from ..solver.sweep import ColumnQuantizer, refine_, sweep_
from ..statistics.asymmetric import AsymmetricTarget
from ..statistics.blocks import Chain
from ..statistics.inputs import InputStatistics
from ..statistics.run import CalibrationRun
from ..tune import tune_codebooks
from .claq import FP16_TINY, check_weight, outgrown
from .method import CompressedLinear, Method, Needs, each_in_its_rank

MAX_OUTLIERS = 0.02
"""Largest share of a column's weights that may stay in fp16."""


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"cycles": 0, "kmeans": "windowed", "outliers": False, "guidance": "none"},
    "balanced": {},
    "best": {"cycles": 6, "tolerance": 0.02, "tune_steps": 200},
}


@dataclass(frozen=True)
class ColumnCodebookConfig(MethodConfig):
    """Column codebooks at their best: CLAQ's format, every stored byte spent where it lowers the error most.

    docs/accuracy.md says what each setting is worth. `preset` makes the usual ones.
    """

    bits: Annotated[float, Between(1.1, 8)]
    """True bits per weight, 1.1 to 8: everything stored for the compressed Linears, together, over their weights."""
    widths: tuple[int, ...] | None = None
    """Widths that a column may have; None: from 1 to two above the whole part of `bits`."""
    outliers: bool = True
    """Weights may stay in fp16, where that lowers the error more than the same bytes do as bits."""
    row_scale: bool = True
    """One fp16 factor per row, its root mean square: lets one codebook serve rows of all sizes."""
    cycles: Annotated[int, Between(0)] = 3
    """Passes of block coordinate descent over all columns after the sweep; 0 for none."""
    tolerance: Annotated[float, Between(0, 1)] = 0.05
    """The descent ends when a pass gains less than this share of what the first gained."""
    correct_bias: bool = True
    """Where the Linear has a bias, let it take up the mean error, and weigh the rest by the input's covariance."""
    propagation: Annotated[float, Between(0, 1)] = 1.0
    """Asymmetric calibration: share of the earlier Linears' error that a Linear's target makes up for, 0 to 1. Above 0 the dense
    block runs beside the one being compressed: twice the runs of blocks, a second copy of one block and of the hidden states."""
    guidance: Literal["none", "rows", "tokens", "rows+tokens"] = "rows"
    """Weigh "rows", "tokens" or "rows+tokens" by the gradient of the model's loss, which takes a backward pass; "none"
    weighs all alike."""
    share_bits: bool = True
    """Linears with the same input (q/k/v, gate/up) get the same width in each column: serving engines merge them."""
    kmeans: Literal["exact", "windowed"] = "exact"
    """"exact", or "windowed": a few 1e-6 above it, in a fifth of the time at 4096 rows and 16 centroids."""
    tune_steps: Annotated[int, Between(0), Word("tune")] = 0
    """Steps of codebook tuning against the dense model after compression; 0 for none."""
    act_order: bool = True
    """Process the columns by falling diagonal of the Hessian."""
    block_size: Annotated[int, Between(1)] = 128
    """Columns between two updates of all later columns."""
    damping: Annotated[float, Between(0, 1)] = 0.05
    """Share of the Hessian's mean diagonal added to its diagonal; less lets the descent fit the calibration text too closely."""
    true_sequential: bool = True
    """Calibrate q/k/v, o, gate/up, down one after the other, each on the outputs of those before."""

    def __post_init__(self) -> None:
        if self.widths is not None:
            widths = tuple(self.widths)
            good = widths and all(isinstance(w, int) and not isinstance(w, bool) and 1 <= w <= 8 for w in widths)
            if not good or list(widths) != sorted(set(widths)):
                raise ValueError(f"widths is {self.widths!r}; allowed: rising integers from 1 to 8, or None")
            object.__setattr__(self, "widths", widths)
        super().__post_init__()

    @classmethod
    def preset(cls, name: str, bits: float, **changes: Any) -> ColumnCodebookConfig:
        """Presets: `fast` sweeps and allocates, `balanced` is guided by the loss and descends, `best` descends longer and tunes."""
        if name not in PRESETS:
            raise ValueError(f"the preset is {name!r}; allowed: {', '.join(map(repr, PRESETS))}")
        return cls(bits=bits, **{**PRESETS[name], **changes})

    @property
    def allowed_widths(self) -> tuple[int, ...]:
        if self.widths is not None:
            return self.widths
        return tuple(range(1, min(8, math.floor(self.bits + 1e-9) + 2) + 1))


class ColumnCodebook(Method[ColumnCodebookConfig]):
    config_type = ColumnCodebookConfig
    defaults = {"bits": 3.0, "preset": "balanced"}
    true_bits = True

    @classmethod
    def options(cls) -> list[Option]:
        words = ", ".join(PRESETS)
        text = "fast sweeps and allocates, balanced is guided by the loss and descends, best descends longer and tunes"
        preset = Option("--preset", "preset", str, f"{text}; default balanced", f"{{{words.replace(', ', ',')}}}")
        return [preset, *super().options()]

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> ColumnCodebookConfig:
        settings = {**cls.defaults, **given}
        return ColumnCodebookConfig.preset(settings.pop("preset"), **settings)

    def without_effect(self) -> dict[str, str]:
        return {} if self.config.cycles else {"tolerance": "it ends the descent, of which cycles = 0 makes none"}

    @property
    def needs(self) -> Needs:
        config = self.config
        steps = f"tuning (tune_steps={config.tune_steps}) trains all layers at once and needs the whole model in memory"
        return Needs(
            sequential=config.true_sequential,
            covariance=True,
            dense_block=config.propagation > 0,
            loss_gradients=config.guidance,
            dense_model=config.tune_steps > 0,
            whole_model=steps if config.tune_steps else "",
        )

    def summary(self) -> str:
        return f"{self.config.bits:.3g} bits"

    def make_plan(
        self, linears: Mapping[str, nn.Module], chains: Sequence[Chain] = (), run: CalibrationRun | None = None
    ) -> dict[str, Any]:
        """Bytes of each Linear."""
        shapes = {}
        for name, module in linears.items():
            rows, columns = dense_weight(module).shape
            shapes[name] = int(rows), int(columns)
        weights = sum(rows * columns for rows, columns in shapes.values())
        return {"bytes": allocation.share_out(shapes, self.config.bits * weights / 8, self.config.row_scale)}

    def planned_bytes(self) -> int:
        return round(sum(self.plan["bytes"].values()))

    def compress_group(
        self, weights: Mapping[str, Tensor], inputs: InputStatistics, run: CalibrationRun
    ) -> dict[str, CompressedLinear]:
        budget = self._planned(weights) + self.carried.get("left over", 0.0)
        compressed = compress_linears(weights, inputs, budget, self.config, run.gradients.row_weights, run.ranks)
        self.carried["left over"] = budget - sum(done.weight.nbytes for done in compressed.values())
        return compressed

    def compress_experts(
        self, experts: Sequence[tuple[Mapping[str, Tensor], InputStatistics]], run: CalibrationRun
    ) -> dict[str, CompressedLinear]:
        """Each by its own bytes, so that none waits for another. What all leave goes to the Linears behind them."""

        def compress(weights: Mapping[str, Tensor], inputs: InputStatistics) -> dict[str, CompressedLinear]:
            # Of an expert that hardly any token reaches, the plan by price may fall short of what its narrowest form takes.
            rows, columns = [len(weight) for weight in weights.values()], next(iter(weights.values())).shape[1]
            least = allocation.least_bytes(self.config.allowed_widths[0], rows, columns, self.config.row_scale)
            nbytes = max(self._planned(weights), least)
            return compress_linears(weights, inputs, nbytes, self.config, run.gradients.row_weights)

        compressed = each_in_its_rank(experts, run.ranks, compress)
        left = self._planned(compressed) - sum(done.weight.nbytes for done in compressed.values())
        self.carried["left over"] = self.carried.get("left over", 0.0) + left
        return compressed

    def _planned(self, names: Iterable[str]) -> float:
        """Bytes."""
        return sum(self.plan["bytes"][name] for name in names)

    def finish(self, model: nn.Module, dense: nn.Module, text: Sequence[Any], progress: bool) -> list[float]:
        return tune_codebooks(model, dense, text, steps=self.config.tune_steps, progress=progress)


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
        check_weight(name, weight, hessian, config.row_scale)
    # k-means runs on the CPU, whatever device the model is on.
    dense = {name: weight.detach().cpu() for name, weight in weights.items()}
    hessian, mean = hessian.cpu(), inputs.mean.cpu() if inputs.mean is not None and config.correct_bias else None
    started = time.perf_counter()
    if mean is not None:
        centre_(hessian, mean)  # where the bias takes up the mean error, only the input's covariance matters
    factor = factor_hessian(hessian, config.damping, config.act_order, in_place=True)
    del hessian
    fits = {}
    for name, weight in dense.items():
        target = ridge_target(weight, inputs.targets.get(name), mean, factor, config.propagation)
        fits[name] = ColumnFits(name, target, (row_weights or {}).get(name), config.row_scale, config.kmeans)
    # Outliers have no scale: those of a Linear below fp16 would become 0.
    reaches = (float(weight.abs().max()) for weight in dense.values())
    outliers = config.outliers and not any(0 < reach < FP16_TINY for reach in reaches)
    plans = _plan(fits, factor, nbytes, config, outliers, ranks)
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
            bias_change = mean_output(weight, quantized, mean)
            if name in inputs.targets:
                bias_change += inputs.targets[name].mean.cpu()
        seconds = time.perf_counter() - started + shared_seconds
        error_share = relative_error(float(left), float(output))  # what the bias leaves
        compressed[name] = CompressedLinear(packed, error_share, seconds, packed.bits_per_weight, bias_change)
    return ranks.merge(compressed, list(weights))


def ridge_target(
    weight: Tensor, error: AsymmetricTarget | None, mean: Tensor | None, factor: HessianFactor, share: float
) -> Tensor:
    """W + share * mean(e x^T) H^-1, H damped, in the form of `as_columns`: its output comes closest to W x + e.

    Means are left to the bias, if there is one.
    """
    rows = as_columns(weight, factor.order)
    if error is None or share == 0:
        return rows
    products = error.take_products().cpu()
    for part, of_outputs, shift in zip(
        rows.split(PANEL, 1), products.split(PANEL), error.mean.cpu().split(PANEL), strict=True
    ):
        if mean is not None:
            of_outputs = of_outputs - torch.outer(shift, mean)
        part.add_(times_inverse(of_outputs[:, factor.order].t(), factor), alpha=share)
    return rows


def mean_output(dense: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
    """(dense - quantized) mean, float32 [N]."""
    parts = zip(dense.split(PANEL), quantized.split(PANEL), strict=True)
    return torch.cat([(before.float() - after) @ mean for before, after in parts])


def _plan(
    fits: Mapping[str, ColumnFits],
    factor: HessianFactor,
    nbytes: float,
    config: ColumnCodebookConfig,
    outliers: bool,
    ranks: Ranks,
) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (column bits uint8 [K], how many outliers each column has, int64 [K])."""
    cost = factor.square.diagonal().double().pow(-2)
    cost[factor.diagonal == 0] = 0
    names = list(fits)
    # Each process fits some columns of every Linear: those are alike in cost, whatever the number of Linears.
    part = ranks.slice_of(len(cost))
    owned = ranks.mine({name: fits[name].target for name in names})
    outputs = ranks.merge(
        {name: float((fits[name].squared_outputs(factor) * fits[name].row_weights).sum()) for name in owned}, names
    )
    mine = [fits[n].errors(config.allowed_widths, cost, outputs[n], outliers, part) for n in names]
    errors = [allocation.ColumnErrors.joined(parts) for parts in zip(*ranks.gather(mine), strict=True)]
    # Back from processing order.
    place = factor.order.argsort()
    try:
        plans = ranks.from_first(lambda: _spend(names, errors, nbytes, config))
    except ValueError as too_few:
        raise ValueError(f"{', '.join(names)}: {too_few}") from too_few
    return {name: (bits[place], counts[place]) for name, (bits, counts) in plans.items()}


def _spend(
    names: list[str], errors: list[allocation.ColumnErrors], nbytes: float, config: ColumnCodebookConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    if config.share_bits:
        found = allocation.spend(errors, nbytes, config.row_scale)
        return {name: (found.column_bits, outliers) for name, outliers in zip(names, found.outlier_counts, strict=True)}
    plans = {}
    rows = sum(e.rows for e in errors)
    for name, error in zip(names, errors, strict=True):
        alone = allocation.spend([error], nbytes * error.rows / rows, config.row_scale)
        plans[name] = (alone.column_bits, alone.outlier_counts[0])
    return plans


class ColumnFits(ColumnQuantizer):
    """Codes, codebook and outliers of every column of one Linear, fitted by weighted k-means."""

    def __init__(self, name: str, target: Tensor, row_weights: Tensor | None, row_scale: bool, method: str) -> None:
        """`target`: the matrix in the form of `as_columns`, [K, N]."""
        size, rows = target.shape
        self.name, self.target, self.method = name, target, method
        self.row_weights = torch.ones(rows) if row_weights is None else row_weights.float().cpu()
        self.scale = torch.ones(rows)
        if row_scale:
            rms = torch.linalg.vector_norm(target, dim=0) / size**0.5
            # Rounded to fp16 first: what is fitted is what is stored. A row of zeros keeps scale 1.
            self.scale = torch.where(rms > 0, rms.half().float().clamp_min(FP16_LEAST), 1.0)
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
    ) -> allocation.ColumnErrors:
        """Losses of the columns in `part`, in processing order, at each width, in units of `output`.

        `cost` [K] is that of a squared error of 1.
        """
        rows = len(self.row_weights)
        most = round(MAX_OUTLIERS * rows) if outliers else 0
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
            found.append(allocation.ColumnErrors(rows, widths, torch.cat(error, 1), torch.stack(worst, 1)))
        return allocation.ColumnErrors.joined(found)

    def plan(self, bits: Tensor, outlier_counts: Tensor) -> None:
        """Widths and numbers of outliers, [K]: before the sweep."""
        size, rows = self.codes.shape
        self.bits, self.outlier_counts = bits, outlier_counts.int()
        self.outlier_mask = torch.zeros(size, rows, dtype=torch.bool)
        self.centroids = torch.zeros(size, 256)

    def sweep_block(
        self, columns: list[int], block: Tensor, coupling: Tensor, upper_diagonal: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Not finite, so that the column at which a sweep ends can be told.
        stored = torch.full_like(block, torch.nan)
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
        codes, outliers, centroids = self.codes[place], self.outlier_mask[place], self.centroids[place]
        try:
            moves, decrease = fit_columns(
                block, coupling, pivot.contiguous(), self.row_weights, self.scale, self.bits[place],
                self.outlier_counts[place], stored, codes, outliers, centroids, self.method, descend,
            )  # fmt: skip
        except OverflowError as error:
            position = int((~torch.isfinite(stored).all(1)).nonzero()[0])
            raise outgrown(self.name, columns[position], block[position]) from error
        self.codes[place], self.outlier_mask[place], self.centroids[place] = codes, outliers, centroids
        return moves, decrease

    def pack(self, quantized: Tensor) -> CodebookWeight:
        """What the last sweep or descent stored, which decodes to `quantized`, [N, K]."""
        used = torch.arange(256) < (1 << self.bits.int())[:, None]
        outliers = {}
        if bool(self.outlier_mask.any()):
            outliers = {"outlier_mask": self.outlier_mask.t(), "outlier_weight": quantized}
        return CodebookWeight.pack(
            self.codes.t().contiguous(), self.centroids[used], self.bits, row_scale=self.row_scale, **outliers
        )
