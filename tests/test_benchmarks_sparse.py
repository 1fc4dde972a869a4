"""The sparse bench: its providers compute what they say, goals are judged within a run, the plot is drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyllmq.benchmarks import providers, record, sparse
from pyllmq.benchmarks.providers import BASELINE
from pyllmq.benchmarks.run import run

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("provider", sparse.providers(), ids=lambda p: p.name)
def test_every_provider_multiplies(provider):
    weight = providers.dense_weight(70, 96)
    layer = provider.make(weight)
    for m in (1, 5):
        x = providers.activations(m, 96, layer.dtype)
        assert providers.check(provider, layer, weight, x) <= provider.tolerance
    copied, x = layer.copy(), providers.activations(1, 96, layer.dtype)
    assert torch.equal(copied.run(x), layer.run(x)) and copied.nbytes == layer.nbytes > 0


DENSE = record.Row(
    ratio_to_torch_fp32=1.0, op=sparse.OP, provider=BASELINE, kernel="F.linear", shape="8x8", n=8, k=8, m=1,
    bits_per_weight=32.0, activations="float32", precision="", threads=2, samples=9, median_us=1.0, p20_us=1.0, p80_us=1.0,
    gweights_per_s=1.0, gb_per_s=1.0, share_of_read_limit=1.0, relative_error=0.0, others_cpu=0.0, device="a CPU",
    isa="AVX2", torch="2.13", pyllmq="0.1", commit="abc", timestamp="1",
)  # fmt: skip


def rows_of_a_run(isa, torchs, ours, time, others_cpu=0.0):
    dense = dataclasses.replace(DENSE, median_us=torchs, isa=isa.upper(), timestamp=time, others_cpu=others_cpu)
    return [
        dense,
        dataclasses.replace(dense, provider="pyllmq bitmap 0.5", bits_per_weight=17.0, median_us=ours, isa=isa),
    ]


def test_goals_are_judged_by_the_last_quiet_run_of_each_instruction_set():
    rows = rows_of_a_run("avx2", 100.0, 90.0, "1") + rows_of_a_run("avx2", 50.0, 20.0, "2")
    rows += rows_of_a_run("avx512", 100.0, 50.0, "3")
    rows += rows_of_a_run("avx2", 90.0, 10.0, "4", others_cpu=0.4)
    avx2, avx512 = sparse.goals_table(rows).splitlines()
    assert avx2.startswith("avx2 ") and "2.50  goal 2.4  reached" in avx2
    assert avx512.startswith("avx512 ") and "2.00  goal 2.4  MISSED" in avx512


def test_a_run_prints_goals_records_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = (
        BASELINE,
        sparse.TORCH_BF16,
        "torch CSR 0.5",
        "pyllmq bitmap 0.5",
        "pyllmq bitmap 0.5 bf16",
        "pyllmq 2:4 2 bits",
    )
    chosen = [provider for provider in sparse.providers() if provider.name in names]
    csv, png = tmp_path / "sparse.csv", tmp_path / "sparse.png"
    options = {"providers": chosen, "budget_s": 0.01, "cold_bytes": 1, "progress": False, "csv": csv, "plot": png}
    rows = run(sparse.OP, ["40x64"], tokens=(1, 8), **options)
    printed = capsys.readouterr().out
    assert png.stat().st_size > 0 and [row.provider for row in record.read(csv)] == [row.provider for row in rows]
    for m, ours, rival, goal in ((1, "bitmap 0.5", "torch CSR 0.5", 1), (8, "bitmap 0.5 bf16", sparse.TORCH_BF16, 1)):
        (line,) = [
            line for line in printed.splitlines() if f"pyllmq {ours} " in line and rival in line and f"M={m} " in line
        ]
        assert f"goal {goal}" in line
