"""A whole run on a GPU: as run.py, but with CUDA graphs, and what fails is named below the table while the rest goes on.

A GPU's time is scarce and nothing has run there before, so one wrong provider must not cost the run. It is never timed, and the
run ends with an error after its table and its CSV were written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import record
from .gpu_providers import gpu_providers
from .gpu_table import COPY_OP, gpu_table
from .gpu_timing import COPY_BYTES, copy_gb_per_s, l2_bytes, measure_replays
from .providers import BASELINE, Layer, Provider, WrongResultError, activations, check, dense_weight
from .record import Row
from .shapes import Shape
from .timing import COLD_BYTES, Samples, cold_copies

Measured = tuple[dict[str, Samples], dict[str, str]]


def run_on_gpu(
    op: str,
    shapes: Sequence[Shape],
    bits: Sequence[str | int | float],
    tokens: Sequence[int],
    csv: Path | str | None,
    *,
    providers: Sequence[Provider] | None = None,
    budget_s: float = 0.15,
    cold_bytes: int | None = None,
    progress: bool = True,
    device: str = "cuda",
    measure: Callable[..., Measured] = measure_replays,
    copy: Callable[[], float] = copy_gb_per_s,
    place: Callable[[], str] | None = None,
) -> list[Row]:
    """Measure pyllmq beside its rivals on the current GPU. Arguments as of `run.run`; the last four are a test's.

    Raises WrongResultError, after everything else was measured and written, if a provider's result was wrong.
    """
    if csv is not None:
        record.check_header(Path(csv))
    name_of_place = place or torch.cuda.get_device_name
    if cold_bytes is None:
        cold_bytes = max(COLD_BYTES, 2 * l2_bytes())
    left_out: dict[str, str] = {}
    wrong: list[str] = []
    ready = []
    for provider in gpu_providers(bits) if providers is None else providers:
        ok, why = provider.available()
        if ok:
            ready.append(provider)
        else:
            left_out[provider.name] = why
    environment: dict[str, Any] = record.environment() | {"device": name_of_place()}
    copied = copy()
    rows: list[Row] = []

    def keep(measured: list[Row]) -> None:
        """At once, so that a run which is ended by its time limit leaves what it has."""
        rows.extend(measured)
        if csv is not None:
            record.append(Path(csv), measured)

    keep([_copy_row(copied, environment, ready[0].isa() if ready else "none")])
    with torch.no_grad(), tqdm(total=len(shapes) * len(tokens), desc=op, disable=not progress, leave=False) as bar:
        for shape in shapes:
            weight = dense_weight(shape.n, shape.k).to(device)
            layers = _make(ready, weight, left_out)
            for m in tokens:
                bar.set_postfix_str(f"{shape.name}, M = {m}")
                errors = _check(ready, layers, weight, m, left_out, wrong)
                samples, failures = measure(_calls(layers, errors, shape.k, m, device, cold_bytes), budget_s=budget_s)
                left_out |= {f"{name} at {shape.n}x{shape.k}, M = {m}": why for name, why in failures.items()}
                keep(_rows(op, shape, m, ready, layers, samples, errors, copied, environment))
                bar.update()

    print(
        f"{op} on {environment['device']}; torch {torch.__version__}, CUDA graphs over more than {cold_bytes >> 20} MiB"
    )
    print(gpu_table([asdict(row) for row in rows]))
    for name, why in left_out.items():
        print(f"not measured: {name}: {why}")
    if csv is not None:
        print(f"{len(rows)} rows appended to {csv}")
    if wrong:
        raise WrongResultError("; ".join(wrong))
    return rows


def _make(providers: Sequence[Provider], weight: torch.Tensor, left_out: dict[str, str]) -> dict[str, Layer]:
    layers = {}
    for provider in providers:
        try:
            with warnings.catch_warnings():  # semi-structured tensors announce that they are a prototype
                warnings.simplefilter("ignore")
                layers[provider.name] = provider.make(weight)
        except Exception as error:  # a rival that does not take this shape, or does not run here
            left_out[f"{provider.name} at {weight.shape[0]}x{weight.shape[1]}"] = _first_line(error)
    return layers


def _check(
    providers: Sequence[Provider],
    layers: dict[str, Layer],
    weight: torch.Tensor,
    m: int,
    left_out: dict[str, str],
    wrong: list[str],
) -> dict[str, float]:
    """Provider -> relative error, of those whose result is right."""
    errors = {}
    for provider in providers:
        if provider.name not in layers:
            continue
        layer = layers[provider.name]
        try:
            x = activations(m, weight.shape[1], layer.dtype).to(weight.device)
            errors[provider.name] = check(provider, layer, weight, x)
        except WrongResultError as error:
            wrong.append(str(error))
            left_out[f"{provider.name} at {weight.shape[0]}x{weight.shape[1]}, M = {m}"] = f"WRONG: {error}"
        except Exception as error:
            left_out[f"{provider.name} at {weight.shape[0]}x{weight.shape[1]}, M = {m}"] = _first_line(error)
    return errors


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _calls(
    layers: dict[str, Layer], right: dict[str, float], k: int, m: int, device: str, cold_bytes: int
) -> dict[str, list[Callable[[], object]]]:
    """Inputs and weights rotate, together over more than `cold_bytes`, whatever M is: a graph leaves no time between calls."""
    calls: dict[str, list[Callable[[], object]]] = {}
    for name in right:
        layer = layers[name]
        x = activations(m, k, layer.dtype).to(device)
        copies = [layer, *(layer.copy() for _ in range(cold_copies(layer.nbytes + x.nbytes, cold_bytes) - 1))]
        calls[name] = [partial(copy.run, x.clone()) for copy in copies]
    return calls


def _rows(
    op: str,
    shape: Shape,
    m: int,
    providers: Sequence[Provider],
    layers: dict[str, Layer],
    samples: dict[str, Samples],
    errors: dict[str, float],
    copied: float,
    environment: dict[str, Any],
) -> list[Row]:
    baseline = samples[BASELINE].percentile_us(50) if BASELINE in samples else float("nan")
    rows = []
    for provider in providers:
        if provider.name not in samples:
            continue
        layer, sample = layers[provider.name], samples[provider.name]
        median_us = sample.percentile_us(50)
        rows.append(
            _row(
                environment,
                ratio_to_torch_fp32=baseline / median_us,
                op=op,
                provider=provider.name,
                kernel=layer.kernel(m),
                shape=shape.name,
                n=shape.n,
                k=shape.k,
                m=m,
                bits_per_weight=8 * layer.nbytes / (shape.n * shape.k),
                activations=str(layer.dtype).removeprefix("torch."),
                samples=len(sample.nanoseconds),
                median_us=median_us,
                p20_us=sample.percentile_us(20),
                p80_us=sample.percentile_us(80),
                gweights_per_s=shape.n * shape.k / median_us / 1e3,
                gb_per_s=layer.nbytes / median_us / 1e3,
                share_of_read_limit=layer.nbytes / median_us / 1e3 / copied,
                relative_error=errors[provider.name],
                isa=provider.isa(),
            )
        )
    return rows


def _copy_row(copied: float, environment: dict[str, Any], isa: str) -> Row:
    """The bandwidth of a plain copy, kept in the same file as a row of its own."""
    unknown = float("nan")
    microseconds = 2 * COPY_BYTES / copied / 1e3
    return _row(
        environment,
        ratio_to_torch_fp32=unknown,
        op=COPY_OP,
        provider="torch copy_",
        kernel="torch copy_",
        shape="1 GiB",
        n=COPY_BYTES,
        k=1,
        m=1,
        bits_per_weight=unknown,
        activations="none",
        samples=1,
        median_us=microseconds,
        p20_us=microseconds,
        p80_us=microseconds,
        gweights_per_s=unknown,
        gb_per_s=copied,
        share_of_read_limit=1.0,
        relative_error=0.0,
        isa=isa,
    )


def _row(environment: dict[str, Any], **fields: Any) -> Row:
    return Row(threads=torch.get_num_threads(), others_cpu=float("nan"), precision="", **fields, **environment)
