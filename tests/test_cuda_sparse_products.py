"""One token of 2:4 codes of 2 bits by products (csrc/sparse/cuda/linear_products.cu) on the emulator, against fp64.

The emulated device has 3 multiprocessors, so 6 blocks at a time: 700 columns are 5 splits of K or more, 70 rows one block. What
`high` permits is asserted of every case, and less of normal x.
"""

import pytest
import torch

import pyllmq
from pyllmq.backends.cuda import sparse
from pyllmq.functional import sparse24_codebook_linear

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .test_sparse_formats import random_codes
from .test_sparse_linear import dense_of

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIGH = 2e-4
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def check(weight, x, bias=None, permitted=HIGH):
    """Errors of the whole result; a few weights have no others to hide behind, so they are compared with what they are made of."""
    dense = dense_of(weight)
    with pyllmq.use_backend("cuda"):
        packed = type(weight)(weight.structure, weight.tensors)
        y = sparse24_codebook_linear(x, packed, bias)
    products = x.double() * dense
    exact = products.sum(1) + (0 if bias is None else bias.double())
    size = products.norm() + (0 if bias is None else bias.double().norm())
    error = (y[0].double() - exact).norm()
    assert error <= permitted * size + ROUNDING[x.dtype] * exact.norm(), (float(error), float(size))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (1, 300), (300, 1), (3, 5), (63, 31), (64, 64), (65, 130), (257, 70), (513, 515), (1100, 40), (40, 4100)],
)
def test_shapes(n, k, dtype):
    for outliers in (0.0, 0.03):
        check(random_codes(n, k, 2, outliers)[0], torch.randn(1, k).to(dtype), torch.randn(n).to(dtype))


def test_errors_of_normal_x():
    """4 blocks that take the whole of K, so that a warp's unit serves 256 columns."""
    check(random_codes(2000, 1900, 2, 0.0)[0], torch.randn(1, 1900), permitted=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30, 1e35])
def test_the_smallest_and_the_largest_x(magnitude, dtype):
    check(random_codes(40, 300, 2, 0.02)[0], (torch.randn(1, 300) * magnitude).to(dtype))


def test_zero():
    assert torch.equal(check(random_codes(40, 64, 2, 0.0)[0], torch.zeros(1, 64)), torch.zeros(1, 40))


def test_one_channel_far_larger_than_the_others():
    x = torch.randn(1, 512)
    x[:, 7] *= 1000
    check(random_codes(64, 512, 2, 0.0)[0], x)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite_in_means_not_finite_out(value):
    weight = random_codes(40, 64, 2, 0.0)[0]
    x = torch.randn(1, 64)
    x[0, 7] = value
    with pyllmq.use_backend("cuda"):
        y = sparse24_codebook_linear(x, type(weight)(weight.structure, weight.tensors))
    assert not torch.isfinite(y).any()


def test_no_order_of_threads_blocks_and_copies_changes_a_bit(emulated):  # noqa: F811
    weight = random_codes(600, 700, 2, 0.02)[0]
    x = torch.randn(1, 700)
    in_every_order(emulated, lambda: check(weight, x))


def test_splits_of_k_and_what_is_refused(emulated):  # noqa: F811
    assert emulated.SparseProducts(0, 4096, 3072, 512, 1024).room(1, 0) == 0  # six blocks of rows
    assert emulated.SparseProducts(0, 4096, 70, 40000, 1024).room(1, 0) >= 20 * 70  # a split is at most 2048 columns
    with pyllmq.use_backend("cuda"):
        operand = random_codes(40, 64, 2, 0.0)[0].operand()
    with pytest.raises(ValueError, match="one token, here 2"):
        sparse.packed_linear_products(torch.randn(2, 64), operand, None, "high")
