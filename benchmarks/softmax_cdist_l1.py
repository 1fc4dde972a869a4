"""`python -m pyllmq.benchmarks.softmax_cdist_l1`: distances of softmaxes beside torch's softmax and cdist, and their goals.

Interleaved in one run, medians, threads as given; memory in a process of its own for each provider. About a minute.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from pyllmq import backends, use_backend
from pyllmq.functional import softmax_cdist_l1

from . import record
from .gpu_timing import measure_replays
from .timing import measure

GOAL = 3.0
"""Forward and backward, times as fast as torch, at 64 rows of 50257."""
MEMORY_GOAL = 1.0
"""Buffers of one side's logits, besides the result: the gradient in the student's logits."""
TEMPERATURE = 2.0


def torch_cdist(student: Tensor, teacher: Tensor) -> Tensor:
    """torch has no cdist of 16-bit numbers on a CPU."""
    wide = torch.promote_types(student.dtype, torch.float32)
    p, q = (torch.softmax(logits / TEMPERATURE, -1, dtype=wide) for logits in (student, teacher))
    return torch.cdist(p, q, p=1.0)


def pyllmq_cdist(student: Tensor, teacher: Tensor) -> Tensor:
    return softmax_cdist_l1(student, teacher, TEMPERATURE)


Cdist = Callable[[Tensor, Tensor], Tensor]
PROVIDERS: dict[str, Cdist] = {"torch": torch_cdist, "pyllmq": pyllmq_cdist}
GPU_BACKENDS = ("cuda", "triton")


def logits(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, and the gradient of the distances."""
    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(rows, vocabulary)).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randn(rows, rows)


def both(cdist: Cdist, student: Tensor, teacher: Tensor, grad: Tensor) -> object:
    distance = cdist(student, teacher)
    return torch.autograd.grad(distance, student, grad.to(distance.dtype))


def run_on_gpu(rows: int, vocabulary: int, dtype: torch.dtype, budget_s: float) -> None:
    """One line for torch and each of our back ends that works: CUDA graphs, interleaved, medians."""
    student, teacher, grad = (each.detach().cuda() for each in logits(rows, vocabulary, dtype))
    student.requires_grad_()
    exact = torch_cdist(student.detach().double(), teacher.double())
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    for name in ("torch", *GPU_BACKENDS):
        works, why = (True, "") if name == "torch" else backends.report()[name]
        if not works:
            print(f"not measured: {name}: {why}")
            continue
        with nullcontext() if name == "torch" else use_backend(name):
            cdist = torch_cdist if name == "torch" else pyllmq_cdist
            error = float((cdist(student.detach(), teacher).double() - exact).abs().max())
            print(f"{name}: largest error against fp64 {error:.1e}")
        calls[f"{name} forward"] = [partial(_with_backend, name, cdist, student.detach(), teacher)]
        calls[f"{name} both"] = [partial(_with_backend, name, both, cdist, student, teacher, grad)]
    samples, failures = measure_replays(calls, budget_s=budget_s)
    print(f"{rows} x {rows} rows of {vocabulary}, {str(dtype).removeprefix('torch.')}, {torch.cuda.get_device_name()}")
    for name, sample in samples.items():
        base = samples.get("torch " + name.split()[1])
        ratio = f"{base.percentile_us(50) / sample.percentile_us(50):6.1f}x torch" if base else ""
        print(f"  {name:<16} {sample.percentile_us(50):9.1f} us  {ratio}")
    for name, why in failures.items():
        print(f"not measured: {name}: {why}")


def _with_backend(name: str, call: Callable[..., object], *arguments: object) -> object:
    """Chosen at each call: outside of it, no back end is forced."""
    with nullcontext() if name == "torch" else use_backend(name):
        return call(*arguments)


def run(rows: int, vocabulary: int, dtype: torch.dtype, threads: int, budget_s: float) -> dict[str, float]:
    """Prints one line for each provider; returns torch's time over ours for "forward" and "both"."""
    torch.set_num_threads(threads)
    student, teacher, grad = logits(rows, vocabulary, dtype)
    exact = torch_cdist(student.detach().double(), teacher.double())
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    for name, cdist in PROVIDERS.items():
        error = float((cdist(student.detach(), teacher).double() - exact).abs().max())
        print(f"{name}: largest error against fp64 {error:.1e}")

        calls[f"{name} forward"] = [partial(cdist, student.detach(), teacher)]
        calls[f"{name} both"] = [partial(both, cdist, student, teacher, grad)]
    samples = measure(calls, budget_s=budget_s)
    ratio = {}
    print(f"{rows} x {rows} rows of {vocabulary}, {str(dtype).removeprefix('torch.')}, {threads} threads, medians")
    for part in ("forward", "both"):
        theirs, ours = (samples[f"{name} {part}"].percentile_us(50) / 1e3 for name in ("torch", "pyllmq"))
        ratio[part] = theirs / ours
        goal = f"  (goal {GOAL:g}x)" if part == "both" else ""
        print(f"  {part:<8} torch {theirs:8.2f} ms   pyllmq {ours:8.2f} ms   {ratio[part]:6.1f}x{goal}")
    return ratio


_PEAK = """
import gc
import sys
from pathlib import Path
import torch
from pyllmq.benchmarks.softmax_cdist_l1 import PROVIDERS, both, logits
cdist, rows, vocabulary, dtype = PROVIDERS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
def peak(rows, vocabulary):
    student, teacher, grad = logits(rows, vocabulary, dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = kib("VmRSS:")
    result = both(cdist, student, teacher, grad)
    return kib("VmHWM:") - before
peak(70, 600)
print(1024 * peak(rows, vocabulary))
"""


def peak_bytes(provider: str, rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Resident memory at the peak of forward and backward, the gradient included, in a new process (Linux with glibc)."""
    name = str(dtype).removeprefix("torch.")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, provider, str(rows), str(vocabulary), name],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    return int(done.stdout)


def memory(rows: int, vocabulary: int, dtype: torch.dtype) -> dict[str, float]:
    """Prints and returns, for each provider, the peak besides the gradient in buffers of the size of one side's logits."""
    if platform.libc_ver()[0] != "glibc":
        print("memory: not measured, it takes Linux with glibc")
        return {}
    one = rows * vocabulary * dtype.itemsize
    buffers = {}
    for name in PROVIDERS:
        extra = peak_bytes(name, rows, vocabulary, dtype) - one
        buffers[name] = extra / one
        goal = f"  (goal: below {MEMORY_GOAL:g})" if name == "pyllmq" else ""
        print(
            f"memory besides the gradient, {name}: {extra / 1e6:.1f} MB, {extra / one:.2f} buffers of [{rows}, {vocabulary}]{goal}"
        )
    return buffers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--budget-s", type=float, default=3.0, help="seconds of timing for each line")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    if given.device == "cuda":
        run_on_gpu(given.rows, given.vocabulary, dtype, given.budget_s)
        return
    print(f"{record.cpu_model()}; torch {torch.__version__}, pyllmq {backends.cpu.runtime.kernels().isa()}")
    for threads in dict.fromkeys(given.threads):
        run(given.rows, given.vocabulary, dtype, threads, given.budget_s)
    memory(given.rows, given.vocabulary, dtype)


if __name__ == "__main__":
    main()
