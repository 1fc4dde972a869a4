"""`pyllmq bench --goals`: what the CPU kernels are built to reach, beside what this machine measured and what it allows."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from pyllmq.nn import CodebookLinear

from .memory import READ_LIMIT, cold_bytes_for, last_level_cache_bytes, ram_bytes
from .providers import BASELINE, RIVALS, Widths, activations, dense_weight, pack_normal, pyllmq_codebook
from .record import Row
from .run import run
from .timing import cold_copies, measure

SQUARE = "4096x4096"
OTHER_SHAPES = ("14336x4096", "4096x11008")
OTHER_SHARE = 0.9
"""Of the square's goal, for other shapes."""

BITS = ("4", "3", "2", "2.1+0.005")
GOALS: dict[tuple[int, str], tuple[float, ...]] = {
    (1, "high"): (9.5, 9.5, 18, 14),
    (1, "fast"): (9.5, 9.5, 18, 14),
    (8, "high"): (4.5, 4.5, 6.5, 5),
    (8, "fast"): (8.5, 7, 12, 9),
    (512, "high"): (1.0, 1.0, 1.2, 1.0),
    (512, "fast"): (1.75, 1.75, 2.5, 1.9),
}
"""(M, precision) -> for each of BITS how many times as fast as torch fp32 in the same run, at 4096x4096."""

ODD_SHAPES = ((4096, 4096), (4095, 4096), (4097, 4096), (4096, 4095), (4096, 4097))
ODD_LIMIT = 1.10
CALL_LIMIT_US = 8.0
MEMORY_SHARE = 0.05
PREPACK_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Line:
    """One goal. `ceiling` is what reading alone allows here; not a number where reading is not what costs."""

    what: str
    measured: float
    goal: float
    ceiling: float

    @property
    def reached(self) -> bool:
        return self.measured >= self.goal


def run_goals(
    square: str = SQUARE, others: Sequence[str] = OTHER_SHAPES, *, budget_s: float = 1.0, csv: Path | str | None = None
) -> list[Line]:
    """Measure and print everything that has a goal; returns the lines of the table of ratios. About four minutes."""
    providers = [RIVALS[0]] + [
        pyllmq_codebook(bits, precision=precision) for precision in ("high", "fast") for bits in BITS
    ]
    rows = run(
        shapes=[square, *others], tokens=sorted({m for m, _ in GOALS}), providers=providers, budget_s=budget_s, csv=csv
    )
    lines = ratio_lines(rows, square)
    print("\n" + ratio_table(lines))
    n, k = (int(size) for size in square.split("x"))
    print()
    for text in (
        *odd_shapes(n, k, budget_s),
        busy_machine(n, k, budget_s),
        call_overhead(),
        *prepack_times(n, k),
        *call_memory(n, k),
    ):
        print(text)
    return lines


def ratio_lines(rows: Sequence[Row], square: str) -> list[Line]:
    """One line for each row that has a goal, in the rows' order."""
    goal_of = {
        (pyllmq_codebook(bits, precision=precision).name, m): goal
        for (m, precision), goals in GOALS.items()
        for bits, goal in zip(BITS, goals, strict=True)
    }
    by_case = {(row.provider, row.n, row.k, row.m): row for row in rows}
    lines = []
    for row in rows:
        if (row.provider, row.m) not in goal_of:
            continue
        share = 1.0 if f"{row.n}x{row.k}" == square else OTHER_SHARE
        ceiling = float("nan")
        limit = by_case.get((READ_LIMIT, row.n, row.k, row.m))
        if limit is not None:
            torch_row = by_case[BASELINE, row.n, row.k, row.m]
            ceiling = limit.gb_per_s / torch_row.gb_per_s * torch_row.bits_per_weight / row.bits_per_weight
        what = f"{row.n}x{row.k}  M={row.m}  {row.provider}" + ("" if row.precision == "fast" else " (high)")
        lines.append(Line(what, row.ratio_to_torch_fp32, share * goal_of[row.provider, row.m], ceiling))
    return lines


def ratio_table(lines: Sequence[Line]) -> str:
    """`ceiling` below the goal: torch reads so near the limit here that no kernel could reach that ratio."""
    text = ["x torch fp32    goal  ceiling  reached"]
    for line in lines:
        ceiling = "-" if line.ceiling != line.ceiling else f"{line.ceiling:.2f}"
        reached = "yes" if line.reached else "no, and the ceiling is lower" if line.ceiling < line.goal else "no"
        text.append(f"{line.measured:12.2f}  {line.goal:6.2f}  {ceiling:>7}  {reached:<28}  {line.what}")
    return "\n".join(text)


def odd_shapes(n: int, k: int, budget_s: float) -> list[str]:
    """Time at M = 1 of shapes that are one off in N or K, interleaved with the even one."""
    provider = pyllmq_codebook(4)
    cold, _ = cold_bytes_for(len(ODD_SHAPES), last_level_cache_bytes(), ram_bytes())
    calls = {}
    for dn, dk in ((rows - 4096, columns - 4096) for rows, columns in ODD_SHAPES):
        layer = provider.make(dense_weight(n + dn, k + dk))
        layers = [layer, *(layer.copy() for _ in range(cold_copies(layer.nbytes, cold) - 1))]
        x = activations(1, k + dk, torch.float32)
        calls[f"{n + dn}x{k + dk}"] = [partial(each.run, x) for each in layers]
    with torch.no_grad():
        found = {name: samples.percentile_us(50) for name, samples in measure(calls, budget_s=budget_s).items()}
    even = found[f"{n}x{k}"]
    return [
        f"odd shape {name}: {us:.1f} us at M=1, {us / even:.2f}x of {n}x{k} (goal: at most {ODD_LIMIT:.2f}x)"
        for name, us in found.items()
        if name != f"{n}x{k}"
    ]


@torch.no_grad()
def busy_machine(n: int, k: int, budget_s: float) -> str:
    """One call while another process keeps every core busy: a pool that spins or waits for sleepers would lose milliseconds."""
    layer = pyllmq_codebook(4).make(dense_weight(n, k))
    call = {"packed": [partial(layer.run, activations(1, k, torch.float32))]}
    quiet = measure(call, budget_s=budget_s)["packed"]
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        busy = measure(call, budget_s=budget_s)["packed"]
    finally:
        for process in others:
            process.kill()
            process.wait()
    return (
        f"{n}x{k} at 4 bits, M=1, one warm copy: median {quiet.percentile_us(50):.0f} us, 95th percentile "
        f"{quiet.percentile_us(95):.0f}; with a busy process on every core {busy.percentile_us(50):.0f} and "
        f"{busy.percentile_us(95):.0f} (half of the cores' time is theirs)"
    )


@torch.no_grad()
def call_overhead(calls: int = 4000, repeats: int = 5) -> str:
    """A 64x64 layer, one token: what a call costs besides the work. Best of the repeats."""
    dense = torch.nn.Linear(64, 64)
    packed = CodebookLinear.from_dense(dense, bits=4)
    x = torch.randn(1, 64)

    def us(call) -> float:
        return min(timeit.repeat(call, number=calls, repeat=repeats)) / calls * 1e6

    functional_us, packed_us = us(lambda: F.linear(x, dense.weight, dense.bias)), us(lambda: packed(x))
    return (
        f"one call of a 64x64 layer: packed {packed_us:.2f} us, {packed_us - functional_us:.2f} more than F.linear's "
        f"{functional_us:.2f} (goal: less than {CALL_LIMIT_US:g} more), nn.Linear {us(lambda: dense(x)):.2f}"
    )


def prepack_times(n: int, k: int, repeats: int = 5) -> list[str]:
    lines = []
    for bits in BITS:
        weight = pack_normal(dense_weight(n, k), Widths.parse(bits))
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            weight.prepack()
            seconds.append(time.perf_counter() - started)
        allowed_ms = 1e3 * weight.nbytes / PREPACK_BYTES_PER_S
        lines.append(
            f"prepacking {n}x{k} at {bits} bits: {1e3 * median(seconds):.2f} ms "
            f"(goal: below {allowed_ms:.2f}, reading it at 1 GB/s)"
        )
    return lines


# ---- memory ---------------------------------------------------------------------------------------------------------

_PEAK_OF_ONE_CALL = """
import ctypes
import gc
import sys
from pathlib import Path
import torch
from pyllmq import functional
from pyllmq.benchmarks.providers import Widths, dense_weight, pack_normal
n, k, m, bits, precision = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
weight = pack_normal(dense_weight(n, k), Widths.parse(bits))
operand, x = weight.operand(), torch.randn(m, k)
def kib(file, field):
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
with torch.no_grad():
    functional.codebook_linear(torch.randn(1, 8), pack_normal(dense_weight(8, 8), Widths.parse(bits)).operand())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, counted = kib("smaps_rollup", "Rss:"), kib("status", "VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    y = functional.codebook_linear(x, operand, None, precision)
    peak = kib("status", "VmHWM:") - counted
    print(1024 * max(kib("smaps_rollup", "Rss:") - before, peak), weight.nbytes, y.nbytes)
"""


def peak_of_one_call(n: int, k: int, m: int, bits: str, precision: str) -> tuple[int, int, int]:
    """(extra bytes at the peak of a first call, bytes of the packed weight, bytes of y), in a new process.

    Extra is resident memory, y included, and all that the kernel keeps for later calls: the workspaces of every thread. What
    is kept is counted page by page (smaps_rollup), what is freed within the call by VmHWM, which may be off by 256 KiB.
    Linux with glibc only: malloc must give back what was freed earlier, or it would be reused unseen.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PEAK_OF_ONE_CALL, *map(str, (n, k, m, bits, precision))],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    extra, packed, output = (int(part) for part in done.stdout.split())
    return extra, packed, output


def call_memory(n: int, k: int) -> list[str]:
    if platform.libc_ver()[0] != "glibc":
        return ["memory of a call: not measured, it takes Linux with glibc"]
    lines = []
    for precision in ("high", "fast"):
        for m in sorted({m for m, _ in GOALS}):
            extra, packed, output = peak_of_one_call(n, k, m, "4", precision)
            beyond = extra - output
            lines.append(
                f"memory of a call, {n}x{k}, 4 bits, {precision}, M={m}: {beyond / 1e6:.2f} MB besides y, "
                f"{beyond / (packed + output):.1%} of packed weight and output (goal: below {MEMORY_SHARE:.0%})"
            )
    return lines
