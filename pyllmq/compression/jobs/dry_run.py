"""What a streamed compression would do, and how long it would take: one batch in one block, one group of Linears, timed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...config import MethodConfig
from ...dispatch import plain_defaults
from ...linears import DEFAULT_EXCLUDE, dense_weight
from ..calibration import as_batches
from ..methods import StaysDenseError, method_of
from ..model_state import quiet_eval
from ..statistics.blocks import BlockLoop, Stage
from ..statistics.inputs import Group, InputStatistics, visit_groups
from .in_memory import bytes_beside
from .job import Job, Task, open_task


@dataclass(frozen=True)
class FolderPlan:
    """What `compress_folder` would do. Times are those of one block on this machine, times the number of blocks."""

    blocks: int
    linears: int
    weights: int
    target: str
    source_bytes: int
    output_bytes: int | None
    """None: the method does not aim at a size."""
    block_bytes: int
    """Of the largest block in float32."""
    hidden_bytes: int
    """Hidden states of all calibration data."""
    free_bytes: int
    seconds_run: float
    """All blocks over all calibration data, as often as the method runs them."""
    seconds_compress: float

    def __str__(self) -> str:
        out = "not known before" if self.output_bytes is None else _size(self.output_bytes)
        minutes = (self.seconds_run + self.seconds_compress) / 60
        about = f"{minutes:.2g} minutes" if minutes < 100 else f"{minutes / 60:.2g} hours"
        return (
            f"{self.linears} Linears in {self.blocks} blocks, {self.weights / 1e6:.2f} M weights: {self.target}\n"
            f"read {_size(self.source_bytes)}, write {out}; {_size(self.free_bytes)} are free there\n"
            f"largest block in float32 {_size(self.block_bytes)}, hidden states {_size(self.hidden_bytes)}\n"
            f"about {about}: {self.seconds_run:.0f} s to run the blocks, {self.seconds_compress:.0f} s to compress; from one batch "
            "and one group of Linears timed now, in one process. Nothing was written"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


class _Timed(Exception):
    """Ends the walk of a dry run."""


@plain_defaults()
def plan_folder(
    source: Any,
    output: str | os.PathLike[str],
    config: MethodConfig,
    calibration: Iterable[Any] | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    embeddings: int | None = None,
    head: int | None = None,
) -> FolderPlan:
    """What `compress_folder` or `compress_files` would do with the same arguments.

    Times one batch in one block, and one group of its Linears; without calibration one Linear.
    """
    method = method_of(config)
    streamed, task = open_task(source, method, include, exclude, embeddings, head)
    method.plan = method.make_plan(task.linears)
    dense = bytes_beside(streamed.model, task.linears, task.ends, indexed=True)
    weights = sum(dense_weight(module).numel() for module in task.linears.values())
    blocks = [stage for stage in task.stages if stage.linears]
    batches, runs, packed_bytes = [], 0, method.planned_bytes()
    if method.needs.calibration:
        batches = as_batches(calibration or (), streamed.model)
        spent = _time_group(streamed, task, {key: value.to(streamed.device) for key, value in batches[0].items()})
        # Beside the statistics, handing on takes a run of the block, and of its dense copy; loss gradients three.
        runs = 1 + method.needs.dense_block + 3 * (method.needs.loss_gradients != "none")
    else:
        spent = _time_weight(streamed, task)
        packed_bytes = round(spent.packed_bytes * weights)
    target = Path(output).resolve()
    exists = next(folder for folder in target.parents if folder.exists())
    in_blocks = [sum(p.numel() for p in stage.block.parameters()) for stage in task.stages if stage.block is not None]
    return FolderPlan(
        blocks=len(blocks),
        linears=len(task.linears),
        weights=weights,
        target=method.summary(),
        source_bytes=sum(file.stat().st_size for file in streamed.files),
        output_bytes=None if packed_bytes is None else dense + packed_bytes,
        block_bytes=4 * max(in_blocks, default=0),
        hidden_bytes=round(spent.hidden_bytes * len(batches) * (1 + method.needs.dense_block)),
        free_bytes=shutil.disk_usage(exists).free,
        seconds_run=(spent.statistics + spent.run * runs) * len(batches) * len(blocks),
        seconds_compress=spent.compress * weights,
    )


@dataclass
class _Spent:
    """Measured: seconds of a run of a block on one batch, and of its statistics; seconds and bytes for each weight."""

    run: float = 0.0
    statistics: float = 0.0
    hidden_bytes: int = 0
    compress: float = 0.0
    packed_bytes: float = 0.0


def _time_weight(streamed: Any, task: Task) -> _Spent:
    """Of one Linear of the middle size, packed by itself."""
    sizes = {name: dense_weight(module).numel() for name, module in task.linears.items()}
    name = sorted(sizes, key=lambda name: sizes[name])[len(sizes) // 2]
    stored = streamed.weight_of(name, task.linears[name])
    began = time.perf_counter()
    try:
        nbytes = task.method.compress_weight(name, stored).weight.nbytes
    except StaysDenseError:
        nbytes = stored.numel() * stored.element_size()
    return _Spent(compress=(time.perf_counter() - began) / sizes[name], packed_bytes=nbytes / sizes[name])


def _time_group(streamed: Any, task: Task, first: dict[str, Tensor]) -> _Spent:
    """Of one block on a batch, and of its smallest group."""
    spent = _Spent()
    with quiet_eval(task.model), torch.no_grad(), tqdm(disable=True) as bar:
        loop = BlockLoop(task.model, first, [first], streamed)
        job = Job(task, task.run(loop), bar)

        def size(group: Group) -> int:
            return sum(dense_weight(module).numel() for module in group.values())

        def visit(stage: Stage, forward: Callable[[int], Any]) -> None:
            if not stage.linears:
                return
            groups: list[tuple[Group, InputStatistics]] = []
            began = time.perf_counter()
            output = forward(0)
            spent.run = time.perf_counter() - began
            if isinstance(output, Tensor):
                spent.hidden_bytes = output.numel() * output.element_size()
            began = time.perf_counter()
            visit_groups(job.run, stage, forward, lambda group, inputs: groups.append((group, inputs)))
            # Of which one run to find the groups, which is not repeated for each batch.
            spent.statistics = max(0.0, time.perf_counter() - began - spent.run)
            group, inputs = min(groups, key=lambda found: size(found[0]))
            began = time.perf_counter()
            job.compress_group(group, inputs)
            spent.compress = (time.perf_counter() - began) / size(group)
            job.put_back()
            raise _Timed

        with suppress(_Timed):
            chain = loop.find_chains(task.stages)[0]
            loop.walk(chain, visit, hand_on=False, asymmetric=task.method.needs.dense_block)
    return spent
