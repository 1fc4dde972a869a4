"""The table of goals, and the one goal that a test can hold: what a call needs in memory. No test asserts how fast anything is."""

from __future__ import annotations

import dataclasses
import math
import platform
from functools import partial

import pytest

from pyllmq.benchmarks import goals
from pyllmq.benchmarks.memory import READ_LIMIT
from pyllmq.benchmarks.providers import BASELINE

from .test_benchmarks import ROW


def row(provider: str, m: int = 1, **changes):
    return dataclasses.replace(ROW, provider=provider, n=4096, k=4096, m=m, **changes)


def test_ratios_stand_beside_goal_and_ceiling():
    rows = [
        row(READ_LIMIT, bits_per_weight=32.0, gb_per_s=30.0),
        row(BASELINE, bits_per_weight=32.0, gb_per_s=24.0),
        row("pyllmq 4", bits_per_weight=4.0, ratio_to_torch_fp32=9.0, precision="high"),
        row("pyllmq 2 fast", bits_per_weight=2.0, ratio_to_torch_fp32=19.0),
        row("pyllmq 8", bits_per_weight=8.0),
        row(BASELINE, m=8),
        row("pyllmq 3 fast", m=8, ratio_to_torch_fp32=6.0),
        dataclasses.replace(row(BASELINE, m=8), n=14336),
        dataclasses.replace(row("pyllmq 3 fast", m=8, ratio_to_torch_fp32=6.5), n=14336),
    ]
    lines = goals.ratio_lines(rows, "4096x4096")
    assert [(line.measured, line.goal, line.reached) for line in lines] == [
        (9.0, 9.5, False), (19.0, 18, True), (6.0, 7, False), (6.5, pytest.approx(6.3), True),
    ]  # fmt: skip
    assert [line.ceiling for line in lines[:2]] == [pytest.approx(30 / 24 * 32 / 4), pytest.approx(30 / 24 * 32 / 2)]
    assert all(math.isnan(line.ceiling) for line in lines[2:])
    table = goals.ratio_table([*lines, goals.Line("x", 8.0, 9.5, 9.0)]).splitlines()
    assert len(table) == 6 and "no, and the ceiling is lower" in table[5] and "ceiling is lower" not in table[1]


def test_every_goal_names_all_widths():
    assert all(len(ratios) == len(goals.BITS) and min(ratios) > 0 for ratios in goals.GOALS.values())


@pytest.mark.slow
def test_goals_run_on_small_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(goals, "GOALS", {(1, "high"): (1.0,) * 4, (2, "fast"): (1.0,) * 4})
    monkeypatch.setattr(goals, "cold_bytes_for", lambda *sizes: (100_000, ""))
    monkeypatch.setattr(goals, "run", partial(goals.run, cold_bytes=100_000, progress=False))
    lines = goals.run_goals("64x96", ["96x64"], budget_s=0.01, csv=tmp_path / "rows.csv")
    assert len(lines) == 2 * 2 * 4 and all(line.measured > 0 for line in lines)
    printed = capsys.readouterr().out
    for expected in (
        "ceiling",
        "odd shape 63x96",
        "with a busy process",
        "one call of a 64x64 layer",
        "prepacking 64x96",
        "memory of a call",
    ):
        assert expected in printed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc what is resident")
@pytest.mark.parametrize(
    ("m", "precision"),
    [(1, "high"), (8, "fast"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "fast"), (8, "high")))],
)
def test_extra_memory_of_a_call_is_bounded(m, precision, monkeypatch):
    """x, y and the tables of a few tokens: nothing of the size of the weight, 17 MB at 8 bits here, 67 MB decoded."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # each thread has a workspace
    extra, packed, output = goals.peak_of_one_call(4096, 4096, m, "8", precision)
    assert packed > 16e6 and output == 4 * m * 4096
    # Linux counts resident pages in batches: 256 KiB on 2 CPUs.
    assert extra < 0.05 * packed + 2 * output + (256 << 10)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc what is resident")
@pytest.mark.parametrize("bits", [pytest.param("2", marks=pytest.mark.slow), "4"])
def test_many_tokens_are_multiplied_in_passes(bits, monkeypatch):
    """Packed x and the sums of all tokens together would be as large as y."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    extra, packed, output = goals.peak_of_one_call(4096, 4096, 512, bits, "high")
    assert output == 4 * 512 * 4096 and extra < 1.05 * output + 0.05 * packed + (256 << 10)
