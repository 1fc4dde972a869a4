"""Whole-model compression in memory: block after block, each on what the already compressed blocks before it give out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...config import MethodConfig
from ...dispatch import plain_defaults
from ...experts import apart, put_together, stacks_of
from ...linears import DEFAULT_EXCLUDE, dense_weight, select_linears
from ..calibration import as_batches, within_positions
from ..methods import StaysDenseError, method_of
from ..methods.pack import PackConfig
from ..model_state import quiet_eval
from ..objective import NoLossError
from ..report import CompressionReport
from ..statistics.blocks import BlockLoop, find_stages
from ..statistics.inputs import Group, InputStatistics
from ..statistics.inputs import visit_groups as visit_stage
from ..statistics.loss_gradients import output_gradients
from ..statistics.run import CalibrationRun
from .ends import End, find_ends, pack_end
from .job import Job, Task, check_finite, not_included, stays_dense, warn

DESCRIPTION_BYTES = 960
"""What a packed Linear adds to config.json and to the headers of the safetensors files: names, shapes, places."""

INDEX_BYTES = 700
"""What its eight tensors add to the index of a folder of several safetensors files."""


@plain_defaults()
def compress(
    model: nn.Module,
    config: MethodConfig,
    calibration: Iterable[Any] | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    tuning: Iterable[Any] | None = None,
    embeddings: int | None = None,
    head: int | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compress the Linears of a transformers model (or any module tree) in place, calibrated, layer by layer.

    Blocks are the members of the model's `nn.ModuleList`s, in the order in which they run. The inputs of each block are taken
    after the blocks before it were compressed; Linears with the same input share one Hessian; no Hessian outlives its group
    of Linears (or its block, with ``true_sequential=False``).

    Args:
        model: on any device, in any float dtype; put into eval mode for the run. Its dense weights are held until the end:
            if anything fails, or is interrupted, the model is as it was.
        config: `ColumnCodebookConfig` (the best accuracy per stored bit), `CLAQConfig` (the published method), `SparseConfig`
            to prune, `KMeansConfig`, or that of a method of your own.
        calibration: batches, each a tensor of token ids [B, L] or a dict as the model's forward takes it. With an
            ``attention_mask`` [B, L], padding does not count. None for methods that look at weights alone (k-means, magnitude
            without `quantize`); errors in the report are then those of the weights.
        include, exclude: name patterns (see `pyllmq.linears.matches`). Embeddings, norms and output heads stay dense by default;
            Linears outside the repeated blocks are compressed only if `include` names them.
        tuning: batches for `tune_steps`, better other text than the calibration; None takes the calibration.
        embeddings, head: widths, 1 to 8 bits, at which input embeddings and output heads are packed too; None leaves them dense. A
            tied weight is one: either word packs both. With calibration they weigh rows by how often their tokens occur and
            heads by their inputs; without, it is k-means with a row scale.
        progress: show a tqdm bar with layer, error and time left.

    Returns:
        CompressionReport: true bits, the paper's bits, relative output error and seconds per Linear.

    Raises:
        ValueError: a config of no registered method, empty or missing calibration, weights that are not finite, patterns that
            fit nothing, nothing to compress.
    """
    from ...integrations.transformers import expect_own_names, is_transformers_model, mark_packed

    started = time.perf_counter()
    method = method_of(config)
    needs = method.needs
    if calibration is None and needs.calibration:
        raise ValueError(
            f"{type(config).__name__} needs calibration data with these settings; give batches of token ids"
        )
    batches = [] if calibration is None else as_batches(calibration, model)
    if tuning is not None and not needs.dense_model:
        raise ValueError(
            f"tuning data is given, but {type(config).__name__} does not tune; set tune_steps, or leave it out"
        )
    try:
        task = Task.of(model, method, include, exclude, embeddings, head)
        check_finite((task.linears if batches else {}) | {end.name: end.module for end in task.ends})
        if is_transformers_model(model):
            expect_own_names(model, task.names)  # of what `mark_packed` would raise after the job
    except BaseException:
        put_together(model)
        raise
    original = copy.deepcopy(model) if needs.dense_model else None
    device = next(model.parameters()).device
    with tqdm(total=len(task.names), disable=not progress, unit="layer") as bar:
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        job = Job(task, task.run(BlockLoop(model, batches[0] if batches else {}, batches)), bar)
        try:
            with quiet_eval(model), torch.no_grad(), within_positions(model, batches):
                (_calibrate if batches else _pack_all)(job)
            if original is not None:
                text = batches if tuning is None else as_batches(tuning, model)
                try:
                    task.report.tuning_losses = method.finish(model, original, text, progress)
                except NoLossError as error:
                    warn(task.report, f"nothing is tuned, as with tune_steps=0: {error}")
        except BaseException:
            job.put_back()
            put_together(model)
            raise
    put_together(model)
    mark_packed(model)
    task.report.seconds = time.perf_counter() - started
    return task.report


def _pack_all(job: Job) -> None:
    """By the weights alone."""
    task = job.task
    for name, module in task.linears.items():
        try:
            job.replace(name, module, task.method.compress_weight(name, dense_weight(module)))
        except StaysDenseError as why:
            task.report.left_dense.append(stays_dense(name, module, str(why)))
    if not task.report.layers:
        raise task.nothing_packed()
    for end in task.ends:
        job.replace_end(end, pack_end(end.name, end.weight, end.bits))


def _calibrate(job: Job) -> None:
    task, method, loop = job.task, job.task.method, job.run.loop
    chains = loop.find_chains(task.stages)
    if (which := method.needs.loss_gradients) != "none":
        try:
            job.run.gradients = output_gradients(task.model, task.linears, job.run.batches).limited_to(which)
        except NoLossError as error:
            warn(task.report, without_gradients(error))
    method.plan = method.make_plan(task.linears, chains, job.run)
    for i, chain in enumerate(chains):
        loop.walk(chain, job.compress_stage, hand_on=i + 1 < len(chains), asymmetric=method.needs.dense_block)
    task.note_dense()


def without_gradients(error: NoLossError) -> str:
    return f"all rows and tokens weigh alike, as with guidance='none': {error}"


def pack_pruned(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    values: Any = None,
) -> CompressionReport:
    """Replace in place the Linears whose zeros save bytes by sparse layers that compute the same: `compress` with a `PackConfig`.

    Args:
        model: any module tree.
        include, exclude: name patterns, as for `compress`.
        values: "float16", "bfloat16", "float32" or "int8"; None is each weight's own dtype.

    Raises:
        ValueError: no Linear would shrink.
    """
    return compress(model, PackConfig(values), include=include, exclude=exclude, progress=False)


@plain_defaults()
def visit_groups(
    model: nn.Module,
    calibration: Iterable[Any],
    visit: Callable[[Group, InputStatistics], None],
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> None:
    """Call `visit(group, inputs)` for every group of Linears with one input, in the order and with the statistics of `compress`.

    `visit` may change the weights: what runs after them sees the change. For methods that are not registered.
    """
    with apart(model), quiet_eval(model), torch.no_grad():
        stages = find_stages(model, select_linears(model, None, exclude), outside=False)
        batches = as_batches(calibration, model)
        loop = BlockLoop(model, batches[0], batches)
        run = CalibrationRun(loop)
        chains = loop.find_chains(stages)
        for i, chain in enumerate(chains):
            loop.walk(
                chain, lambda stage, forward: visit_stage(run, stage, forward, visit), hand_on=i + 1 < len(chains)
            )


def bytes_beside(model: nn.Module, linears: Mapping[str, nn.Module], ends: Sequence[End], indexed: bool) -> int:
    """Bytes of a packed folder but for the packed Linears' tensors: what stays dense, packed ends, descriptions.

    The experts of `model` must have been taken apart. `indexed`: it has several safetensors files and an index.
    """
    packed = {id(module.weight) for module in (*linears.values(), *(end.module for end in ends))}
    stacks = stacks_of(model, set(linears))
    # Tied tensors are stored once. On the meta device only their identity tells.
    tensors = {id(t): t for key, t in model.state_dict(keep_vars=True).items() if key not in stacks}
    dense = sum(t.numel() * t.element_size() for tensor, t in tensors.items() if tensor not in packed)
    described = (DESCRIPTION_BYTES + INDEX_BYTES * indexed) * (len(linears) + len(ends))
    return dense + sum(end.nbytes for end in ends) + described


def bits_for_size(
    model: nn.Module,
    nbytes: int,
    other_files: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    indexed: bool = False,
    embeddings: int | None = None,
    head: int | None = None,
) -> float:
    """True bits per weight at which the packed folder of `model` has `nbytes`, dense tensors and `other_files` included.

    `other_files` may count tensors that are copied as they are. `indexed`: it will have several safetensors files and an index, as
    `compress_folder` writes them.
    Raises ValueError if what stays dense takes the whole size, or leaves fewer than 1.1 bits or more than 8.
    """
    with apart(model):
        chosen = select_linears(model, include, not_included(include, exclude))
        stages = find_stages(model, chosen, include is not None)
        linears = {name: module for stage in stages for name, module in stage.linears.items()}
        weights = sum(dense_weight(module).numel() for module in linears.values())
        dense = other_files + bytes_beside(model, linears, find_ends(model, embeddings, head, chosen), indexed)
    bits = 8 * (nbytes - dense) / max(1, weights)
    if not 1.1 <= bits <= 8:
        raise ValueError(
            f"{nbytes} bytes leave {max(bits, 0.0):.3f} bits per weight beside {dense} bytes that stay dense or are copied (of "
            f"these {other_files} in other files and in tensors that the model has no place for); allowed: 1.1 to 8"
        )
    return bits
