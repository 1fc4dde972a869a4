"""3 to 32 tokens by wgmma from registers (csrc/codebook/cuda/linear_wgmma_registers.cu) on the emulator, against fp64.

The emulated device has 3 multiprocessors, so 3 blocks at a time. A block is 512 rows; its two or four warp groups take pairs of
groups of 16 columns in turn, through rings of four stages. Columns of the product: tokens, or twice the tokens in fp32; up to 8, 16
and 32 of them are a kernel each.
"""

import itertools
from functools import partial

import pytest
import torch

from pyllmq.backends.cuda import codebook as cuda
from pyllmq.layouts import WeightOperand

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .oracle import random_case
from .test_cuda_kernels import SHAPES
from .test_cuda_wgmma import check as wgmma_check
from .test_cuda_wgmma import hopper, operand_of  # noqa: F401

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("hopper")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


check = partial(wgmma_check, linear=cuda.packed_linear_wgmma_registers)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_width(bits):
    case = random_case(67, 259, (bits,))
    for tokens, dtype in itertools.product((1, 3, 8, 9, 16), DTYPES):
        check(case, torch.randn(tokens, 259).to(dtype), torch.randn(67))
    for dtype in DTYPES[1:]:
        check(case, torch.randn(32, 259).to(dtype))


@pytest.mark.parametrize("widths", [(1, 2, 3, 4), (2, 4), (1, 3), (3, 4)])
def test_mixes_of_widths(widths):
    case = random_case(131, 451, widths, outliers=0.02)
    for tokens, dtype in ((5, torch.float32), (9, torch.bfloat16), (29, torch.float16)):
        check(case, torch.randn(tokens, 451).to(dtype))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shapes_of_a_mix_with_everything(n, k):
    case = random_case(n, k, (1, 2, 3, 4), segments=min(3, n), outliers=0.03, row_scale=True)
    for tokens, dtype in ((3, torch.bfloat16), (13, torch.float32), (20, torch.float16)):
        check(case, torch.randn(tokens, k).to(dtype), torch.randn(n).to(dtype), factor=2.0 if k > 8 else 8.0)


@pytest.mark.parametrize("extra", ["outliers", "segments", "row_scale", "all weights are outliers"])
def test_each_extra(extra):
    case = random_case(
        200,
        320,
        (2, 4),
        segments=3 if extra == "segments" else 1,
        outliers={"outliers": 0.02, "all weights are outliers": 1.1}.get(extra, 0.0),
        row_scale=extra == "row_scale",
    )
    for dtype in DTYPES:
        check(case, torch.randn(12, 320).to(dtype))


def test_blocks_take_several_pieces_of_work_and_splits_of_k(hopper):  # noqa: F811
    def partials(n, k, tokens):
        groups = -(-k // 16) + 3
        return hopper.CodebookWgmmaRegisters(0, 4096, n, k).room(tokens, 2) - 32 - groups * 32 * 16

    assert partials(1800, 200, 16) == 0  # four row blocks on three multiprocessors
    assert partials(70, 4000, 16) == 3 * 16 * 70
    check(random_case(1800, 200, (2, 3), segments=2, outliers=0.01), torch.randn(16, 200).half(), torch.randn(1800))
    check(random_case(70, 4000, (1, 4), outliers=0.01, row_scale=True), torch.randn(16, 4000).bfloat16())


@pytest.mark.parametrize("tokens", [5, 12, 30])
def test_no_order_of_threads_blocks_and_copies_changes_a_bit(hopper, tokens):  # noqa: F811
    """Stages pass three times through their rings: of 30 tokens two warp groups have 12 pairs of groups each."""
    case = random_case(150, 1600, (1, 3, 4), segments=2, outliers=0.02, row_scale=True)
    x = torch.randn(tokens, 1600).half()
    in_every_order(hopper, lambda: check(case, x))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_x_far_outside_of_the_range_of_fp16(magnitude):
    case = random_case(40, 300, (2, 4), outliers=0.02)
    for dtype in DTYPES[:2]:
        check(case, (torch.randn(10, 300) * magnitude).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_in_means_not_finite_out_for_that_token_only(dtype):
    case = random_case(40, 64, (2, 3, 4))
    x = torch.randn(10, 64).to(dtype)
    x[0, 7], x[2, 9] = torch.inf, torch.nan
    y = cuda.packed_linear_wgmma_registers(x, operand_of(case), None, "high")
    assert not torch.isfinite(y[0]).any() and y[2].isnan().all()
    torch.testing.assert_close(y[1].double(), x[1].double() @ case.dense.T, rtol=1e-2, atol=1e-2)


def test_what_is_refused(hopper):  # noqa: F811
    case = random_case(40, 64, (2,))
    with pytest.raises(ValueError, match="at most 16 tokens in fp32, here 17"):
        cuda.packed_linear_wgmma_registers(torch.randn(17, 64), operand_of(case), None, "high")
    with pytest.raises(ValueError, match="linear of 33 tokens; at most 32"):
        hopper.CodebookWgmmaRegisters(0, 4096, 40, 64).room(33, 2)


@pytest.mark.parametrize("case", ["another shape", "more than 4 bits"])
def test_a_layout_that_it_cannot_read_gives_nan(case):
    operand = operand_of(random_case(40, 50, (5 if case == "more than 4 bits" else 4,)))
    columns = 49 if case == "another shape" else 50
    odd = WeightOperand("codebook", cuda.LAYOUT, operand.tensors, operand.meta, (40, columns))
    assert cuda.packed_linear_wgmma_registers(torch.randn(10, columns).half(), odd, None, "high").isnan().all()
