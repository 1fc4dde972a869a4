"""codebook_gradient's CUDA kernel on the emulator (tests/cuda_emulator.py): what a CPU can prove of it.

Columns of a width below, at and above a tile of 32; rows below and above the run of 256 from which on blocks split them; widths
above 5 bits, whose codebooks are gone through in parts.
"""

import itertools

import pytest
import torch

import pyllmq
from pyllmq import CodebookWeight
from pyllmq.functional import codebook_gradient

from .cuda_emulator import emulated  # noqa: F401
from .test_codebook_gradient import dense_in_fp64, packed, trainable

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]


def found_and_exact(weight, codes, gradient):
    operand, leaves = trainable(weight)
    dense, own = dense_in_fp64(weight, codes, leaves)
    dense.backward(gradient.double())
    with pyllmq.use_backend("cuda"):
        return codebook_gradient(gradient, operand), own["codebook"].grad


@pytest.mark.parametrize(
    ("rows", "size", "segments", "outliers", "scaled"),
    [
        (1, 1, 1, 0.0, False),
        (7, 5, 2, 0.3, True),
        (33, 65, 1, 0.0, True),
        (130, 300, 3, 0.02, True),
        (1100, 70, 2, 0.0, True),
    ],
)
def test_sums_are_those_of_autograd(rows, size, segments, outliers, scaled):
    weight, codes = packed(rows, size, segments, outliers, scaled, seed=size)
    found, exact = found_and_exact(weight, codes, torch.randn(rows, size))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6 * rows**0.5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [31, 32, 33])
def test_every_width_alone(bits, columns):
    codes = torch.randint(0, 1 << bits, (300, columns), dtype=torch.uint8)
    weight = CodebookWeight.pack(codes, torch.randn(columns << bits), torch.full((columns,), bits))
    found, exact = found_and_exact(weight, codes, torch.randn(300, columns))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=4e-5)


def test_every_order_of_threads_and_blocks_gives_the_same_bits(emulated):  # noqa: F811
    weight, codes = packed(700, 40, 2, 0.05, True)
    gradient = torch.randn(700, 40)
    results = []
    for last_thread_first, last_block_first in itertools.product((False, True), repeat=2):
        emulated.emulator.set_schedule(last_thread_first=last_thread_first, last_block_first=last_block_first)
        results.append(found_and_exact(weight, codes, gradient)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])
