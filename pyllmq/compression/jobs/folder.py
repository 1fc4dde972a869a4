"""Compression from folder to folder, one block in memory at a time; what is finished is on the disk and never done again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...config import MethodConfig
from ...dispatch import plain_defaults
from ...folders import INDEX, SINGLE, copy_others, opened, put_folder, read_headers
from ...formats import structure_from_dict
from ...layers.linear import PackedModule
from ...linears import DEFAULT_EXCLUDE, LeftDense, dense_weight
from ...memory import peak_memory
from ...weights import OUTSIDE
from ..calibration import Batch, as_batches, within_positions
from ..methods import StaysDenseError, method_of
from ..model_state import quiet_eval
from ..objective import NoLossError
from ..ranks import ALONE, Ranks
from ..report import CompressionReport, LayerReport
from ..statistics.blocks import BlockLoop, Chain, Stage
from ..statistics.loss_gradients import LossGradients, output_gradients_by_block
from .ends import pack_end
from .in_memory import without_gradients
from .job import Job, check_finite, open_task, stays_dense, warn
from .manifest import (
    Manifest,
    batches_digest,
    source_signature,
    sync,
    working_folder,
    write_tensors,
    write_text,
)

if TYPE_CHECKING:
    from ...integrations.checkpoint import StreamedModel


@plain_defaults()
def compress_folder(
    source: Any,
    output: str | os.PathLike[str],
    config: MethodConfig,
    calibration: Iterable[Any],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    embeddings: int | None = None,
    head: int | None = None,
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
        config: as for `compress`; what needs the whole model at once is refused.
        calibration: batches, as for `compress`.
        include, exclude, embeddings, head: as for `compress`.
        others: what else belongs into the folder and has a `save_pretrained`. Everything in `source` that is not replaced, such
            as its tokenizer, is copied anyway.
        resume: go on with a job that was ended, to the same bytes. Refused if it is not the same job.
        progress: show a tqdm bar.
        ranks: the processes that work together, see `ranks.joined`. Each is given the same arguments.

    Raises:
        ValueError: as `compress`; settings that need the whole model; a job that cannot be resumed.
        FileExistsError: an unfinished job is in the way.
        OSError: files that cannot be read or written; what is finished stays.
    """
    from ...integrations.transformers import expect_own_names

    started = time.perf_counter()
    method = method_of(config)
    if reason := method.needs.whole_model:
        raise ValueError(f"{reason}; use pyllmq.compress (in the command: --in-memory), or leave it out")
    target = Path(output).resolve()
    streamed, task = open_task(source, method, include, exclude, embeddings, head)
    model = streamed.model
    all_batches = as_batches(calibration, model)
    if len(all_batches) < ranks.size:
        raise ValueError(
            f"{len(all_batches)} calibration batches are too few for {ranks.size} processes; give each at least one"
        )
    names = expect_own_names(model, task.names)

    def signature() -> dict[str, Any]:
        data = {"calibration": batches_digest(all_batches), "processes": ranks.size, "threads": torch.get_num_threads()}
        return (
            job_signature(streamed.folder, config, task.names)
            | {"ends": {end.name: end.bits for end in task.ends}}
            | data
        )

    if streamed.without_place:
        warn(task.report, streamed.copied_as_they_are())
    with ExitStack() as context:
        manifest = ranks.from_first(lambda: open_manifest(target, signature(), resume))
        if ranks.first:
            context.enter_context(manifest.locked())
        batches = [_to_device(batch, streamed.device) for batch in ranks.share(all_batches)]
        loop = BlockLoop(model, _to_device(all_batches[0], streamed.device), batches, streamed)
        done = sum(len(entry["layers"]) for entry in manifest.finished)
        bar = tqdm(total=len(task.names), initial=done, disable=not (progress and ranks.first), unit="layer")
        folder = FolderJob(Job(task, task.run(loop, ranks), bar), streamed, manifest, started)
        with quiet_eval(model), torch.no_grad(), within_positions(model, all_batches), bar:
            chains = loop.find_chains(task.stages, lambda stage: check_finite(stage.linears))
            folder.plan(chains)
            folder.restore()
            for i, chain in enumerate(chains):
                folder.compress_chain(chain, hand_on=i + 1 < len(chains))
            folder.copy_the_rest()
            task.note_dense()
        task.report.seconds = folder.seconds()
        task.report.peak_memory = max(ranks.gather(peak_memory()))
        ranks.from_first(lambda: put_finished(manifest, streamed, target, others, names))
    return task.report


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


def job_signature(source: Path, config: MethodConfig, linears: Sequence[str]) -> dict[str, Any]:
    """What the bytes of the result depend on, whatever the method."""
    return {
        "source": source_signature(source),
        "config": {"type": type(config).__name__, **config.to_dict()},
        "linears": list(linears),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything that takes part in the result."""
    import safetensors
    import transformers

    from ... import version

    named = {"pyllmq": version, "torch": torch, "transformers": transformers, "safetensors": safetensors}
    return {name: module.__version__ for name, module in named.items()}


def open_manifest(target: Path, signature: Mapping[str, Any], resume: bool, finished: bool = False) -> Manifest:
    """The job that writes `target`: a new one, or the one to go on with, which may be `finished`."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give the name of a folder")
    return Manifest.resume(target, signature, finished) if resume else Manifest.begin(target, signature)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


class FolderJob:
    """A `Job` whose finished blocks go to the working folder."""

    def __init__(self, job: Job, streamed: StreamedModel, manifest: Manifest, started: float) -> None:
        self.job, self.streamed, self.manifest, self.started = job, streamed, manifest, started
        self.method, self.report, self.loop, self.ranks = job.task.method, job.task.report, job.run.loop, job.run.ranks
        self.earlier = manifest.finished[-1]["seconds"] if manifest.finished else 0.0
        self.hidden, self.dense = (HiddenStates(manifest.place, kind, self.ranks) for kind in ("hidden", "dense"))
        """What the blocks give out, and what the dense ones do."""
        self.chain, self.hand_on = Chain([]), False
        """The chain in hand."""

    def seconds(self) -> float:
        """Of this run and those that it goes on from."""
        return self.earlier + time.perf_counter() - self.started

    # ---- the plan ----

    def plan(self, chains: Sequence[Chain]) -> None:
        """What is decided before the first block; a resumed job reads it."""
        job, method = self.job, self.method
        file = self.manifest.place / "plan.safetensors"
        if self.manifest.plan is not None:
            method.plan = self.manifest.plan
            if file.exists():
                job.run.gradients = LossGradients.from_tensors(_read(file)).shared(self.ranks)
            return
        if (which := method.needs.loss_gradients) != "none":
            hidden = HiddenStates(self.manifest.place, "inputs", self.ranks)
            try:
                found = output_gradients_by_block(self.loop, chains, job.task.linears, hidden, self.ranks)
            except NoLossError as error:
                for stage in (stage for chain in chains for stage in chain.stages):
                    hidden.remove(stage.name)
                warn(self.report, without_gradients(error))
            else:
                found = found.limited_to(which)
                job.run.gradients = found.shared(self.ranks)
                if self.ranks.first:
                    write_tensors(file, found.tensors())
        method.plan = method.make_plan(job.task.linears, chains, job.run)
        if self.ranks.first:
            self.manifest.set_plan(method.plan)

    # ---- block after block ----

    def restore(self) -> None:
        """Take up the state behind the last finished unit."""
        for entry in self.manifest.finished:
            self.report.layers += [LayerReport(**row) for row in entry["layers"]]
            self.report.warnings[:] = entry["warnings"]
            self.report.left_dense[:] = [LeftDense(**row) for row in entry["left_dense"]]
            self.method.carried = entry["carried"]

    def compress_chain(self, chain: Chain, hand_on: bool) -> None:
        names = [stage.name for stage in chain.stages]
        finished = {entry["unit"] for entry in self.manifest.finished}
        begin = sum(name in finished for name in names)
        hidden = dense = None
        if begin and (hand_on or begin < len(names)):
            hidden = self.hidden.read(names[begin - 1])
            if self.method.needs.dense_block and begin < len(names):
                dense = self.dense.read(names[begin - 1])
        if begin == len(names):
            self.loop.finish(chain, hidden)
            return
        self.chain, self.hand_on = chain, hand_on
        self.loop.walk(
            chain,
            self.job.compress_stage,
            hand_on=hand_on,
            done=self.finish,
            begin=begin,
            hidden=hidden,
            dense=dense,
            asymmetric=self.method.needs.dense_block,
        )

    def pack(self, stage: Stage) -> None:
        """A unit by its weights alone."""
        task = self.job.task
        self.chain, self.hand_on = Chain([stage]), False
        with self.streamed.loaded(stage.name):
            check_finite(stage.linears)
            for name, module in stage.linears.items():
                try:
                    self.job.replace(name, module, self.method.compress_weight(name, dense_weight(module)))
                except StaysDenseError as why:
                    task.report.left_dense.append(stays_dense(name, module, str(why)))
            for end in stage.ends:
                self.job.replace_end(end, pack_end(end.name, end.weight, end.bits))
            self.finish(stage, [], [])

    def finish(self, stage: Stage, hidden: list[Tensor], dense: list[Tensor]) -> None:
        """Write a unit, then the hidden states behind it, then its entry in the manifest."""
        unit, job, report = stage.name, self.job, self.report
        last = stage.block is None or stage is self.chain.stages[-1]
        if hidden and (self.hand_on or not last):
            self.hidden.write(unit, hidden)
        if dense and not last:
            self.dense.write(unit, dense)
        self.ranks.gather(None)  # all of them are written
        layers = report.layers[sum(len(entry["layers"]) for entry in self.manifest.finished) :]
        replaced = {name: job.task.model.get_submodule(name) for name in job.replaced}
        structures = {name: m.structure.to_dict() for name, m in replaced.items() if isinstance(m, PackedModule)}
        entry = self._entry(layers, structures)
        self.ranks.from_first(lambda: self._write(unit, entry))
        if not self.ranks.first:
            self.manifest.finished.append(entry | {"unit": unit})
        # Those behind the last block of a chain stay: they are what the model goes on with after it.
        before = 0 if stage.block is None else self.chain.stages.index(stage)
        if before:
            for states in (self.hidden, self.dense):
                states.remove(self.chain.stages[before - 1].name)
        job.put_back()

    def copy_the_rest(self) -> None:
        """Units in which nothing is compressed."""
        known = {entry["unit"] for entry in self.manifest.finished}
        for unit in (OUTSIDE, *self.streamed.blocks):
            if unit not in known and self.ranks.first:
                with self.streamed.loaded(unit):
                    self._write(unit, self._entry([], {}))

    def _entry(self, layers: Sequence[LayerReport], structures: Mapping[str, Any]) -> dict[str, Any]:
        """Of the manifest: what a unit came to, and the state behind it."""
        return {
            "layers": [asdict(layer) for layer in layers],
            "structures": dict(structures),
            "warnings": list(self.report.warnings),
            "left_dense": [asdict(item) for item in self.report.left_dense],
            "carried": self.method.carried,
            "seconds": self.seconds(),
        }

    def _write(self, unit: str, entry: Mapping[str, Any]) -> None:
        write_unit(self.streamed, self.manifest, unit, (OUTSIDE, *self.streamed.blocks), entry)


def write_unit(
    streamed: StreamedModel, manifest: Manifest, unit: str, units: Sequence[str], entry: Mapping[str, Any]
) -> None:
    """A file with the tensors of a loaded unit, one of `units`, and its entry in the manifest."""
    part = f"model-{units.index(unit) + 1:05d}-of-{len(units):05d}.safetensors"
    file = SINGLE if len(units) == 1 else part
    write_tensors(manifest.folder / file, streamed.checkpoint_tensors(unit))
    manifest.add(unit, file, entry)


def put_finished(
    manifest: Manifest, streamed: StreamedModel, target: Path, others: Sequence[Any], names: Mapping[str, str]
) -> None:
    """Make the folder of finished files whole, open it as a user will, and move it to its place.

    `names`: Linear -> what its tensors are called in the files.
    """
    from ...integrations.transformers import check_written, describe_packed

    structures = {name: described for entry in manifest.finished for name, described in entry["structures"].items()}
    order = [name for name, _ in streamed.model.named_modules() if name in structures]
    describe_packed(streamed.model, {names[name]: structure_from_dict(structures[name]) for name in order})
    put_whole(manifest, streamed, target, others, lambda folder: check_written(folder, type(streamed.model)))
    manifest.remove()


def put_whole(
    manifest: Manifest, streamed: StreamedModel, target: Path, others: Sequence[Any], check: Callable[[Path], object]
) -> None:
    """Add to the finished files what else belongs into a folder of this model, `check` it, and move it to its place."""
    folder = manifest.folder
    write_index(folder, [entry["file"] for entry in manifest.finished])
    streamed.save_settings(folder)
    for other in others:
        other.save_pretrained(folder)
    copy_others(streamed.folder, folder, skip=(manifest.place, target))
    check(folder)
    for path in (*folder.rglob("*"), folder):
        sync(path)
    put_folder(folder, target)


def write_index(folder: Path, files: Sequence[str]) -> None:
    """model.safetensors.index.json of these files; none for a single one."""
    if list(files) == [SINGLE]:
        return
    paths = [folder / file for file in sorted(files)]
    where = {key: header.file.name for key, header in sorted(read_headers(paths).items())}
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in paths)}, "weight_map": where}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of this process's batches, in files of the working folder."""

    place: Path
    kind: str
    ranks: Ranks

    def file(self, unit: str) -> Path:
        return self.place / f"{self.kind}.{unit}.{self.ranks.rank}.safetensors"

    def write(self, unit: str, hidden: Sequence[Tensor]) -> None:
        write_tensors(self.file(unit), {f"{i:06d}": tensor.contiguous() for i, tensor in enumerate(hidden)})

    def read(self, unit: str) -> list[Tensor]:
        return list(_read(self.file(unit)).values())

    def remove(self, unit: str) -> None:
        self.file(unit).unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Tensor]:
    with opened(file) as tensors:
        return {key: tensors.get_tensor(key).clone() for key in sorted(tensors.keys())}
