"""Measures tiles of the Triton kernels on the GPU that is here and writes the fastest as a file for triton_kernels/configs/.

    python -m pyllmq.benchmarks.tune_triton sm_90.json       (some minutes: every candidate is compiled)

Nothing is tuned while pyllmq is used; a file made here is looked at, compared with `pyllmq bench`, and shipped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch

from pyllmq import backends, dispatch
from pyllmq.layouts import machine_layout
from pyllmq.triton_kernels.configs import Tile

from .gpu_timing import measure_replays
from .providers import Widths, activations, dense_weight, pack_normal
from .timing import Samples, cold_copies

N = K = 8192
TOKENS = (1, 16, 64)
"""Each is measured, and the tile serves all numbers of tokens from the one before up to it."""

WIDTHS = {2: (1, 2), 3: (3,), 4: (4,), 8: (5, 6, 7, 8)}
"""Width measured -> widths served by what was found."""


def candidates(op: str, tokens: int) -> list[Tile]:
    if op == "codebook_dequantize":
        return [Tile(rows, slots, 0, 4, 1, 0) for rows, slots in product((32, 64, 128), (32, 64, 128))]
    blocks = {1: (1,), 16: (16,), 64: (32, 64)}[tokens]
    return [
        Tile(rows, slots, block, 4, stages, programs)
        for rows, slots, block, stages, programs in product((64, 128), (32, 64), blocks, (1, 3), (528, 1056))
    ]


def fastest(samples: Mapping[Tile, Samples]) -> Tile:
    return min(samples, key=lambda tile: samples[tile].percentile_us(50))


def row(op: str, widths: tuple[int, ...], tokens: int, tile: Tile) -> dict[str, object]:
    limit = {} if tokens in (0, TOKENS[-1]) else {"max_tokens": tokens}
    return {"op": op, "bits": list(widths), **limit, **asdict(tile)}


def tune(op: str, bits: int, tokens: int) -> Tile:
    """The fastest tile at N = K = 8192, weights cold."""
    from pyllmq.triton_kernels.codebook_dequantize import codebook_dequantize
    from pyllmq.triton_kernels.codebook_linear import codebook_linear

    with dispatch.use_backend("triton"):
        operand = pack_normal(dense_weight(N, K).cuda(), Widths.parse(bits)).operand()
    blob = operand.tensors[0]
    blobs = [blob, *(blob.clone() for _ in range(cold_copies(blob.numel()) - 1))]
    operands = [machine_layout(operand.layout).from_blob(each, operand.shape) for each in blobs]
    layouts = [backends.triton.codebook.CodebookLayout.of(each) for each in operands]
    x = activations(max(tokens, 1), K, torch.bfloat16).cuda()

    def calls(tile: Tile) -> list[Callable[[], object]]:
        if op == "codebook_dequantize":
            return [partial(codebook_dequantize, layout, torch.bfloat16, tile) for layout in layouts]
        return [partial(codebook_linear, x, layout, None, tile) for layout in layouts]

    tiles = {str(tile): tile for tile in candidates(op, tokens)}
    samples, failures = measure_replays({name: calls(tile) for name, tile in tiles.items()}, budget_s=0.02)
    for name, why in failures.items():
        print(f"  left out: {name}: {why}", file=sys.stderr)
    if not samples:
        raise RuntimeError(f"no tile of {op} runs at {bits} bits and {tokens} tokens: {failures}")
    return fastest({tiles[name]: sample for name, sample in samples.items()})


def main(file: Path) -> None:
    works, why = backends.report()["triton"]
    if not works:
        sys.exit(f"tiles can be measured only where the back end works; here: {why}")
    rows = []
    for op, tokens in (("codebook_dequantize", 0), *(("codebook_linear", m) for m in TOKENS)):
        for bits, widths in WIDTHS.items():
            tile = tune(op, bits, tokens)
            rows.append(row(op, widths, tokens, tile))
            print(f"{op} at {bits} bits, {tokens} tokens: {tile}")
    write(file, rows)
    print(f"written: {file}")


def write(file: Path, rows: list[dict[str, object]]) -> None:
    """One row a line; the file is there whole or not at all."""
    partial_file = file.with_name(f".{file.name}.partial")
    partial_file.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n")
    os.replace(partial_file, file)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pyllmq.benchmarks.tune_triton OUT.json")
    main(Path(sys.argv[1]))
