"""Every CPU kernel in the table: the same bits with any number of threads, from several Python threads at once, and after fork."""

import hashlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllmq import BitmapWeight, Sparse24CodebookLinear, Sparse24Weight
from pyllmq.dispatch import Kernel, rows
from pyllmq.layouts import machine_layout
from pyllmq.operations import Arriving, Cdist, ColumnBlock, Gate, Normalisation, PackedExperts, Points, Transport
from pyllmq.packing import mask_24, unstructured_mask

from .oracle import random_case

pytestmark = pytest.mark.kernels

ROWS = {row.name: row for row in rows() if row.backend == "cpu"}
THREADS = (1, 2, 3, 5)
Call = Callable[[Callable[..., Any]], list[Tensor]]
"""Takes the `run` of a row, gives everything that it computed."""

N, K = 701, 299  # neither divides by a tile; enough work for several threads
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("exact", "high", "fast")


def linear(weight: Any) -> Call:
    bias, inputs = torch.randn(N), [torch.randn(tokens, K) for tokens in (1, 7, 70)]

    def call(run):
        operand = weight.prepack()
        found = list(operand.tensors)
        for x, dtype, precision in itertools.product(inputs, DTYPES, PRECISIONS):
            found.append(run(x.to(dtype), operand, bias, precision))
        return found

    return call


def dequantize(weight: Any) -> Call:
    def call(run):
        operand = weight.prepack()
        held = machine_layout(operand.layout).unpack(operand, weight.structure.tensors(), weight.tensors)
        return [*held.values(), *(run(operand, dtype) for dtype in DTYPES)]

    return call


def calls() -> dict[str, Call]:
    """By the name of the row; random numbers are drawn here, and not again when a call is repeated."""
    case = random_case(N, K, (1, 2, 3, 4, 8), segments=2, outliers=0.01, row_scale=True)
    dense, x = torch.randn(N, K), torch.randn(33, K)
    stored, ids = case.weight.checkpoint_operand(), torch.randint(0, N, (400,))
    formats = {
        "codebook": case.weight,
        "bitmap": BitmapWeight.pack(dense, unstructured_mask(dense, 0.6), torch.int8),
        "sparse24": Sparse24Weight.pack(dense, mask_24(dense), torch.float16),
        "sparse24_codebook": Sparse24CodebookLinear.from_dense(dense, 3, outlier_fraction=0.02).packed_weight(),
    }
    codes, packed = torch.randint(0, 8, (N, K), dtype=torch.uint8), torch.randint(0, 256, (N, 113), dtype=torch.uint8)
    student, teacher, grad = torch.randn(3, 20, 3001), torch.randn(3, 17, 3001).bfloat16(), torch.randn(3, 20, 17)
    points, importance = torch.randn(40, 601), torch.rand(40, 601)
    wide, small, logits = torch.rand(3, 90, 110), torch.rand(300, 4, 4), torch.randn(900, 4, 5)

    def gradient(run):
        return [run(dense, stored)]

    def cdist_backward(run):
        _, *statistics = ROWS["cpu.softmax_cdist_l1"].run(student, teacher, 2.0)
        return [run(grad, Cdist(student, teacher, *statistics, 2.0))]

    def kmeans(run):
        found = []
        for method, weights in itertools.product(("exact", "windowed", "lloyd"), (None, importance)):
            for pair in run(Points(points, weights, (3, 16, 100), method), 7, False, True):
                found.extend(pair)
        return found

    def fit_columns(run):
        columns, rows_, found = 24, 300, []
        for descend in (False, True):
            target, stored_values = (
                dense[:columns, :K].repeat(1, 2)[:, :rows_].contiguous(),
                torch.zeros(columns, rows_),
            )
            results = [torch.zeros(columns, rows_, dtype=torch.uint8), torch.zeros(columns, rows_, dtype=torch.bool)]
            results.append(torch.zeros(columns, 256))
            ones, kept = torch.ones(rows_), torch.full((columns,), 2, dtype=torch.int32)
            bits = (torch.arange(columns) % 4 + 1).to(torch.uint8)
            block = ColumnBlock(
                target, torch.full((columns, columns), 0.1), torch.ones(columns), ones, ones, bits, kept, stored_values,
                *results,
            )  # fmt: skip
            moves, _ = run(block, "exact", descend)
            found += [target, stored_values, *results, moves]
        return found

    def sinkhorn(run):
        found = []
        for cost, tape in ((wide, torch.empty(3, 9, 200)), (small, torch.empty(0))):  # small problems keep none
            problems, n, m = cost.shape
            a, b, epsilon = (
                torch.full((problems, n), 1 / n),
                torch.full((problems, m), 1 / m),
                torch.full((problems,), 0.1),
            )
            found += [*run(Transport(cost, a, b, epsilon, torch.inf, torch.inf), 9, 0.0, tape), tape]
        return found

    def sinkhorn_backward(run):
        problems, n, m = wide.shape
        a, b, tape = torch.full((problems, n), 1 / n), torch.full((problems, m), 1 / m), torch.empty(problems, 9, n + m)
        epsilon = torch.full((problems,), 0.1)
        transport = Transport(wide, a, b, epsilon, torch.inf, torch.inf)
        plan, u, v, count = ROWS["cpu.sinkhorn"].run(transport, 9, 0.0, tape)
        return list(run(transport, Arriving(tape, count, plan, u, v)))

    hidden, choices = torch.randn(50, 72), torch.stack([torch.randperm(5)[:2] for _ in range(50)])
    shapes = ((80, 72), (72, 40))
    up, down = ([random_case(n, k, (2, 4), outliers=0.01).weight.prepack() for _ in range(5)] for n, k in shapes)

    def routed_experts(run):
        experts = PackedExperts(tuple(up), tuple(down), Gate("silu"))
        return [run(hidden[:tokens], choices[:tokens], torch.ones(tokens, 2), experts) for tokens in (1, 50)]

    how = Normalisation(12, False, True, "line", 0.0, 1e-6)
    found: dict[str, Call] = {
        "cpu.codebook_linear": linear(case.weight),
        "cpu.codebook_dequantize": dequantize(case.weight),
        "cpu.codebook_rows": lambda run: [run(case.weight.prepack(), ids, dtype) for dtype in DTYPES],
        "cpu.decode_checkpoint": lambda run: [run(stored, dtype) for dtype in DTYPES],
        "cpu.decode_checkpoint_and_matmul": lambda run: [run(x, stored, None, "high")],
        "cpu.codebook_gradient": gradient,
        "cpu.routed_experts": routed_experts,
        "cpu.pack_codes": lambda run: [run(codes, bits) for bits in (3, 5, 8)],
        "cpu.unpack_codes": lambda run: [run(packed, 3, 301), run(packed, 8, 113)],
        "cpu.softmax_cdist_l1": lambda run: list(run(student, teacher, 2.0)),
        "cpu.softmax_cdist_l1_backward": cdist_backward,
        "cpu.kmeans_1d": kmeans,
        "cpu.kmeans_1d_moved": kmeans,
        "cpu.kmeans_1d_errors": lambda run: [run(Points(points, importance, range(1, 17), "exact"))],
        "cpu.kmeans_1d_errors_moved": lambda run: [run(Points(points, None, range(1, 17), "windowed"))],
        "cpu.fit_columns": fit_columns,
        "cpu.sinkhorn": sinkhorn,
        "cpu.sinkhorn_backward": sinkhorn_backward,
        "cpu.doubly_stochastic": lambda run: [run(logits, how)],
        "cpu.doubly_stochastic_backward": lambda run: [run(logits, logits.flip(0), how)],
    }
    for name, weight in formats.items():
        if name != "codebook":
            found |= {f"cpu.{name}_linear": linear(weight), f"cpu.{name}_dequantize": dequantize(weight)}
    return found


def digest(tensors: list[Tensor]) -> str:
    """By numpy: after a fork torch's own threads would be waited for in vain."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def digests(made: dict[str, Call], names: list[str]) -> dict[str, str]:
    return {name: digest(made[name](ROWS[name].run)) for name in names}


@pytest.fixture(scope="module")
def made() -> dict[str, Call]:
    torch.manual_seed(0)
    return calls()


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_row_has_an_entry(made):
    assert set(made) == set(ROWS) and all(isinstance(row, Kernel) for row in ROWS.values())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_same_bits_with_any_number_of_threads(made, name):
    found = set()
    for threads in (*THREADS, *THREADS[::-1]):
        torch.set_num_threads(threads)
        found |= set(digests(made, [name]).values())
    assert len(found) == 1


def test_from_several_python_threads(made):
    """Each in an order of its own, while another changes the number of threads that they share."""
    torch.set_num_threads(1)
    expected = digests(made, list(made))
    wrong: list[Any] = []
    done = threading.Event()

    def work(turn: int) -> None:
        names = sorted(made, key=lambda name: hashlib.sha256(f"{name}{turn}".encode()).digest())
        torch.set_num_threads(THREADS[turn % len(THREADS)])
        try:
            for _ in range(2):
                found = digests(made, names)
                wrong.extend(name for name in names if found[name] != expected[name])
        except BaseException as error:
            wrong.append(error)

    def resize() -> None:
        for threads in itertools.cycle(THREADS):
            torch.set_num_threads(threads)
            digests(made, ["cpu.pack_codes"])
            if done.wait(0.003):
                return

    workers = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    resizer = threading.Thread(target=resize)
    for thread in (*workers, resizer):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    resizer.join()
    assert wrong == []


def compare_in_child(made, expected, threads):
    torch.set_num_threads(1)  # its own threads do not survive a fork (OpenMP); ours do
    torch.get_num_threads = lambda: threads
    found = digests(made, list(expected))
    raise SystemExit([name for name in expected if found[name] != expected[name]] or 0)


def test_in_forked_children(made):
    """Two at a time, forked while another thread of this process is in the middle of a call."""
    names = [
        name for name in sorted(made) if name != "cpu.decode_checkpoint_and_matmul"
    ]  # torch's threads do not survive
    torch.set_num_threads(3)
    expected = digests(made, names)
    done = threading.Event()

    def keep_busy() -> None:
        while not done.is_set():
            digests(made, ["cpu.kmeans_1d", "cpu.bitmap_linear"])

    # A child waits for ever for the sanitizer's allocator if any thread of this process held it at the fork, and a thread that
    # only starts and ends does so as well: 4 of 600 children on a busy machine; without it none in four minutes.
    busy = [] if "PYLLMQ_SANITIZED" in os.environ else [threading.Thread(target=keep_busy)]
    for thread in busy:
        thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(3):
            children = [context.Process(target=compare_in_child, args=(made, expected, threads)) for threads in (1, 3)]
            for child in children:
                child.start()
            for child in children:
                child.join(120)
                alive = child.is_alive()
                child.kill()
                assert not alive and child.exitcode == 0, "it hangs" if alive else child.exitcode
    finally:
        done.set()
        for thread in busy:
            thread.join()
