"""A whole run: shapes x tokens x providers -> rows, one printed table, and if asked for a CSV and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pyllmq import backends
from pyllmq.operations import DEFAULT_PRECISION

from . import plot as plotting
from . import record, sparse
from .gpu import run_on_gpu
from .gpu_providers import sparse_gpu_providers
from .memory import READ_LIMIT, cold_bytes_for, last_level_cache_bytes, ram_bytes, read_limit_calls
from .providers import BASELINE, RIVALS, Layer, Provider, activations, check, dense_weight, pyllmq_codebook
from .record import Row
from .shapes import Shape, resolve
from .timing import FEW_TOKENS, Samples, cold_copies, measure

OPS = ("codebook_linear", sparse.OP)
OUR_ACTIVATIONS = (torch.float32, torch.bfloat16)
BUSY_SHARE = 0.05


def run(
    op: str = "codebook_linear",
    shapes: Sequence[str] = ("llama-2-7b",),
    bits: Sequence[str | int | float] = (2, 3, 4),
    tokens: Sequence[int] = (1, 8, 512),
    device: str = "cpu",
    precision: Sequence[str] = (DEFAULT_PRECISION,),
    csv: Path | str | None = None,
    plot: Path | str | None = None,
    *,
    providers: Sequence[Provider] | None = None,
    budget_s: float = 1.5,
    cold_bytes: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Measure pyllmq beside its rivals and print one table.

    Args:
        op: "codebook_linear", or "sparse_linear" with providers of its own (sparse.py), whose goals are printed, too.
        shapes: names of models (see shapes.py) or "NxK".
        bits: widths of our columns: 1..8, a mix "2.1", with outliers "2.1+0.005".
        tokens: numbers of tokens M.
        device: "cpu"; "cuda" has rivals, timing and a table of its own (gpu.py).
        precision: of our arithmetic: "exact", "high", "fast"; each is a row of its own.
        csv: file to append the rows to; plot: PNG to draw from that file.
        providers: others than ours and the rivals. The first that is "torch fp32" is the baseline and must be there.
        budget_s: seconds of timing for each provider in each case.
        cold_bytes: bytes of weight copies to rotate over up to M = 64; None: twice the last-level cache, 256 MiB at least, and
            at most what lets the copies of all providers fit in a third of the RAM.

    Returns:
        The rows, in the order of the table. At M = 1 the first is "read limit": a plain loop over as many bytes as the
        dense fp32 weight has.

    Raises:
        ValueError: an op, shape, width, M or device that is not known, a CSV of another kind. ImportError: a plot
        without matplotlib. Both before anything is measured. WrongResultError: a provider's result is wrong.
    """
    _check(op, tokens, device, budget_s)
    cases = resolve(shapes)
    if device == "cuda":
        if plot is not None:
            raise ValueError("a run on a GPU draws no plot; leave plot out")
        return run_on_gpu(
            op,
            cases,
            _unique(bits),
            _unique(tokens),
            csv,
            providers=sparse_gpu_providers() if providers is None and op == sparse.OP else providers,
            cold_bytes=cold_bytes,
            progress=progress,
        )
    chosen = list(RIVALS if providers is None else providers)
    if providers is None and op == sparse.OP:
        chosen = sparse.providers()
    elif providers is None:
        chosen += [
            pyllmq_codebook(width, dtype, each)
            for dtype in OUR_ACTIVATIONS
            for each in _unique(precision)
            for width in _unique(bits)
        ]
    names = [provider.name for provider in chosen]
    if BASELINE not in names or len(set(names)) != len(names):
        raise ValueError(f"providers must have names of their own, and {BASELINE!r} among them; given: {names}")
    if plot is not None and csv is None:
        raise ValueError("a plot is drawn only from a CSV; give csv too")
    if csv is not None:
        record.check_header(Path(csv))
    if plot is not None:
        plotting.require_matplotlib()

    ready, left_out = [], {}
    for provider in chosen:
        ok, why = provider.available()
        if ok:
            ready.append(provider)
        else:
            left_out[provider.name] = why
    cold_note = ""
    if cold_bytes is None:
        cold_bytes, cold_note = cold_bytes_for(len(ready) + 1, last_level_cache_bytes(), ram_bytes())
    rows: list[Row] = []
    total = (len(ready) * len(tokens) + (1 in tokens)) * len(cases)
    with torch.no_grad(), tqdm(total=total, desc=op, unit="case", disable=not progress, leave=False) as bar:
        for shape in cases:
            rows += _run_shape(op, shape, ready, _unique(tokens), budget_s, cold_bytes, left_out, bar)

    print(f"{op} on {record.cpu_model()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(record.table(rows))
    if op == sparse.OP:
        print(sparse.goals_table(rows))
    for name, why in left_out.items():
        print(f"not measured: {name}: {why}")
    if cold_note:
        print(f"note: {cold_note}")
    busiest = max((row.others_cpu for row in rows), default=0.0)
    if busiest > BUSY_SHARE:
        print(f"note: other processes used up to {busiest:.0%} of the CPUs; repeat the run on a quiet machine")
    if csv is not None:
        record.append(Path(csv), rows)
        print(f"{len(rows)} rows appended to {csv}")
    if plot is not None and csv is not None:
        sparse.draw(rows, Path(plot)) if op == sparse.OP else plotting.draw(Path(csv), Path(plot))
        print(f"drawn: {plot}")
    return rows


def _check(op: str, tokens: Sequence[int], device: str, budget_s: float) -> None:
    if op not in OPS:
        raise ValueError(f"op {op!r} is not known; known: {', '.join(OPS)}")
    if not tokens or any(isinstance(m, bool) or not isinstance(m, int) or m < 1 for m in tokens):
        raise ValueError(f"numbers of tokens {list(tokens)}; each must be an integer of at least 1")
    if budget_s <= 0:
        raise ValueError(f"budget_s is {budget_s}; it must be positive")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU here; allowed: 'cpu'")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} cannot be measured by this version; allowed: 'cpu', 'cuda'")


def _unique(values: Sequence) -> list:
    return list(dict.fromkeys(values))


def _run_shape(
    op: str,
    shape: Shape,
    providers: Sequence[Provider],
    tokens: Sequence[int],
    budget_s: float,
    cold_bytes: int,
    left_out: dict[str, str],
    bar: tqdm,
) -> list[Row]:
    weight = dense_weight(shape.n, shape.k)
    layers: dict[str, Layer] = {}
    for provider in providers:
        bar.set_postfix_str(f"{shape.name}: {provider.name} packs")
        try:
            layers[provider.name] = provider.make(weight)
        except ValueError as error:  # a rival that does not take this shape is named below the table
            left_out[f"{provider.name} at {shape.n}x{shape.k}"] = str(error)
            bar.update(len(tokens))
    runnable = [provider for provider in providers if provider.name in layers]
    copies = {name: [layer] for name, layer in layers.items()}
    rows = []
    for m in tokens:
        inputs = {dtype: activations(m, shape.k, dtype) for dtype in {layer.dtype for layer in layers.values()}}
        errors = {p.name: check(p, layers[p.name], weight, inputs[layers[p.name].dtype]) for p in runnable}
        calls: dict[str, Sequence[Callable[[], object]]] = {}
        for name, layer in layers.items():
            wanted = cold_copies(layer.nbytes, cold_bytes) if m <= FEW_TOKENS else 1
            while len(copies[name]) < wanted:
                copies[name].append(layer.copy())
            calls[name] = [partial(copy.run, inputs[layer.dtype]) for copy in copies[name][:wanted]]
        if m == 1:
            calls[READ_LIMIT] = read_limit_calls(layers[BASELINE].nbytes, cold_bytes)
        bar.set_postfix_str(f"{shape.name}, M = {m}")
        others = record.OthersCpu()
        samples = measure(calls, budget_s=budget_s, finished=lambda name: bar.update())
        rows += _rows(op, shape, m, runnable, layers, samples, errors, others.share())
    return rows


def _rows(
    op: str,
    shape: Shape,
    m: int,
    providers: Sequence[Provider],
    layers: dict[str, Layer],
    samples: dict[str, Samples],
    errors: dict[str, float],
    others_cpu: float,
) -> list[Row]:
    baseline_us = samples[BASELINE].percentile_us(50)
    baseline_bytes = layers[BASELINE].nbytes
    limit_gb_per_s = float("nan")
    if READ_LIMIT in samples:
        limit_gb_per_s = baseline_bytes / samples[READ_LIMIT].percentile_us(50) / 1e3
    environment: dict[str, Any] = {**record.environment()}

    def row(name: str, nbytes: int, **fields: Any) -> Row:
        sample = samples[name]
        median_us = sample.percentile_us(50)
        return Row(
            ratio_to_torch_fp32=baseline_us / median_us,
            op=op,
            provider=name,
            shape=shape.name,
            n=shape.n,
            k=shape.k,
            m=m,
            bits_per_weight=8 * nbytes / (shape.n * shape.k),
            threads=torch.get_num_threads(),
            samples=len(sample.nanoseconds),
            median_us=median_us,
            p20_us=sample.percentile_us(20),
            p80_us=sample.percentile_us(80),
            gweights_per_s=shape.n * shape.k / median_us / 1e3,
            gb_per_s=nbytes / median_us / 1e3,
            share_of_read_limit=nbytes / median_us / 1e3 / limit_gb_per_s,
            others_cpu=others_cpu,
            **fields,
            **environment,
        )

    rows = []
    if READ_LIMIT in samples:
        isa = backends.cpu.runtime.kernels().isa()
        probe: dict[str, Any] = {"kernel": "_cpu.read_bandwidth_probe", "isa": isa, "activations": "none"}
        rows.append(row(READ_LIMIT, baseline_bytes, precision="", relative_error=0.0, **probe))
    for provider in providers:
        layer = layers[provider.name]
        rows.append(
            row(
                provider.name,
                layer.nbytes,
                kernel=layer.kernel(m),
                activations=str(layer.dtype).removeprefix("torch."),
                precision=provider.precision,
                relative_error=errors[provider.name],
                isa=provider.isa(),
            )
        )
    return rows
