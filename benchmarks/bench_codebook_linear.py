"""`pytest benchmarks`: codebook_linear and its rivals, one test each, in about a minute.

pytest-benchmark times one provider after the other, so these numbers serve to compare a change with the commit before
(--benchmark-autosave, --benchmark-compare). Ratios between providers come from the last test, which is `pyllmq bench` on a
small set: interleaved, printed as a table, appended to a CSV.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from pyllmq.benchmarks.providers import RIVALS, Layer, Provider, activations, check, dense_weight, pyllmq_codebook
from pyllmq.benchmarks.run import run
from pyllmq.benchmarks.timing import FEW_TOKENS, cold_copies

N, K = 2048, 2048
PROVIDERS = {p.name: p for p in (*RIVALS, *(pyllmq_codebook(bits) for bits in (2, 3, 4, "2.1+0.005")))}


@lru_cache(maxsize=1)
def weight() -> torch.Tensor:
    return dense_weight(N, K)


@lru_cache(maxsize=2)
def cold_layers(name: str, m: int) -> tuple[Layer, ...]:
    layer = PROVIDERS[name].make(weight())
    copies = cold_copies(layer.nbytes) if m <= FEW_TOKENS else 1
    return (layer, *(layer.copy() for _ in range(copies - 1)))


@pytest.mark.parametrize("m", [1, 8, 512])
@pytest.mark.parametrize("name", PROVIDERS)
def test_codebook_linear(benchmark, name: str, m: int) -> None:
    provider: Provider = PROVIDERS[name]
    ok, why = provider.available()
    if not ok:
        pytest.skip(why)
    with torch.no_grad():
        layers = cold_layers(name, m)
        x = activations(m, K, layers[0].dtype)
        error = check(provider, layers[0], weight(), x)
        benchmark.group = f"codebook_linear N={N} K={K} M={m}"
        benchmark.extra_info |= {"relative_error": error, "bits_per_weight": 8 * layers[0].nbytes / (N * K)}
        benchmark.extra_info |= {"isa": provider.isa(), "kernel": layers[0].kernel(m)}
        benchmark.extra_info |= {"threads": torch.get_num_threads()}
        turn = iter(range(1 << 62))
        # pedantic with one iteration: every round is a single call on the next copy.
        benchmark.pedantic(
            lambda layer: layer.run(x),
            setup=lambda: ((layers[next(turn) % len(layers)],), {}),
            rounds=10 if m > FEW_TOKENS else 200,
            warmup_rounds=2 if m > FEW_TOKENS else 20,
        )


def test_side_by_side(capsys) -> None:
    """The interleaved table of `pyllmq bench` for this size, appended to pyllmq_bench.csv in the current folder."""
    with capsys.disabled():
        print()
        rows = run(
            shapes=[f"{N}x{K}"], bits=[2, 3, 4], tokens=[1, 8], csv="pyllmq_bench.csv", budget_s=0.4, progress=False
        )
    ours = [row for row in rows if row.provider.startswith("pyllmq") and row.m == 1]
    assert len(ours) >= 3 and all(row.relative_error < 1e-2 for row in rows if row.provider.startswith("pyllmq"))
