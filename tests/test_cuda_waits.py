"""Each wait and barrier of the CUDA kernels for weights, left out in turn: some order of threads and copies misses it.

The emulator knows them by their place in the source. What a kernel does without one runs in a process of its own, since it may
read and write anywhere. Of waits for groups of copies or products the same is asked with one more group under way.

Shapes are such that a block takes several items, and its rings of stages turn more than once.
"""

import faulthandler
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pyllmq
from pyllmq import CodebookWeight
from pyllmq.backends.cuda import codebook, sparse

from .cuda_emulator import ROOT, emulated, orders  # noqa: F401
from .expert_layer import EVERYTHING, Layer
from .oracle import random_case
from .test_sparse_formats import random_codes
from .test_sparse_linear import bitmap, sparse24

pytestmark = [pytest.mark.kernels, pytest.mark.slow]

MOST_TIMES = 5  # the time of the slowest order with all waits, then a run is stopped

HALF, BRAIN = torch.float16, torch.bfloat16
Run = Callable[[], torch.Tensor]


def operand_of(weight: Any) -> Any:
    with pyllmq.use_backend("cuda"):
        return type(weight)(weight.structure, weight.tensors).operand()


def of_codebook(linear: str, tokens: int, dtype: torch.dtype, n: int, k: int, widths: tuple[int, ...]) -> Run:
    case = random_case(n, k, widths, segments=2, outliers=0.02, row_scale=True)
    operand = operand_of(CodebookWeight(case.weight.structure, case.weight.tensors))
    x = torch.randn(tokens, k).to(dtype)
    return lambda: getattr(codebook, linear)(x, operand, None, "exact")


def of_sparse(linear: str, weight: Any, tokens: int, dtype: torch.dtype = HALF) -> Run:
    operand = operand_of(weight)
    x = torch.randn(tokens, operand.shape[1])
    x *= 2.0 ** (torch.arange(operand.shape[1]) // 32 % 4)  # so that the warps that look for the largest find others
    x = x.to(dtype)
    return lambda: getattr(sparse, linear)(x, operand, None, "exact")


def of_experts(mixes: list[Any], tokens: int, hidden: int, units: int, experts: int = 3) -> Run:
    layer = Layer(mixes, "cuda", experts=experts, hidden=hidden, units=units, **EVERYTHING)
    x, index, weights = layer.route(tokens, 2)
    return lambda: layer.run(x, index, weights)


def fused() -> Iterator[Run]:
    yield of_codebook("packed_linear", 3, HALF, 150, 900, (1, 2, 3, 4, 6))
    yield of_codebook("packed_linear", 9, BRAIN, 1000, 300, (2, 4, 5))


def byte_planes() -> Iterator[Run]:
    yield of_codebook("packed_linear_byte_planes", 1, HALF, 150, 2100, (1, 2, 3, 4))
    yield of_codebook("packed_linear_byte_planes", 2, HALF, 2100, 600, (2, 3))


def wgmma() -> Iterator[Run]:
    yield of_codebook("packed_linear_wgmma", 9, HALF, 900, 700, (1, 3, 4, 7))
    yield of_codebook("packed_linear_wgmma", 140, HALF, 150, 500, (2, 3, 4))


def wgmma_registers() -> Iterator[Run]:
    yield of_codebook("packed_linear_wgmma_registers", 5, HALF, 150, 1900, (1, 3, 4))
    yield of_codebook("packed_linear_wgmma_registers", 30, HALF, 1700, 700, (2, 4))


def linear(weight: Callable[[int, int], Any]) -> Callable[[], Iterator[Run]]:
    def runs() -> Iterator[Run]:
        yield of_sparse("packed_linear", weight(300, 1500), 3, torch.float32)
        yield of_sparse("packed_linear", weight(1800, 300), 12)

    return runs


def tables() -> Iterator[Run]:
    yield of_sparse("packed_linear_tables", random_codes(1100, 420, 4, 0.02)[0], 1)
    yield of_sparse("packed_linear_tables", random_codes(6500, 200, 3, 0.02)[0], 1)


def products() -> Iterator[Run]:
    yield of_sparse("packed_linear_products", random_codes(600, 3000, 2, 0.02)[0], 1)
    yield of_sparse("packed_linear_products", random_codes(3700, 300, 2, 0.02)[0], 1)


def experts(*mixes: Any) -> Callable[[], Iterator[Run]]:
    def runs() -> Iterator[Run]:
        yield of_experts(list(mixes), 1, 300, 150)
        yield of_experts(list(mixes), 12, 1400, 70, experts=2)
        yield of_experts(list(mixes), 150, 16, 8, experts=2)

    return runs


def experts_of_columns() -> Iterator[Run]:
    """A block adds two panels."""
    yield of_experts(["few fp16", "bitmap fp32"], 5, 4500, 200, experts=2)
    yield of_experts(["few fp16"], 150, 16, 8, experts=2)


HOPPER = {"wgmma": wgmma, "wgmma from registers": wgmma_registers}
KERNELS = HOPPER | {
    "fused": fused,
    "byte planes": byte_planes,
    "2:4": linear(lambda n, k: sparse24(n, k, HALF)),
    "bitmap": linear(lambda n, k: bitmap(n, k, 0.5, HALF)),
    "2:4 of 2 bits": linear(lambda n, k: random_codes(n, k, 2, 0.02)[0]),
    "2:4 of 4 bits": linear(lambda n, k: random_codes(n, k, 4, 0.02)[0]),
    "columns": linear(lambda n, k: bitmap(n, 6 * k, 0.9)),
    "tables": tables,
    "products": products,
    "experts of codebooks": experts((1, 2, 3, 4, 6), (4, 5)),
    "experts of 2:4": experts("2:4 bf16", "2:4 int8"),
    "experts of bitmaps": experts("bitmap fp16"),
    "experts of 2:4 of 2 bits": experts("2 bits"),
    "experts of 2:4 of 4 bits": experts("4 bits"),
    "experts of columns": experts_of_columns,
}

MEETS = "lanes meet at a tensor core instruction behind the last read, which orders nothing by the letter"
EMPTY = "all copies were waited for: what is still counted are groups without any"
NOT_MISSED = {
    "product.cuh: ptx::sync_warp();  // the next fetch overwrites this stage": MEETS,
    "product.cuh: ptx::sync_warp();  // all lanes are done with the tables before": MEETS,
    "product.cuh: ptx::sync_warp();  // the ring is free": MEETS,
    "linear_byte_planes.cu: ptx::sync_warp();      // the ring is free": MEETS,
    "linear_products.cu: ptx::sync_warp();  // the next fetch overwrites this stage": MEETS,
    "linear_products.cu: ptx::sync_warp();      // the ring is free": MEETS,
    "product.cuh: ptx::wait_async<0>();  // for groups without copies": EMPTY,
    "linear_byte_planes.cu: ptx::wait_async<0>();  // for groups without copies": EMPTY,
    "linear_products.cu: ptx::wait_async<0>();  // for groups without copies": EMPTY,
    "linear_tables.cu: ptx::wait_async<0>();  // for groups without copies": EMPTY,
    "linear_tables.cu: ptx::sync_block();  // nobody reads x any more": "what is read late makes a table that none reads",
    "linear_wgmma.cu: ptx::wait_async<0>();  // for groups without copies": EMPTY,
    "linear_wgmma_registers.cu: ptx::sync_warp();  // together again, as wgmma wants the lanes": "fibers need not be",
    "routed_experts.cu: ptx::sync_block();  // room is read, where the block had a row before": "blocks have one row each",
    "linear_byte_planes.cu: if (kWidth == 4 && half == 1) ptx::sync_warp();": "it holds the compiler back, not lanes",
}
"""Waits that no order misses, by their line of source, which stands once in its file: why. Where it says `weaker`, too."""
OF_ITS_OWN = "a warp has put there what it reads: cells of 32 columns, and four warps"
OTHERS = "of this kernel no order shows it, of others some does"
NOT_MISSED_BY = {
    "fused": {"linear_outputs.cuh: ptx::sync_block();  // all sums of the block are there": OTHERS},
    "wgmma from registers": {"linear_outputs.cuh: ptx::sync_block();  // all sums of the block are there": OTHERS},
    "2:4 of 4 bits": {"streamed_linear.cuh: ptx::sync_block();  // x is there": OF_ITS_OWN},
    "experts of 2:4 of 4 bits": {
        "multiply_cells.cu: ptx::sync_block();  // the stage before is multiplied": OF_ITS_OWN,
        "multiply_cells.cu: ptx::sync_block();  // x is there": OF_ITS_OWN,
    },
}


def differs(extension: Any, runs: list[Run], expected: list[torch.Tensor], seconds: float) -> str:
    """What shows it, of the runs in every order in a process of their own; nothing where all give the same bits."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        said = ""
        for order, (run, bits) in itertools.product(orders(), zip(runs, expected, strict=True)):
            extension.emulator.set_schedule(**order)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                if not torch.equal(run(), bits):
                    said = "other bits"
            except BaseException as error:
                said = str(error) or type(error).__name__
            if said:
                said += f" where {[name for name, on in order.items() if on]}"
                break
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as said:
        return said.read() or (f"ended by {status}" if status else "")


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_wait_or_barrier_can_be_left_out(emulated, kernel):  # noqa: F811
    emulator = emulated.emulator
    emulator.set_hopper(kernel in HOPPER)
    runs = list(KERNELS[kernel]())
    emulator.list_waits(True)
    expected = [run() for run in runs]
    places, slowest = emulator.waits(), 0.0
    emulator.list_waits(False)
    for order, (run, bits) in itertools.product(orders(), zip(runs, expected, strict=True)):
        emulator.set_schedule(**order)
        began = time.process_time()
        assert torch.equal(run(), bits), order
        slowest = max(slowest, time.process_time() - began)
    emulator.set_schedule()
    seconds = 1 + MOST_TIMES * slowest
    assert places

    not_missed, known = set(), NOT_MISSED | NOT_MISSED_BY.get(kernel, {})
    for file, line in places:
        source = (ROOT / file).read_text().splitlines()[line - 1].strip()
        for only_weaker in (False, True) if "wait_async" in source or "wgmma_wait" in source else (False,):
            emulator.leave_out(file, line, only_weaker)
            found = differs(emulated, runs, expected, seconds)
            emulator.leave_out()
            name = f"{Path(file).name}: {source}"
            print(f"{kernel} | {name}{', weaker' if only_weaker else ''} | {found}")
            if not found:
                not_missed.add(name)
                assert name not in known or (ROOT / file).read_text().count(source + "\n") == 1
    emulator.set_hopper(False)
    assert not_missed <= known.keys(), not_missed - known.keys()
