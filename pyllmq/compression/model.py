"""Whole-model compression: block after block, each on the inputs that the already compressed blocks before it produce."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import CLAQConfig, ColumnCodebookConfig, SparseConfig
from ..nn import LAYER_OF_KIND
from ..swap import (
    DEFAULT_EXCLUDE,
    dense_weight,
    left_dense,
    linear_modules,
    replace_module,
    select_linears,
    tied_weights,
)
from . import allocate, claq, columns, densities
from .blocks import Stage, find_chains, find_stages, record_chain, run_call
from .calibration import Batch, as_batches
from .drift import DenseTwin, Drift, watch
from .guide import Guidance, output_gradients
from .pruning import prune_linears
from .report import CompressionReport, LayerReport, summary
from .sensitivity import trace_per_weight
from .tune import tune_codebooks

SILENT_SHARE = 0.01
"""Linear-like parameters left dense without being asked for are reported loudly above this share."""

DESCRIPTION_BYTES = 960
"""What a packed Linear adds to config.json and to the headers of the safetensors files: names, shapes, places."""


def compress(
    model: nn.Module,
    config: CLAQConfig | ColumnCodebookConfig | SparseConfig,
    calibration: Iterable[Any],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    tuning: Iterable[Any] | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compress the Linears of a transformers model (or any module tree) in place, calibrated, layer by layer.

    Blocks are the members of the model's `nn.ModuleList`s, in the order in which they run. The inputs of each block are taken
    after the blocks before it were compressed; Linears with the same input share one Hessian; no Hessian outlives its group
    of Linears (or its block, with ``true_sequential=False``).

    Args:
        model: on any device, in any float dtype; put into eval mode for the run. Its dense weights are held until the end:
            if anything fails, or is interrupted, the model is as it was.
        config: `ColumnCodebookConfig` (the best accuracy per stored bit), `CLAQConfig` (the published method), or `SparseConfig`
            to prune.
        calibration: batches, each a tensor of token ids [B, L] or a dict as the model's forward takes it. With an
            ``attention_mask`` [B, L], padding does not count.
        include, exclude: name patterns (see `pyllmq.swap.matches`). Embeddings, norms and output heads stay dense by default;
            Linears outside the repeated blocks are compressed only if `include` names them.
        tuning: batches for `config.tune_steps`, better other text than the calibration; None takes the calibration.
        progress: show a tqdm bar with layer, error and time left.

    Returns:
        CompressionReport: true bits, the paper's bits, relative output error and seconds per Linear.

    Raises:
        ValueError: empty calibration, weights that are not finite, patterns that fit nothing, nothing to compress.
    """
    started = time.perf_counter()
    batches = as_batches(calibration)
    chosen = select_linears(model, include, exclude)
    for name, owner in tied_weights(model, chosen).items():
        raise ValueError(
            f"{name} shares its weight with {owner}; compressing it would untie them. Add {name!r} to exclude"
        )
    stages = find_stages(model, chosen, outside=include is not None)
    planned = [name for stage in stages for name in stage.linears]
    if not planned:
        raise ValueError(
            f"nothing to compress: {len(list(linear_modules(model)))} Linears, {len(chosen)} after include and exclude, none of "
            "them in a repeated block; name them in include to compress them all the same"
        )
    for name in planned:
        _check_finite(name, dense_weight(chosen[name]))
    dense, total = left_dense(model, planned, include, exclude)

    steps = config.tune_steps if isinstance(config, ColumnCodebookConfig) else 0
    original = copy.deepcopy(model) if steps else None
    tuning = batches if tuning is None else as_batches(tuning)
    method = (
        config.method if isinstance(config, SparseConfig) else "claq" if isinstance(config, CLAQConfig) else "columns"
    )
    report = CompressionReport(method, config.to_dict(), left_dense=dense)
    unasked = sum(item.parameters for item in dense if not item.asked)
    if unasked > SILENT_SHARE * total:
        names = summary([item for item in dense if not item.asked])
        _warn(
            report,
            f"{100 * unasked / total:.1f} % of the Linear-like parameters stay dense without being asked for: {names}. "
            "Name them in exclude if that is wanted; Linears outside the blocks can be named in include",
        )

    replaced: dict[str, nn.Module] = {}
    try:
        with _quiet_eval(model), torch.no_grad(), tqdm(total=len(planned), disable=not progress, unit="layer") as bar:
            device = next(model.parameters()).device
            batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
            job = _Job(model, batches, config, replaced, report, bar)
            job.visit = partial(_compress_group, job)
            if isinstance(config, ColumnCodebookConfig):
                _plan_budgets(job, config, {name: chosen[name] for name in planned})
            if isinstance(config, SparseConfig):
                job.sparsity = _plan_sparsity(job, config, stages)
            for chain in find_chains(model, stages, batches[0]):
                _compress_chain(job, chain)
        if original is not None:
            report.tuning_losses = tune_codebooks(model, original, tuning, steps=steps, progress=progress)
    except BaseException:
        for name, module in replaced.items():
            replace_module(model, name, module)
        raise
    from ..integrations.transformers import mark_packed

    mark_packed(model)
    report.seconds = time.perf_counter() - started
    return report


def visit_groups(
    model: nn.Module, calibration: Iterable[Any], visit: Visit, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> None:
    """Call `visit(group, inputs)` for every group of Linears with one input, in the order and with the statistics of `compress`.

    `visit` may change the weights: what runs after them sees the change. For other methods beside ours.
    """
    stages = find_stages(model, select_linears(model, None, exclude), outside=False)
    with _quiet_eval(model), torch.no_grad(), tqdm(disable=True) as bar:
        job = _Job(model, as_batches(calibration), CLAQConfig(bits=2), {}, CompressionReport("", {}), bar, visit=visit)
        for chain in find_chains(model, stages, job.batches[0]):
            _compress_chain(job, chain)


def _plan_budgets(job: _Job, config: ColumnCodebookConfig, linears: dict[str, nn.Module]) -> None:
    """Bytes for every Linear, and what one backward pass of the dense model says about its rows and tokens."""
    shapes = {
        name: (int(w.shape[0]), int(w.shape[1])) for name, w in ((n, dense_weight(m)) for n, m in linears.items())
    }
    if config.guidance != "none":
        found = output_gradients(job.model, linears, job.batches)
        rows = found.row_weights if "rows" in config.guidance else {}
        job.guidance = Guidance(rows, found.token_weights if "tokens" in config.guidance else {})
    weights = sum(rows * columns for rows, columns in shapes.values())
    job.budgets = allocate.share_out(shapes, config.bits * weights / 8, config.row_scale)


Visit = Callable[[dict[str, nn.Module], columns.InputStatistics], None]


@dataclass
class _Job:
    """What stays the same during one compression."""

    model: nn.Module
    batches: list[Batch]
    config: CLAQConfig | ColumnCodebookConfig | SparseConfig
    replaced: dict[str, nn.Module]
    report: CompressionReport
    bar: tqdm
    budgets: dict[str, float] = field(default_factory=dict)
    """name -> bytes, for a method whose target is the true size."""
    sparsity: dict[str, float] = field(default_factory=dict)
    """name -> share of the weights to prune."""
    guidance: Guidance = field(default_factory=Guidance)
    left_over: float = 0.0
    """Bytes that the groups done so far were given and did not use."""
    twin: DenseTwin | None = None
    """The block at work as it was, for a method that makes up for the damage done so far."""
    visit: Visit = lambda group, inputs: None
    """What is done with each group of Linears that share an input, before anything after them is run."""


def _compress_chain(job: _Job, chain: list[Stage]) -> None:
    blocks = [stage.block for stage in chain if stage.block is not None]
    if not blocks:
        for stage in chain:
            _compress_stage(job, stage, lambda index: job.model(**job.batches[index]))
        return
    recorded = record_chain(job.model, blocks, job.batches)
    hidden = [calls[0].hidden for calls in recorded]
    propagate = isinstance(job.config, ColumnCodebookConfig) and job.config.propagation > 0
    dense_hidden = hidden
    for i, (stage, block) in enumerate(zip(chain, blocks, strict=True)):
        calls = [replace(calls[i], hidden=h) for calls, h in zip(recorded, hidden, strict=True)]
        if propagate:
            dense_calls = [replace(call, hidden=h) for call, h in zip(calls, dense_hidden, strict=True)]
            job.twin = DenseTwin(block, stage.linears, partial(run_call, dense_calls))
        _compress_stage(job, stage, partial(run_call, calls, block))
        if i + 1 < len(chain):
            hidden = [call.run(block) for call in calls]
            if job.twin is not None:
                dense_hidden = [call.run(job.twin.block) for call in dense_calls]
    job.twin = None


# ---- pruning: how much of each Linear ---------------------------------------------------------------------------------


def _plan_sparsity(job: _Job, config: SparseConfig, stages: Sequence[Stage]) -> dict[str, float]:
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
        norms = _input_norms(job, linears)
        outliers = {}
        for key, names in members.items():
            scores = {name: densities.wanda_scores(dense_weight(linears[name]), norms[name]) for name in names}
            outliers[key] = densities.outlier_share(scores)
        shares = densities.by_outliers(outliers, sizes, config.share, config.spread)
    else:
        traces = trace_per_weight(job.model, linears, job.batches, str(config.allocation))
        sums = {key: sum(traces[name] for name in names) for key, names in members.items()}
        shares = densities.by_rank(sums, sizes, config.share, config.spread)
    return {name: shares[key] for name, key in unit.items()}


def _input_norms(job: _Job, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """name -> |X_j| over the calibration tokens, float32 [K]; 0 for a Linear that never runs."""
    sums = {name: torch.zeros_like(dense_weight(module)[0], dtype=torch.float32) for name, module in linears.items()}
    current = 0

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums[name] += _real_tokens(args[0], job.batches[current], name).square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(recorder(name)) for name, module in linears.items()]
    try:
        for current in range(len(job.batches)):  # noqa: B007  (read by the hooks)
            job.model(**job.batches[current])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def _real_tokens(x: Tensor, batch: Batch, name: str) -> Tensor:
    """The input of a Linear without padding, float32 [tokens, K]."""
    x = x.detach()
    mask = _token_mask(batch, name)
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        x = x[mask.bool()]
    return x.reshape(-1, x.shape[-1]).float()


# ---- one stage: group the Linears by input, take the Hessian, compress ----------------------------------------------


def _compress_stage(job: _Job, stage: Stage, run: Callable[[int], Any]) -> None:
    groups = _group_by_input(job, stage, run)
    if job.config.true_sequential:
        for group in groups:
            (inputs,) = _input_statistics(job, [group], run)
            job.visit(group, inputs)
    else:
        for group, inputs in zip(groups, _input_statistics(job, groups, run), strict=True):
            job.visit(group, inputs)
    reached = {name for group in groups for name in group}
    for name, module in stage.linears.items():
        if name not in reached:
            _warn(
                job.report,
                f"{name} was never run by the calibration data; it is compressed by its weights alone",
            )
            job.visit({name: module}, columns.InputStatistics(torch.eye(dense_weight(module).shape[1])))


def _group_by_input(job: _Job, stage: Stage, run: Callable[[int], Any]) -> list[dict[str, nn.Module]]:
    """The stage's Linears in the order in which they run, those that are given the very same tensor in one group."""
    groups: list[tuple[Tensor, int, dict[str, nn.Module]]] = []
    seen: set[str] = set()

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
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
            run(index)
            if len(seen) == len(stage.linears):
                break
    finally:
        for handle in handles:
            handle.remove()
    return [members for _, _, members in groups]


def _input_statistics(
    job: _Job, groups: list[dict[str, nn.Module]], run: Callable[[int], Any]
) -> list[columns.InputStatistics]:
    """H, fp32 [K, K], a sum of x x^T over the calibration tokens, and their mean, for the common input of each group."""
    sums: dict[Any, Tensor] = {}
    tokens = [0.0] * len(groups)
    current = 0
    seen: dict[int, tuple[Tensor, Tensor | None]] = {}

    def add(key: Any, value: Tensor) -> None:
        sums[key] = sums[key].add_(value) if key in sums else value

    def recorder(i: int) -> Callable[..., None]:
        name = next(iter(groups[i]))

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = _real_tokens(args[0], job.batches[current], name)
            s = _token_weights(job, name, current, args[0].shape[:-1])
            if s is not None and s.numel() != len(x):  # an expert that was sent other tokens than in the dense model
                s = None
            weighted = x if s is None else x * s.reshape(-1, 1)
            add(("products", i), weighted.T @ x)
            add(("total", i), weighted.sum(0))
            tokens[i] += x.shape[0] if s is None else float(s.sum())
            seen[i] = weighted, s

        return hook

    members = [(i, name) for i, group in enumerate(groups) for name in group]
    places = {} if job.twin is None else {name: job.twin.places_in_block[name] for _, name in members}
    had: dict[str, Tensor] = {}
    handles = [next(iter(group.values())).register_forward_pre_hook(recorder(i)) for i, group in enumerate(groups)]
    try:
        with watch(places, had):
            for current in range(len(job.batches)):  # noqa: B007  (read by the hooks)
                seen.clear()
                had.clear()
                run(current)
                if job.twin is None:
                    continue
                wanted = job.twin.look([name for _, name in members], current)
                for i, name in members:
                    # An expert is sent other tokens than in the dense model: nothing to compare.
                    if i not in seen or name not in had or name not in wanted or wanted[name].dim() != 3:
                        continue
                    x, s = seen[i]
                    missing = _real_tokens(wanted[name] - had[name], job.batches[current], name)
                    if len(missing) != len(x):
                        continue
                    add(("drift", name), missing.T @ x)
                    add(("mean drift", name), (missing if s is None else missing * s.reshape(-1, 1)).sum(0))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for i, group in enumerate(groups):
        if tokens[i] == 0:
            raise ValueError(
                f"the calibration data reaches {next(iter(group))} with no token; is the attention_mask all zero?"
            )
        biased = all(isinstance(module.bias, Tensor) for module in group.values())
        products, total = sums["products", i], sums["total", i]
        # The published methods know 2/n sum x x^T; the covariance needs the plain mean.
        if not isinstance(job.config, ColumnCodebookConfig):
            found.append(columns.InputStatistics(products.mul_(2.0 / tokens[i])))
            continue
        mean = total.div_(tokens[i]) if biased and job.config.correct_bias else None
        drifts = {
            name: Drift(sums["drift", name].div_(tokens[i]), sums["mean drift", name].div_(tokens[i]))
            for name in group
            if ("drift", name) in sums
        }
        found.append(columns.InputStatistics(products.div_(tokens[i]), mean, drifts))
    return found


def _token_weights(job: _Job, name: str, current: int, shape: torch.Size) -> Tensor | None:
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


def _compress_group(job: _Job, group: dict[str, nn.Module], inputs: columns.InputStatistics) -> None:
    weights = {name: dense_weight(module).float() for name, module in group.items()}
    config = job.config
    if isinstance(config, CLAQConfig):
        compressed = claq.compress_linears(weights, inputs.hessian, config)
    elif isinstance(config, SparseConfig):
        dtype = dense_weight(next(iter(group.values()))).dtype
        compressed = prune_linears(weights, inputs.hessian, config, job.sparsity, dtype)
    else:
        budget = sum(job.budgets[name] for name in group) + job.left_over
        compressed = columns.compress_linears(weights, inputs, budget, config, job.guidance.row_weights)
        job.left_over = budget - sum(done.weight.nbytes for done in compressed.values())
    for name, done in compressed.items():
        module = group[name]
        dense = dense_weight(module)
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
        if bias is not None and done.bias_change is not None:
            bias = bias + done.bias_change.to(bias)
        layer_type = LAYER_OF_KIND[done.weight.structure.kind]
        layer = layer_type.from_weight(done.weight.to(dense.device), bias, dense.dtype)
        job.replaced[name] = module
        replace_module(job.model, name, layer)
        job.report.layers.append(
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
        job.bar.set_postfix_str(f"{name} error {done.error:.5f}", refresh=False)
        job.bar.update()


def _check_finite(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"{name}.weight holds {bad} values that are not finite; repair the model before compressing it"
        )


def _warn(report: CompressionReport, message: str) -> None:
    report.warnings.append(message)
    warnings.warn(message, stacklevel=4)


@contextmanager
def _quiet_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) and no key-value cache, both put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model_config = getattr(model, "config", None)
    use_cache = getattr(model_config, "use_cache", None)
    model.eval()
    if use_cache:
        model_config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if use_cache:
            model_config.use_cache = use_cache  # type: ignore[union-attr]


def bits_for_size(
    model: nn.Module,
    nbytes: int,
    other_files: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> float:
    """True bits per weight at which the packed folder of `model` has `nbytes`, dense tensors and `other_files` included.

    Raises ValueError if what stays dense takes the whole size, or leaves fewer than 1.1 bits or more than 8.
    """
    chosen = select_linears(model, include, exclude)
    linears = [m for stage in find_stages(model, chosen, include is not None) for m in stage.linears.values()]
    weights = [dense_weight(module) for module in linears]
    packed = {weight.data_ptr() for weight in weights}
    # Tied tensors are stored once.
    rest = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    dense = sum(size for pointer, size in rest.items() if pointer not in packed) + other_files
    dense += DESCRIPTION_BYTES * len(linears)
    bits = 8 * (nbytes - dense) / max(1, sum(w.numel() for w in weights))
    if not 1.1 <= bits <= 8:
        raise ValueError(
            f"{nbytes} bytes leave {max(bits, 0.0):.3f} bits per weight beside {dense} bytes that stay dense; allowed: 1.1 to 8"
        )
    return bits
