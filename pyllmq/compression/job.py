"""One compression: how much each Linear may take, then block after block its Linears, group by group of one input."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import CLAQConfig, ColumnCodebookConfig, SparseConfig
from ..formats import layer_type
from ..linears import dense_weight, replace_module
from . import allocate, claq, columns, densities
from .blocks import BlockLoop, Chain, Stage
from .calibration import Batch
from .drift import Drift, Enough, watch
from .guide import Guidance
from .memory import return_freed
from .pruning import prune_linears
from .ranks import Ranks
from .report import CompressionReport, LayerReport
from .sensitivity import trace_per_weight

TOKENS = 1024
"""That are added to a Hessian at a time: with 512 it is read and written so often that it costs an eighth more."""

Visit = Callable[[dict[str, nn.Module], columns.InputStatistics], None]
Config = CLAQConfig | ColumnCodebookConfig | SparseConfig


@dataclass
class Job:
    """What stays the same during one compression, and how far it has come."""

    loop: BlockLoop
    config: Config
    report: CompressionReport
    bar: tqdm
    ranks: Ranks = field(default_factory=Ranks)
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    """name -> the dense Linear in whose place a packed layer is."""
    budgets: dict[str, float] = field(default_factory=dict)
    """name -> bytes, for a method whose target is the true size."""
    sparsity: dict[str, float] = field(default_factory=dict)
    """name -> share of the weights to prune."""
    guidance: Guidance = field(default_factory=Guidance)
    left_over: float = 0.0
    """Bytes that the groups done so far were given and did not use."""
    visit: Visit | None = None
    """What is done with each group of Linears that share an input, before anything after them is run; None compresses them."""

    @property
    def with_twin(self) -> bool:
        """Does the method ask what the dense model has where the damage is?"""
        return isinstance(self.config, ColumnCodebookConfig) and self.config.propagation > 0

    @property
    def model(self) -> nn.Module:
        return self.loop.model

    @property
    def batches(self) -> Sequence[Batch]:
        return self.loop.batches

    def compress_stage(self, stage: Stage, run: Callable[[int], Any]) -> None:
        """Group the Linears of a stage by their input, take the statistics of each input, compress them."""
        if not stage.linears:
            return
        visit = self.visit or self.compress_group
        groups, repeated = _group_by_input(self, stage, run)
        if self.config.true_sequential:
            for group in groups:
                (inputs,) = _input_statistics(self, [group], repeated, run)
                self._make_room(stage)
                visit(group, inputs)
        else:
            for group, inputs in zip(groups, _input_statistics(self, groups, repeated, run), strict=True):
                self._make_room(stage)
                visit(group, inputs)
        reached = {name for group in groups for name in group}
        for name, module in stage.linears.items():
            if name not in reached:
                warn(
                    self.report,
                    f"{name} was never run by the calibration data; it is compressed by its weights alone",
                )
                visit({name: module}, columns.InputStatistics(torch.eye(dense_weight(module).shape[1])))

    def _make_room(self, stage: Stage) -> None:
        """While Linears are compressed, nothing runs."""
        self.loop.weights.rest(stage.name)
        return_freed()

    def compress_group(self, group: dict[str, nn.Module], inputs: columns.InputStatistics) -> None:
        """Put packed layers in the place of Linears that share an input."""
        weights = {name: dense_weight(module) for name, module in group.items()}
        config = self.config
        if isinstance(config, CLAQConfig):
            compressed = claq.compress_linears(_floats(weights), inputs.hessian, config, self.ranks)
        elif isinstance(config, SparseConfig):
            dtype = dense_weight(next(iter(group.values()))).dtype
            compressed = prune_linears(_floats(weights), inputs.hessian, config, self.sparsity, dtype, self.ranks)
        else:
            budget = sum(self.budgets[name] for name in group) + self.left_over
            row_weights = self.guidance.row_weights
            compressed = columns.compress_linears(weights, inputs, budget, config, row_weights, self.ranks)
            self.left_over = budget - sum(done.weight.nbytes for done in compressed.values())
        for name, done in compressed.items():
            module = group[name]
            dense = dense_weight(module)
            bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
            if bias is not None and done.bias_change is not None:
                bias = bias + done.bias_change.to(bias)
            layer = layer_type(done.weight.kind).from_weight(done.weight.to(dense.device), bias, dense.dtype)
            self.replaced[name] = module
            replace_module(self.model, name, layer)
            self.report.layers.append(
                LayerReport(
                    name=name,
                    out_features=layer.out_features,
                    in_features=layer.in_features,
                    bits_per_weight=layer.bits_per_weight,
                    paper_bits=done.paper_bits,
                    nbytes=layer.nbytes,
                    dense_nbytes=dense.numel() * dense.element_size(),
                    error=done.error,
                    seconds=done.seconds,
                    pruned=done.pruned,
                )
            )
            self.bar.set_postfix_str(f"{name} error {done.error:.5f}", refresh=False)
            self.bar.update()


def _floats(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.float() for name, weight in weights.items()}


# ---- how much each Linear may take ------------------------------------------------------------------------------------


def byte_budgets(linears: Mapping[str, nn.Module], config: ColumnCodebookConfig) -> dict[str, float]:
    """name -> bytes."""
    shapes = {
        name: (int(w.shape[0]), int(w.shape[1])) for name, w in ((n, dense_weight(m)) for n, m in linears.items())
    }
    weights = sum(rows * columns for rows, columns in shapes.values())
    return allocate.share_out(shapes, config.bits * weights / 8, config.row_scale)


def plan_sparsity(job: Job, config: SparseConfig, chains: Sequence[Chain]) -> dict[str, float]:
    """name -> share of the weights to prune."""
    stages = [stage for chain in chains for stage in chain.stages if stage.linears]
    linears = {name: module for stage in stages for name, module in stage.linears.items()}
    layer_of = {
        name: name if stage.block is None else str(i) for i, stage in enumerate(stages) for name in stage.linears
    }
    if config.allocation == "uniform" or len(linears) == 1:
        return dict.fromkeys(linears, config.share)
    by_layer = config.level == "layer" or config.allocation == "owl"
    unit = layer_of if by_layer else {name: name for name in linears}
    members: dict[str, list[str]] = {}
    for name, key in unit.items():
        members.setdefault(key, []).append(name)
    sizes = {key: sum(dense_weight(linears[name]).numel() for name in names) for key, names in members.items()}
    if config.allocation == "owl":
        outliers = _outlier_shares(job, chains, unit)
        shares = densities.by_outliers(outliers, sizes, config.share, config.spread)
    else:
        traces = trace_per_weight(job.model, linears, job.batches, str(config.allocation))
        sums = {key: sum(traces[name] for name in names) for key, names in members.items()}
        shares = densities.by_rank(sums, sizes, config.share, config.spread)
    return {name: shares[key] for name, key in unit.items()}


def _outlier_shares(job: Job, chains: Sequence[Chain], unit: Mapping[str, str]) -> dict[str, float]:
    """unit -> share of outliers among its Wanda scores in the dense model."""
    found: dict[str, float] = {}

    def visit(stage: Stage, run: Callable[[int], Any]) -> None:
        norms = _input_norms(job, stage.linears, run)
        for key in dict.fromkeys(unit[name] for name in stage.linears):
            names = [name for name in stage.linears if unit[name] == key]
            weights = {name: dense_weight(stage.linears[name]) for name in names}
            found[key] = densities.outlier_share({n: densities.wanda_scores(w, norms[n]) for n, w in weights.items()})

    for i, chain in enumerate(chains):
        job.loop.walk(chain, visit, hand_on=i + 1 < len(chains))
    job.loop.outputs.clear()
    return found


def _input_norms(job: Job, linears: Mapping[str, nn.Module], run: Callable[[int], Any]) -> dict[str, Tensor]:
    """name -> |X_j| over the calibration tokens, float32 [K]; 0 for a Linear that never runs."""
    sums = {name: torch.zeros_like(dense_weight(module)[0], dtype=torch.float32) for name, module in linears.items()}
    current = 0

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for x in _real_tokens(args[0], job.batches[current], name).split(TOKENS):
                sums[name] += x.float().square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(recorder(name)) for name, module in linears.items()]
    try:
        for current in range(len(job.batches)):  # noqa: B007  (read by the hooks)
            run(current)
    finally:
        for handle in handles:
            handle.remove()
    return {name: job.ranks.sum_(total).sqrt() for name, total in sums.items()}


def _real_tokens(x: Tensor, batch: Batch, name: str) -> Tensor:
    """The input of a Linear without padding, [tokens, K]."""
    x = x.detach()
    mask = _token_mask(batch, name)
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        x = x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _by_tokens(x: Tensor, shares: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(float32 [T, K], weights [T, 1]) of some tokens at a time: 2048 of them are 0.09 GB at K = 11008."""
    parts = x.split(TOKENS)
    if shares is None:
        return ((part.float(), None) for part in parts)
    return ((part.float(), s) for part, s in zip(parts, shares.reshape(-1, 1).split(TOKENS), strict=True))


# ---- the inputs of a stage -------------------------------------------------------------------------------------------


def _group_by_input(job: Job, stage: Stage, run: Callable[[int], Any]) -> tuple[list[dict[str, nn.Module]], set[str]]:
    """The stage's Linears in the order in which they run, those that are given the very same tensor in one group.

    And the names of those that run more than once.
    """
    groups: list[tuple[Tensor, int, dict[str, nn.Module]]] = []
    seen: set[str] = set()
    of_batch: Counter[str] = Counter()
    repeated: set[str] = set()

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            of_batch[name] += 1
            if of_batch[name] > 1:
                repeated.add(name)
            if name in seen:
                return
            seen.add(name)
            x = args[0]
            # The list keeps every input alive, so that no address is used twice.
            for tensor, version, members in groups:
                if tensor.data_ptr() == x.data_ptr() and tensor.shape == x.shape and version == x._version:
                    members[name] = module
                    return
            groups.append((x, x._version, {name: module}))

        return hook

    handles = [module.register_forward_pre_hook(recorder(name)) for name, module in stage.linears.items()]
    try:
        for index in range(len(job.batches)):
            of_batch.clear()
            run(index)
            if len(seen) == len(stage.linears):
                break
    finally:
        for handle in handles:
            handle.remove()
    # Other processes may have reached experts that this one's text did not.
    found: list[dict[str, nn.Module]] = []
    taken: set[str] = set()
    for names in itertools.chain(*job.ranks.gather([list(members) for _, _, members in groups])):
        new = [name for name in names if name not in taken]
        taken.update(new)
        if new:
            found.append({name: stage.linears[name] for name in new})
    return found, repeated


def _input_statistics(
    job: Job, groups: list[dict[str, nn.Module]], repeated: set[str], run: Callable[[int], Any]
) -> list[columns.InputStatistics]:
    """H, fp32 [K, K], a sum of x x^T over the calibration tokens, and their mean, for the common input of each group; with a
    twin also how far the outputs have drifted.

    A run ends where all is known: nothing of a block runs behind q, k and v for their sake. `repeated` say more than once.
    """
    once = repeated.isdisjoint(name for group in groups for name in group)
    sums = [torch.zeros(0)] * len(groups)
    totals = [torch.zeros(0)] * len(groups)
    counts = torch.zeros(len(groups), dtype=torch.float64)
    for i, group in enumerate(groups):
        weight = dense_weight(next(iter(group.values())))
        totals[i] = torch.zeros(weight.shape[1], device=weight.device)
        sums[i] = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    drifts = _Drifts(job, groups, once)
    seen: dict[int, tuple[Tensor, Tensor | None]] = {}
    current = 0
    return_freed()

    def end_where_known() -> None:
        if once and len(seen) == len(groups) and drifts.known():
            raise Enough

    def recorder(i: int) -> Callable[..., None]:
        name = next(iter(groups[i]))

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            batch = job.batches[current]
            tokens = _real_tokens(args[0], batch, name)
            s = _token_weights(job, name, current, args[0].shape[:-1])
            # An expert may be sent other tokens than in the dense model.
            if s is not None and s.numel() != len(tokens):
                s = None
            for x, share in _by_tokens(tokens, s):
                weighted = x if share is None else x * share
                # Added in the product: a second [K, K] is 0.5 GB at K = 11008.
                sums[i].addmm_(weighted.T, x)
                totals[i].add_(weighted.sum(0))
            counts[i] += len(tokens) if s is None else float(s.sum())
            seen[i] = tokens, s
            end_where_known()

        return hook

    handles = [next(iter(group.values())).register_forward_pre_hook(recorder(i)) for i, group in enumerate(groups)]
    try:
        with drifts.watched(end_where_known):
            for current in range(len(job.batches)):
                seen.clear()
                with suppress(Enough):
                    run(current)
                drifts.add(current, seen)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for i, (products, total, count) in enumerate(zip(sums, totals, job.ranks.sum_(counts).tolist(), strict=True)):
        if count == 0:
            raise ValueError(
                f"the calibration data reaches {next(iter(groups[i]))} with no token; is the attention_mask all zero?"
            )
        job.ranks.sum_(products)
        job.ranks.sum_(total)
        biased = all(isinstance(module.bias, Tensor) for module in groups[i].values())
        # The published methods know 2/n sum x x^T; the covariance needs the plain mean.
        if not isinstance(job.config, ColumnCodebookConfig):
            found.append(columns.InputStatistics(products.mul_(2.0 / count)))
            continue
        mean = total.div_(count) if biased and job.config.correct_bias else None
        found.append(columns.InputStatistics(products.div_(count), mean, drifts.of(groups[i], count)))
    return found


class _Drifts:
    """Collects, for the Linears of some groups, what the twin has at their places beyond what the block has."""

    def __init__(self, job: Job, groups: list[dict[str, nn.Module]], once: bool) -> None:
        self.job, self.twin, self.once = job, job.loop.twin, once
        self.members = [(i, name) for i, group in enumerate(groups) for name in group] if self.twin else []
        self.had: dict[str, Tensor] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        """name -> those of e x^T and of e."""
        for i, name in self.members:
            weight = dense_weight(groups[i][name])
            mean = torch.zeros(len(weight), device=weight.device)
            self.sums[name] = torch.zeros_like(weight, dtype=torch.float32), mean

    def watched(self, then: Callable[[], None]) -> AbstractContextManager[Any]:
        places = {name: self.twin.places_in_block[name] for _, name in self.members} if self.twin else {}
        return watch(places, self.had, then=then)

    def known(self) -> bool:
        return len(self.had) == len(self.members)

    def add(self, current: int, seen: Mapping[int, tuple[Tensor, Tensor | None]]) -> None:
        """`seen`: for each group its real tokens in the batch of index `current`, and their weights."""
        if self.twin is None:
            return
        wanted = self.twin.look([name for _, name in self.members], current, self.once)
        for i, name in self.members:
            # An expert is sent other tokens than in the dense model: nothing to compare.
            if i not in seen or name not in self.had or name not in wanted or wanted[name].dim() != 3:
                continue
            tokens, s = seen[i]
            missing = _real_tokens(wanted.pop(name) - self.had.pop(name), self.job.batches[current], name)
            if len(missing) == len(tokens):
                products, mean = self.sums[name]
                for (x, share), e in zip(_by_tokens(tokens, s), missing.split(TOKENS), strict=True):
                    e = e.float() if share is None else e * share
                    products.addmm_(e.T, x)
                    mean.add_(e.sum(0))
        self.had.clear()

    def of(self, group: Mapping[str, nn.Module], count: float) -> dict[str, Drift]:
        """The means over `count` tokens."""
        found = {name: self.sums[name] for name in group if name in self.sums}
        return {
            name: Drift(*(self.job.ranks.sum_(total).div_(count) for total in sums)) for name, sums in found.items()
        }


def _token_weights(job: Job, name: str, current: int, shape: torch.Size) -> Tensor | None:
    """What the tokens of `_real_tokens` count in the statistics; None: all alike."""
    if name not in job.guidance.token_weights:
        return None
    weights = job.guidance.token_weights[name][current]
    mask = _token_mask(job.batches[current], name)
    return weights if mask is None or mask.shape != shape else weights[mask.bool()]


def _token_mask(batch: Batch, name: str) -> Tensor | None:
    """Which tokens of a Linear's input are real, [B, L].

    In a decoder that has ids of its own it is their mask; where those are as long as the encoder's, cross attention's view of
    the encoder is then taken whole, padding included: better some padding than real tokens lost.
    """
    mask = batch.get("attention_mask")
    decoder_ids = batch.get("decoder_input_ids")
    if decoder_ids is None or "decoder" not in name or (mask is not None and mask.shape != decoder_ids.shape):
        return mask
    return batch.get("decoder_attention_mask")


def warn(report: CompressionReport, message: str) -> None:
    report.warnings.append(message)
    warnings.warn(message, stacklevel=4)
