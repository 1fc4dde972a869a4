"""`python -m pyllmq.benchmarks.kmeans_1d`: 1-D k-means of columns beside its rivals, and the goals. About a minute.

Each provider clusters columns of its own number in a call (rivals take one at a time anyway), gives centroids and codes, and
is timed in turns with the others on one thread. The excess is that of its error over the optimum, mean and largest.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from pyllmq.functional import kmeans_1d, kmeans_1d_errors

from .timing import measure

Cluster = Callable[[Tensor, int], list[np.ndarray]]
"""Columns [C, n], k -> the centroids of each column; codes are found, too."""


@dataclass(frozen=True)
class Solver:
    name: str
    module: str
    """What must be installed; "" for ours."""
    cluster: Cluster
    columns: int
    """In one timed call, so that a slow one does not take the whole budget."""


def ours(method: str) -> Cluster:
    return lambda columns, k: list(kmeans_1d(columns, k, method=method)[0].numpy())


def kmeans1d(columns: Tensor, k: int) -> list[np.ndarray]:
    import kmeans1d

    return [np.array(kmeans1d.cluster(column, k).centroids) for column in columns.numpy()]


def ckwrap(columns: Tensor, k: int) -> list[np.ndarray]:
    import ckwrap

    return [np.array(ckwrap.ckmeans(column, k).centers) for column in columns.double().numpy()]


def flash1dkmeans(columns: Tensor, k: int) -> list[np.ndarray]:
    import flash1dkmeans

    return [flash1dkmeans.kmeans_1d(column, k, random_state=0)[0] for column in columns.numpy()]


def sklearn(columns: Tensor, k: int) -> list[np.ndarray]:
    from sklearn.cluster import KMeans

    return [KMeans(k, n_init=1, random_state=0).fit(c[:, None]).cluster_centers_[:, 0] for c in columns.numpy()]


SOLVERS = (
    Solver("pyllmq exact", "", ours("exact"), 16),
    Solver("pyllmq windowed", "", ours("windowed"), 32),
    Solver("pyllmq lloyd", "", ours("lloyd"), 16),
    Solver("flash1dkmeans", "flash1dkmeans", flash1dkmeans, 16),
    Solver("ckwrap", "ckwrap", ckwrap, 2),
    Solver("kmeans1d", "kmeans1d", kmeans1d, 1),
    Solver("sklearn n_init=1", "sklearn", sklearn, 1),
)


def error_of(columns: Tensor, centroids: Sequence[np.ndarray]) -> np.ndarray:
    """Sum of squared distances to the nearest centroid, fp64."""
    errors = []
    for column, centres in zip(columns.double().numpy(), centroids, strict=True):
        ordered = np.sort(np.asarray(centres, dtype=np.float64))
        nearest = ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, column)]
        errors.append(np.square(column - nearest).sum())
    return np.array(errors)


def time_solvers(columns: Tensor, k: int, solvers: Sequence[Solver], budget_s: float) -> dict[str, float]:
    """Milliseconds per column."""
    calls = {s.name: [partial(s.cluster, columns[: s.columns], k)] for s in solvers}
    samples = measure(calls, budget_s=budget_s)
    return {s.name: samples[s.name].percentile_us(50) / 1e3 / s.columns for s in solvers}


def sources(n: int, model: Path | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(128, n, generator=generator)
    chi = torch.randn(128, n, 3, generator=generator).square().sum(-1)
    found = {"normal": normal, "Student-t(3)": torch.randn(128, n, generator=generator) / (chi / 3).sqrt()}
    if model:
        from safetensors import safe_open

        columns = []
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                weights = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
            columns += [w.float().T[::17] for w in weights if w.dim() == 2 and 256 <= w.shape[0] < 20_000]
        for rows in sorted({c.shape[1] for c in columns}):
            found[f"{model.name}, n = {rows}"] = torch.cat([c for c in columns if c.shape[1] == rows])[:512]
    return found


# ---- on a GPU -------------------------------------------------------------------------------------------------------

MODEL_COLUMNS = ((4096, 876_544), (11008, 262_144))
"""(points of a column, columns) of the linear layers of a model of 7 billion weights (Llama 2)."""
GPU_GOALS_S = {"windowed": 3.0, "exact": 15.0}
"""For all of them, k = 16, on an H200."""
GPU_COLUMNS = 8192
GPU_REPEATS = 3


def run_on_gpu(
    device: str = "cuda", columns: int = GPU_COLUMNS, synchronize: Callable[[], None] = torch.cuda.synchronize
) -> None:
    """Seconds for every column of a model, from batches of each length: wall time of calls that end synchronised, medians."""
    generator = torch.Generator().manual_seed(0)
    seconds = dict.fromkeys(GPU_GOALS_S, 0.0)
    for n, count in MODEL_COLUMNS:
        values = torch.randn(columns, n, generator=generator).to(device)
        for method in GPU_GOALS_S:
            optimum = kmeans_1d_errors(values[:64].cpu(), [16])[:, 0].numpy()
            found = error_of(values[:64].cpu(), list(kmeans_1d(values[:64], 16, method=method)[0].cpu().numpy()))
            taken = []
            for _ in range(GPU_REPEATS + 1):  # the first one compiles and loads
                synchronize()
                begin = time.perf_counter()
                kmeans_1d(values, 16, method=method)
                synchronize()
                taken.append(time.perf_counter() - begin)
            each = median(taken[1:]) / columns
            seconds[method] += each * count
            print(
                f"{method:9} n = {n}, k = 16: {1e6 * each:8.2f} us a column ({columns} in a call); "
                f"mean excess error {(found / optimum).mean() - 1:.1e}",
                flush=True,
            )
    for method, goal in GPU_GOALS_S.items():
        said = "reached" if seconds[method] <= goal else "NOT reached"
        total = sum(count for _, count in MODEL_COLUMNS)
        print(f"{method}: {seconds[method]:.2f} s for {total} columns (goal {goal:g} s: {said})")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyllmq.benchmarks.kmeans_1d", description=__doc__)
    parser.add_argument("--n", type=int, default=4096, help="values per column")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seconds", type=float, default=0.5, help="per solver and k")
    parser.add_argument("--model", type=Path, help="a folder with safetensors, whose columns are clustered, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the goals for a whole model")
    given = parser.parse_args(arguments)
    if given.device == "cuda":
        run_on_gpu()
        return 0
    logging.disable(logging.WARNING)  # flash1dkmeans logs at each call
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    solvers = [s for s in SOLVERS if not s.module or find_spec(s.module)]
    for missing in sorted({s.module for s in SOLVERS} - {s.module for s in solvers}):
        print(f"{missing} is not installed (pip install 'pyllmq-kernels[bench]')")

    data = sources(given.n, given.model)
    print(f"n = {given.n}, 1 thread: ms per column with centroids and codes; excess of the error over the optimum")
    print(f"{'':18}{'k':>4}{'ms':>10}   " + "".join(f"{name + ' mean / max':>36}" for name in data))
    for k in given.k:
        times = time_solvers(data["normal"], k, solvers, given.seconds)
        optimum = {name: kmeans_1d_errors(columns, [k])[:, 0].numpy() for name, columns in data.items()}
        for solver in solvers:
            excess = ""
            for name, columns in data.items():
                few = columns if not solver.module else columns[:24]
                centroids = solver.cluster(few, k)
                ratio = error_of(few, centroids) / np.maximum(optimum[name][: len(few)], 1e-300) - 1
                excess += f"{ratio.mean():>24.1e} / {ratio.max():.1e}"
            print(f"{solver.name:18}{k:>4}{times[solver.name]:>10.3f}   {excess}")
        for text in goals(times, k):
            print(text)

    for count in sorted({2, threads} - {1}):
        print(threads_line(data["normal"].repeat(4, 1), max(given.k), count))
    torch.set_num_threads(threads)
    return 0


def goals(times: dict[str, float], k: int) -> list[str]:
    lines = []
    for name, rival, goal in (("pyllmq exact", "kmeans1d", 12.0), ("pyllmq windowed", "flash1dkmeans", 3.0)):
        if rival in times:
            ratio = times[rival] / times[name]
            said = "reached" if ratio >= goal else "NOT reached"
            lines.append(f"  {name} is {ratio:.1f}x as fast as {rival} at k = {k} (goal {goal:g}x: {said})")
    return lines


def threads_line(columns: Tensor, k: int, threads: int) -> str:
    """One thread and several in turns; a busy machine shows less than a quiet one."""

    def with_threads(count: int) -> Callable[[], object]:
        def call() -> None:
            torch.set_num_threads(count)
            kmeans_1d(columns, k)

        return call

    samples = measure({"1": [with_threads(1)], "n": [with_threads(threads)]}, budget_s=2.0)
    ratio = samples["1"].percentile_us(50) / samples["n"].percentile_us(50)
    return f"  exact, k = {k}, {threads} threads: {ratio:.2f}x one (goal of 2 threads: 1.8x)"


if __name__ == "__main__":
    raise SystemExit(main())
