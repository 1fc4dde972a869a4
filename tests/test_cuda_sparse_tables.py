"""One token of 2:4 codes of 3 and 4 bits by tables of products (csrc/sparse/cuda/linear_tables.cu) on the emulator, against fp64.

The emulated device has 3 multiprocessors, so 6 blocks at a time, of 1024 rows each. Products and sums are fp32, so `exact` is
asserted of every case.
"""

import itertools

import pytest
import torch

import pyllmq
from pyllmq.backends.cuda import sparse
from pyllmq.functional import sparse24_codebook_linear
from pyllmq.layouts import WeightOperand

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .oracle import linear_and_size
from .test_sparse_formats import random_codes
from .test_sparse_linear import dense_of

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def operand_of(weight):
    with pyllmq.use_backend("cuda"):
        return type(weight)(weight.structure, weight.tensors).operand()


def check(weight, x, bias=None):
    """Each output errs by no more than fp32 sums of so many terms and its own rounding may."""
    dense = dense_of(weight)
    y = sparse.packed_linear_tables(x, operand_of(weight), bias, "exact")
    exact, size = linear_and_size(dense, x, bias)
    assert bool(((y.double() - exact).abs() <= 4e-7 * size + ROUNDING[x.dtype] * exact.abs() + 1e-37).all())
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (1, 300), (300, 1), (3, 5), (63, 31), (64, 64), (65, 130), (1100, 70), (40, 4100)]
)
def test_shapes(n, k, dtype):
    for bits, outliers in ((3, 0.03), (4, 0.0)):
        check(random_codes(n, k, bits, outliers)[0], torch.randn(1, k).to(dtype), torch.randn(n).to(dtype))


def test_the_row_serves_one_token_of_3_and_4_bits(emulated):  # noqa: F811
    launches = []
    for bits, precision in itertools.product((3, 4), ("exact", "high", "fast")):
        weight, x = random_codes(40, 64, bits)[0], torch.randn(1, 64)
        with pyllmq.use_backend("cuda"):
            y = sparse24_codebook_linear(x, type(weight)(weight.structure, weight.tensors), None, precision)
        launches.append(torch.equal(y, check(weight, x)))
    assert all(launches)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_small_and_large_x(magnitude):
    for dtype in DTYPES[:2]:
        check(random_codes(40, 300, 4, 0.02)[0], (torch.randn(1, 300) * magnitude).to(dtype))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite_where_a_weight_is_kept(value):
    weight = random_codes(40, 64, 4)[0]
    x = torch.randn(1, 64)
    x[0, 7] = value
    y = sparse.packed_linear_tables(x, operand_of(weight), None, "high")
    kept = dense_of(weight)[:, 7] != 0
    assert kept.any() and not kept.all()
    assert not torch.isfinite(y[0, kept]).any() and torch.isfinite(y[0, ~kept]).all()


def test_no_order_of_threads_blocks_and_copies_changes_a_bit(emulated):  # noqa: F811
    weight = random_codes(1100, 420, 4, 0.02)[0]
    x = torch.randn(1, 420)
    in_every_order(emulated, lambda: check(weight, x))


def test_splits_of_k_and_what_is_refused(emulated):  # noqa: F811
    assert emulated.SparseTables(0, 4096, 6144, 512, 768).room(1, 0) == 0  # six blocks of rows
    assert emulated.SparseTables(0, 4096, 70, 40000, 768).room(1, 0) >= 20 * 70  # a split is at most 2048 columns
    with pytest.raises(ValueError, match="one token, here 2"):
        sparse.packed_linear_tables(torch.randn(2, 64), operand_of(random_codes(40, 64, 4)[0]), None, "high")


def test_a_layout_of_another_shape_gives_nan():
    operand = operand_of(random_codes(40, 52, 4)[0])
    odd = WeightOperand(operand.kind, operand.layout, operand.tensors, operand.meta, (40, 51))
    assert sparse.packed_linear_tables(torch.randn(1, 51), odd, None, "high").isnan().all()
