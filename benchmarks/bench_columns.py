"""`pytest benchmarks/bench_columns.py`: one 4096x4096 Linear at 2.25 true bits beside CLAQ with exact k-means, its Hessian given.

Target: the preset `balanced` takes at most 3 times as long as CLAQ, and less than 60 s on 2 cores.
"""

from __future__ import annotations

import time

import torch

from pyllmq import CLAQConfig, ColumnCodebookConfig
from pyllmq.compression.methods import claq
from pyllmq.compression.methods import column_codebook as columns

N = K = 4096
BITS = 2.25
TARGET_RATIO, TARGET_S = 3.0, 60.0


def test_compress_one_linear_at_true_bits(benchmark, capsys) -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, K) * 0.02
    x = torch.randn(2 * K, K) @ (torch.eye(K) + 0.3 * torch.randn(K, K) / K**0.5)
    hessian = x.T @ x / len(x)
    started = time.perf_counter()
    published = claq.compress_linears({"linear": weight}, hessian, CLAQConfig(bits=BITS))["linear"]
    published_s = time.perf_counter() - started
    config = ColumnCodebookConfig.preset("balanced", BITS)
    inputs, nbytes = columns.InputStatistics(hessian.clone()), BITS * N * K / 8
    done = benchmark.pedantic(
        lambda: columns.compress_linears({"linear": weight}, inputs, nbytes, config)["linear"], rounds=1
    )
    seconds = benchmark.stats.stats.median
    assert done.weight.nbytes <= nbytes
    with capsys.disabled():
        print(
            f"\nbalanced at {done.weight.bits_per_weight:.3f} true bits, {N}x{K}, {torch.get_num_threads()} threads: "
            f"{seconds:.1f} s (target {TARGET_S:g}), {seconds / published_s:.2f} times CLAQ's {published_s:.1f} s "
            f"(target {TARGET_RATIO:g}); relative output error {done.error:.4f}, CLAQ's {published.error:.4f} at "
            f"{published.weight.bits_per_weight:.3f} true bits"
        )
