"""Compression from folder to folder, one block in memory at a time; what is finished is on the disk and never done again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import ColumnCodebookConfig, SparseConfig
from ..formats import structure_from_dict
from ..nn import PackedLinear
from ..linears import DEFAULT_EXCLUDE, left_dense, replace_module, select_linears
from .blocks import OUTSIDE, BlockLoop, Chain, Stage, check_finite, find_stages
from .calibration import Batch, as_batches
from .guide import Guidance, output_gradients_by_block
from .job import Config, Job, byte_budgets, plan_sparsity, warn
from .manifest import (
    Manifest,
    batches_digest,
    numbered,
    source_signature,
    sync,
    working_folder,
    write_tensors,
    write_text,
)
from .memory import peak_memory
from .model import planned_linears, quiet_eval, start_report
from .ranks import ALONE, Ranks
from .report import CompressionReport, LayerReport

if TYPE_CHECKING:
    from ..integrations.checkpoint import StreamedModel


def compress_folder(
    source: Any,
    output: str | os.PathLike[str],
    config: Config,
    calibration: Iterable[Any],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    others: Sequence[Any] = (),
    resume: bool = False,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> CompressionReport:
    """Compress the model of a folder into another folder; the same result as `compress` and `save_pretrained`.

    No more is in memory at a time than one block, the Hessians of its inputs, and the hidden states of the calibration data;
    before the first block, what is outside the blocks. Whatever is finished is kept in `OUT.partial` beside the output, which
    itself is there when it is whole.

    Args:
        source: folder of a transformers model in safetensors, or a `StreamedModel` of one.
        output: folder to write; an earlier one of that name is replaced at the end.
        config: as for `compress`; what needs the whole model at once is refused (`needs_whole_model`).
        calibration: batches, as for `compress`.
        include, exclude: name patterns, as for `compress`.
        others: what else belongs into the folder and has a `save_pretrained`, such as the tokenizer.
        resume: go on with a job that was ended, to the same bytes. Refused if it is not the same job.
        progress: show a tqdm bar.
        ranks: the processes that work together, see `ranks.joined`. Each is given the same arguments.

    Raises:
        ValueError: as `compress`; settings that need the whole model; a job that cannot be resumed.
        FileExistsError: an unfinished job is in the way.
        OSError: files that cannot be read or written; what is finished stays.
    """
    from ..integrations.checkpoint import StreamedModel

    started = time.perf_counter()
    for reason in needs_whole_model(config):
        raise ValueError(f"{reason}; use pyllmq.compress (in the command: --in-memory), or leave it out")
    all_batches = as_batches(calibration)
    if len(all_batches) < ranks.size:
        raise ValueError(
            f"{len(all_batches)} calibration batches are too few for {ranks.size} processes; give each at least one"
        )
    target = Path(output).resolve()
    streamed = source if isinstance(source, StreamedModel) else StreamedModel(source)
    model = streamed.model
    chosen = select_linears(model, include, exclude)
    stages = find_stages(model, chosen, outside=include is not None)
    planned = planned_linears(model, chosen, stages)
    names = streamed.names_in_file(planned)
    dense, total = left_dense(model, planned, include, exclude)
    streamed.split(stage.name for stage in stages if stage.block is not None)

    def signature() -> dict[str, Any]:
        return job_signature(streamed.folder, config, all_batches, list(planned), ranks)

    report = start_report(config, dense, total)
    if streamed.without_place:
        warn(report, streamed.copied_as_they_are())
    with ExitStack() as context:
        manifest = ranks.from_first(lambda: open_manifest(target, signature(), resume))
        if ranks.first:
            context.enter_context(manifest.locked())
        batches = [_to_device(batch, streamed.device) for batch in ranks.share(all_batches)]
        loop = BlockLoop(model, _to_device(all_batches[0], streamed.device), batches, streamed)
        done = sum(len(entry["layers"]) for entry in manifest.finished)
        bar = tqdm(total=len(planned), initial=done, disable=not (progress and ranks.first), unit="layer")
        folder = _FolderJob(Job(loop, config, report, bar, ranks), streamed, manifest, started)
        with quiet_eval(model), torch.no_grad(), bar:
            chains = loop.find_chains(stages, _check)
            folder.plan(chains, planned, [len(next(iter(batch.values()))) for batch in all_batches])
            folder.restore()
            for i, chain in enumerate(chains):
                folder.compress_chain(chain, hand_on=i + 1 < len(chains))
            folder.copy_the_rest()
        report.seconds = folder.seconds()
        report.peak_memory = max(ranks.gather(peak_memory()))
        ranks.from_first(lambda: put_finished(manifest, streamed, target, others, names))
    return report


def needs_whole_model(config: Config) -> list[str]:
    """What of these settings can only be had with all weights in memory; empty: nothing."""
    if isinstance(config, ColumnCodebookConfig) and config.tune_steps:
        return [
            f"tuning (tune_steps={config.tune_steps}) trains all layers at once and needs the whole model in memory"
        ]
    if isinstance(config, SparseConfig) and config.allocation in ("fisher", "hutchinson"):
        return [f"allocation={config.allocation!r} takes gradients of the whole model in memory"]
    return []


def how_to_go_on(output: str | os.PathLike[str]) -> str:
    """One sentence on what an ended job left; empty if that is nothing."""
    place = working_folder(Path(output).resolve())
    try:
        contents = json.loads((place / "manifest.json").read_text())
    except (OSError, ValueError):
        return ""
    finished = sum(len(entry["layers"]) for entry in contents["finished"])
    return (
        f"{finished} of {len(contents['signature']['linears'])} Linears are finished and kept in {place}; the same command with "
        "--resume goes on from there"
    )


def job_signature(
    source: Path, config: Config, batches: Sequence[Batch], linears: Sequence[str], ranks: Ranks
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on."""
    return {
        "source": source_signature(source),
        "config": {"type": type(config).__name__, **config.to_dict()},
        "linears": list(linears),
        "calibration": batches_digest(batches),
        "processes": ranks.size,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything that takes part in the result."""
    import safetensors
    import transformers

    from .. import __version__

    return {
        "pyllmq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def open_manifest(target: Path, signature: Mapping[str, Any], resume: bool) -> Manifest:
    """The job that writes `target`: a new one, or the one to go on with."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give the name of a folder")
    if resume:
        return Manifest.resume(target, signature)
    return Manifest.begin(target, signature)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def _check(stage: Stage) -> None:
    for name, module in stage.linears.items():
        check_finite(name, module)


class _FolderJob:
    """A `Job` whose finished blocks go to the working folder."""

    def __init__(self, job: Job, streamed: Any, manifest: Manifest, started: float) -> None:
        self.job, self.streamed, self.manifest, self.started = job, streamed, manifest, started
        self.earlier = manifest.finished[-1]["seconds"] if manifest.finished else 0.0
        self.ranks = job.ranks
        self.chain, self.hand_on = Chain([]), False
        """The chain in hand."""

    def seconds(self) -> float:
        """Of this run and those that it goes on from."""
        return self.earlier + time.perf_counter() - self.started

    # ---- the plan ----

    def plan(self, chains: Sequence[Chain], linears: Mapping[str, nn.Module], rows: Sequence[int]) -> None:
        """What is decided before the first block; a resumed job reads it. `rows`: the number of texts of every batch."""
        job, config = self.job, self.job.config
        file = self.manifest.place / "plan.safetensors"
        if self.manifest.plan is not None:
            job.budgets, job.sparsity = self.manifest.plan["budgets"], self.manifest.plan["sparsity"]
            if file.exists():
                job.guidance = Guidance.from_tensors(_read(file)).shared(self.ranks)
            return
        if isinstance(config, SparseConfig):
            job.sparsity = plan_sparsity(job, config, chains)
        if isinstance(config, ColumnCodebookConfig):
            job.budgets = byte_budgets(linears, config)
            if config.guidance != "none":
                hidden = _Stored(self.manifest.place, "inputs", self.ranks)
                found = output_gradients_by_block(job.loop, chains, linears, hidden, rows, self.ranks)
                found = found.limited_to(config.guidance)
                job.guidance = found.shared(self.ranks)
                if self.ranks.first:
                    write_tensors(file, found.tensors())
        if self.ranks.first:
            self.manifest.set_plan({"budgets": job.budgets, "sparsity": job.sparsity})

    # ---- block after block ----

    def restore(self) -> None:
        """Take up the state behind the last finished unit."""
        for entry in self.manifest.finished:
            self.job.report.layers += [LayerReport(**row) for row in entry["layers"]]
            self.job.report.warnings[:] = entry["warnings"]
            self.job.left_over = entry["left_over"]

    def compress_chain(self, chain: Chain, hand_on: bool) -> None:
        names = [self._unit(stage) for stage in chain.stages]
        finished = {entry["unit"] for entry in self.manifest.finished}
        begin = sum(name in finished for name in names)
        if chain.stages[0].block is None:
            if OUTSIDE not in finished:
                self.job.loop.walk(chain, self.job.compress_stage, hand_on=False, done=self.finish)
            return
        hidden = dense = None
        if begin and (hand_on or begin < len(names)):
            hidden = self._hidden(names[begin - 1]).read()
            if self.job.with_twin and begin < len(names):
                dense = self._hidden(names[begin - 1], "dense").read()
        if begin == len(names):
            self.job.loop.finish(chain, hidden)
            return
        self.chain, self.hand_on = chain, hand_on
        self.job.loop.walk(
            chain,
            self.job.compress_stage,
            hand_on=hand_on,
            done=self.finish,
            begin=begin,
            hidden=hidden,
            dense=dense,
            with_twin=self.job.with_twin,
        )

    def finish(self, stage: Stage, hidden: list[Tensor], dense: list[Tensor]) -> None:
        """Write a unit, then the hidden states behind it, then its entry in the manifest."""
        unit, job = self._unit(stage), self.job
        last = stage.block is None or stage is self.chain.stages[-1]
        if hidden and (self.hand_on or not last):
            self._hidden(unit).write(hidden)
        if dense and not last:
            self._hidden(unit, "dense").write(dense)
        self.ranks.gather(None)  # all of them are written
        layers = job.report.layers[sum(len(entry["layers"]) for entry in self.manifest.finished) :]
        structures = {name: _packed(job, name).structure.to_dict() for name in job.replaced}
        entry = {
            "layers": [asdict(layer) for layer in layers],
            "structures": structures,
            "warnings": list(job.report.warnings),
            "left_over": job.left_over,
            "seconds": self.seconds(),
        }
        self.ranks.from_first(lambda: self._write(unit, entry))
        if not self.ranks.first:
            self.manifest.finished.append(entry | {"unit": unit})
        # Those behind the last block of a chain stay: they are what the model goes on with after it.
        before = 0 if stage.block is None else self.chain.stages.index(stage)
        if before:
            self._hidden(self.chain.stages[before - 1].name).remove()
            self._hidden(self.chain.stages[before - 1].name, "dense").remove()
        for name, module in job.replaced.items():
            replace_module(job.model, name, module)
        job.replaced.clear()

    def copy_the_rest(self) -> None:
        """Units in which nothing is compressed."""
        known = {entry["unit"] for entry in self.manifest.finished}
        for unit in (OUTSIDE, *self.streamed.blocks):
            if unit not in known and self.ranks.first:
                with self.streamed.loaded(unit):
                    nothing = {"layers": [], "structures": {}, "warnings": self.job.report.warnings}
                    self._write(unit, {**nothing, "left_over": self.job.left_over, "seconds": self.seconds()})

    def _write(self, unit: str, entry: Mapping[str, Any]) -> None:
        file = self._file(unit)
        write_tensors(self.manifest.folder / file, self.streamed.checkpoint_tensors(unit))
        self.manifest.add(unit, file, entry)

    def _file(self, unit: str) -> str:
        units = (OUTSIDE, *self.streamed.blocks)
        if len(units) == 1:
            return "model.safetensors"
        return f"model-{units.index(unit) + 1:05d}-of-{len(units):05d}.safetensors"

    @staticmethod
    def _unit(stage: Stage) -> str:
        return OUTSIDE if stage.block is None else stage.name

    def _hidden(self, unit: str, kind: str = "hidden") -> _Hidden:
        """`kind` "dense": what the dense blocks give out."""
        return _Stored(self.manifest.place, kind, self.ranks).of(unit)


def put_finished(
    manifest: Manifest, streamed: StreamedModel, target: Path, others: Sequence[Any], names: Mapping[str, str]
) -> None:
    """Make the folder of finished files whole, open it as a user will, and move it to its place.

    `names`: Linear -> what its tensors are called in the files.
    """
    from ..folders import copy_others, put_folder
    from ..integrations.transformers import check_written, describe_packed

    folder = manifest.folder
    write_index(folder, [entry["file"] for entry in manifest.finished])
    structures = {name: described for entry in manifest.finished for name, described in entry["structures"].items()}
    order = [name for name, _ in streamed.model.named_modules() if name in structures]
    describe_packed(streamed.model, {names[name]: structure_from_dict(structures[name]) for name in order})
    streamed.save_settings(folder)
    for other in others:
        other.save_pretrained(folder)
    copy_others(streamed.folder, folder, skip=(manifest.place, target))
    check_written(folder, type(streamed.model))
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)
    put_folder(folder, target)
    manifest.remove()


def _packed(job: Job, name: str) -> PackedLinear:
    layer = job.model.get_submodule(name)
    assert isinstance(layer, PackedLinear)
    return layer


def write_index(folder: Path, files: Sequence[str]) -> None:
    """model.safetensors.index.json of these files; none for a single one."""
    from ..folders import INDEX, SINGLE, opened

    if list(files) == [SINGLE]:
        return
    where, nbytes = {}, 0
    for file in sorted(files):
        with opened(folder / file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no dict)
                where[key] = file
        nbytes += (folder / file).stat().st_size
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(where.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


class _Stored:
    """Hidden states of this process's batches, in files of the working folder."""

    def __init__(self, place: Path, kind: str, ranks: Ranks) -> None:
        self.place, self.kind, self.ranks = place, kind, ranks

    def of(self, unit: str) -> _Hidden:
        return _Hidden(self.place / f"{self.kind}.{unit}.{self.ranks.rank}.safetensors")


class _Hidden:
    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, hidden: Sequence[Tensor]) -> None:
        write_tensors(self.file, numbered(hidden))

    def read(self) -> list[Tensor]:
        return list(_read(self.file).values())

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Tensor]:
    from ..folders import opened

    with opened(file) as tensors:
        return {key: tensors.get_tensor(key).clone() for key in sorted(tensors.keys())}
