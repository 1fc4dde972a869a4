"""`pyllmq bench --op experts`: the experts of one layer, packed, beside the three implementations of transformers.

Calls rotate over experts, token after token: what a call reads has left the caches, as between two tokens of a model. All run
as a model runs them, from hidden states, indices and weights to the weighted sum. The share of the read limit counts the bytes
of the experts that were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyllmq import backends
from pyllmq.experts import DOWN, UP, RoutedExperts
from pyllmq.formats.codebook import CodebookLinear
from pyllmq.operations import DEFAULT_PRECISION

from . import record
from .memory import READ_LIMIT, free_bytes, read_limit_calls
from .providers import BASELINE, Widths, WrongResultError, dense_weight, pack_normal
from .record import Row
from .timing import Samples, measure

OP = "experts"
TOKENS = (1, 64)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
DENSE_SHARE = 0.3
"""Of the free memory, for the dense experts in fp32: as many experts are made as fit."""
MOST_COPIED = 1 << 30
"""Bytes. batched_mm copies the weights of every token's experts before it multiplies: 64 tokens of Qwen3-30B-A3B's shape are
9.7 GB and half a minute a call. It is left out where they are more than this."""
TOLERANCE = 5e-4
"""Of the default precision, 2e-4 a Linear."""


@dataclass(frozen=True)
class ExpertShape:
    """Of one layer, from the model's config.json."""

    name: str
    family: str
    """Whose stacked experts of transformers are measured."""
    experts: int
    choices: int
    hidden: int
    intermediate: int

    @property
    def has_bias(self) -> bool:
        return self.family == "gpt_oss"

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate

    def module(self) -> nn.Module:
        """Dense, on the current device, without values."""
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

        size: dict[str, Any] = {"hidden_size": self.hidden}
        if self.family == "qwen3_moe":
            moe: dict[str, Any] = {"num_experts": self.experts, "moe_intermediate_size": self.intermediate}
            return Qwen3MoeExperts(Qwen3MoeConfig(**size, **moe))
        size |= {"num_local_experts": self.experts, "intermediate_size": self.intermediate}
        if self.family == "mixtral":
            return MixtralExperts(MixtralConfig(**size))
        return GptOssExperts(GptOssConfig(**size))


SHAPES = {
    "qwen3-30b-a3b": ExpertShape("qwen3-30b-a3b", "qwen3_moe", 128, 8, 2048, 768),
    "mixtral-8x7b": ExpertShape("mixtral-8x7b", "mixtral", 8, 2, 4096, 14336),
    "gpt-oss-20b": ExpertShape("gpt-oss-20b", "gpt_oss", 32, 4, 2880, 2880),
    "tiny": ExpertShape("tiny", "qwen3_moe", 6, 2, 64, 32),
}


Routing = tuple[Tensor, Tensor, Tensor]
"""Hidden states, indices, weights."""


@dataclass(frozen=True)
class Layer:
    """The experts of one layer in a provider's form."""

    module: nn.Module
    expert_bytes: int
    """Stored for one expert; biases not counted."""
    precision: str
    kernel: str
    weights: Callable[[int], tuple[Tensor, Tensor]]
    """Expert -> (up, down) in fp64, as the module multiplies with them."""


def run_experts(
    shapes: Sequence[str],
    bits: Sequence[str | int | float] = (3, 4),
    tokens: Sequence[int] = TOKENS,
    experts: int | None = None,
    precision: str = DEFAULT_PRECISION,
    csv: Path | str | None = None,
    *,
    budget_s: float = 3.0,
    progress: bool = True,
) -> list[Row]:
    """Measure packed experts beside transformers' eager loop, batched_mm and grouped_mm, and print one table.

    Args:
        shapes: names from SHAPES.
        bits: widths of our columns, 1 to 8; 2.5 mixes 2 and 3.
        tokens: numbers of tokens M.
        experts: at most so many in a layer; None: as many as a share of the free memory holds in fp32.
        precision: of our arithmetic.
        csv: file to append the rows to.
        budget_s: seconds of timing for each provider in each case.

    Raises:
        ValueError: a shape or number that is not known. WrongResultError: a provider's result is wrong.
    """
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise ValueError(f"shape {unknown[0]!r} of experts is not known; known: {', '.join(SHAPES)}")
    if experts is not None and experts < 1:
        raise ValueError(f"{experts} experts; at least 1 is needed")
    if not tokens or any(m < 1 for m in tokens):
        raise ValueError(f"numbers of tokens {list(tokens)}; each must be at least 1")
    if csv is not None:
        record.check_header(Path(csv))
    rows: list[Row] = []
    with torch.no_grad(), tqdm(total=len(shapes) * len(tokens), desc=OP, disable=not progress, leave=False) as bar:
        for name in shapes:
            shape = fitting(SHAPES[name], experts)
            if shape.experts < SHAPES[name].experts:
                print(f"note: {shape.experts} of the {SHAPES[name].experts} experts of {name}")
            rows += _run_shape(shape, bits, tokens, precision, budget_s, bar)
    print(f"{OP} on {record.cpu_model()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("N, K: gate and up of one expert; bits and bytes: of all experts that a call reads")
    print(record.table(rows))
    if csv is not None:
        record.append(Path(csv), rows)
        print(f"{len(rows)} rows appended to {csv}")
    return rows


def fitting(shape: ExpertShape, experts: int | None) -> ExpertShape:
    """The shape with as many experts as asked, or as memory holds, but no fewer than a token chooses."""
    if experts is None:
        experts = int(free_bytes() * DENSE_SHARE / (4 * shape.weights))
    return replace(shape, experts=min(shape.experts, max(shape.choices, experts)))


def _run_shape(
    shape: ExpertShape,
    bits: Sequence[str | int | float],
    tokens: Sequence[int],
    precision: str,
    budget_s: float,
    bar: tqdm,
) -> list[Row]:
    bar.set_postfix_str(f"{shape.name}: packs")
    dense = shape.module()
    for parameter in dense.parameters():
        parameter.normal_(std=0.02)
    layers = {BASELINE if name == "eager" else f"torch {name}": _torch(shape, dense, name) for name in IMPLEMENTATIONS}
    for width in bits:
        layers[f"pyllmq {width} bits"] = _packed(shape, str(width), precision)
    rows = []
    for m in tokens:
        routings = routes(shape, m)
        copied = 4 * m * shape.choices * shape.weights
        if copied > MOST_COPIED:
            print(
                f"note: torch batched_mm is not measured at M = {m} of {shape.name}: it copies {copied >> 20} MiB a call"
            )
        running = {name: layer for name, layer in layers.items() if name != "torch batched_mm" or copied <= MOST_COPIED}
        errors = {name: check(name, layer, shape, routings[0]) for name, layer in running.items()}
        calls: dict[str, Sequence[Callable[[], object]]] = {
            name: [partial(layer.module, *routing) for routing in routings] for name, layer in running.items()
        }
        chosen = len(routings[0][1].unique())
        block = chosen * max(layer.expert_bytes for name, layer in layers.items() if name.startswith("pyllmq"))
        if m == 1:
            calls[READ_LIMIT] = read_limit_calls(block, max(256 << 20, 2 * block))
        bar.set_postfix_str(f"{shape.name}, M = {m}")
        others = record.OthersCpu()
        samples = measure(calls, budget_s=budget_s)
        limit = block / samples[READ_LIMIT].percentile_us(50) / 1e3 if m == 1 else math.nan
        share = others.share()
        rows += [_row(shape, m, name, layers[name], samples, chosen, limit, errors[name], share) for name in running]
        bar.update()
    return rows


def routes(shape: ExpertShape, tokens: int) -> list[Routing]:
    """Calls whose experts follow each other through the whole layer: a token chooses `choices` that the last one did not."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(shape.experts, generator=generator).repeat(shape.choices)
    found = []
    for first in range(max(1, shape.experts // shape.choices)):
        if tokens == 1:
            index = order[first * shape.choices : (first + 1) * shape.choices][None]
        else:
            index = torch.rand(tokens, shape.experts, generator=generator).topk(shape.choices).indices
        x = torch.randn(tokens, shape.hidden, generator=generator)
        found.append((x, index, torch.rand(tokens, shape.choices, generator=generator)))
    return found


def _torch(shape: ExpertShape, dense: nn.Module, implementation: str) -> Layer:
    with torch.device("meta"):
        module = shape.module()
    module._parameters = dense._parameters  # one memory for the three
    module.config._experts_implementation = implementation  # type: ignore[union-attr]
    return Layer(module, 4 * shape.weights, "", implementation, lambda e: _stacked(dense, e))


def _stacked(dense: Any, expert: int) -> tuple[Tensor, Tensor]:
    parts = (dense.gate_up_proj[expert].double(), dense.down_proj[expert].double())
    return (parts[0].T, parts[1].T) if dense.is_transposed else parts


def _packed(shape: ExpertShape, width: str, precision: str) -> Layer:
    """One weight for all experts, each in memory of its own: what codes stand for does not matter to a kernel."""
    with torch.device("meta"):
        routed = RoutedExperts(shape.module())
    sizes = {UP: (2 * shape.intermediate, shape.hidden), DOWN: (shape.hidden, shape.intermediate)}
    weights = {part: pack_normal(dense_weight(*size), Widths.parse(width)) for part, size in sizes.items()}
    biases = {part: torch.randn(size[0]) * 0.02 if shape.has_bias else None for part, size in sizes.items()}
    for name, _ in list(routed.named_children()):
        part = name.rpartition("_")[2]
        layer = CodebookLinear.from_weight(weights[part], biases[part], torch.float32)
        layer.precision = precision
        setattr(routed, name, layer)
    nbytes = sum(weight.nbytes for weight in weights.values())
    dense = weights[UP].dequantize().double(), weights[DOWN].dequantize().double()
    return Layer(routed, nbytes, precision, "cpu.routed_experts", lambda e: dense)


def check(name: str, layer: Layer, shape: ExpertShape, routing: Routing) -> float:
    """Relative error of the first token against fp64. Raises WrongResultError where it is more than TOLERANCE."""
    x, index, weights = routing
    y = layer.module(*routing)
    module: Any = layer.module.dense if isinstance(layer.module, RoutedExperts) else layer.module
    exact = torch.zeros(shape.hidden, dtype=torch.float64)
    for expert, weight in zip(index[0].tolist(), weights[0].double(), strict=True):
        up, down = layer.weights(expert)
        up_bias, down_bias = _biases(layer.module, expert) if shape.has_bias else (0.0, 0.0)
        exact += weight * (down @ module._apply_gate(up @ x[0].double() + up_bias) + down_bias)
    error = float((y[0].double() - exact).norm() / exact.norm())
    if not error <= TOLERANCE:
        raise WrongResultError(f"{name}: relative error {error:.2g} against fp64, allowed {TOLERANCE}. It is not timed")
    return error


def _biases(module: Any, expert: int) -> tuple[Tensor, Tensor]:
    if isinstance(module, RoutedExperts):
        up, down = (module.get_parameter(f"expert_{expert}_{part}.bias").double() for part in (UP, DOWN))
        return up, down
    return module.gate_up_proj_bias[expert].double(), module.down_proj_bias[expert].double()


def _row(
    shape: ExpertShape,
    tokens: int,
    name: str,
    layer: Layer,
    samples: dict[str, Samples],
    chosen: int,
    limit_gb_per_s: float,
    error: float,
    others_cpu: float,
) -> Row:
    sample = samples[name]
    median_us = sample.percentile_us(50)
    nbytes = chosen * layer.expert_bytes
    return Row(
        ratio_to_torch_fp32=samples[BASELINE].percentile_us(50) / median_us,
        op=OP,
        provider=name,
        kernel=layer.kernel,
        shape=f"{shape.name}, {shape.experts} experts",
        n=2 * shape.intermediate,
        k=shape.hidden,
        m=tokens,
        bits_per_weight=8 * layer.expert_bytes / shape.weights,
        activations="float32",
        precision=layer.precision,
        threads=torch.get_num_threads(),
        samples=len(sample.nanoseconds),
        median_us=median_us,
        p20_us=sample.percentile_us(20),
        p80_us=sample.percentile_us(80),
        gweights_per_s=chosen * shape.weights / median_us / 1e3,
        gb_per_s=nbytes / median_us / 1e3,
        share_of_read_limit=nbytes / median_us / 1e3 / limit_gb_per_s,
        relative_error=error,
        others_cpu=others_cpu,
        isa=backends.cpu.runtime.kernels().isa(),
        **record.environment(),
    )
