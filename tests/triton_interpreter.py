"""The Triton back end in Triton's interpreter, on a CPU. tests/test_triton.py runs this file in a process with TRITON_INTERPRET=1.

bfloat16 is left out: the interpreter's bfloat16 arithmetic is wrong (docs/kernels-triton.md); test_gpu.py has it.
Tokens 1 (products per thread), 2, 16, 33 (dots, one or two blocks of tokens), 65 (decoded, then torch's matmul). N and K are odd,
below, at and above a tile of 64 rows and 32 or 64 slots. Every float tensor that a kernel fills is poisoned and guarded.
"""

import copy
import math

import pytest
import torch

import pyllmq
from pyllmq import CodebookLinear, CodebookWeight
from pyllmq.backends.triton import codebook as triton_backend
from pyllmq.functional import (
    codebook_dequantize,
    codebook_gradient,
    codebook_linear,
    kmeans_1d,
    kmeans_1d_errors,
    packed_rows,
)

from .oracle import assert_as_good_as_torch, random_case

TOKENS = (1, 2, 16, 33, 65)
DTYPES = (torch.float32, torch.float16)
GUARD = 64


@pytest.fixture(autouse=True)
def only_triton():
    with pyllmq.use_backend("triton"):
        yield


@pytest.fixture
def guarded(monkeypatch):
    """Float tensors come filled with NaN, between guards of NaN that must still be there at the end."""
    empty, buffers = torch.empty, []

    def poisoned(*size, dtype=None, **options):
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if dtype is None or not dtype.is_floating_point or options.get("device") == torch.device("meta"):
            return empty(*size, dtype=dtype, **options)
        count = math.prod(shape)
        whole = empty(count + 2 * GUARD, dtype=dtype, **options).fill_(torch.nan)
        buffers.append(whole)
        return whole[GUARD : GUARD + count].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    assert buffers, "no kernel allocated anything: the poison tests nothing"
    for whole in buffers:
        assert whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all(), "a kernel wrote outside its output"


def check(case, x, bias=None):
    weight = CodebookWeight(case.weight.structure, case.weight.tensors)
    assert weight.operand().layout == "triton.codebook"
    actual = codebook_linear(x, weight, bias)
    exact = x.double() @ case.dense.T + (0 if bias is None else bias.double())
    dense = case.dense.to(x.dtype)
    orders = [torch.randperm(x.shape[1]) for _ in range(4 if exact.numel() >= 256 else 16)]
    torchs = [
        torch.nn.functional.linear(x[:, order], dense[:, order], None if bias is None else bias.to(x.dtype))
        for order in orders
    ]
    assert_as_good_as_torch(actual, exact, *torchs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_width(guarded, bits, tokens, dtype):
    check(random_case(67, 131, (bits,)), torch.randn(tokens, 131).to(dtype), torch.randn(67).to(dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 90), (130, 1), (31, 33), (64, 64), (129, 70), (3, 5)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_shapes_of_a_mix_with_everything(guarded, n, k, tokens):
    case = random_case(n, k, (1, 2, 3, 4, 6), segments=min(3, n), outliers=0.05, row_scale=True)
    check(case, torch.randn(tokens, k), torch.randn(n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("extra", ["outliers", "segments", "row_scale"])
def test_extras_one_by_one(guarded, dtype, tokens, extra):
    case = random_case(
        70,
        72,
        (2, 4),
        segments=3 if extra == "segments" else 1,
        outliers=0.2 * (extra == "outliers"),
        row_scale=extra == "row_scale",
    )
    check(case, torch.randn(tokens, 72).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(guarded, dtype):
    case = random_case(75, 130, tuple(range(1, 9)), segments=2, outliers=0.05, row_scale=True)
    weight = CodebookWeight(case.weight.structure, case.weight.tensors)
    assert torch.equal(codebook_dequantize(weight, dtype), case.dense.to(dtype))


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_bf16_tokens_do_not_round_centroids(tokens):
    """(1 + 2^-10) - 1: exact in bf16, and the interpreter only converts bf16 here. A centroid as bf16 would give 0; beyond 64
    tokens, where the dense matrix is bf16, it does.
    """
    weight = CodebookWeight.pack(
        torch.tensor([[1, 0]], dtype=torch.uint8), torch.tensor([[-1, 1 + 2**-10, -1, 0]]), torch.tensor([1, 1])
    )
    y = codebook_linear(torch.ones(tokens, 2, dtype=torch.bfloat16), weight)
    assert (y == (2**-10 if tokens <= 64 else 0)).all()


def test_slots_are_split_and_no_split_is_empty():
    from pyllmq.triton_kernels.codebook_linear import splits
    from pyllmq.triton_kernels.configs import Tile

    for programs in (1, 3, 8, 1000):
        tile = Tile(rows=64, slots=32, tokens=1, warps=4, stages=1, programs=programs)
        for slots in (1, 31, 32, 33, 1000, 8192):
            count, each = splits(tile, 130, slots, 1)
            assert each % 32 == 0 and (count - 1) * each < slots <= count * each
            assert programs > 3 or count == 1


def test_same_bits_every_time():
    case = random_case(100, 200, (2, 3, 8), outliers=0.02)
    x = torch.randn(5, 200)
    operand = CodebookWeight(case.weight.structure, case.weight.tensors).operand()
    assert torch.equal(codebook_linear(x, operand), codebook_linear(x, operand))


@pytest.mark.parametrize("tokens", [1, 3])
def test_not_finite_in_means_not_finite_out(tokens):
    case = random_case(40, 64, (2, 3, 4))
    x = torch.randn(tokens, 64)
    x[0, 7], x[-1, 9] = torch.inf, torch.nan
    y = codebook_linear(x, CodebookWeight(case.weight.structure, case.weight.tensors))
    assert not torch.isfinite(y[0]).any() and y[-1].isnan().all()
    assert tokens == 1 or torch.isfinite(y[1]).all()


def test_no_tokens_and_leading_dimensions():
    case = random_case(10, 12)
    weight = CodebookWeight(case.weight.structure, case.weight.tensors)
    assert codebook_linear(torch.randn(0, 12), weight).shape == (0, 10)
    x = torch.randn(2, 1, 3, 12).transpose(0, 2)
    torch.testing.assert_close(codebook_linear(x, weight), (x.double() @ case.dense.T).float())


# ---- the layout -----------------------------------------------------------------------------------------------------


def test_the_codes_come_back_from_the_layout():
    case = random_case(37, 90, (1, 3, 5, 8), outliers=0.1, row_scale=True)
    layer = CodebookLinear.from_weight(case.weight)
    assert layer.operand().layout == "triton.codebook" and not any(
        name.startswith("codes_b") for name, _ in layer.named_buffers()
    )
    assert torch.equal(layer.packed_weight().unpack(), case.codes)
    for key, tensor in case.weight.tensors.items():
        assert torch.equal(layer.state_dict()[key], tensor), key


def test_centroids_under_outliers():
    case = random_case(30, 50, (1, 3, 5, 7, 8), segments=3, outliers=0.3)
    plain = CodebookWeight.pack(
        case.codes,
        case.weight.tensors["codebook"],
        case.column_bits,
        segment_rows=case.weight.tensors["segment_rows"],
    )
    layout = triton_backend.CodebookLayout.of(case.weight.operand())
    row = torch.repeat_interleave(layout.outlier_row_offsets.long().diff())
    assert torch.equal(layout.outlier_replaced, plain.dequantize(torch.float16)[row, layout.outlier_columns.long()])


def test_a_layer_is_copied_cast_and_moved():
    case = random_case(24, 40, (2, 3), outliers=0.05)
    layer = CodebookLinear.from_weight(case.weight, torch.randn(24))
    x = torch.randn(3, 40)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected) and twin.layout.data_ptr() != layer.layout.data_ptr()
    views = {tensor.untyped_storage().data_ptr() for tensor in twin.operand().tensors if tensor.numel()}
    assert views == {twin.layout.untyped_storage().data_ptr()}, "the copy's views lie in another blob"
    layer.half()
    assert layer(x.half()).dtype == torch.float16
    torch.testing.assert_close(layer(x.half()).float(), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="no weights yet"):
        twin.to("meta")(x)


def test_gradients_reach_x_and_bias():
    case = random_case(20, 33, (2, 5), outliers=0.05)
    x, bias = torch.randn(4, 33, requires_grad=True), torch.randn(20, requires_grad=True)
    codebook_linear(x, CodebookWeight(case.weight.structure, case.weight.tensors), bias).sum().backward()
    torch.testing.assert_close(x.grad, case.dense.sum(0).float().expand(4, -1))
    torch.testing.assert_close(bias.grad, torch.full((20,), 4.0))


def test_opcheck():
    case = random_case(9, 14, (1, 3), outliers=0.1)
    operand = CodebookWeight(case.weight.structure, case.weight.tensors).operand()
    x = torch.randn(4, 14, requires_grad=True)
    arguments = (x, list(operand.tensors), "codebook", operand.layout, (), (9, 14), torch.randn(9), "exact")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pyllmq.packed_linear.default, arguments, test_utils=checks)


def test_a_damaged_layout_is_refused():
    (blob, *_) = random_case(40, 50).weight.operand().tensors
    damaged = blob.clone()
    damaged[0] ^= 1
    for given, n, message in (
        (damaged, 40, "no layout 'triton.codebook'"),
        (blob[:512].clone(), 40, "cut off"),
        (blob[:10].clone(), 40, "at least"),
        (blob, 41, r"\[40, 50\], but was given as \[41, 50\]"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_backend.from_blob(given, (n, 50))


def test_every_width_and_number_of_tokens_has_a_tile():
    from pyllmq.triton_kernels.configs import FOLDER, rows_of, tile_for

    for file in FOLDER.glob("*.json"):
        assert all(row["rows"] % 16 == 0 and row["slots"] % 16 == 0 for row in rows_of(file.stem))
    for bits in range(1, 9):
        assert tile_for("codebook_dequantize", bits, 0, torch.device("cpu")).rows > 0
        assert tile_for("codebook_linear", bits, 1, torch.device("cpu")).tokens == 1
        for tokens in (2, 16, 17, 64, 65):
            assert tile_for("codebook_linear", bits, tokens, torch.device("cpu")).tokens >= 16, (
                "tl.dot takes 16 tokens or more"
            )
    with pytest.raises(LookupError, match="sinkhorn"):
        tile_for("sinkhorn", 2, 1, torch.device("cpu"))


@pytest.mark.parametrize(("n", "k", "segments"), [(1, 1, 1), (70, 37, 2), (129, 50, 1)])
@pytest.mark.parametrize("extras", [False, True])
def test_codebook_gradient(n, k, segments, extras, guarded):
    torch.manual_seed(n)
    bits = torch.randint(1, 9, (k,))
    codes = (torch.rand(n, k) * (1 << bits)).to(torch.uint8)
    weight = CodebookWeight.pack(
        codes,
        torch.randn(segments, int((1 << bits).sum())),
        bits,
        segment_rows=torch.tensor([n // segments] * (segments - 1) + [n - n // segments * (segments - 1)]),
        outlier_mask=torch.rand(n, k) < 0.1 if extras else None,
        outlier_weight=torch.randn(n, k) if extras else None,
        row_scale=torch.rand(n) + 0.5 if extras else None,
    )
    gradient, operand = torch.randn(n, k), weight.checkpoint_operand()
    found = codebook_gradient(gradient, operand)
    with pyllmq.use_backend("reference"):
        expected = codebook_gradient(gradient, operand)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * n**0.5)
    assert torch.equal(codebook_gradient(gradient, operand), found)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 3, 70, 150])
def test_kmeans_1d_equals_the_cpu(n, weighted, guarded):
    """150 points reach strides of one program per end; duplicates and a constant row are in it."""
    torch.manual_seed(n)
    values = torch.randn(3, n)
    values[1] = values[1].mul(2).round()
    values[2] = 0.25
    weights = torch.rand(n) + 0.1 if weighted else None
    ks = [1, 2, 5]
    found, errors = kmeans_1d(values, ks, weights), kmeans_1d_errors(values, ks, weights)
    with pyllmq.use_backend("cpu"):
        expected, expected_errors = kmeans_1d(values, ks, weights), kmeans_1d_errors(values, ks, weights)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-9, atol=1e-9)
    for (centroids, codes), (their_centroids, their_codes) in zip(found, expected, strict=True):
        torch.testing.assert_close(centroids[0], their_centroids[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(codes[0], their_codes[0]) and torch.equal(codes[2], their_codes[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (67, 131), (33, 64)])
def test_rows(guarded, n, k, dtype):
    case = random_case(n, k, (1, 2, 3, 4, 6, 8), segments=min(2, n), outliers=0.05, row_scale=True)
    weight = CodebookWeight(case.weight.structure, case.weight.tensors)
    ids = torch.cat([torch.randint(n, (2, 9)), torch.full((2, 9), n - 1)])
    assert torch.equal(packed_rows(weight, ids, dtype), case.dense[ids].to(dtype))
    outside = packed_rows(weight, torch.tensor([0, n, -1, 2**40]), dtype)
    assert torch.equal(outside[0], case.dense[0].to(dtype)) and outside[1:].isnan().all()
    assert packed_rows(weight, torch.empty(0, 2, dtype=torch.int64), dtype).shape == (0, 2, k)
