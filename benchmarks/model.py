"""`pyllmq bench --model DIR`: a whole packed model beside the dense one that it stands for, in one interleaved run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from pyllmq import evaluate, fusion
from pyllmq.compression import calibration
from pyllmq.folders import is_packed
from pyllmq.linears import DEFAULT_EXCLUDE, replace_module
from pyllmq.loading import is_causal, load_model, load_tokenizer
from pyllmq.nn import CodebookLinear, set_precision
from pyllmq.operations import DEFAULT_PRECISION, check_precision
from pyllmq.swap import swap_linear

from . import record
from .providers import Widths

PROMPT_CHARACTERS = 200
SENTENCES = 32
ROUNDS = 7


@dataclass(frozen=True)
class ModelRow:
    """One length: units per second of both models, medians of the rounds. A unit is a new token, or for encoders a sentence."""

    ratio: float
    """Packed speed / dense speed in the same run: above 1 is faster. Packed is fused where it can be."""
    model: str
    unit: str
    length: int
    """New tokens after the same prompt; for encoders the sentences in a batch."""
    dense_per_s: float
    packed_per_s: float
    packed_layers_share: float
    """Of the packed model's time that was spent in packed layers, not fused."""
    bits_per_weight: float
    """Of the packed layers together, everything stored."""
    precision: str
    threads: int
    device: str
    torch: str
    pyllmq: str
    commit: str
    timestamp: str


Speed = Callable[[Any], float]
"""A model -> units per second."""

HEADER = [field.name for field in fields(ModelRow)]


def run_model(
    folder: Path | str,
    *,
    bits: str = "4",
    lengths: Sequence[int] = (32, 128),
    precision: Sequence[str] = (DEFAULT_PRECISION,),
    csv: Path | str | None = None,
    rounds: int = ROUNDS,
) -> list[ModelRow]:
    """Measure `generate` (M = 1 decoding) of a causal model, or sentences per second of an encoder, packed and dense in turn.

    Args:
        folder: packed: the dense model is made from its decoded weights; dense: it is packed without data at `bits`.
        bits: as in `run`: 1 to 8, or a mix with outliers such as "2.1+0.005". Only for a dense folder.
        lengths: numbers of new tokens; for encoders sentences in a batch.
        precision: of the packed layers; each is measured, with the dense model again beside it.
        csv: file to append the rows to.

    Raises:
        ValueError: a length below 1, unknown bits or precision, a model without a packed layer, a CSV of another kind.
    """
    if not lengths or min(lengths) < 1 or rounds < 1:
        raise ValueError(f"lengths are {list(lengths)}, rounds {rounds}; each must be at least 1")
    for each in precision:
        check_precision(each)
    widths = Widths.parse(bits)
    if csv is not None:
        record.check_header(Path(csv), HEADER)
    tokenizer, given = load_tokenizer(folder), load_model(folder)
    dense, packed = (dense_twin(given), given) if is_packed(folder) else (given, packed_twin(given, widths))
    set_precision(packed, DEFAULT_PRECISION)  # raises if nothing is packed
    weights = [module.structure for module in packed.modules() if isinstance(module, CodebookLinear)]
    stored = 8 * sum(s.nbytes for s in weights) / sum(s.out_features * s.in_features for s in weights)
    causal = is_causal(packed)
    measure_at = _tokens_per_s if causal else _sentences_per_s
    where: dict[str, Any] = {"threads": torch.get_num_threads(), **record.environment()}
    rows = []
    for each in precision:
        set_precision(packed, each)
        for length in lengths:
            measure = measure_at(tokenizer, length)
            fusion.fuse(packed)
            dense_per_s, packed_per_s = in_turns(measure, (dense, packed), rounds)
            fusion.unfuse(packed)
            rows.append(
                ModelRow(
                    ratio=packed_per_s / dense_per_s,
                    model=Path(folder).resolve().name,
                    unit="token" if causal else "sentence",
                    length=length,
                    dense_per_s=dense_per_s,
                    packed_per_s=packed_per_s,
                    packed_layers_share=packed_layers_share(packed, measure),
                    bits_per_weight=stored,
                    precision=each,
                    **where,
                )
            )
    print(
        f"{folder}: {len(weights)} packed layers, {stored:.3f} bits per weight; {where['device']}, {where['threads']} threads"
    )
    print(table(rows))
    if csv is not None:
        record.append(Path(csv), rows, HEADER)
        print(f"{len(rows)} rows appended to {csv}")
    return rows


def in_turns(measure: Speed, models: Sequence[nn.Module], rounds: int) -> list[float]:
    """Median speed of each model; within a round every model has one turn."""
    speeds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for found, model in zip(speeds, models, strict=True):
            found.append(measure(model))
    return [median(found) for found in speeds]


def table(rows: Sequence[ModelRow]) -> str:
    unit = rows[0].unit
    lines = [f"packed/dense  dense {unit}s/s  packed {unit}s/s  time in packed layers  length  precision"]
    for row in rows:
        lines.append(
            f"{row.ratio:12.2f}  {row.dense_per_s:{9 + len(unit)}.1f}  {row.packed_per_s:{10 + len(unit)}.1f}  "
            f"{row.packed_layers_share:21.0%}  {row.length:6d}  {row.precision}"
        )
    return "\n".join(lines)


# ---- the other model ------------------------------------------------------------------------------------------------


def dense_twin(packed: nn.Module) -> nn.Module:
    """A copy whose packed layers are Linears with the weights that those decode to."""
    twin = copy.deepcopy(packed)
    for name, layer in [(n, m) for n, m in twin.named_modules() if isinstance(m, CodebookLinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        replace_module(twin, name, linear)
    return twin


def packed_twin(dense: nn.Module, widths: Widths) -> nn.Module:
    """A copy whose Linears, but for output heads, are packed without data."""
    twin = copy.deepcopy(dense)
    swap_linear(
        twin,
        lambda linear: CodebookLinear.from_dense(
            linear, column_bits=widths.column_bits(linear.in_features), outlier_fraction=widths.outliers
        ),
        exclude=DEFAULT_EXCLUDE,
    )
    return twin


# ---- speed ----------------------------------------------------------------------------------------------------------


def _tokens_per_s(tokenizer: Any, length: int) -> Speed:
    prompt = "\n\n".join(calibration.builtin_paragraphs())[:PROMPT_CHARACTERS]
    return lambda model: evaluate.decoding_speed(model, tokenizer, prompt, length).tokens_per_second


def _sentences_per_s(tokenizer: Any, length: int) -> Speed:
    sentences = calibration.builtin_sentences()[: max(SENTENCES, length)]
    batches = calibration.sentence_batches(tokenizer, sentences, batch_size=length)

    def measure(model: Any) -> float:
        evaluate.sentence_embeddings(model, batches[:1])
        started = time.perf_counter()
        evaluate.sentence_embeddings(model, batches)
        return len(sentences) / (time.perf_counter() - started)

    return measure


def packed_layers_share(packed: nn.Module, measure: Speed) -> float:
    """Share of one measurement spent inside packed layers, by hooks: their own cost counts as the layers'."""
    inside, begun = 0.0, 0.0

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def end(*_: Any) -> None:
        nonlocal inside
        inside += time.perf_counter() - begun

    hooks = []
    for module in packed.modules():
        if isinstance(module, CodebookLinear):
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        started = time.perf_counter()
        measure(packed)
        return inside / (time.perf_counter() - started)
    finally:
        for hook in hooks:
            hook.remove()
