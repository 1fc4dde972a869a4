"""`pytest benchmarks`: one 4096x4096 Linear compressed with CLAQ at 2 bits, its Hessian given. Target 12 s on 2 cores, goal 6 s."""

from __future__ import annotations

import time

import pytest
import torch

from pyllmq import CLAQConfig
from pyllmq.compression.methods import claq
from pyllmq.compression.solver import hessian as hessian_of

N = K = 4096
TARGET_S, GOAL_S = 12.0, 6.0


@pytest.mark.parametrize(("bits", "outliers"), [(2.0, 0.0)])
def test_compress_one_linear(benchmark, capsys, bits: float, outliers: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, K) * 0.02
    x = torch.randn(2 * K, K) @ (torch.eye(K) + 0.3 * torch.randn(K, K) / K**0.5)
    hessian = x.T @ x
    started = time.perf_counter()
    factor = hessian_of.factor_hessian(hessian)
    factor_s = time.perf_counter() - started
    assert factor.damping == 0.01
    done = benchmark.pedantic(
        lambda: claq.compress_linears({"linear": weight}, hessian, CLAQConfig(bits=bits, outliers=outliers))["linear"],
        rounds=1,
    )
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {"bits_per_weight": done.weight.bits_per_weight, "error": done.error}
    with capsys.disabled():
        print(
            f"\nCLAQ {bits:g} bits, {N}x{K}, {torch.get_num_threads()} threads: {seconds:.1f} s in all, of which {factor_s:.1f} s "
            f"factor the Hessian (target {TARGET_S:g} s, goal {GOAL_S:g} s); relative output error {done.error:.4f}, "
            f"{done.weight.bits_per_weight:.3f} true bits"
        )
