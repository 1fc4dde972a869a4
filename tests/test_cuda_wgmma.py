"""Many tokens by wgmma (csrc/codebook/cuda/linear_wgmma.cu) on the emulator, against fp64.

The emulated device has 3 multiprocessors, so 3 blocks at a time. Blocks are of 16, 32, 64, 128 and 256 tokens; those of up to 64
have two groups of decoders, and all but those of 256 take 256 rows. A step is 64 columns.
"""

import itertools

import pytest
import torch

import pyllmq
from pyllmq import CodebookWeight, dispatch
from pyllmq.backends.cuda import codebook as cuda
from pyllmq.functional import codebook_linear
from pyllmq.layouts import WeightOperand
from pyllmq.operations import WeightProblem

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .oracle import assert_linear_as_good_as_torch, linear_and_size, random_case
from .test_cuda_kernels import SHAPES

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("hopper")]

DTYPES = (torch.bfloat16, torch.float16)
ALL_WIDTHS = tuple(range(1, 9))


@pytest.fixture
def hopper(emulated):  # noqa: F811
    emulated.emulator.set_hopper(True)
    yield emulated
    emulated.emulator.set_hopper(False)


def operand_of(case):
    with pyllmq.use_backend("cuda"):
        return CodebookWeight(case.weight.structure, case.weight.tensors).operand()


def check(case, x, bias=None, factor=2.0, linear=cuda.packed_linear_wgmma):
    weight = operand_of(case)
    before = weight.tensors[0].clone()
    y = linear(x, weight, bias, "exact")
    assert torch.equal(weight.tensors[0], before), "a kernel left a counter that is not zero"
    if x.dtype == torch.float32:  # two fp16 planes, 22 bits, where torch has 24
        exact, size = linear_and_size(case.dense, x, bias)
        assert bool(((y.double() - exact).abs() <= 1e-6 * size + 1e-37).all())
    else:
        assert_linear_as_good_as_torch(case.dense, x, y, bias, factor)
    return y


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_every_width(bits):
    case = random_case(67, 259, (bits,))
    for tokens, dtype in itertools.product((1, 9, 16, 17, 64), DTYPES):
        check(case, torch.randn(tokens, 259).to(dtype), torch.randn(67))


@pytest.mark.parametrize("widths", [(1, 2, 3, 4), (2, 4), (3, 8), ALL_WIDTHS])
def test_mixes_of_widths(widths):
    case = random_case(131, 451, widths, outliers=0.02)
    for tokens, dtype in ((9, torch.bfloat16), (33, torch.float16)):
        check(case, torch.randn(tokens, 451).to(dtype))


@pytest.mark.parametrize("tokens", [65, 128, 129, 256, 300])
def test_blocks_of_many_tokens(tokens):
    """300 tokens are three blocks of 128, 256 one: of a row block of 65 rows it computes the first two of four tiles."""
    case = random_case(150, 200, (2, 3, 6), segments=2, outliers=0.02, row_scale=True)
    for dtype in DTYPES:
        check(case, torch.randn(tokens, 200).to(dtype), torch.randn(150).to(dtype))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shapes_of_a_mix_with_everything(n, k):
    case = random_case(n, k, ALL_WIDTHS, segments=min(3, n), outliers=0.03, row_scale=True)
    for tokens, dtype in ((3, torch.bfloat16), (20, torch.float16)):
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


def test_blocks_take_several_pieces_of_work_and_splits_of_k(hopper):
    def room(n, k, tokens):
        return hopper.CodebookWgmma(0, 4096, n, k).room(tokens, 2)

    def of_x(k, tokens):
        return tokens + tokens * 32 * (-(-(-(-k // 16) + 7) // 4))

    assert room(900, 200, 16) == of_x(200, 16)  # four row blocks on three multiprocessors
    assert room(70, 2000, 16) == of_x(2000, 16) + 3 * 16 * 70
    check(random_case(900, 200, (2, 3), segments=2, outliers=0.01), torch.randn(16, 200).half(), torch.randn(900))
    check(random_case(70, 2000, (1, 4, 5), outliers=0.01, row_scale=True), torch.randn(16, 2000).bfloat16())


@pytest.mark.parametrize("tokens", [9, 140])
def test_no_order_of_threads_blocks_and_copies_changes_a_bit(hopper, tokens):
    """Stages pass three times through their ring."""
    case = random_case(150, 900 if tokens == 9 else 300, (1, 3, 4, 7), segments=2, outliers=0.02, row_scale=True)
    x = torch.randn(tokens, case.dense.shape[1]).half()
    in_every_order(hopper, lambda: check(case, x))


@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30, 1e37])
def test_x_far_outside_of_the_range_of_fp16(magnitude):
    check(random_case(40, 300, (2, 4), outliers=0.02), (torch.randn(10, 300) * magnitude).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_in_means_not_finite_out_for_that_token_only(dtype):
    case = random_case(40, 64, (2, 3, 4))
    x = torch.randn(10, 64).to(dtype)
    x[0, 7], x[2, 9] = torch.inf, torch.nan
    y = cuda.packed_linear_wgmma(x, operand_of(case), None, "high")
    assert not torch.isfinite(y[0]).any() and y[2].isnan().all()
    torch.testing.assert_close(y[1].double(), x[1].double() @ case.dense.T, rtol=1e-2, atol=1e-2)


def row(tokens, dtype=torch.float16, meta=(4, 1), precision="high"):
    return dispatch.choose(WeightProblem("packed_linear", "cpu", dtype, cuda.LAYOUT, tokens, meta, precision)).name


def test_which_row_serves(hopper):
    assert row(9) == row(2048) == row(16, torch.bfloat16, precision="exact") == row(64, meta=(8, 1)) == "cuda.wgmma"
    assert row(33, meta=(2, 1)) == row(16, meta=(5, 1)) == "cuda.wgmma"
    registers = "cuda.wgmma_registers"
    assert row(9, meta=(3, 0)) == row(17) == row(32, torch.bfloat16, precision="exact") == registers
    assert row(5, torch.float32) == row(16, torch.float32, meta=(1, 0), precision="exact") == registers
    assert row(8) == row(8, meta=(2, 1)) == row(4, torch.float32) == row(17, torch.float32) == "cuda.fused"
    assert row(64, torch.float32) == row(64, meta=(4, 0)) == "cuda.fused" and row(2) == "cuda.byte_planes"
    assert row(2049) == row(65, torch.float32) == row(65, meta=(4, 0)) == "cuda.dequantize_matmul"
    hopper.emulator.set_hopper(False)
    assert row(64) == row(32) == "cuda.fused" and row(65) == "cuda.dequantize_matmul"


def test_the_row_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("PYLLMQ_CUDA_WGMMA", "0")
    assert row(64) == row(32) == "cuda.fused"


def test_what_is_refused(hopper):
    case = random_case(40, 64, (2,), outliers=0.1, row_scale=True)
    with pytest.raises(ValueError, match="fp16 and bf16, not fp32"):
        cuda.packed_linear_wgmma(torch.randn(10, 64), operand_of(case), None, "high")
    with pytest.raises(ValueError, match="linear of 4097 tokens; at most 4096"):
        hopper.CodebookWgmma(0, 4096, 40, 64).room(4097, 2)


def test_an_outlier_that_is_too_large_for_its_rows_scale():
    case = random_case(40, 64, (2,), outliers=0.1, row_scale=True)
    tensors = dict(case.weight.tensors)
    assert operand_of(case).meta == (2, 1)
    tensors["row_scale"] = torch.full_like(tensors["row_scale"], 1e-6)
    with pyllmq.use_backend("cuda"):
        weight = CodebookWeight(case.weight.structure, tensors)
        assert weight.operand().meta == (2, 0)
        x = torch.randn(10, 64).half()
        torch.testing.assert_close(
            codebook_linear(x, weight), codebook_linear(x.float(), weight).half(), rtol=2e-3, atol=2e-3
        )
    assert cuda.packed_linear_wgmma(x, weight.operand(), None, "high").isnan().all()


def test_a_layout_of_another_shape_gives_nan():
    operand = operand_of(random_case(40, 50))
    odd = WeightOperand("codebook", cuda.LAYOUT, operand.tensors, operand.meta, (40, 49))
    assert cuda.packed_linear_wgmma(torch.randn(10, 49).half(), odd, None, "high").isnan().all()
