"""The benchmark of sinkhorn: it measures who is right, names who is missing, and refuses who is wrong."""

import pytest
import torch

from pyllmq.benchmarks import kmeans_1d as kmeans
from pyllmq.benchmarks import sinkhorn as benchmark
from pyllmq.benchmarks.timing import Samples


def test_a_small_run(tmp_path, capsys):
    file = tmp_path / "record.csv"
    rows = benchmark.run(["3x4x5"], iterations=4, csv=file, budget_s=0.01)
    found = {(row.mode, row.provider) for row in rows}
    for mode in ("forward", "forward+backward"):
        assert {(mode, name) for name in (benchmark.OURS, benchmark.LOOP, "torch exp loop")} <= found
    ours = next(row for row in rows if row.provider == benchmark.OURS)
    assert ours.ratio == 1 and ours.relative_error < 1e-5
    assert "3x4x5, 4 iterations, forward+backward" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == len(rows) + 1


def test_threads_beside_one():
    before = torch.get_num_threads()
    assert benchmark.threads_line("3x4x5", 4, budget_s=0.001).startswith("3x4x5, 2 threads: ")
    assert torch.get_num_threads() == before


def test_every_goal_has_a_provider():
    assert {rival for _, _, rival in benchmark.GOALS} <= set(benchmark.PROVIDERS)
    assert len(benchmark.GOALS) == 12


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="shape '3x4' is not understood"):
        benchmark.run(["3x4"])
    wrong = benchmark.Provider(lambda cost, iterations: cost)
    monkeypatch.setitem(benchmark.PROVIDERS, "wrong", wrong)
    with pytest.raises(RuntimeError, match="wrong is wrong at 2x3x3"):
        benchmark.run(["2x3x3"], iterations=2, budget_s=0.01)


def test_a_run_on_a_gpu_names_who_is_missing_and_who_is_wrong(monkeypatch, capsys):
    """On a CPU: the GPU's back ends do not serve it. The times are made up."""

    def each_takes_a_microsecond(calls, budget_s):
        for copies in calls.values():
            copies[0]()
        return {name: Samples([1000] * 5) for name in calls}, {}

    monkeypatch.setitem(benchmark.PROVIDERS, "torch exp loop", benchmark.Provider(lambda cost, iterations: cost))
    monkeypatch.setattr(benchmark, "GPU_BACKENDS", ("cpu", "triton"))
    monkeypatch.setattr(benchmark, "GPU_GOALS_US", {("3x4x5", 6): 2, ("2x9x9", 6): 0.5})
    with pytest.raises(RuntimeError, match="torch exp loop is wrong at 3x4x5.*torch exp loop is wrong at 2x9x9"):
        benchmark.run_on_gpu([("3x4x5", 6), ("2x9x9", 6)], device="cpu", measure=each_takes_a_microsecond)
    printed = capsys.readouterr().out
    assert "(goal 2 us: reached)" in printed and "(goal 0.5 us: NOT reached)" in printed
    assert "not measured: triton: NoKernelError" in printed and "torch log loop, forward+backward" in printed


def test_kmeans_of_a_model_on_a_gpu(capsys):
    kmeans.run_on_gpu("cpu", columns=3, synchronize=lambda: None)
    printed = capsys.readouterr().out
    assert "for 1138688 columns (goal 15 s" in printed and "windowed  n = 11008" in printed
