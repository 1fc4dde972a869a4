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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ...config import Between, MethodConfig, Option, options_of
from ...formats import BitmapWeight, CodebookWeight, PackedWeight, Sparse24CodebookWeight, Sparse24Weight
from ...linears import dense_weight
from ...packing import largest_of_groups
from ...structure import require_fp16
from ..ranks import ALONE, Ranks
from ..solver import sparsity as allocation
from ..solver.hessian import HessianFactor, factor_hessian, output_error
from ..solver.sweep import LAZY_COLUMNS, ColumnQuantizer, refine_columns, sweep_columns
from ..statistics.blocks import Chain, Stage
from ..statistics.inputs import InputStatistics, input_norms
from ..statistics.run import CalibrationRun
from ..statistics.sensitivity import trace_per_weight
from .claq import CLAQ, CLAQConfig, CodebookColumns, check_matrix, check_weight, column_plans
from .method import CompressedLinear, Method, Needs

GROUPS = (2, 4, 8)
QUANTIZER_OPTIONS = ("bits", "outliers", "kmeans", "outlier_order_threshold")
"""Settings of `SparseConfig.quantize` that the command line offers beside those of the pruning."""
CHOICE_COLUMNS = LAZY_COLUMNS // 2
"""Columns that are chosen from at once; fewer gain nothing, 32 lose 2 to 14 % (output error of four Linears at 50 %). Half of a
run of the sweep, so that 4096 rows stay below the size from which torch starts its threads."""


@dataclass(frozen=True)
class SparseConfig(MethodConfig):
    """Pruning, alone or together with CLAQ: docs/pruning.md has the formulas and sources."""

    sparsity: Annotated[float | None, Between(0, 0.99)] = None
    """Share of the weights that become 0, 0 to 0.99. With an N:M pattern it follows from that."""
    pattern: str = "unstructured"
    """"unstructured", or "N:M": at most N of M neighbours in a row are kept, M = 2, 4 or 8. "2:4" has its own format."""
    method: Literal["magnitude", "wanda", "sparsegpt", "mixed"] = "mixed"
    """"magnitude", "wanda", "sparsegpt", or "mixed": its criterion, and sparsities by the sensitivity of each matrix."""
    values: Literal["float16", "bfloat16", "float32", "int8"] | None = None
    """What kept weights are stored in: "float16", "bfloat16", "float32" or "int8"; None is the model's dtype."""
    quantize: CLAQConfig | None = None
    """Quantize the kept weights in the same sweep, to codebooks. With "2:4" every column has one width, 2, 3 or 4 bits;
    otherwise one entry of each codebook is the 0 of the pruned weights, and the size is that of the codes. `damping`,
    `block_size` and `true_sequential` are those of this config, columns go from left to right, and `published` is not
    allowed."""
    allocation: Literal["uniform", "fisher", "hutchinson", "owl"] | None = None
    """Which matrices are pruned more: "uniform"; by rank of the sensitivity of the model's loss, "fisher" (first
    derivatives) or "hutchinson" (trace of the Hessian); "owl". None: "fisher" for mixed, else "uniform"; with an N:M
    pattern always "uniform"."""
    level: Literal["matrix", "layer"] = "matrix"
    """Sensitivities are ranked by "matrix" or by "layer"; OWL always goes by layer."""
    spread: Annotated[float, Between(0, 0.5)] = 0.1
    """Half the range of the sparsities, 0.5 with 0.1: 0.4 to 0.6."""
    block_size: Annotated[int, Between(1)] = 128
    """Columns among which a sweep chooses what to prune."""
    damping: Annotated[float, Between(0, 1)] = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""
    refine: Annotated[int, Between(0, 100)] = 1
    """Most cycles of coordinate descent over the kept weights after a sweep; 0 to 100, none with `published`."""
    true_sequential: bool = True
    """Calibrate q/k/v, o, gate/up, down one after the other, each on the outputs of those before."""
    published: bool = False
    """Sweep as the papers do: the same share from every block of `block_size` columns, no refinement."""

    def __post_init__(self) -> None:
        group = self.kept_of
        if group is not None:
            share = 1 - group[0] / group[1]
            if self.sparsity is None:
                object.__setattr__(self, "sparsity", share)
            elif abs(self.sparsity - share) > 1e-9:
                raise ValueError(
                    f"sparsity is {self.sparsity!r}, but the pattern {self.pattern} prunes {share:g}; leave sparsity out"
                )
        elif self.sparsity is None:
            raise ValueError("sparsity is None; allowed: a number, 0 to 0.99, or an N:M pattern")
        super().__post_init__()
        if group is not None and self.allocation not in (None, "uniform"):
            raise ValueError(
                f"allocation is {self.allocation!r}; allowed: None, 'uniform' with the pattern {self.pattern}"
            )
        step = group[1] if group else 8
        if self.block_size % step:
            raise ValueError(f"block_size is {self.block_size}; with {self.pattern} it must be a multiple of {step}")
        if self.quantize is not None and self.quantize.published:
            raise ValueError("quantize has published=True; the released code does not prune, leave it out")
        if self.quantize is not None and self.values is not None:
            raise ValueError(f"values is {self.values!r} and quantize is given; codebooks are fp16, leave values out")
        if self.quantize is not None and self.pattern == "2:4" and self.quantize.code_bits not in (2, 3, 4):
            raise ValueError(
                f"quantize has {self.quantize.code_bits:g} bits for the codes; with the pattern 2:4 it must be 2, 3 or 4"
            )
        if self.allocation is None:
            by_method = "fisher" if self.method == "mixed" and group is None else "uniform"
            object.__setattr__(self, "allocation", by_method)

    @property
    def share(self) -> float:
        """`sparsity` as a number, whether it was given or follows from the pattern."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, None if unstructured."""
        if self.pattern == "unstructured":
            return None
        kept, colon, group = str(self.pattern).partition(":")
        if not (
            colon and kept.isdecimal() and group.isdecimal() and int(group) in GROUPS and 0 < int(kept) < int(group)
        ):
            raise ValueError(
                f"pattern is {self.pattern!r}; allowed: 'unstructured', or 'N:M' with M = 2, 4 or 8 and N from 1 to M - 1"
            )
        return int(kept), int(group)

    @property
    def sweeps(self) -> bool:
        """Does the column sweep run? Magnitude and Wanda alone leave the kept weights as they are."""
        return self.quantize is not None or self.method in ("sparsegpt", "mixed")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        if isinstance(values.get("quantize"), Mapping):
            values = {**values, "quantize": CLAQConfig.from_dict(values["quantize"])}
        return super().from_dict(values)


class Sparse(Method[SparseConfig]):
    """Four words of the command line, each of which fixes `SparseConfig.method`."""

    config_type = SparseConfig
    defaults = {"sparsity": 0.5}

    @classmethod
    def options(cls) -> list[Option]:
        own = options_of(SparseConfig, without=("quantize",), defaults=cls.defaults)
        return own + [option for option in options_of(CLAQConfig) if option.field in QUANTIZER_OPTIONS]

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> SparseConfig:
        settings = {field: value for field, value in given.items() if field not in QUANTIZER_OPTIONS}
        quantizer = {field: value for field, value in given.items() if field in QUANTIZER_OPTIONS}
        if quantizer and "bits" not in quantizer:
            words = ", ".join(f"--{field.replace('_', '-')}" for field in quantizer)
            raise ValueError(f"{words} is about codebooks of the kept weights, which --bits asks for; give --bits too")
        if "pattern" not in settings:
            settings = {**cls.defaults, **settings}
        quantize = CLAQ.from_options(quantizer) if quantizer else None
        return SparseConfig(**settings, quantize=quantize)

    def without_effect(self) -> dict[str, str]:
        config = self.config
        found: dict[str, str] = {}
        if config.allocation == "uniform":
            found |= dict.fromkeys(("level", "spread"), "all matrices are pruned alike, allocation is 'uniform'")
        if config.allocation == "owl":
            found["level"] = "OWL goes by layer"
        if not config.sweeps:
            alone = f"{config.method} alone leaves the kept weights as they are, without a sweep"
            found |= dict.fromkeys(("block_size", "damping", "refine", "published"), alone)
        elif config.published:
            found["refine"] = "the papers' sweep is not refined"
        if not self.needs.calibration:
            found["true_sequential"] = "there is no calibration"
        return found

    @property
    def name(self) -> str:
        return self.config.method

    @property
    def needs(self) -> Needs:
        config = self.config
        gradients = f"allocation={config.allocation!r} takes gradients of the whole model in memory"
        by_weights_alone = config.method == "magnitude" and config.quantize is None and config.allocation == "uniform"
        return Needs(
            calibration=not by_weights_alone,
            sequential=config.true_sequential,
            whole_model=gradients if config.allocation in ("fisher", "hutchinson") else "",
        )

    def summary(self) -> str:
        return f"{self.config.share:.3g} pruned"

    def make_plan(
        self, linears: Mapping[str, nn.Module], chains: Sequence[Chain] = (), run: CalibrationRun | None = None
    ) -> dict[str, Any]:
        """Share of the weights of each Linear to prune."""
        if run is None or self.config.allocation == "uniform" or len(linears) == 1:
            return {"sparsity": dict.fromkeys(linears, self.config.share)}
        return {"sparsity": plan_sparsity(run, self.config, chains)}

    def compress_group(
        self, weights: Mapping[str, Tensor], inputs: InputStatistics, run: CalibrationRun
    ) -> dict[str, CompressedLinear]:
        dtype = next(iter(weights.values())).dtype
        floats = {name: weight.float() for name, weight in weights.items()}
        return prune_linears(floats, inputs.hessian, self.config, self.plan["sparsity"], dtype, run.ranks)

    def pack(self, weight: Tensor) -> PackedWeight:
        pruned = pruning_mask(weight, weight, self.config, self.config.share)
        dtype = weight.dtype if self.config.values is None else getattr(torch, self.config.values)
        return pack_kept(weight.float().masked_fill(pruned, 0), pruned, None, self.config, dtype)


def plan_sparsity(run: CalibrationRun, config: SparseConfig, chains: Sequence[Chain]) -> dict[str, float]:
    """name -> share of the weights to prune, by outliers or sensitivities."""
    stages = [stage for chain in chains for stage in chain.stages if stage.linears]
    linears = {name: module for stage in stages for name, module in stage.linears.items()}
    layer_of = {
        name: name if stage.block is None else str(i) for i, stage in enumerate(stages) for name in stage.linears
    }
    by_layer = config.level == "layer" or config.allocation == "owl"
    unit = layer_of if by_layer else {name: name for name in linears}
    members: dict[str, list[str]] = {}
    for name, key in unit.items():
        members.setdefault(key, []).append(name)
    sizes = {key: sum(dense_weight(linears[name]).numel() for name in names) for key, names in members.items()}
    if config.allocation == "owl":
        outliers = _outlier_shares(run, chains, unit)
        shares = allocation.by_outliers(outliers, sizes, config.share, config.spread)
    else:
        traces = trace_per_weight(run.loop.model, linears, run.batches, str(config.allocation))
        sums = {key: sum(traces[name] for name in names) for key, names in members.items()}
        shares = allocation.by_rank(sums, sizes, config.share, config.spread)
    return {name: shares[key] for name, key in unit.items()}


def _outlier_shares(run: CalibrationRun, chains: Sequence[Chain], unit: Mapping[str, str]) -> dict[str, float]:
    """unit -> share of outliers among its Wanda scores in the dense model."""
    found: dict[str, float] = {}

    def visit(stage: Stage, forward: Callable[[int], Any]) -> None:
        norms = input_norms(run, stage.linears, forward)
        for key in dict.fromkeys(unit[name] for name in stage.linears):
            names = [name for name in stage.linears if unit[name] == key]
            scores = {n: allocation.wanda_scores(dense_weight(stage.linears[n]), norms[n]) for n in names}
            found[key] = allocation.outlier_share(scores)

    for i, chain in enumerate(chains):
        run.loop.walk(chain, visit, hand_on=i + 1 < len(chains))
    run.loop.outputs.clear()
    return found


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
    value_dtype = dtype if config.values is None else getattr(torch, config.values)
    for name, weight in weights.items():
        if config.quantize is not None:
            check_weight(name, weight, hessian, row_scale=config.pattern != "2:4")
            continue
        check_matrix(name, weight, hessian)
        if value_dtype == torch.float16:  # before a sweep rounds to it
            require_fp16(f"the weight of {name!r}", weight, "set values to 'bfloat16', 'float32' or 'int8'")
    started = time.perf_counter()
    factor, plans = None, {}
    if config.sweeps:
        factor = factor_hessian(hessian, config.damping, act_order=False)
        if config.quantize is not None:
            plans = column_plans(weights, factor.order, config.quantize)
    shared_seconds = (time.perf_counter() - started) / len(weights)

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
        return ~largest_of_groups(scores, *config.kept_of)
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
                self.pruned[column:end] = ~largest_of_groups(scores.t(), *self.kept_of).t()
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
            return self.codebooks.column(column, column, values, self.pruned[column])
        # What is optimised is what is stored; int8 is rounded by row at the end.
        rounded = values.to(self.dtype).float() if self.dtype.is_floating_point else values
        return rounded.masked_fill(self.pruned[column], 0)
