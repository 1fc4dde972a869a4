"""Measures what a weight costs by tables and by decoding, and whether `automatic` takes the cheaper of the two.

python -m pyllmq.benchmarks.path_cost [ISA ...]         the table of path_cost.h, on a quiet machine with 2 threads
python -m pyllmq.benchmarks.path_cost --check [ISA ...]     the choice against both paths at 4096x4096
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from statistics import median

import numpy as np
import torch

from pyllmq import backends
from pyllmq.layouts import WeightOperand
from pyllmq.operations import PRECISIONS

from .providers import Widths, activations, dense_weight, linear_path, pack_normal

ISAS = ("scalar", "avx2", "avx_vnni", "avx512", "amx")
WIDTHS = range(1, 9)
PATHS = ("tables", "decode")
SHAPE = {"scalar": (128, 512)}
USUAL_SHAPE = (4096, 4096)
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32)
TOKEN_BLOCK = 8
"""kMaxTokenBlock in csrc/codebook/cpu/linear.h."""

TURNS, TURN_S = 3, 0.004
CHECK_SHAPE = (4096, 4096)
CHECK_BITS = ("2", "3", "4", "2.1+0.005", "5", "8")
CHECK_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 512)
WORST_CHOICE = 1.10


def packed(shape: tuple[int, int], bits: str) -> WeightOperand:
    return pack_normal(dense_weight(*shape), Widths.parse(bits)).operand()


def call(operand: WeightOperand, x: torch.Tensor, y: torch.Tensor, path: str, precision: str) -> None:
    backends.cpu.runtime.kernels()
    bound = backends.cpu.runtime.bound(operand)
    precision_code = PRECISIONS.index(precision)
    bound.linear_by(PATHS.index(path), x.data_ptr(), 0, x.shape[0], 0, 0, y.data_ptr(), precision_code)


def both_paths_us(operand: WeightOperand, tokens: int, precision: str) -> dict[str, float]:
    """Median of single calls, the two paths in turns."""
    x, y = activations(tokens, operand.shape[1], torch.float32), torch.empty(tokens, operand.shape[0])
    calls = {path: partial(call, operand, x, y, path, precision) for path in PATHS}
    samples: dict[str, list[int]] = {path: [] for path in PATHS}
    for _ in range(TURNS):
        for path, run in calls.items():
            run()
            end = time.perf_counter() + TURN_S
            while True:
                begin = time.perf_counter_ns()
                run()
                samples[path].append(time.perf_counter_ns() - begin)
                if time.perf_counter() >= end:
                    break
    return {path: median(found) / 1e3 for path, found in samples.items()}


def fit(fixed: np.ndarray, per_token: np.ndarray, cost: np.ndarray) -> tuple[float, float]:
    """Non-negative a, b of a * fixed + b * per_token = cost, least squares of relative errors."""
    columns = np.stack([fixed, per_token], 1) / cost[:, None]
    found = np.linalg.lstsq(columns, np.ones(len(cost)), rcond=None)[0]
    if (found >= 0).all():
        return float(found[0]), float(found[1])
    keep = int(found[1] >= 0)
    alone = float(columns[:, keep].sum() / (columns[:, keep] ** 2).sum())
    return (0.0, alone) if keep else (alone, 0.0)


def path_cost(operand: WeightOperand, precision: str) -> tuple[float, float, float, float]:
    """PathCost of csrc/codebook/cpu/path_cost.h, in ps per weight."""
    weights = operand.shape[0] * operand.shape[1]
    tokens = np.array(TOKENS, dtype=float)
    us = [both_paths_us(operand, m, precision) for m in TOKENS]
    ps = {path: np.array([found[path] for found in us]) * 1e6 / weights for path in PATHS}
    return *fit(np.ceil(tokens / TOKEN_BLOCK), tokens, ps["tables"]), *fit(np.ones_like(tokens), tokens, ps["decode"])


def table_of(isa: str) -> str:
    backends.cpu.runtime.kernels().set_isa(isa)
    operands = [packed(SHAPE.get(isa, USUAL_SHAPE), str(width)) for width in WIDTHS]
    rows = []
    for precision in PRECISIONS:
        costs = zip(*(path_cost(operand, precision) for operand in operands), strict=True)
        by_width = ["{" + ", ".join(f"{float(f'{number:.3g}'):g}" for number in cost) + "}" for cost in costs]
        rows.append("     {" + ",\n      ".join(by_width) + f"}},  // {precision}")
    return f"    {{  // {isa}\n" + "\n".join(rows) + "\n    },"


@torch.no_grad()
def check(isa: str) -> bool:
    """Print the time of the chosen path over that of the better one; False where that is more than WORST_CHOICE."""
    backends.cpu.runtime.kernels().set_isa(isa)
    worst = 1.0
    for bits in CHECK_BITS:
        operand = packed(CHECK_SHAPE, bits)
        for precision in PRECISIONS:
            cells = []
            for tokens in CHECK_TOKENS:
                us = both_paths_us(operand, tokens, precision)
                chosen = linear_path(operand, torch.float32, tokens, precision)
                ratio = us[chosen] / min(us.values())
                worst = max(worst, ratio)
                cells.append(f"{tokens}:{chosen[0]} {ratio:.2f}")
            print(f"{isa} {bits:>9} {precision:5}  " + "  ".join(cells), flush=True)
    print(f"{isa}: the chosen path takes at most {worst:.2f}x of the better one (goal: {WORST_CHOICE:.2f}x)")
    return worst <= WORST_CHOICE


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("isa", nargs="*", metavar="ISA", help=f"one of {', '.join(ISAS)}; default: all of them")
    parser.add_argument("--check", action="store_true", help="measure the choice; fails where it is a bad one")
    given = parser.parse_args(arguments)
    torch.set_num_threads(2)
    isas = given.isa or ISAS
    if given.check:
        return 0 if all(list(map(check, isas))) else 1
    for isa in isas:
        print(table_of(isa), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
