"""Methods that need no calibration data: checkpoint file by checkpoint file, in several processes, without a model that runs."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...config import MethodConfig
from ...dispatch import plain_defaults
from ...folders import opened
from ...linears import DEFAULT_EXCLUDE, LeftDense, is_transposed_linear
from ...memory import peak_memory
from ...weights import OUTSIDE, MadeFromOthersError
from ..methods import StaysDenseError, method_of
from ..report import CompressionReport, LayerReport
from ..statistics.blocks import BlockLoop, Stage
from .ends import pack_end
from .folder import FolderJob, job_signature, open_manifest, put_finished
from .job import Job, Task, layer_report, open_task, warn
from .manifest import Manifest, write_tensors

if TYPE_CHECKING:
    from ...integrations.checkpoint import StreamedModel


@dataclass
class FileResult:
    """What became of the Linears in one file."""

    layers: list[LayerReport] = field(default_factory=list)
    structures: dict[str, Any] = field(default_factory=dict)
    """By name, as config.json describes them."""
    left_dense: list[LeftDense] = field(default_factory=list)
    peak_memory: int = 0


@plain_defaults()
def compress_files(
    source: Any,
    output: str | os.PathLike[str],
    config: MethodConfig,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    embeddings: int | None = None,
    head: int | None = None,
    others: Sequence[Any] = (),
    workers: int = 1,
    resume: bool = False,
    progress: bool = True,
) -> CompressionReport:
    """Compress a folder by its weights alone. Errors in the report are those of the weights.

    Args:
        source: folder of a transformers model, or a `StreamedModel` of one.
        config: of a method that needs no calibration: `KMeansConfig`, a `SparseConfig` of the method "magnitude" that neither
            quantizes nor allocates, or one of your own.
        workers: processes, each of which works on one file of the checkpoint at a time; the machine's threads are shared out. A
            checkpoint whose tensors transformers merges or stacks as it loads (experts) goes block by block in one process.
        others: as for `compress_folder`, like the arguments not named here.

    Raises:
        ValueError: a method that needs data, and as `compress_folder`.
    """
    started = time.perf_counter()
    method = method_of(config)
    if method.needs.calibration:
        raise ValueError(f"{method.name!r} with these settings needs calibration data; use pyllmq.compress_folder")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers is {workers!r}; it must be an integer >= 1")
    streamed, task = open_task(source, method, include, exclude, embeddings, head)
    report, planned = task.report, task.linears
    ends = {end.name: end for end in task.ends}
    if streamed.without_place:
        warn(report, streamed.copied_as_they_are())
    target = Path(output).resolve()
    signature = job_signature(streamed.folder, config, task.names) | {"ends": {n: end.bits for n, end in ends.items()}}
    try:
        weight_keys = streamed.weight_keys(planned | {name: end.module for name, end in ends.items()})
    except MadeFromOthersError:  # experts that transformers stacks
        if workers > 1:
            text = f"workers={workers} is not used: {streamed.folder} holds experts that transformers stacks as it loads them, "
            warn(report, text + "so blocks are compressed one after the other in one process")
        return _compress_blocks(streamed, task, target, signature, others, resume, progress)
    linears = {key: (name, is_transposed_linear(planned[name])) for name, key in weight_keys.items() if name in planned}
    of_ends = {key: (name, ends[name].bits) for name, key in weight_keys.items() if name in ends}
    manifest = open_manifest(target, signature, resume)
    known = {entry["unit"] for entry in manifest.finished}
    todo = [file for file in streamed.files if file.name not in known]
    done = sum(len(entry["layers"]) for entry in manifest.finished)
    report.peak_memory = peak_memory()
    with (
        manifest.locked(),
        tqdm(total=len(task.names), initial=done, disable=not progress, unit="layer") as bar,
        closing(_work(todo, manifest, config, linears, of_ends, set(streamed.headers), workers)) as results,
    ):
        for file, found in results:
            report.peak_memory = max(report.peak_memory, found.peak_memory)
            manifest.add(file.name, _packed_name(file), asdict(found) | {"warnings": [], "carried": {}, "seconds": 0.0})
            bar.update(len(found.layers) + len(found.left_dense))
    rows = {row["name"]: LayerReport(**row) for entry in manifest.finished for row in entry["layers"]}
    report.layers = [rows[name] for name in task.names if name in rows]
    report.left_dense += [LeftDense(**row) for entry in manifest.finished for row in entry["left_dense"]]
    if not rows.keys() - ends.keys():
        manifest.remove()
        raise task.nothing_packed()
    names = {name: key.removesuffix(".weight") for name, key in weight_keys.items()}
    put_finished(manifest, streamed, target, others, names)
    report.seconds = time.perf_counter() - started
    return report


def _compress_blocks(
    streamed: StreamedModel,
    task: Task,
    target: Path,
    signature: Mapping[str, Any],
    others: Sequence[Any],
    resume: bool,
    progress: bool,
) -> CompressionReport:
    """Block by block as transformers loads them, in this process."""
    from ...integrations.transformers import expect_own_names

    names = expect_own_names(streamed.model, task.names)
    manifest = open_manifest(target, signature, resume)
    job = task.run(BlockLoop(streamed.model, {}, [], streamed))
    with manifest.locked(), tqdm(total=len(task.names), disable=not progress, unit="layer") as bar:
        folder = FolderJob(Job(task, job, bar), streamed, manifest, time.perf_counter())
        folder.restore()
        bar.update(len(task.report.layers))
        finished = {entry["unit"] for entry in manifest.finished}
        for unit in (*streamed.blocks, OUTSIDE):
            linears = {n: module for n, module in task.linears.items() if streamed.unit_of(f"{n}.weight") == unit}
            if unit not in finished:
                block = None if unit == OUTSIDE else streamed.model.get_submodule(unit)
                folder.pack(Stage(unit, block, linears, task.ends if unit == OUTSIDE else ()))
        if not any(layer.name in task.linears for layer in task.report.layers):
            manifest.remove()
            raise task.nothing_packed()
        task.report.seconds, task.report.peak_memory = folder.seconds(), peak_memory()
        put_finished(manifest, streamed, target, others, names)
    return task.report


def _work(
    files: Sequence[Path],
    manifest: Manifest,
    config: MethodConfig,
    linears: Mapping[str, tuple[str, bool]],
    ends: Mapping[str, tuple[str, int]],
    keys: set[str],
    workers: int,
) -> Generator[tuple[Path, FileResult]]:
    """(file, result) of every file as it is finished; in this process if there is nothing to share out."""
    tasks = {file: (file, manifest.folder / _packed_name(file), config, linears, ends, keys) for file in files}
    workers = min(workers, len(files))
    if workers <= 1:
        yield from ((file, compress_file(*task)) for file, task in tasks.items())
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        running = {pool.submit(compress_file, *task): file for file, task in tasks.items()}
        try:
            yield from ((running[done], done.result()) for done in as_completed(running))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _packed_name(file: Path) -> str:
    """Of the file that is written for `file`: always safetensors."""
    return file.name if file.suffix == ".safetensors" else f"{file.stem.replace('pytorch_model', 'model')}.safetensors"


def compress_file(
    file: Path,
    target: Path,
    config: MethodConfig,
    linears: Mapping[str, tuple[str, bool]],
    ends: Mapping[str, tuple[str, int]],
    keys: set[str],
) -> FileResult:
    """Write one file of a checkpoint with the Linears in it packed.

    Args:
        linears: key of a weight -> (name in the model, whether it is stored as [in_features, out_features]).
        ends: key of the weight of an embedding or head -> (name in the model, bits).
        keys: what is written, of all files.
    """
    method, result = method_of(config), FileResult()
    written: dict[str, Tensor] = {}
    with opened(file) as tensors:
        for key in sorted(keys & set(tensors.keys())):
            stored = tensors.get_tensor(key)
            if key not in linears and key not in ends:
                written[key] = stored
                continue
            name, transposed = linears.get(key) or (ends[key][0], False)
            dense = stored.T if transposed else stored
            try:
                done = pack_end(name, dense, ends[key][1]) if key in ends else method.compress_weight(name, dense)
            except StaysDenseError as why:
                result.left_dense.append(LeftDense(name, dense.numel(), str(why), False))
                written[key] = stored
                continue
            result.structures[name] = done.weight.structure.to_dict()
            written |= {f"{key.removesuffix('weight')}{part}": value for part, value in done.weight.tensors.items()}
            result.layers.append(layer_report(name, dense, done))
    write_tensors(target, {key: value.contiguous() for key, value in written.items()})
    result.peak_memory = peak_memory()
    return result
