"""Packed experts and packed embeddings on a GPU: `python -m pyllmq.benchmarks.gpu_experts [--csv FILE]`, a step of run_gpu.sh.

Experts: one token and more, from hidden states, indices and weights to the weighted sum, beside transformers' grouped_mm and
batched_mm in bf16. Calls of one token rotate over all experts of the layer, so that what they read has left the caches. Rows: 128
and 4096 ids of a vocabulary beside torch's embedding. All as CUDA graphs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyllmq.formats import PackedWeight
from pyllmq.functional import packed_rows, routed_experts
from pyllmq.layouts import WeightOperand, layout_for, machine_layout
from pyllmq.operations import PACKED_ROWS, ROUTED_EXPERTS, Gate, PackedExperts

from . import record
from .experts import SHAPES, ExpertShape, Routing, routes
from .gpu_table import BASELINE, gpu_table
from .gpu_timing import measure_replays
from .providers import Widths, WrongResultError, dense_weight, pack_normal
from .record import Row
from .sparse import coded, pruned, pruned_24
from .timing import Samples

TOKENS = (1, 16, 64, 512, 4096)
MOST_COPIED = 8 << 30
"""Bytes of weights that batched_mm may copy for each token's experts."""
VOCABULARIES = {"llama-3.2-1b": (128256, 2048), "tiny": (300, 64)}
IDS = (128, 4096)
TOLERANCE = 1e-2
"""Of bf16 outputs against fp64."""

SPARSE: dict[str, Callable[[Tensor], PackedWeight]] = {
    "2:4 bf16": partial(pruned_24, torch.bfloat16),
    "2:4 2 bits": partial(coded, 2),
    "2:4 4 bits": partial(coded, 4),
    "bitmap 50 % bf16": partial(pruned, 0.5, torch.bfloat16),
}
"""Experts that are measured beside those of codebooks."""

Calls = dict[str, Sequence[Callable[[], Tensor]]]
Measure = Callable[..., tuple[dict[str, Samples], dict[str, str]]]


def copies_of(weight: PackedWeight, count: int, device: str) -> tuple[WeightOperand, ...]:
    """The operand, each time in memory of its own."""
    first = weight.to(device).prepack()
    if layout_for(first.kind, device) is None:
        return (first,) * count
    layout = machine_layout(first.layout)
    others = (layout.from_blob(first.tensors[0].clone(), first.shape) for _ in range(count - 1))
    return (first, *others)


def packed_experts(shape: ExpertShape, form: str, device: str) -> tuple[PackedExperts, int, tuple[Tensor, Tensor]]:
    """All experts of a layer, the bytes of one, and its dense weights; a form is a codebook's width or a name of SPARSE."""
    sizes = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    pack = SPARSE.get(form) or (lambda weight: pack_normal(weight, Widths.parse(form)))
    weights = [pack(dense_weight(*size)) for size in sizes]
    up, down = (copies_of(weight, shape.experts, device) for weight in weights)
    dense = weights[0].dequantize().to(device), weights[1].dequantize().to(device)
    return PackedExperts(up, down, Gate("silu")), sum(weight.nbytes for weight in weights), dense


def of_torch(shape: ExpertShape, implementation: str, dense: tuple[Tensor, Tensor], device: str) -> nn.Module:
    """transformers' experts in bf16, each with these weights."""
    with torch.device("meta"):
        module: Any = shape.module()
    for name, weight in zip(("gate_up_proj", "down_proj"), dense, strict=True):
        stack = weight.to(device, torch.bfloat16).expand(shape.experts, *weight.shape).contiguous()
        module._parameters[name] = nn.Parameter(stack, requires_grad=False)
    module.config._experts_implementation = implementation
    found: nn.Module = module
    return found


def expected(dense: tuple[Tensor, Tensor], routing: Routing) -> Tensor:
    """The first token in fp64: every expert has the same weights."""
    x, _, weights = routing
    h = Gate("silu")(dense[0].double() @ x[0].double())
    return weights[0].double().sum() * (dense[1].double() @ h)


def check(name: str, y: Tensor, exact: Tensor) -> float:
    error = float((y.double() - exact).norm() / exact.norm())
    if not error <= TOLERANCE:
        raise WrongResultError(f"{name}: relative error {error:.2g} against fp64, allowed {TOLERANCE}. It is not timed")
    return error


def run_gpu_experts(
    shapes: Sequence[str] = ("qwen3-30b-a3b",),
    bits: Sequence[str] = ("3", "4"),
    tokens: Sequence[int] = TOKENS,
    vocabularies: Sequence[str] = ("llama-3.2-1b",),
    csv: Path | None = None,
    *,
    sparse: Sequence[str] = tuple(SPARSE),
    device: str = "cuda",
    budget_s: float = 0.15,
    measure: Measure = measure_replays,
) -> list[Row]:
    """Measure both operations and print one table; the last four are a test's.

    Raises ValueError for a shape with biases, which transformers computes otherwise, and WrongResultError where ours is wrong.
    """
    if biased := [name for name in shapes if SHAPES[name].has_bias]:
        raise ValueError(
            f"the experts of {biased[0]} have biases; allowed: {', '.join(n for n, s in SHAPES.items() if not s.has_bias)}"
        )
    if csv is not None:
        record.check_header(csv)
    environment = record.environment()
    if device == "cuda":
        environment |= {"device": torch.cuda.get_device_name()}
    rows: list[Row] = []
    failed: dict[str, str] = {}

    def add(
        op: str, shape: str, case: tuple[int, int, int], calls: Calls, about: dict[str, tuple[str, float, float, float]]
    ) -> None:
        """about: provider -> (kernel, bits per weight, bytes of a call, error)."""
        samples, failures = measure(calls, budget_s=budget_s)
        failed.update({f"{name}, {shape}, M = {case[2]}": why for name, why in failures.items()})
        found = [_row(op, shape, case, name, *about[name], samples, environment) for name in about if name in samples]
        rows.extend(found)
        if csv is not None:
            record.append(csv, found)

    with torch.no_grad():
        for name in shapes:
            _experts(SHAPES[name], [*bits, *sparse], tokens, device, add, failed)
        for name in vocabularies:
            _rows(name, bits, device, add)
    print(gpu_table([row.__dict__ for row in rows]))
    print(
        "experts: N and K are gate and up of one expert, bytes those of the experts chosen; rows: N and K of the vocabulary, M ids"
    )
    for name, why in failed.items():
        print(f"not measured: {name}: {why}")
    return rows


def _experts(
    shape: ExpertShape,
    forms: Sequence[str],
    tokens: Sequence[int],
    device: str,
    add: Callable[..., None],
    failed: dict[str, str],
) -> None:
    layers = {
        f"pyllmq {form}{'' if form in SPARSE else ' bits'}": packed_experts(shape, form, device) for form in forms
    }
    dense = next(iter(layers.values()))[2]
    rivals = {BASELINE: "grouped_mm", "torch bf16, batched_mm": "batched_mm"}
    torchs = {name: of_torch(shape, implementation, dense, device) for name, implementation in rivals.items()}
    for m in tokens:
        routings = [tuple(each.to(device) for each in routing) for routing in routes(shape, m)]
        given = [(x.bfloat16(), index, weights) for x, index, weights in routings]
        chosen = len(given[0][1].unique())
        calls: Calls = {}
        about = {}
        for name, module in torchs.items():
            if rivals[name] == "batched_mm" and 2 * m * shape.choices * shape.weights > MOST_COPIED:
                continue
            run = [_call(module, x, index, weights.bfloat16()) for x, index, weights in given]
            try:
                error = check(name, run[0]()[0], expected(dense, given[0]))
            except Exception as refusal:  # whatever a rival raises must not end the run
                failed[f"{name}, {shape.name}, M = {m}"] = f"{type(refusal).__name__}: {refusal}"
                continue
            calls[name] = run
            about[name] = (rivals[name], 16.0, 2.0 * chosen * shape.weights, error)
        for name, (packed, nbytes, own) in layers.items():
            calls[name] = [_call(routed_experts, *routing, packed) for routing in given]
            error = check(name, calls[name][0]()[0], expected(own, given[0]))
            kernel = ROUTED_EXPERTS.kernel_for(torch.device(device), torch.bfloat16, packed.layouts)
            about[name] = (kernel.__module__, 8 * nbytes / shape.weights, float(chosen * nbytes), error)
        add("experts", shape.name, (2 * shape.intermediate, shape.hidden, m), calls, about)


def _rows(name: str, bits: Sequence[str], device: str, add: Callable[..., None]) -> None:
    n, k = VOCABULARIES[name]
    weights = {width: pack_normal(dense_weight(n, k), Widths.parse(width)) for width in bits}
    operands = {width: weight.to(device).prepack() for width, weight in weights.items()}
    table = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    for count in IDS:
        drawn = [torch.randint(n, (count,), device=device) for _ in range(20)]
        calls: Calls = {BASELINE: [_call(nn.functional.embedding, ids, table) for ids in drawn]}
        about = {BASELINE: ("F.embedding", 16.0, 2.0 * count * k, 0.0)}
        for width, operand in operands.items():
            provider = f"pyllmq {width} bits"
            calls[provider] = [_call(packed_rows, operand, ids, torch.bfloat16) for ids in drawn]
            exact = packed_rows(weights[width].checkpoint_operand(), drawn[0].cpu()).to(device).double()
            error = check(provider, calls[provider][0](), exact)
            kernel = PACKED_ROWS.kernel_for(torch.device(device), torch.bfloat16, operand.layout, 0, operand.meta)
            size = weights[width].nbytes / n
            about[provider] = (kernel.__module__, 8 * size / k, count * size, error)
        add("packed_rows", name, (n, k, count), calls, about)


def _call(function: Callable[..., Tensor], *given: Any) -> Callable[[], Tensor]:
    return lambda: function(*given)


def _row(
    op: str,
    shape: str,
    case: tuple[int, int, int],
    provider: str,
    kernel: str,
    bits_per_weight: float,
    nbytes: float,
    error: float,
    samples: dict[str, Samples],
    environment: dict[str, Any],
) -> Row:
    sample = samples[provider]
    median_us = sample.percentile_us(50)
    return Row(
        ratio_to_torch_fp32=math.nan,
        op=op,
        provider=provider,
        kernel=kernel.removeprefix("pyllmq.backends."),
        shape=shape,
        n=case[0],
        k=case[1],
        m=case[2],
        bits_per_weight=bits_per_weight,
        activations="bfloat16",
        precision="",
        threads=torch.get_num_threads(),
        samples=len(sample.nanoseconds),
        median_us=median_us,
        p20_us=sample.percentile_us(20),
        p80_us=sample.percentile_us(80),
        gweights_per_s=math.nan,
        gb_per_s=nbytes / median_us / 1e3,
        share_of_read_limit=math.nan,
        relative_error=error,
        others_cpu=math.nan,
        isa="",
        **environment,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--shapes", default="qwen3-30b-a3b")
    given = parser.parse_args(arguments)
    run_gpu_experts(given.shapes.split(","), csv=given.csv)


if __name__ == "__main__":
    main()
