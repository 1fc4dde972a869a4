"""Structured pruning from folder to folder, one block in memory at a time; resumable, as folder.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...dispatch import plain_defaults
from ...linears import follow_weight, select_linears
from ...weights import OUTSIDE
from ..calibration import as_batches, within_positions
from ..methods.structured import ChannelReport, StructuredConfig, StructuredPass, StructuredReport
from ..model_state import quiet_eval
from ..ranks import ALONE
from ..statistics.blocks import BlockLoop, Chain, Stage, find_stages
from ..statistics.loss_gradients import output_gradients_by_block
from .folder import HiddenStates, job_signature, open_manifest, put_whole, write_unit
from .job import check_finite
from .manifest import batches_digest


@plain_defaults()
def prune_folder(
    source: Any,
    output: str | os.PathLike[str],
    config: StructuredConfig,
    calibration: Iterable[Any],
    *,
    others: Sequence[Any] = (),
    resume: bool = False,
    keep: bool = False,
    progress: bool = True,
) -> StructuredReport:
    """`prune_structured` from folder to folder, for models larger than memory: the result is a dense transformers folder.

    Args:
        source: folder of a transformers model in safetensors, or a `StreamedModel` of one.
        output: folder to write; an earlier one of that name is replaced at the end.
        calibration: batches, as for `pyllmq.compress`.
        others, resume, progress: as for `pyllmq.compress_folder`.
        keep: let it be resumed once it is finished, too, which then only checks that it is the same job.

    Raises:
        ValueError: as `prune_structured`; a job that cannot be resumed.
        FileExistsError: an unfinished job is in the way.
        OSError: files that cannot be read or written; what is finished stays.
    """
    from ...integrations.checkpoint import StreamedModel

    streamed = source if isinstance(source, StreamedModel) else StreamedModel(source)
    streamed.expect_runnable()
    model, target = streamed.model, Path(output).resolve()
    batches = as_batches(calibration, model)
    linears = select_linears(model)
    stages = find_stages(model, linears, outside=False)
    streamed.split(stage.name for stage in stages if stage.block is not None)
    data = {"calibration": batches_digest(batches), "threads": torch.get_num_threads()}
    manifest = open_manifest(
        target, job_signature(streamed.folder, config, list(linears)) | data, resume, finished=keep
    )
    with manifest.locked(), quiet_eval(model), torch.no_grad(), within_positions(model, batches):
        batches = [{key: value.to(streamed.device) for key, value in batch.items()} for batch in batches]
        loop, work = BlockLoop(model, batches[0], batches, streamed), StructuredPass(model, config)
        chains = loop.find_chains(stages, lambda stage: check_finite(stage.linears))
        if manifest.plan is None:
            work.choose_layers(loop, chains)
            if work.priced:
                inputs = HiddenStates(manifest.place, "inputs", ALONE)
                work.choose_widths(loop, chains, lambda: output_gradients_by_block(loop, chains, work.linears, inputs))
            manifest.set_plan({"layers": work.report.layers, "widths": work.widths})
        else:
            work.take_layers(manifest.plan["layers"])
            work.widths = manifest.plan["widths"]
        streamed.rename(work.names_of_layers())
        units = [unit for unit in (OUTSIDE, *streamed.blocks) if unit not in work.gone]
        for entry in manifest.finished:
            work.report.groups += [
                ChannelReport(**{**row, "writers": tuple(row["writers"])}) for row in entry["groups"]
            ]
            work.heads = {(groups, size): (count, said) for (groups, size), count, said in entry["heads"]}
        known = {entry["unit"] for entry in manifest.finished}
        states = HiddenStates(manifest.place, "hidden", ALONE)
        bar = tqdm(total=len(units), initial=len(manifest.finished), disable=not progress, unit="block")

        def write(unit: str, before: int) -> None:
            """`before`: groups of the blocks before it."""
            held = model.get_submodule(unit).named_parameters(prefix=unit) if unit else ()
            entry = {
                "layers": [name for name in linears if name.startswith(f"{unit}.")] if unit else [],
                "groups": [asdict(group) for group in work.report.groups[before:]],
                "heads": [[size, *said] for size, said in work.heads.items()],
                "shapes": {name: list(parameter.shape) for name, parameter in held},
            }
            write_unit(streamed, manifest, unit, units, entry)
            bar.update()

        with bar, loop.without(work.gone):
            for i, chain in enumerate(chains if work.narrows else ()):
                _narrow(chain, loop, work, states, write, known, i + 1 < len(chains))
            for unit in units:
                if unit not in {entry["unit"] for entry in manifest.finished}:
                    with streamed.loaded(unit):
                        write(unit, len(work.report.groups))
        for entry in manifest.finished:
            _take_shapes(model, entry["shapes"])
        for module in linears.values():
            follow_weight(module)
        try:
            work.finish()
        except ValueError:
            manifest.remove()  # a resumed job would end in the same way
            raise
        if manifest.folder.is_dir():
            name = type(model).__name__
            put_whole(manifest, streamed, target, others, lambda folder: StreamedModel(folder, architecture=name))
        if not keep:
            manifest.remove()
    return work.report


def _narrow(
    chain: Chain,
    loop: BlockLoop,
    work: StructuredPass,
    states: HiddenStates,
    write: Callable[[str, int], None],
    finished: set[str],
    hand_on: bool,
) -> None:
    """Those blocks of a chain that are not `finished`; `write` is called with each."""
    names = [stage.name for stage in chain.stages]
    begin = 1 + max((i for i, name in enumerate(names) if name in finished), default=-1)
    last = names[begin - 1] if begin else None
    hidden = None
    if last is not None and (hand_on or begin < len(names)) and chain.stages[0].block is not None:
        hidden = states.read(last)
    if begin == len(names):
        loop.finish(chain, hidden)
        return
    before = len(work.report.groups)

    def done(stage: Stage, given: list[Tensor], dense: list[Tensor]) -> None:
        nonlocal before, last
        work.cut()
        if stage.name in work.gone:  # it hands on what the block before it does
            return
        if given and (hand_on or stage is not chain.stages[-1]):
            states.write(stage.name, given)
        write(stage.name, before)
        if last is not None:
            states.remove(last)
        before, last = len(work.report.groups), stage.name

    loop.walk(chain, work.visitor(loop), hand_on=hand_on, done=done, begin=begin, hidden=hidden)


def _take_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Let parameters without values have the shapes that they were written with."""
    for name, shape in shapes.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        if list(getattr(module, own).shape) != list(shape):
            like = getattr(module, own)
            setattr(module, own, nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=False))
