"""Low rank: each Linear becomes two thin ones, by the projection of its outputs that the model's loss minds least.

For y = W x with C the covariance of x and omega the row weights of the loss, the best W' of rank r is

    [U, s] = eigenvectors and roots of the eigenvalues of Omega^1/2 W C W^T Omega^1/2
    W' = Omega^-1/2 U_r U_r^T Omega^1/2 W,    what it loses = sum of s_i^2 over i > r

SVD-LLM (arXiv 2403.07378), DRONE, AFM and Bolaco (2405.10616) are this solver with other C and omega. Means are left to the bias,
and W is the target that makes up for the layers before (docs/accuracy.md). All ranks are bought at one price: what a direction
loses, on the scale of the model's own loss, for each number that it stores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ...config import Between, MethodConfig
from ...formats import LowRankWeight, PackedWeight
from ...linears import dense_weight, is_transposed_linear
from ..calibration import given_to_model
from ..objective import mismatch
from ..ranks import Ranks
from ..solver.bayesian import bayesian_minimum
from ..solver.hessian import as_matrix, centre_, factor_hessian, output_error
from ..solver.price import buy
from ..statistics.blocks import Chain, Stage
from ..statistics.inputs import Group, InputStatistics, visit_groups
from ..statistics.run import CalibrationRun
from .claq import check_weight
from .column_codebook import ColumnCodebookConfig, compress_linears, mean_output, ridge_target
from .method import CompressedLinear, Method, Needs

UNIT = 8
"""Ranks are multiples of it: rows of eight fill a vector register, and codes of any width whole bytes."""
WHOLE = 0
"""In the place of a rank: the Linear is not split. From NK / (N + K) on, two factors hold more numbers than it does."""

EVALUATIONS = 20
RANDOM = 6
"""Of them, before the Gaussian process is asked."""
REACH = 2.0
"""Multipliers are searched between 2^-REACH and 2^REACH."""
JUDGED = 8
"""Batches, at most, by which an evaluation is judged."""


@dataclass(frozen=True)
class LowRankConfig(MethodConfig):
    """Low rank: each Linear becomes two thin ones, the ranks bought at one price by what the model's loss minds."""

    keep: Annotated[float, Between(0.05, 1)] = 0.6
    """Share of the parameters of the chosen Linears that stays, 0.05 to 1."""
    allocation: Literal["price", "uniform", "search"] = "price"
    """Who gets which rank: "price", one price for all on the scale of the loss; "uniform", the same share of each; "search",
    Bayesian optimisation of the price of each type of Linear, at most 20 evaluations of the whole model, kept where it beats
    the price."""
    bits: Annotated[float | None, Between(1.1, 8)] = None
    """True bits of each number that stays, 1.1 to 8: the factors are packed as codebooks; None: they stay dense."""
    guidance: Literal["none", "rows"] = "rows"
    """Weigh rows by the gradient of the model's loss; "none" weighs all alike."""
    correct_bias: bool = True
    """Where the Linear has a bias, let it take up the mean error, and weigh the rest by the input's covariance."""
    propagation: Annotated[float, Between(0, 1)] = 1.0
    """Share of the earlier Linears' error that a Linear's target makes up for, 0 to 1."""
    damping: Annotated[float, Between(0, 1)] = 0.05
    """Of that target: share of the Hessian's mean diagonal added to its diagonal."""
    true_sequential: bool = True
    """Calibrate q/k/v, o, gate/up, down one after the other, each on the outputs of those before."""


class LowRank(Method[LowRankConfig]):
    config_type = LowRankConfig

    def without_effect(self) -> dict[str, str]:
        return {} if self.config.propagation else {"damping": "propagation is 0, so no target needs it"}

    @property
    def needs(self) -> Needs:
        config = self.config
        guided = config.guidance != "none" or config.allocation != "uniform"
        search = "allocation='search' runs the whole model for each of its evaluations"
        return Needs(
            sequential=config.true_sequential,
            covariance=True,
            dense_block=config.propagation > 0,
            loss_gradients="rows" if guided else "none",
            whole_model=search if config.allocation == "search" else "",
        )

    def summary(self) -> str:
        bits = "" if self.config.bits is None else f" at {self.config.bits:.3g} bits"
        return f"{100 * self.config.keep:.3g} % of the parameters{bits}"

    def make_plan(
        self, linears: Mapping[str, nn.Module], chains: Sequence[Chain] = (), run: CalibrationRun | None = None
    ) -> dict[str, Any]:
        """The rank of each Linear, and the bytes of all."""
        shapes = {name: _shape(module) for name, module in linears.items()}
        ranks = {name: uniform_rank(shape, self.config.keep) for name, shape in shapes.items()}
        if run is not None and self.config.allocation != "uniform":
            ranks |= _priced(run, chains, linears, self.config)
        if not any(ranks.values()):
            raise ValueError(
                f"keep is {self.config.keep:g}, and no Linear has fewer numbers as two factors of a rank that is a multiple of "
                f"{UNIT}; ask for less, or leave the model as it is"
            )
        nbytes = 0.0
        for name, (n, k) in shapes.items():
            numbers = ranks[name] * (n + k) or n * k
            nbytes += numbers * (
                dense_weight(linears[name]).element_size() if self.config.bits is None else self.config.bits / 8
            )
        return {"ranks": ranks, "bytes": round(nbytes)}

    def planned_bytes(self) -> int:
        return int(self.plan["bytes"])

    def compress_group(
        self, weights: Mapping[str, Tensor], inputs: InputStatistics, run: CalibrationRun
    ) -> dict[str, CompressedLinear]:
        ranks = {name: self.plan["ranks"][name] for name in weights}
        row_weights = run.gradients.row_weights if self.config.guidance == "rows" else {}
        return split_linears(weights, inputs, ranks, self.config, row_weights, run.ranks)


def _shape(module: nn.Module) -> tuple[int, int]:
    n, k = dense_weight(module).shape
    return int(n), int(k)


# ---- one Linear -------------------------------------------------------------------------------------------------------


def output_basis(
    weight: Tensor, covariance: Tensor, row_weights: Tensor, root: Callable[[], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Directions of the weighted outputs, by falling size.

    Args:
        weight: float64 [N, K].
        covariance: float64 [K, K], of the input.
        row_weights: float64 [N] > 0.
        root: gives R with covariance = R R^T, for where there are fewer inputs than outputs; None makes it.

    Returns:
        (orthonormal columns float64 [N, R], their squared outputs [R]), R = min(N, K).
    """
    weighted = row_weights.sqrt()[:, None] * weight
    n, k = weight.shape
    if n <= k:
        squares, basis = torch.linalg.eigh(weighted @ covariance @ weighted.t())
        return basis.flip(1), squares.flip(0).clamp_min(0)
    reduced = weighted @ (square_root(covariance) if root is None else root())
    squares, right = torch.linalg.eigh(reduced.t() @ reduced)
    # Directions of no output have no image of their own; QR gives them any that is orthogonal.
    basis, _ = torch.linalg.qr(reduced @ right.flip(1))
    return basis, squares.flip(0).clamp_min(0)


def square_root(covariance: Tensor) -> Tensor:
    """R [K, K] with covariance = R R^T; the covariance may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def factors(weight: Tensor, basis: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(inner [r, K], outer [N, r]) of the projection onto the basis [N, r]."""
    root = row_weights.sqrt()[:, None]
    return basis.t() @ (root * weight), basis / root


def split_linears(
    weights: Mapping[str, Tensor],
    inputs: InputStatistics,
    ranks: Mapping[str, int],
    config: LowRankConfig,
    row_weights: Mapping[str, Tensor],
    processes: Ranks,
) -> dict[str, CompressedLinear]:
    """The Linears of one input that `ranks` splits, as two factors each; with `config.bits` the others too, packed whole.

    Args:
        weights: name -> float [N_i, K].
        inputs: statistics of the input, used up.
        ranks: name -> rank, or WHOLE.
        row_weights: name -> float [N_i] > 0; those that are not named: 1 everywhere.
    """
    hessian = inputs.take_hessian().cpu()
    for name, weight in weights.items():
        check_weight(name, weight, hessian, row_scale=True)
    dense = {name: weight.detach().cpu() for name, weight in weights.items()}
    done: dict[str, CompressedLinear] = {}
    if config.bits is not None and (whole := {name: dense[name] for name in dense if ranks[name] == WHOLE}):
        found = replace(inputs, hessian=hessian.clone())
        nbytes = config.bits * sum(weight.numel() for weight in whole.values()) / 8
        done |= compress_linears(whole, found, nbytes, _codes(config), row_weights, processes)
    started = time.perf_counter()
    mean = inputs.mean.cpu() if inputs.mean is not None and config.correct_bias else None
    if mean is not None:
        centre_(hessian, mean)
    factor = factor_hessian(hessian, config.damping)
    covariance = hessian.double()
    known: list[Tensor] = []

    def root() -> Tensor:
        if not known:
            known.append(square_root(covariance))
        return known[0]

    shared = (time.perf_counter() - started) / len(weights)
    split = {name: weight for name, weight in dense.items() if ranks[name] != WHOLE}
    mine = {}
    for name, weight in processes.mine(split).items():
        started = time.perf_counter()
        target = as_matrix(
            ridge_target(weight, inputs.targets.get(name), mean, factor, config.propagation), factor.order
        )
        omega = (
            row_weights[name].cpu().double() if name in row_weights else torch.ones(len(weight), dtype=torch.float64)
        )
        basis, _ = output_basis(target.double(), covariance, omega, root)
        inner, outer = factors(target.double(), basis[:, : ranks[name]], omega)
        packed, product = _packed(name, target, inner, outer, hessian, omega, config, weight.dtype)
        bias_change = None
        if mean is not None:
            bias_change = mean_output(weight, product, mean)
            if name in inputs.targets:
                bias_change += inputs.targets[name].mean.cpu()
        error = output_error(target, product, hessian)
        seconds = time.perf_counter() - started + shared
        mine[name] = CompressedLinear(packed, error, seconds, packed.bits_per_weight, bias_change)
    done |= processes.merge(mine, list(split))
    return {name: done[name] for name in weights if name in done}


def _codes(config: LowRankConfig) -> ColumnCodebookConfig:
    """Of what is packed as codebooks."""
    assert config.bits is not None
    return ColumnCodebookConfig(
        config.bits, correct_bias=config.correct_bias, propagation=config.propagation, damping=config.damping
    )


def _packed(
    name: str,
    target: Tensor,
    inner: Tensor,
    outer: Tensor,
    hessian: Tensor,
    omega: Tensor,
    config: LowRankConfig,
    dtype: torch.dtype,
) -> tuple[LowRankWeight, Tensor]:
    """The factors as they are stored, and their product, float32 [N, K]."""
    if config.bits is None:
        stored = inner.to(dtype).contiguous(), outer.to(dtype).contiguous()
        return LowRankWeight.of(*stored), stored[1].float() @ stored[0].float()

    def pack(factor: Tensor, hessian: Tensor, rows: Tensor) -> PackedWeight:
        assert config.bits is not None
        inputs = InputStatistics(hessian.clone())
        done = compress_linears(
            {name: factor.float()}, inputs, config.bits * factor.numel() / 8, _codes(config), {name: rows.float()}
        )
        weight = done[name].weight
        assert isinstance(weight, PackedWeight)
        return weight

    # The columns of Omega^1/2 outer are orthonormal: an error of any row of inner costs the same.
    packed_inner = pack(inner, hessian, torch.ones(len(inner)))
    decoded = packed_inner.dequantize().double()
    between = decoded @ hessian.double() @ decoded.t()
    # What inner lost, outer makes up for as well as it can.
    ridge = torch.eye(len(between), dtype=torch.float64) * (1e-6 * between.diagonal().mean())
    outer = torch.linalg.solve(between + ridge, decoded @ hessian.double() @ target.double().t()).t()
    packed_outer = pack(outer, between.float(), omega)
    return LowRankWeight.of(packed_inner, packed_outer), packed_outer.dequantize() @ packed_inner.dequantize()


# ---- ranks of all Linears ---------------------------------------------------------------------------------------------


def uniform_rank(shape: tuple[int, int], keep: float) -> int:
    """The largest rank at which a Linear [N, K] keeps at most `keep` of its numbers, but one unit; WHOLE where that saves none."""
    n, k = shape
    rank = max(UNIT, math.floor(keep * n * k / (n + k) / UNIT) * UNIT)
    return rank if rank * (n + k) < n * k and keep < 1 else WHOLE


def price_ranks(losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], keep: float) -> dict[str, int]:
    """name -> rank, for the least loss in all with at most `keep` of the numbers.

    Everything is bought at one price: a unit of ranks, or a whole Linear in the place of its factors.

    Args:
        losses: name -> what each direction loses where it is left out, falling, float64 [min(N, K)], in one unit for all.
        shapes: name -> (N, K).
    """
    numbers = sum(n * k for n, k in shapes.values())
    options = {name: _options(losses[name], shape) for name, shape in shapes.items()}
    chosen = buy({name: (cost, loss) for name, (_, cost, loss) in options.items()}, keep * numbers)
    if chosen is None:
        least = sum(float(cost.min()) for _, cost, _ in options.values())
        raise ValueError(
            f"keep is {keep:g}, but a rank of {UNIT} in every Linear already takes {least / numbers:.3g} of the parameters; "
            "ask for more"
        )
    return {name: int(options[name][0][at]) for name, at in chosen.items()}


def _options(loss: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """What a Linear may become: (ranks, the numbers that each stores, what each loses)."""
    n, k = shape
    ranks = torch.tensor([rank for rank in range(UNIT, min(n, k), UNIT) if rank * (n + k) < n * k] + [WHOLE])
    left = torch.cat([loss.flip(0).cumsum(0).flip(0), loss.new_zeros(1)])
    lost = left[ranks].where(ranks != WHOLE, 0.0)
    return ranks, (ranks * (n + k)).where(ranks != WHOLE, n * k).double(), lost


@dataclass
class _Spectrum:
    """What is known of a dense Linear before the first block."""

    losses: Tensor
    """Of each direction, float64 [min(N, K)], on the scale of the model's loss."""
    basis: Tensor | None = None
    """float32 [N, min(N, K)], for the search alone."""
    mean: Tensor | None = None


def _priced(
    run: CalibrationRun, chains: Sequence[Chain], linears: Mapping[str, nn.Module], config: LowRankConfig
) -> dict[str, int]:
    """Ranks of the Linears that the loss has a gradient at; of the others nothing can be compared."""
    gradients = run.gradients
    known = _spectra(run, chains, config, keep_basis=config.allocation == "search")
    known = {name: spectrum for name, spectrum in known.items() if name in gradients.scales}
    if not known:
        return {}
    shapes = {name: _shape(linears[name]) for name in known}
    losses = {name: spectrum.losses for name, spectrum in known.items()}
    if config.allocation == "search":
        return _searched(run, {name: linears[name] for name in known}, known, shapes, config)
    return price_ranks(losses, shapes, config.keep)


def _spectra(
    run: CalibrationRun, chains: Sequence[Chain], config: LowRankConfig, keep_basis: bool
) -> dict[str, _Spectrum]:
    """Of each Linear in the dense model."""
    found: dict[str, _Spectrum] = {}

    def see(group: Group, inputs: InputStatistics) -> None:
        covariance = inputs.take_hessian().cpu().double()
        mean = inputs.mean.cpu() if inputs.mean is not None and config.correct_bias else None
        if mean is not None:
            covariance.addr_(mean.double(), mean.double(), alpha=-1)
        mine = {}
        for name, weight in run.ranks.mine({name: dense_weight(module) for name, module in group.items()}).items():
            omega = _row_weights(run, name, len(weight), config)
            basis, squares = output_basis(weight.cpu().double(), covariance, omega)
            losses = squares * run.gradients.scales.get(name, 0.0)
            mine[name] = _Spectrum(losses, basis.float(), mean) if keep_basis else _Spectrum(losses)
        found.update(run.ranks.merge(mine, list(group)))

    at_once = replace(run, sequential=False)  # nothing changes, so each block runs once
    for i, chain in enumerate(chains):

        def visit(stage: Stage, forward: Callable[[int], Any]) -> None:
            visit_groups(at_once, stage, forward, see)

        run.loop.walk(chain, visit, hand_on=i + 1 < len(chains))
    run.loop.outputs.clear()
    return found


def _row_weights(run: CalibrationRun, name: str, rows: int, config: LowRankConfig) -> Tensor:
    if config.guidance == "rows" and name in run.gradients.row_weights:
        return run.gradients.row_weights[name].cpu().double()
    return torch.ones(rows, dtype=torch.float64)


# ---- Bayesian optimisation ----------------------------------------------------------------------------------------------


def _searched(
    run: CalibrationRun,
    linears: Mapping[str, nn.Module],
    known: Mapping[str, _Spectrum],
    shapes: Mapping[str, tuple[int, int]],
    config: LowRankConfig,
) -> dict[str, int]:
    """Bolaco's search (arXiv 2405.10616, section 3.3), over what a loss in each type of Linear weighs: 1 for all is the price."""
    types = {name: ".".join(part for part in name.split(".") if not part.isdigit()) for name in linears}
    kinds = list(dict.fromkeys(types.values()))
    batches = list(run.batches)[:: -(-len(run.batches) // JUDGED)]
    tried: list[dict[str, int]] = []

    def damage(point: Tensor) -> float:
        weigh = dict(zip(kinds, point.exp2().tolist(), strict=True))
        losses = {name: spectrum.losses * weigh[types[name]] for name, spectrum in known.items()}
        tried.append(price_ranks(losses, shapes, config.keep))
        return judge(tried[-1])

    with torch.no_grad():
        wanted = [run.loop.model(**given_to_model(batch, run.loop.model)) for batch in batches]

    def judge(ranks: Mapping[str, int]) -> float:
        with _projected(run, linears, known, ranks, config), torch.no_grad():
            found = [
                float(mismatch(run.loop.model, run.loop.model(**given_to_model(batch, run.loop.model)), output, batch))
                for batch, output in zip(batches, wanted, strict=True)
            ]
        return sum(found) / len(found)

    best, _ = bayesian_minimum(damage, len(kinds), REACH, EVALUATIONS, RANDOM)
    return tried[best]


@contextmanager
def _projected(
    run: CalibrationRun,
    linears: Mapping[str, nn.Module],
    known: Mapping[str, _Spectrum],
    ranks: Mapping[str, int],
    config: LowRankConfig,
) -> Iterator[None]:
    """The Linears have these ranks, each by its dense inputs."""
    before = {name: [(p, p.data) for p in module.parameters(recurse=False)] for name, module in linears.items()}
    try:
        for name, module in linears.items():
            basis, mean = known[name].basis, known[name].mean
            if ranks[name] == WHOLE:
                continue
            assert basis is not None
            weight = dense_weight(module)
            omega = _row_weights(run, name, len(weight), config).float()
            inner, outer = factors(weight.cpu().float(), basis[:, : ranks[name]], omega)
            product = (outer @ inner).to(weight)
            if mean is not None:
                bias = module.bias
                assert isinstance(bias, Tensor)
                bias.data = bias.data + mean_output(weight.cpu(), product.cpu(), mean).to(bias.data)
            assert isinstance(module.weight, Tensor)
            module.weight.data = product.t() if is_transposed_linear(module) else product
        yield
    finally:
        for tensors in before.values():
            for parameter, data in tensors:
                parameter.data = data
