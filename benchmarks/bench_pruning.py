"""`pytest benchmarks/bench_pruning.py`: one 4096x4096 Linear pruned at 50 %, its Hessian given. Goal: 20 s on 2 cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyllmq import SparseConfig
from pyllmq.compression.methods.sparse import prune_linears

N = K = 4096
GOAL_S = 20.0


@pytest.mark.parametrize(("method", "published"), [("wanda", False), ("sparsegpt", True), ("mixed", False)])
def test_prune_one_linear(benchmark, capsys, method: Any, published: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, K) * 0.02
    x = torch.randn(2 * K, K) @ (torch.eye(K) + 0.3 * torch.randn(K, K) / K**0.5)
    hessian = x.T @ x
    config = SparseConfig(0.5, method=method, published=published)
    done = benchmark.pedantic(
        lambda: prune_linears({"linear": weight}, hessian, config, {"linear": 0.5})["linear"], rounds=1
    )
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {"bits_per_weight": done.weight.bits_per_weight, "error": done.error}
    with capsys.disabled():
        print(
            f"\n{method}{' as published' if published else ''}, {N}x{K} at 50 %, {torch.get_num_threads()} threads: "
            f"{seconds:.1f} s (goal {GOAL_S:g} s); relative output error {done.error:.4f}"
        )
