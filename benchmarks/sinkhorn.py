"""`python -m pyllmq.benchmarks.sinkhorn`: batched Sinkhorn beside plain torch, POT and geomloss, ratios beside their goals.

Every provider does the same number of iterations on the same costs, in turns (timing.py). None is timed before its plan was
compared with a log-domain loop in fp64. POT and geomloss come with the extra `bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import pyllmq
from pyllmq import backends

from . import record
from .gpu_timing import measure_replays
from .timing import Samples, measure

SHAPES = ("64x64x64", "8x512x512", "4096x4x4")
EPSILON = 0.1
LOOP = "torch log loop"
OURS = "pyllmq"

GOALS: dict[tuple[str, str, str], float] = {
    (shape, *key): goal
    for key, goals in {
        ("forward", LOOP): (40, 30, 120),
        ("forward", "POT exp"): (8, 9, 50),
        ("forward", "geomloss"): (45, 38, 180),
        ("forward+backward", LOOP): (25, 20, 60),
    }.items()
    for shape, goal in zip(SHAPES, goals, strict=True)
}
"""(shape, mode, rival) -> how many times as fast as the rival we mean to be: one thread, 50 iterations, fp32."""


GPU_GOALS_US = {("64x64x64", 50): 80, ("8x512x512", 50): 150, ("65536x4x4", 20): 25, ("1x4096x4096", 50): 1000}
"""(shape, iterations) -> microseconds of a forward call that we mean to stay below on an H200."""
GPU_BACKENDS = ("cuda", "triton")
GPU_RIVALS = (LOOP, "torch exp loop")


@dataclass(frozen=True)
class Row:
    op: str
    mode: str
    shape: str
    provider: str
    ratio: float
    """Time of this provider divided by ours."""
    goal: float
    median_us: float
    p20_us: float
    p80_us: float
    relative_error: float
    """Largest error of the plan against fp64, as a share of its largest entry."""
    iterations: int
    threads: int
    samples: int
    others_cpu: float
    isa: str
    device: str
    torch: str
    pyllmq: str
    commit: str
    timestamp: str


HEADER = [field.name for field in fields(Row)]


def log_loop(cost: Tensor, iterations: int) -> Tensor:
    n, m = cost.shape[-2:]
    log_a, log_b = (-torch.log(torch.tensor(float(size), dtype=cost.dtype)) for size in (n, m))
    logits = -cost / EPSILON
    beta = cost.new_zeros(cost.shape[0], m)
    for _ in range(iterations):
        alpha = log_a - torch.logsumexp(logits + beta.unsqueeze(-2), -1)
        beta = log_b - torch.logsumexp(logits + alpha.unsqueeze(-1), -2)
    return torch.exp(alpha.unsqueeze(-1) + logits + beta.unsqueeze(-2))


def exp_loop(cost: Tensor, iterations: int) -> Tensor:
    """The loop of the published distillation code: the whole matrix divided by its sums in turn."""
    plan = torch.exp(-cost / EPSILON)
    for _ in range(iterations):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    return plan / cost.shape[-1]


def _pot(method: str) -> Callable[[Tensor, int], Tensor]:
    def run(cost: Tensor, iterations: int) -> Tensor:
        from ot.batch import solve_batch

        return solve_batch(cost, reg=EPSILON, max_iter=iterations, tol=0.0, method=method, grad="autodiff").plan

    return run


def _geomloss(cost: Tensor, iterations: int) -> Tensor:
    from geomloss.ot import solve_batch

    return solve_batch(cost, reg=EPSILON, max_iter=iterations).plan


def _ours(cost: Tensor, iterations: int) -> Tensor:
    return pyllmq.sinkhorn(cost, epsilon=EPSILON, iterations=iterations)


@dataclass(frozen=True)
class Provider:
    run: Callable[[Tensor, int], Tensor]
    """(cost [B, n, m], iterations) -> plan with uniform marginals."""
    needs: str | None = None
    differentiable: bool = True
    tolerance: float = 1e-4


PROVIDERS = {
    OURS: Provider(_ours),
    LOOP: Provider(log_loop),
    "torch exp loop": Provider(exp_loop),
    "POT exp": Provider(_pot("sinkhorn"), "ot"),
    "POT log": Provider(_pot("log_sinkhorn"), "ot"),
    # it averages the two potentials' updates, so after the same number of iterations it is elsewhere
    "geomloss": Provider(_geomloss, "geomloss", differentiable=False, tolerance=0.2),
}


def run(
    shapes: Sequence[str] = SHAPES,
    iterations: int = 50,
    threads: int = 1,
    csv: Path | str | None = None,
    *,
    modes: Sequence[str] = ("forward", "forward+backward"),
    budget_s: float = 0.5,
) -> list[Row]:
    """Measure and print; returns the rows. Raises ValueError for a shape that is not BxNxM, RuntimeError for a wrong plan."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = [row for shape in shapes for mode in modes for row in _case(shape, mode, iterations, budget_s)]
    finally:
        torch.set_num_threads(before)
    print(table(rows))
    for name, provider in PROVIDERS.items():
        if provider.needs and find_spec(provider.needs) is None:
            print(f"not measured: {name}: {provider.needs} is not installed (pip install 'pyllmq-kernels[bench]')")
    if csv is not None:
        record.append(Path(csv), rows, HEADER)
        print(f"{len(rows)} rows appended to {csv}")
    return rows


def _sizes(shape: str) -> tuple[int, int, int]:
    parts = shape.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"shape {shape!r} is not understood; allowed: problems x rows x columns, such as 64x64x64")
    problems, n, m = map(int, parts)
    return problems, n, m


def _case(shape: str, mode: str, iterations: int, budget_s: float) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(*_sizes(shape), generator=generator)
    weight = torch.randn(cost.shape, generator=generator)
    exact = log_loop(cost[:4].double(), iterations)
    calls, errors = {}, {}
    for name, provider in PROVIDERS.items():
        if provider.needs and find_spec(provider.needs) is None:
            continue
        if mode != "forward" and not provider.differentiable:
            continue
        error = float((provider.run(cost[:4], iterations) - exact).abs().max() / exact.max())
        if not error <= provider.tolerance:
            raise RuntimeError(f"{name} is wrong at {shape}: error {error:.2g}, allowed {provider.tolerance:.2g}")
        errors[name] = error
        calls[name] = [_call(provider, cost, weight, iterations, mode)]
    others = record.OthersCpu()
    samples = measure(calls, budget_s=budget_s)
    share = others.share()
    ours_us = samples[OURS].percentile_us(50)
    return [
        Row(
            op="sinkhorn",
            mode=mode,
            shape=shape,
            provider=name,
            ratio=sample.percentile_us(50) / ours_us,
            goal=GOALS.get((shape, mode, name), float("nan")),
            median_us=sample.percentile_us(50),
            p20_us=sample.percentile_us(20),
            p80_us=sample.percentile_us(80),
            relative_error=errors[name],
            iterations=iterations,
            threads=torch.get_num_threads(),
            samples=len(sample.nanoseconds),
            others_cpu=share,
            isa=backends.cpu.runtime.kernels().isa(),
            **record.environment(),
        )
        for name, sample in samples.items()
    ]


def _call(provider: Provider, cost: Tensor, weight: Tensor, iterations: int, mode: str) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return provider.run(cost, iterations)

    def forward_and_backward() -> object:
        followed = cost.detach().requires_grad_()
        return torch.autograd.grad(provider.run(followed, iterations), followed, weight)

    return forward if mode == "forward" else forward_and_backward


def table(rows: Sequence[Row]) -> str:
    head = f"sinkhorn on {record.cpu_model()}; torch {torch.__version__}; rivals: " + ", ".join(
        f"{name} {version(name)}" for name, module in (("POT", "ot"), ("geomloss", "geomloss")) if find_spec(module)
    )
    lines = [head, "times ours    goal  reached  median us  rel. error  provider"]
    case = None
    for row in rows:
        if (row.shape, row.mode) != case:
            case = row.shape, row.mode
            lines.append(f"\n{row.shape}, {row.iterations} iterations, {row.mode}, threads: {row.threads}")
        has_goal = row.goal == row.goal
        goal, reached = (f"{row.goal:.0f}", "yes" if row.ratio >= row.goal else "no") if has_goal else ("-", "")
        lines.append(
            f"{row.ratio:10.2f}  {goal:>6}  {reached:<7}  {row.median_us:9.1f}  {row.relative_error:10.1e}  {row.provider}"
        )
    return "\n".join(lines)


THREADS_GOAL = 1.8


def threads_line(shape: str, iterations: int, threads: int = 2, budget_s: float = 1.0) -> str:
    """One thread and several in turns; a busy machine shows less than a quiet one."""
    cost = torch.rand(*_sizes(shape), generator=torch.Generator().manual_seed(0))

    def with_threads(count: int) -> Callable[[], object]:
        def call() -> None:
            torch.set_num_threads(count)
            _ours(cost, iterations)

        return call

    before = torch.get_num_threads()
    try:
        samples = measure({"1": [with_threads(1)], "n": [with_threads(threads)]}, budget_s=budget_s)
    finally:
        torch.set_num_threads(before)
    ratio = samples["1"].percentile_us(50) / samples["n"].percentile_us(50)
    said = "reached" if ratio >= THREADS_GOAL else "NOT reached"
    return f"{shape}, {threads} threads: {ratio:.2f}x one (goal {THREADS_GOAL}x: {said})"


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def run_on_gpu(
    cases: Sequence[tuple[str, int]] = tuple(GPU_GOALS_US),
    *,
    budget_s: float = 0.3,
    device: str = "cuda",
    measure: Callable[..., tuple[dict[str, Samples], dict[str, str]]] = measure_replays,
) -> None:
    """A line for each back end and rival in each case, printed as it comes: CUDA graphs, interleaved, medians.

    What fails is named, and the rest goes on; RuntimeError at the end if a plan was wrong. The last two arguments are a test's.
    """
    wrong = []
    for shape, iterations in cases:
        generator = torch.Generator().manual_seed(0)
        cost, weight = (make(*_sizes(shape), generator=generator).to(device) for make in (torch.rand, torch.randn))
        exact = log_loop(cost[:4].double(), iterations)
        print(f"\nsinkhorn {shape}, {iterations} iterations, fp32")
        calls: dict[str, list[Callable[[], object]]] = {}
        for name in (*GPU_BACKENDS, *GPU_RIVALS):
            provider = _gpu_provider(name)
            try:
                error = float((provider.run(cost[:4], iterations) - exact).abs().max() / exact.max())
            except Exception as failure:  # a back end that is not there, or does not take this shape
                print(f"  not measured: {name}: {type(failure).__name__}: {str(failure).splitlines()[0]}")
                continue
            if not error <= provider.tolerance:
                wrong.append(f"{name} is wrong at {shape}: error {error:.2g}, allowed {provider.tolerance:.2g}")
                print(f"  not measured: {wrong[-1]}")
                continue
            for mode in ("forward", "forward+backward"):
                calls[f"{name}, {mode}"] = [_call(provider, cost, weight, iterations, mode)]
        samples, failures = measure(calls, budget_s=budget_s)
        for name, sample in samples.items():
            goal = (
                GPU_GOALS_US.get((shape, iterations)) if name in [f"{ours}, forward" for ours in GPU_BACKENDS] else None
            )
            median = sample.percentile_us(50)
            said = "" if goal is None else f"  (goal {goal} us: {'reached' if median <= goal else 'NOT reached'})"
            print(f"  {name:<34} {median:11.1f} us{said}", flush=True)
        for name, why in failures.items():
            print(f"  not measured: {name}: {why}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _gpu_provider(name: str) -> Provider:
    """A back end is chosen at each call: outside of it none is forced."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    return Provider(partial(_forced, name))


def _forced(backend: str, cost: Tensor, iterations: int) -> Tensor:
    with pyllmq.use_backend(backend):
        return _ours(cost, iterations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the shapes that have goals there"
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help="problems x rows x columns, comma-separated")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", default=None, help="append the rows to this file")
    given = parser.parse_args()
    if given.device == "cuda":
        run_on_gpu()
        return
    shapes = given.shapes.split(",")
    run(shapes, given.iterations, given.threads, given.csv)
    for shape in shapes:
        print(threads_line(shape, given.iterations))


if __name__ == "__main__":
    main()
