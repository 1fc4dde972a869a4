"""Whole-model compression: block after block, each on the inputs that the already compressed blocks before it produce."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import CLAQConfig, ColumnCodebookConfig, KMeansConfig, SparseConfig
from ..linears import (
    DEFAULT_EXCLUDE,
    LeftDense,
    dense_weight,
    left_dense,
    linear_modules,
    replace_module,
    select_linears,
    tied_weights,
)
from .blocks import BlockLoop, Stage, check_finite, find_stages
from .calibration import as_batches
from .guide import output_gradients
from .job import Config, Job, Visit, byte_budgets, plan_sparsity, warn
from .report import CompressionReport, summary
from .tune import tune_codebooks

SILENT_SHARE = 0.01
"""Linear-like parameters left dense without being asked for are reported loudly above this share."""

DESCRIPTION_BYTES = 960
"""What a packed Linear adds to config.json and to the headers of the safetensors files: names, shapes, places."""

INDEX_BYTES = 700
"""What its eight tensors add to the index of a folder of several safetensors files."""


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
        include, exclude: name patterns (see `pyllmq.linears.matches`). Embeddings, norms and output heads stay dense by default;
            Linears outside the repeated blocks are compressed only if `include` names them.
        tuning: batches for `config.tune_steps`, better other text than the calibration; None takes the calibration.
        progress: show a tqdm bar with layer, error and time left.

    Returns:
        CompressionReport: true bits, the paper's bits, relative output error and seconds per Linear.

    Raises:
        ValueError: empty calibration, weights that are not finite, patterns that fit nothing, nothing to compress.
    """
    from ..integrations.transformers import expect_packable, mark_packed

    started = time.perf_counter()
    batches = as_batches(calibration)
    chosen = select_linears(model, include, exclude)
    stages = find_stages(model, chosen, outside=include is not None)
    planned = planned_linears(model, chosen, stages)
    for name, module in planned.items():
        check_finite(name, module)
    expect_packable(model, planned)
    dense, total = left_dense(model, planned, include, exclude)

    steps = config.tune_steps if isinstance(config, ColumnCodebookConfig) else 0
    original = copy.deepcopy(model) if steps else None
    tuning = batches if tuning is None else as_batches(tuning)
    report = start_report(config, dense, total)

    replaced: dict[str, nn.Module] = {}
    try:
        with quiet_eval(model), torch.no_grad(), tqdm(total=len(planned), disable=not progress, unit="layer") as bar:
            device = next(model.parameters()).device
            batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
            loop = BlockLoop(model, batches[0], batches)
            job = Job(loop, config, report, bar, replaced=replaced)
            chains = loop.find_chains(stages)
            if isinstance(config, ColumnCodebookConfig):
                job.budgets = byte_budgets(planned, config)
                if config.guidance != "none":
                    job.guidance = output_gradients(model, planned, batches).limited_to(config.guidance)
            if isinstance(config, SparseConfig):
                job.sparsity = plan_sparsity(job, config, chains)
            for i, chain in enumerate(chains):
                loop.walk(chain, job.compress_stage, hand_on=i + 1 < len(chains), with_twin=job.with_twin)
        if original is not None:
            report.tuning_losses = tune_codebooks(model, original, tuning, steps=steps, progress=progress)
    except BaseException:
        for name, module in replaced.items():
            replace_module(model, name, module)
        raise
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
    batches = as_batches(calibration)
    with quiet_eval(model), torch.no_grad(), tqdm(disable=True) as bar:
        loop = BlockLoop(model, batches[0], batches)
        job = Job(loop, CLAQConfig(bits=2), CompressionReport("", {}), bar, visit=visit)
        chains = loop.find_chains(stages)
        for i, chain in enumerate(chains):
            loop.walk(chain, job.compress_stage, hand_on=i + 1 < len(chains))


def planned_linears(model: nn.Module, chosen: Mapping[str, nn.Module], stages: Sequence[Stage]) -> dict[str, nn.Module]:
    """The Linears that will be compressed, by name. Raises ValueError if there are none, or one may not be."""
    for name, owner in tied_weights(model, chosen).items():
        raise ValueError(
            f"{name} shares its weight with {owner}; compressing it would untie them. Add {name!r} to exclude"
        )
    planned = {name: module for stage in stages for name, module in stage.linears.items()}
    if not planned:
        raise ValueError(
            f"nothing to compress: {len(list(linear_modules(model)))} Linears, {len(chosen)} after include and exclude, none of "
            "them in a repeated block; name them in include to compress them all the same"
        )
    return planned


def start_report(config: Config | KMeansConfig, dense: list[LeftDense], total: int) -> CompressionReport:
    """A report that names what stays dense of `total` Linear-like parameters, and warns if that is much and was not asked for."""
    methods = {CLAQConfig: "claq", ColumnCodebookConfig: "columns", KMeansConfig: "kmeans"}
    method = config.method if isinstance(config, SparseConfig) else methods[type(config)]
    report = CompressionReport(method, config.to_dict(), left_dense=dense)
    unasked = sum(item.parameters for item in dense if not item.asked)
    if unasked > SILENT_SHARE * total:
        names = summary([item for item in dense if not item.asked])
        warn(
            report,
            f"{100 * unasked / total:.1f} % of the Linear-like parameters stay dense without being asked for: {names}. "
            "Name them in exclude if that is wanted; Linears outside the blocks can be named in include",
        )
    return report


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
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
    indexed: bool = False,
) -> float:
    """True bits per weight at which the packed folder of `model` has `nbytes`, dense tensors and `other_files` included.

    `indexed`: it will have several safetensors files and an index, as `compress_folder` writes them.
    Raises ValueError if what stays dense takes the whole size, or leaves fewer than 1.1 bits or more than 8.
    """
    chosen = select_linears(model, include, exclude)
    linears = [m for stage in find_stages(model, chosen, include is not None) for m in stage.linears.values()]
    weights = [dense_weight(module) for module in linears]
    packed = {id(module.weight) for module in linears}
    # Tied tensors are stored once. On the meta device only their identity tells.
    rest = {id(t): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values()}
    dense = sum(size for tensor, size in rest.items() if tensor not in packed) + other_files
    dense += (DESCRIPTION_BYTES + INDEX_BYTES * indexed) * len(linears)
    bits = 8 * (nbytes - dense) / max(1, sum(w.numel() for w in weights))
    if not 1.1 <= bits <= 8:
        raise ValueError(
            f"{nbytes} bytes leave {max(bits, 0.0):.3f} bits per weight beside {dense} bytes that stay dense; allowed: 1.1 to 8"
        )
    return bits
