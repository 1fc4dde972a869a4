"""The benchmark of sinkhorn: it measures who is right, names who is missing, and refuses who is wrong."""

import pytest

from pyllmq.benchmarks import sinkhorn as benchmark


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
