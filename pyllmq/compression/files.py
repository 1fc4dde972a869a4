"""Methods that need no calibration data: checkpoint file by checkpoint file, in several processes, without a model that runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..config import KMeansConfig, SparseConfig
from ..linears import DEFAULT_EXCLUDE, is_transposed_linear, left_dense, select_linears
from .blocks import find_stages
from .data_free import pack_columns
from .manifest import Manifest, source_signature, write_tensors
from .memory import peak_memory
from .model import planned_linears, start_report
from .job import warn
from .pruning import pack_kept, pruning_mask
from .report import CompressionReport, LayerReport
from .stream import open_manifest, put_finished, versions

Result = tuple[list[LayerReport], dict[str, Any], int]
"""Rows of the report, name -> structure, peak memory."""


def compress_files(
    source: Any,
    output: str | os.PathLike[str],
    config: KMeansConfig | SparseConfig,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    others: Sequence[Any] = (),
    workers: int = 1,
    resume: bool = False,
    progress: bool = True,
) -> CompressionReport:
    """Compress a folder by its weights alone. Errors in the report are those of the weights.

    Args:
        source: folder of a transformers model, or a `StreamedModel` of one.
        config: `KMeansConfig`, or a `SparseConfig` of the method "magnitude" that does not quantize.
        workers: processes, each of which works on one file of the checkpoint at a time; the machine's threads are shared out.
        others: as for `compress_folder`, like the arguments not named here.

    Raises:
        ValueError: a method that needs data, and as `compress_folder`.
    """
    from ..integrations.checkpoint import StreamedModel

    started = time.perf_counter()
    if isinstance(config, SparseConfig) and (config.method != "magnitude" or config.quantize or config.sweeps):
        raise ValueError(f"{config.method!r} with these settings needs calibration data; use pyllmq.compress_folder")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers is {workers!r}; it must be an integer >= 1")
    streamed = source if isinstance(source, StreamedModel) else StreamedModel(source)
    model = streamed.model
    chosen = select_linears(model, include, exclude)
    planned = planned_linears(model, chosen, find_stages(model, chosen, outside=include is not None))
    report = start_report(config, *left_dense(model, planned, include, exclude))
    if streamed.without_place:
        warn(report, streamed.copied_as_they_are())
    weight_keys = streamed.weight_keys(planned)
    linears = {key: (name, is_transposed_linear(planned[name])) for name, key in weight_keys.items()}
    target = Path(output).resolve()
    signature = {
        "source": source_signature(streamed.folder),
        "config": {"type": type(config).__name__, **config.to_dict()},
        "linears": list(planned),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }
    manifest = open_manifest(target, signature, resume)
    known = {entry["unit"] for entry in manifest.finished}
    todo = [file for file in streamed.files if file.name not in known]
    done = sum(len(entry["layers"]) for entry in manifest.finished)
    report.peak_memory = peak_memory()
    with (
        manifest.locked(),
        tqdm(total=len(planned), initial=done, disable=not progress, unit="layer") as bar,
        _work(todo, manifest, config, linears, set(streamed.headers), workers) as results,
    ):
        for file, (layers, structures, peak) in results:
            entry = {"layers": [asdict(layer) for layer in layers], "structures": structures}
            manifest.add(file.name, _packed_name(file), {**entry, "warnings": [], "left_over": 0.0, "seconds": 0.0})
            report.peak_memory = max(report.peak_memory, peak)
            bar.update(len(layers))
    rows = {row["name"]: LayerReport(**row) for entry in manifest.finished for row in entry["layers"]}
    report.layers = [rows[name] for name in planned]
    names = {name: key.removesuffix(".weight") for name, key in weight_keys.items()}
    put_finished(manifest, streamed, target, others, names)
    report.seconds = time.perf_counter() - started
    return report


@contextmanager
def _work(
    files: Sequence[Path],
    manifest: Manifest,
    config: KMeansConfig | SparseConfig,
    linears: Mapping[str, tuple[str, bool]],
    keys: set[str],
    workers: int,
) -> Iterator[Iterator[tuple[Path, Result]]]:
    """(file, result) of every file as it is finished; in this process if there is nothing to share out."""
    workers = min(workers, len(files))
    if workers <= 1:
        yield ((file, compress_file(file, manifest.folder / _packed_name(file), config, linears, keys)) for file in files)
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        tasks = {
            pool.submit(compress_file, file, manifest.folder / _packed_name(file), config, linears, keys): file for file in files
        }
        try:
            yield ((tasks[task], task.result()) for task in as_completed(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _packed_name(file: Path) -> str:
    """Of the file that is written for `file`: always safetensors."""
    return file.name if file.suffix == ".safetensors" else f"{file.stem.replace('pytorch_model', 'model')}.safetensors"


def compress_file(
    file: Path,
    target: Path,
    config: KMeansConfig | SparseConfig,
    linears: Mapping[str, tuple[str, bool]],
    keys: set[str],
) -> Result:
    """Write one file of a checkpoint with the Linears in it packed.

    Args:
        linears: key of a weight -> (name in the model, whether it is stored as [in_features, out_features]).
        keys: what is written, of all files.
    """
    from ..folders import opened

    layers, structures, written = [], {}, {}
    with opened(file) as tensors:
        for key in sorted(keys & set(tensors.keys())):
            if key not in linears:
                written[key] = tensors.get_tensor(key)
                continue
            started = time.perf_counter()
            name, transposed = linears[key]
            stored = tensors.get_tensor(key)
            dense = stored.T if transposed else stored
            packed = _pack(name, dense, config)
            structures[name] = packed.structure.to_dict()
            written |= {f"{key.removesuffix('weight')}{part}": value for part, value in packed.tensors.items()}
            layers.append(_row(name, dense, packed, started))
    write_tensors(target, {key: value.contiguous() for key, value in written.items()})
    return layers, structures, peak_memory()


def _pack(name: str, dense: Tensor, config: KMeansConfig | SparseConfig) -> Any:
    try:
        if isinstance(config, KMeansConfig):
            return pack_columns(dense, torch.full((dense.shape[1],), config.bits), row_scale=config.row_scale)
        if not bool(torch.isfinite(dense).all()):
            raise ValueError("holds values that are not finite; repair the model before compressing it")
        pruned = pruning_mask(dense, dense, config, config.share)
        dtype = dense.dtype if config.values is None else getattr(torch, config.values)
        return pack_kept(dense.float().masked_fill(pruned, 0), pruned, None, config, dtype)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error


def _row(name: str, dense: Tensor, packed: Any, started: float) -> LayerReport:
    weight, found = dense.float(), packed.dequantize()
    output = float(weight.double().square().sum())
    pruned = float((found == 0).double().mean())
    return LayerReport(
        name=name,
        out_features=dense.shape[0],
        in_features=dense.shape[1],
        bits_per_weight=packed.bits_per_weight,
        paper_bits=packed.bits_per_weight,
        nbytes=packed.nbytes,
        dense_nbytes=dense.numel() * dense.element_size(),
        error=float((found - weight).double().square().sum()) / max(output, 1e-300),
        seconds=time.perf_counter() - started,
        pruned=pruned if packed.structure.kind != "codebook" else 0.0,
    )
