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

from ..config import ColumnCodebookConfig, SparseConfig
from ..linears import DEFAULT_EXCLUDE, dense_weight, replace_module, select_linears
from .blocks import BlockLoop, Stage, find_stages
from .calibration import as_batches
from .job import Config, Job, byte_budgets
from .model import DESCRIPTION_BYTES, INDEX_BYTES, planned_linears, quiet_eval, start_report


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
        return "\n".join(
            [
                f"{self.linears} Linears in {self.blocks} blocks, {self.weights / 1e6:.2f} M weights: {self.target}",
                f"read {_size(self.source_bytes)}, write {out}; {_size(self.free_bytes)} are free there",
                f"largest block in float32 {_size(self.block_bytes)}, hidden states {_size(self.hidden_bytes)}",
                f"about {about}: {self.seconds_run:.0f} s to run the blocks, "
                f"{self.seconds_compress:.0f} s to compress; from one batch and one group of Linears timed now, in one process. "
                "Nothing was written",
            ]
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


class _Timed(Exception):
    """Ends the walk of a dry run."""


def plan_folder(
    source: Any,
    output: str | os.PathLike[str],
    config: Config,
    calibration: Iterable[Any],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> FolderPlan:
    """What `compress_folder` would do with the same arguments; times one batch in one block, and one group of its Linears."""
    from ..integrations.checkpoint import StreamedModel

    streamed = source if isinstance(source, StreamedModel) else StreamedModel(source)
    model, batches = streamed.model, as_batches(calibration)
    chosen = select_linears(model, include, exclude)
    stages = find_stages(model, chosen, outside=include is not None)
    planned = planned_linears(model, chosen, stages)
    streamed.split(stage.name for stage in stages if stage.block is not None)
    blocks = [stage for stage in stages if stage.linears]
    weights = {name: dense_weight(module).numel() for name, module in planned.items()}
    first = [{key: value.to(streamed.device) for key, value in batches[0].items()}]
    spent: dict[str, float] = {"hidden": 0}

    with quiet_eval(model), torch.no_grad(), tqdm(disable=True) as bar:
        loop = BlockLoop(model, first[0], first, streamed)
        job = Job(
            loop, config, start_report(config, [], 1), bar, visit=lambda group, inputs: groups.append((group, inputs))
        )
        groups: list[Any] = []
        job.sparsity = dict.fromkeys(planned, config.share if isinstance(config, SparseConfig) else 0.0)
        if isinstance(config, ColumnCodebookConfig):
            job.budgets = byte_budgets(planned, config)

        def visit(stage: Stage, run: Callable[[int], Any]) -> None:
            if not stage.linears:
                return
            began = time.perf_counter()
            output = run(0)
            spent["run"] = time.perf_counter() - began
            if isinstance(output, Tensor):
                spent["hidden"] = output.numel() * output.element_size()
            began = time.perf_counter()
            job.compress_stage(stage, run)
            # Of which one run to find the groups, which is not repeated for each batch.
            spent["statistics"] = max(0.0, time.perf_counter() - began - spent["run"])
            group, inputs = min(groups, key=lambda found: sum(weights[name] for name in found[0]))
            began = time.perf_counter()
            job.compress_group(group, inputs)
            spent["compress"] = (time.perf_counter() - began) / sum(weights[name] for name in group)
            for name, module in job.replaced.items():
                replace_module(model, name, module)
            raise _Timed

        with suppress(_Timed):
            loop.walk(loop.find_chains(stages)[0], visit, hand_on=False, with_twin=job.with_twin)

    # Beside the statistics, handing on takes a run of the block, and of its twin; guidance three.
    runs = 2 if job.with_twin else 1
    runs += 3 if isinstance(config, ColumnCodebookConfig) and config.guidance != "none" else 0
    dense = sum(
        t.numel() * t.element_size() for n, t in model.state_dict().items() if n.rpartition(".")[0] not in planned
    )
    target = Path(output).resolve()
    exists = next(folder for folder in target.parents if folder.exists())
    sized = isinstance(config, ColumnCodebookConfig)
    return FolderPlan(
        blocks=len(blocks),
        linears=len(planned),
        weights=sum(weights.values()),
        target=f"{config.bits:.3g} bits" if not isinstance(config, SparseConfig) else f"{config.share:.3g} pruned",
        source_bytes=sum(file.stat().st_size for file in streamed.files),
        output_bytes=dense + round(sum(job.budgets.values())) + (DESCRIPTION_BYTES + INDEX_BYTES) * len(planned)
        if sized
        else None,
        block_bytes=max(
            4 * sum(p.numel() for p in stage.block.parameters()) for stage in stages if stage.block is not None
        ),
        hidden_bytes=round(spent["hidden"] * len(batches) * (2 if job.with_twin else 1)),
        free_bytes=shutil.disk_usage(exists).free,
        seconds_run=(spent["statistics"] + spent["run"] * runs) * len(batches) * len(blocks),
        seconds_compress=spent["compress"] * sum(weights.values()),
    )
