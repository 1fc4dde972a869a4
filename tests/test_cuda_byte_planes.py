"""One and two tokens by byte planes (csrc/codebook/cuda/linear_byte_planes.cu) on the emulator, against fp64.

The emulated device has 3 multiprocessors, so 6 blocks at a time: 700 columns are 3 splits of K, 70 rows one block. What `high`
permits is asserted of every case, and a quarter of it of normal x.
"""

import pytest
import torch

import pyllmq
from pyllmq import CodebookWeight, dispatch
from pyllmq.backends.cuda import codebook as cuda
from pyllmq.functional import codebook_linear
from pyllmq.operations import WeightProblem

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .oracle import CODEBOOK_SIZE, assert_within, random_case
from .test_cuda_kernels import SHAPES

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIGH = 2e-4


def check(case, x, bias=None, precision="high"):
    """The row's result, once it is within what `high` permits."""
    with pyllmq.use_backend("cuda"):
        weight = CodebookWeight(case.weight.structure, case.weight.tensors)
        operand = weight.operand()
        problem = WeightProblem("packed_linear", "cpu", x.dtype, operand.layout, len(x), operand.meta, precision)
        assert dispatch.choose(problem).name == "cuda.byte_planes"
        before = operand.tensors[0].clone()
        y = codebook_linear(x, weight, bias, precision)
    assert torch.equal(operand.tensors[0], before), "a kernel left a counter that is not zero"
    assert_within(HIGH, case, x, y, bias)
    return y


@pytest.mark.parametrize("widths", [(1,), (2,), (3,), (4,), (1, 2), (2, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_every_width_and_mix(widths, tokens):
    case = random_case(67, 259, widths)
    for dtype, precision in zip(DTYPES, ("high", "fast", "high"), strict=True):
        check(case, torch.randn(tokens, 259).to(dtype), torch.randn(67), precision)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_shapes_of_a_mix_with_everything(n, k, tokens):
    case = random_case(n, k, (1, 2, 3, 4), segments=min(3, n), outliers=0.03, row_scale=True)
    for dtype in DTYPES:
        check(case, torch.randn(tokens, k).to(dtype), torch.randn(n).to(dtype))


@pytest.mark.parametrize("extra", ["outliers", "segments", "row_scale", "all weights are outliers"])
@pytest.mark.parametrize("widths", [(2,), (3,), (2, 4)])
def test_each_extra(extra, widths):
    case = random_case(
        200,
        320,
        widths,
        segments=3 if extra == "segments" else 1,
        outliers={"outliers": 0.02, "all weights are outliers": 1.1}.get(extra, 0.0),
        row_scale=extra == "row_scale",
    )
    for tokens in (1, 2):
        check(case, torch.randn(tokens, 320))


@pytest.mark.parametrize(("bits", "heavy", "permitted"), [(2, False, 5e-5), (4, False, 5e-5), (4, True, 2e-4)])
def test_errors_are_a_fraction_of_what_high_permits(bits, heavy, permitted):
    """6 blocks that take the whole of K, so that a warp's unit serves 240 columns; a Student t of 3 degrees has values of ten times
    its spread."""
    case = random_case(2600, 1900, (bits,))
    x = torch.distributions.StudentT(3.0).sample((1, 1900)) if heavy else torch.randn(1, 1900)
    exact = x.double() @ case.dense.T
    error = float((check(case, x).double() - exact).norm() / exact.norm())
    assert error <= permitted, error


@pytest.mark.parametrize("rank", [1, 10])
def test_one_channel_far_larger_than_the_others(rank):
    x = torch.randn(2, 512)
    x[:, :rank] *= 1000
    check(random_case(64, 512, (2, 3, 4)), x)


def test_the_largest_codes_of_every_column_and_an_even_codebook():
    """All 16 entries of every sign in either half, and columns whose entries are one number, or only two."""
    columns = torch.stack(
        [torch.linspace(-1, 1, 16), torch.linspace(1, -1, 16), torch.full((16,), 0.7), torch.zeros(16)]
    )
    columns = torch.cat([columns, torch.randn(60, 16).sign(), torch.randn(64, 16)]) * CODEBOOK_SIZE
    codes = torch.arange(16).repeat_interleave(8)[:, None].expand(128, 128).to(torch.uint8)
    weight = CodebookWeight.pack(codes, columns.reshape(1, -1), torch.full((128,), 4), segment_rows=torch.tensor([128]))
    dense = columns.half().double().T[codes[:, 0].long()]
    x = torch.randn(1, 128)
    with pyllmq.use_backend("cuda"):
        y = codebook_linear(x, weight)
        alone = codebook_linear(torch.eye(128)[3:4], weight)
    assert float((y.double() - x.double() @ dense.T).norm()) <= 5e-5 * float((x.double() @ dense.T).norm())
    assert torch.equal(alone, torch.zeros(1, 128))


def test_splits_of_k_and_their_workspace(emulated):  # noqa: F811
    def room(n, k, tokens):
        return emulated.CodebookBytePlanes(0, 4096, n, k, 4).room(tokens, 0)

    assert room(3000, 900, 1) == 0  # 6 blocks of rows
    assert room(70, 900, 1) == 4 * 70 and room(70, 900, 2) == 4 * 2 * 70
    assert room(100000, 40000, 1) == 20 * 100000  # a split is at most 2048 columns
    check(random_case(1, 5000, (2,)), torch.randn(2, 5000))
    check(random_case(3000, 300, (1, 4), outliers=0.01), torch.randn(1, 300).half(), torch.randn(3000))


@pytest.mark.parametrize("tokens", [1, 2])
def test_no_order_of_threads_blocks_and_copies_changes_a_bit(emulated, tokens):  # noqa: F811
    case = random_case(150, 700, (1, 2, 3, 4), segments=2, outliers=0.02, row_scale=True)
    x = torch.randn(tokens, 700)
    in_every_order(emulated, lambda: check(case, x))


@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30, 1e37])
def test_the_smallest_and_the_largest_x(magnitude):
    check(random_case(40, 300, (2, 4), outliers=0.02), torch.randn(2, 300) * magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_in_means_not_finite_out_for_that_token_only(dtype):
    case = random_case(40, 64, (2, 3, 4))
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(2, 64).to(dtype)
        x[0, 7] = value
        with pyllmq.use_backend("cuda"):
            y = codebook_linear(x, CodebookWeight(case.weight.structure, case.weight.tensors))
        assert not torch.isfinite(y[0]).any()
        torch.testing.assert_close(y[1].double(), x[1].double() @ case.dense.T, rtol=1e-2, atol=1e-2)


def test_zero():
    case = random_case(40, 64, (3,))
    assert torch.equal(check(case, torch.zeros(2, 64)), torch.zeros(2, 40))


def test_what_another_row_serves(emulated):  # noqa: F811
    def row(meta, tokens=1, precision="high"):
        return dispatch.choose(
            WeightProblem("packed_linear", "cpu", torch.float32, cuda.LAYOUT, tokens, meta, precision)
        ).name

    assert row((4,)) == row((1,), tokens=2) == row((4,), precision="fast") == "cuda.byte_planes"
    assert row((5,)) == row((4,), tokens=3) == row((4,), precision="exact") == "cuda.fused"
    with pyllmq.use_backend("cuda"):
        wide = random_case(40, 50, (2, 5)).weight.operand()
    assert wide.meta == (5, 1)
    with pytest.raises(ValueError, match="1 to 4 bits, this one has columns of 5"):
        cuda.byte_planes(wide)
    with pyllmq.use_backend("cuda"):
        narrow = random_case(40, 50, (2, 3)).weight.operand()
    with pytest.raises(ValueError, match="one or two tokens, here 3"):
        cuda.packed_linear_byte_planes(torch.randn(3, 50), narrow, None, "high")
