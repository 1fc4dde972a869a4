"""The CUDA kernels on the emulator (tests/cuda_emulator.py) against fp64: what a CPU can prove of them.

The emulated device has 3 multiprocessors, so 6 blocks at a time: a few hundred rows and columns give several items per block and
up to 6 splits of K. Tokens: below, at and above 4, 8 and 16 columns of the product (fp32 takes two a token), and above the 64
beyond which torch's matmul runs. All at precision `exact`: the row for one and two tokens otherwise has tests of its own
(test_cuda_byte_planes.py).
"""

import itertools

import pytest
import torch

import pyllmq
from pyllmq import CodebookLinear, CodebookWeight
from pyllmq.backends.checkpoints import codebook_checkpoint
from pyllmq.backends.cuda import codebook as cuda
from pyllmq.formats import codes as reference
from pyllmq.functional import codebook_dequantize, codebook_linear, pack_codes, unpack_codes
from pyllmq.layouts import WeightOperand

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .oracle import assert_as_good_as_torch, assert_linear_as_good_as_torch, random_case

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65)
ALL_WIDTHS = tuple(range(1, 9))


def packed(case):
    """A weight whose operand is made now, by the back end in force."""
    return CodebookWeight(case.weight.structure, case.weight.tensors)


def check(case, x, bias=None, factor=2.0):
    with pyllmq.use_backend("cuda"):
        weight = packed(case)
        assert weight.operand().layout == "cuda.codebook"
        actual = codebook_linear(x, weight, bias, "exact")
    assert_linear_as_good_as_torch(case.dense, x, actual, bias, factor)
    return actual


@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_and_number_of_tokens(bits, dtype):
    case = random_case(67, 259, (bits,))
    for tokens in TOKENS:
        check(case, torch.randn(tokens, 259).to(dtype), torch.randn(67))


SHAPES = [
    (1, 1),
    (1, 300),
    (300, 1),
    (63, 17),
    (64, 16),
    (65, 15),
    (3, 5),
    (513, 33),
    (129, 600),
    (1300, 40),
    (40, 1500),
]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_a_mix_with_everything(n, k, dtype):
    case = random_case(n, k, ALL_WIDTHS, segments=min(3, n), outliers=0.03, row_scale=True)
    for tokens in (1, 7, 16, 33):
        # fp32 x is a sum of two halves, which shows where torch has one product
        check(case, torch.randn(tokens, k).to(dtype), torch.randn(n).to(dtype), factor=2.0 if k > 8 else 8.0)


@pytest.mark.parametrize("extra", ["outliers", "segments", "row_scale", "all weights are outliers"])
@pytest.mark.parametrize("widths", [(2,), (2, 4), (3, 8)])
def test_each_extra(extra, widths):
    case = random_case(
        200,
        320,
        widths,
        segments=3 if extra == "segments" else 1,
        outliers={"outliers": 0.02, "all weights are outliers": 1.1}.get(extra, 0.0),
        row_scale=extra == "row_scale",
    )
    for tokens, dtype in itertools.product((1, 6, 20), DTYPES):
        # a row's outliers are added one after the other: with 320 of them, that chain's error is what there is
        check(case, torch.randn(tokens, 320).to(dtype), factor=4.0 if extra.startswith("all") else 2.0)


@pytest.mark.parametrize("n", [3072, 70])
def test_without_and_with_splits_of_k(emulated, n):  # noqa: F811
    assert emulated.CodebookOperand(0, 4096, n, 900).room(3, 2) == (0 if n == 3072 else 4 * 3 * 70)
    check(random_case(n, 900, (1, 4), outliers=0.01), torch.randn(3, 900).half(), torch.randn(n))


def test_many_columns_of_x_do_not_fit_into_shared_memory_at_once():
    check(random_case(1, 40000, (2,)), torch.randn(16, 40000).half())


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_threads_blocks_and_copies_changes_a_bit(emulated, tokens, dtype):  # noqa: F811
    case = random_case(150, 700, ALL_WIDTHS, segments=2, outliers=0.02, row_scale=True)
    x = torch.randn(tokens, 700).to(dtype)
    in_every_order(emulated, lambda: check(case, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_far_larger_than_the_others(dtype):
    x = torch.randn(5, 512)
    x[:, 100] *= 1000
    check(random_case(64, 512, (2, 3, 4)), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30, 1e37])
def test_x_far_outside_of_the_range_of_fp16(dtype, magnitude):
    check(random_case(40, 300, (2, 4), outliers=0.02), (torch.randn(3, 300) * magnitude).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 70])
def test_not_finite_in_means_not_finite_out_for_that_token_only(dtype, tokens):
    case = random_case(40, 64, (2, 3, 4))
    x = torch.randn(tokens, 64).to(dtype)
    x[0, 7], x[2, 9] = torch.inf, torch.nan
    with pyllmq.use_backend("cuda"):
        y = codebook_linear(x, packed(case))
    assert not torch.isfinite(y[0]).any() and y[2].isnan().all()
    torch.testing.assert_close(y[1].double(), x[1].double() @ case.dense.T, rtol=1e-2, atol=1e-2)


def test_zero_and_no_tokens():
    case = random_case(40, 64, (3,))
    assert torch.equal(check(case, torch.zeros(3, 64)), torch.zeros(3, 40))
    with pyllmq.use_backend("cuda"):
        assert codebook_linear(torch.randn(2, 0, 64), packed(case)).shape == (2, 0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(45, 130), (1, 1), (700, 20), (70, 600)])
@pytest.mark.parametrize("row_scale", [False, True])
def test_dequantize(dtype, n, k, row_scale):
    case = random_case(n, k, ALL_WIDTHS, segments=min(2, n), outliers=0.05, row_scale=row_scale)
    with pyllmq.use_backend("cuda"):
        assert torch.equal(codebook_dequantize(packed(case), dtype), case.dense.to(dtype))


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_dequantize_strips_of_one_width(bits):
    case = random_case(150, 104, (bits,), segments=2, outliers=0.03)
    with pyllmq.use_backend("cuda"):
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(codebook_dequantize(packed(case), dtype), case.dense.to(dtype))


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_pack_and_unpack_codes(bits):
    for rows, columns in ((1, 1), (7, 13), (3, 0), (0, 3), (40, 600)):
        codes = torch.randint(0, 2**bits, (rows, columns)).to(torch.uint8)
        with pyllmq.use_backend("cuda"):
            actual = pack_codes(codes, bits)
            assert torch.equal(actual, reference.pack_codes(codes, bits))
            assert torch.equal(unpack_codes(actual, bits, columns), codes)
    if bits < 8:
        with pyllmq.use_backend("cuda"), pytest.raises(ValueError, match=f"a code is {2**bits}, but {bits}-bit"):
            pack_codes(torch.full((2, 2), 2**bits, dtype=torch.uint8), bits)


def test_gradient_of_x():
    case = random_case(20, 33, (2, 5), outliers=0.05)
    x = torch.randn(3, 33, requires_grad=True)
    grad = torch.randn(3, 20)
    with pyllmq.use_backend("cuda"):
        codebook_linear(x, packed(case)).backward(grad)
    assert_as_good_as_torch(x.grad, grad.double() @ case.dense, grad @ case.dense.float())


# ---- layout ---------------------------------------------------------------------------------------------------------


def prepacked(weight):
    return cuda.prepack(weight.tensors, (weight.out_features, weight.in_features))


def unpacked(weight):
    found = cuda.unpack(prepacked(weight), weight.structure.tensors(), weight.tensors)
    assert set(found) == {key for key in weight.tensors if key.startswith("codes_b")}
    return found


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_layout_gives_back_the_codes(n, k):
    case = random_case(n, k, ALL_WIDTHS, segments=min(2, n), outliers=0.05)
    assert all(torch.equal(tensor, case.weight.tensors[key]) for key, tensor in unpacked(case.weight).items())


def test_the_layout_is_hardly_larger_than_the_checkpoint():
    for bits in ALL_WIDTHS:
        weight = random_case(1024, 1024, (bits,)).weight
        integers = 1024 * (2 * max(4, 2**bits) + 8) if bits <= 4 else 0  # codebooks as integers, for one and two tokens
        assert prepacked(weight).tensors[0].numel() < weight.nbytes + 16384 + integers


def test_a_layer_moves_into_the_layout_and_back():
    linear = torch.nn.Linear(70, 90)
    x = torch.randn(5, 70)
    with pyllmq.use_backend("cuda"):
        layer = CodebookLinear.from_dense(linear, column_bits=[1, 2, 3, 4, 5, 6, 7] * 10, outlier_fraction=0.02)
        assert layer.operand().layout == "cuda.codebook" and not any(
            k.startswith("codes_b") for k, _ in layer.named_buffers()
        )
        y = layer(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dequantize(), linear.bias))
        again = CodebookLinear.from_dense(torch.nn.Linear(70, 90), bits=2)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), y)
        cast = layer.bfloat16()
        assert cast.operand().layout == "cuda.codebook"
        assert_as_good_as_torch(cast(x.bfloat16()).detach(), y.detach().double(), y.detach().bfloat16(), factor=4)


def test_a_layout_of_another_shape_gives_nan_and_a_damaged_one_is_refused(emulated):  # noqa: F811
    operand = prepacked(random_case(40, 50).weight)
    (blob,) = operand.tensors
    magic = blob.clone()
    magic[0] ^= 1

    def unchecked(tensor, n, k):
        return WeightOperand("codebook", cuda.LAYOUT, (tensor,), operand.meta, (n, k))

    for tensor, n, k in ((blob, 40, 49), (blob, 41, 50), (magic, 40, 50), (blob[:-128].clone(), 40, 50)):
        for linear in (cuda.packed_linear, cuda.packed_linear_byte_planes):
            assert linear(torch.randn(2, k), unchecked(tensor, n, k), None, "exact").isnan().all()
        assert cuda.packed_dequantize(unchecked(tensor, n, k), torch.float16).isnan().all()
    with pytest.raises(ValueError, match="less than its header"):
        cuda.packed_linear(torch.randn(2, 50), unchecked(blob[:100].clone(), 40, 50), None, "exact")
    with pytest.raises(ValueError, match="less than its header"):
        cuda.from_blob(blob[:100].clone(), (40, 50))
    with pytest.raises(ValueError, match=r"uint8 vector, given: torch.int8"):
        cuda.from_blob(blob.view(torch.int8), (40, 50))
    with pytest.raises(ValueError, match="wrong magic"):
        cuda.unpack(cuda.from_blob(magic, (40, 50)), {}, {})
    with pytest.raises(ValueError, match="cut or padded"):
        cuda.unpack(cuda.from_blob(blob[:-128].clone(), (40, 50)), {}, {})
    with pytest.raises(ValueError, match=r"shape \[40, 50\].*given as \[50, 40\]"):
        cuda.unpack(cuda.from_blob(blob, (50, 40)), {}, {})
    bits, rows = torch.full((50,), 2, dtype=torch.uint8), torch.tensor([40], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"shape \[2147483648, 50\]; allowed: 1..2147483647"):
        field = {"column_bits": bits, "segment_rows": rows}
        emulated.codebook_layout_bytes(codebook_checkpoint(emulated, field, (2**31, 50)))
