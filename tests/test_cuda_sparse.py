"""The CUDA kernels of the sparse formats on the emulator (tests/cuda_emulator.py) against fp64: what a CPU can prove of them.

Tokens: columns of the product below, at and above 8 and 16 (fp32 x takes two or three of them a token, fp16 x two with bf16
values), 4 and 16 for column numbers, and above the 64 beyond which torch's matmul runs.
"""

import copy
from dataclasses import replace

import pytest
import torch

import pyllmq
from pyllmq import (
    BitmapWeight,
    Sparse24CodebookLinear,
    Sparse24Linear,
    Sparse24Weight,
    SparseLinear,
    dispatch,
)
from pyllmq.backends.cuda import sparse
from pyllmq.layouts import machine_layout
from pyllmq.operations import WeightProblem
from pyllmq.packing import mask_24

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .oracle import assert_as_good_as_torch
from .test_sparse_formats import random_codes
from .test_sparse_linear import LINEAR, bitmap, dense_of, sparse24

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 65)
SHAPES = [(1, 1), (1, 300), (300, 1), (3, 5), (63, 31), (64, 64), (65, 130), (257, 70), (130, 515), (40, 4100)]


def codes(n, k, bits=2, outliers=0.0):
    return random_codes(n, k, bits, outliers)[0]


def packed_here(weight):
    """With an operand made now, by the back end in force."""
    return type(weight)(weight.structure, weight.tensors)


def check(weight, x, bias=None, columns=False, factor=2.0):
    dense = dense_of(weight)
    with pyllmq.use_backend("cuda"):
        packed = packed_here(weight)
        operand = packed.operand()
        assert operand.layout == f"cuda.{weight.kind}" and bool(operand.meta[0]) == columns
        actual = LINEAR[type(weight)](x, packed, bias, "exact")
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    orders = [torch.randperm(x.shape[1]) for _ in range(16 if exact.numel() >= 64 else 64)]
    torchs = [
        torch.nn.functional.linear(x[:, order], dense.to(x.dtype)[:, order], None if bias is None else bias.to(x.dtype))
        for order in orders
    ]
    assert_as_good_as_torch(actual, exact, *torchs, factor=factor, roundings=1.0 if x.shape[1] > 8 else 2.0)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("make", [bitmap, sparse24])
def test_every_type_of_values_and_number_of_tokens(make, values, dtype):
    weight = make(67, 259, values=values)
    for tokens in TOKENS:
        # fp32 x becomes two fp16 numbers, 22 bits in place of 24: 2.01 times torch's error where torch sums by AVX-512
        factor = 2.5 if dtype == torch.float32 and values == torch.float16 else 2.0
        check(weight, torch.randn(tokens, 259).to(dtype), torch.randn(67), values == torch.float32, factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_every_width_and_number_of_tokens(bits, dtype):
    weight = codes(67, 259, bits, 0.02)
    for tokens in TOKENS:
        check(weight, torch.randn(tokens, 259).to(dtype), torch.randn(67))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(n, k, dtype):
    bias = torch.randn(n).to(dtype)
    outliers = 0.03 if k > 8 else 0.0  # of few weights torch's error is luck, and an outlier is two roundings
    for weight in (bitmap(n, k), sparse24(n, k), codes(n, k, 2, outliers), codes(n, k, 4, outliers)):
        for tokens in (1, 7, 20):
            # fp32 x times bf16 values is a sum of three, which shows where torch's own sum is short
            factor = 2.0 if k > 128 else 4.0 if k > 8 else 8.0
            check(weight, torch.randn(tokens, k).to(dtype), bias, as_columns(weight), factor=factor)


def as_columns(weight):
    """At one column everything is kept, at a few a random share."""
    kept = getattr(weight.structure, "kept", None)
    return kept is not None and kept < sparse.FEW_KEPT * weight.out_features * weight.in_features


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.74, 0.76, 0.9, 0.99, 0.999])
def test_sparsities(sparsity, values):
    weight = bitmap(130, 700, sparsity, values)
    columns = sparsity > 0.75 or values == torch.float32
    for tokens in (1, 3, 17):
        # a cell's 128 columns are added one after the other: with all of them kept, that chain's error is what there is
        check(weight, torch.randn(tokens, 700), None, columns, factor=4.0 if sparsity == 0 else 2.0)


def test_rows_of_very_different_lengths():
    dense = torch.zeros(130, 600)
    dense[3] = torch.randn(600)
    dense[40, 7] = 1.5
    dense[129, ::2] = torch.randn(300)
    for tokens in (1, 9):
        check(BitmapWeight.pack(dense), torch.randn(tokens, 600), None, columns=True)
        check(BitmapWeight.pack(dense.bfloat16(), dense == dense), torch.randn(tokens, 600))


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_columns_far_apart_and_in_several_panels(values):
    dense = torch.zeros(9, 9000)
    dense[0, [0, 255, 256, 511, 512, 4095, 4096, 8191, 8192, 8999]] = torch.randn(10)
    dense[3, 8999], dense[4, 4095], dense[5, 4096] = 1.0, 2.0, 3.0
    dense[8, ::37] = torch.randn(244)
    for tokens in (1, 2, 4, 16):
        check(BitmapWeight.pack(dense, value_dtype=values), torch.randn(tokens, 9000), torch.randn(9), columns=True)


@pytest.mark.parametrize("n", [3300, 70])
def test_without_and_with_splits_of_k(emulated, n):  # noqa: F811
    weight = sparse24(n, 900)
    with pyllmq.use_backend("cuda"):
        partials = sparse.operand(packed_here(weight).operand()).room(3, 1)
    assert (partials > 0) == (n != 3300)
    check(weight, torch.randn(3, 900).bfloat16(), torch.randn(n))


def test_x_does_not_fit_into_shared_memory_at_once():
    for weight in (bitmap(1, 20000), sparse24(1, 20000), codes(1, 20000, 3, 0.001)):
        check(weight, torch.randn(16, 20000).half())


@pytest.mark.parametrize("tokens", [1, 9])
def test_fewer_warps_where_cells_are_large(emulated, monkeypatch, tokens):  # noqa: F811
    """Everything kept: cells of 17 KiB, of which compute capability 8.6 holds two warps' rings."""
    check(bitmap(70, 600, 0.0), torch.randn(tokens, 600))


@pytest.mark.parametrize(
    "make",
    [
        bitmap,
        sparse24,
        codes,
        lambda n, k: codes(n, k, 4, 0.01),
        lambda n, k: bitmap(n, k, 0.9),
    ],
    ids=["bitmap", "2:4", "2:4 of 2 bits", "2:4 of 4 bits", "columns"],
)
def test_no_order_of_threads_blocks_and_copies_changes_a_bit(emulated, make):  # noqa: F811
    weight, x = make(300, 700), torch.randn(5, 700)
    with pyllmq.use_backend("cuda"):
        in_every_order(emulated, lambda: LINEAR[type(weight)](x, packed_here(weight)))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_large_and_small_x(magnitude):
    for weight in (bitmap(40, 200), sparse24(40, 200), sparse24(40, 200, torch.int8), codes(40, 200, 4, 0.02)):
        for dtype in (torch.float32, torch.bfloat16):
            check(weight, (torch.randn(3, 200) * magnitude).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_in_means_not_finite_out_for_that_token_only(dtype):
    for weight in (bitmap(40, 64), bitmap(40, 64, 0.9), sparse24(40, 64), codes(40, 64, 2), codes(40, 64, 4)):
        x = torch.randn(3, 64).to(dtype)
        x[0, 7], x[2, 9] = torch.inf, torch.nan
        dense = dense_of(weight)
        with pyllmq.use_backend("cuda"):
            y = LINEAR[type(weight)](x, packed_here(weight))
        assert not torch.isfinite(y[0, dense[:, 7] != 0]).any() and y[2, dense[:, 9] != 0].isnan().all()
        torch.testing.assert_close(y[1].double(), x[1].double() @ dense.T, rtol=1e-2, atol=1e-2)


def test_no_tokens():
    for weight in (bitmap(40, 64), bitmap(40, 64, 0.9), sparse24(40, 64), codes(40, 64)):
        with pyllmq.use_backend("cuda"):
            assert LINEAR[type(weight)](torch.randn(2, 0, 64), packed_here(weight)).shape == (2, 0, 40)


# ---- the dense matrix, gradients, layouts ---------------------------------------------------------------------------


def all_kinds(n, k):
    for values in VALUES:
        yield bitmap(n, k, values=values)
        yield bitmap(n, k, 0.9, values=values)
        yield sparse24(n, k, values)
    yield from (codes(n, k, bits, outliers) for bits in (2, 3, 4) for outliers in (0.0, 0.05))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(45, 130), (1, 1), (130, 7), (3, 8200)])
def test_dequantize(dtype, n, k):
    for weight in all_kinds(n, k):
        with pyllmq.use_backend("reference"):
            exact = packed_here(weight).dequantize(torch.float32)
        with pyllmq.use_backend("cuda"):
            actual = packed_here(weight).dequantize(dtype)
        assert torch.equal(actual, exact.to(dtype)), weight.structure


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 70), (70, 517), (5, 8200)])
def test_the_layout_gives_the_tensors_back(n, k):
    for weight in all_kinds(n, k):
        with pyllmq.use_backend("cuda"):
            operand = packed_here(weight).operand()
            tensors = machine_layout(operand.layout).unpack(operand, weight.structure.tensors(), {})
        assert operand.layout.startswith("cuda.")
        assert all(torch.equal(tensors[key], tensor) for key, tensor in weight.tensors.items()), weight.structure


def test_column_numbers_of_32_bits():
    dense = torch.zeros(2, 70000)
    dense[0, ::9], dense[1, 69999] = 1, 2
    dense[1, [0, 254, 255, 256, 511, 512, 767]] = 3  # one step, or steps that only move and one of 0
    weight = BitmapWeight.pack(dense, positions="columns")
    with pyllmq.use_backend("cuda"):
        tensors = machine_layout("cuda.bitmap").unpack(packed_here(weight).operand(), weight.structure.tensors(), {})
    assert all(torch.equal(tensors[key], tensor) for key, tensor in weight.tensors.items())
    check(weight, torch.randn(1, 70000), None, columns=True)


def test_gradient_of_x():
    for weight in (bitmap(20, 33), sparse24(20, 33), codes(20, 33, 4, 0.05)):
        x = torch.randn(3, 33, requires_grad=True)
        grad = torch.randn(3, 20)
        with pyllmq.use_backend("cuda"):
            LINEAR[type(weight)](x, packed_here(weight)).backward(grad)
        dense = dense_of(weight)
        assert_as_good_as_torch(x.grad, grad.double() @ dense, grad @ dense.float())


def test_what_a_layout_takes():
    """Bits a weight: 2:4 its format's and the counters, a bitmap the lanes' filling up more, 3 bits as 4."""
    dense = torch.randn(1024, 1024).bfloat16()
    with pyllmq.use_backend("cuda"):
        for weight, most in (
            (Sparse24Weight.pack(dense * mask_24(dense)), 9.04),
            (bitmap(1024, 1024, 0.5), 10.2),
            (bitmap(1024, 1024, 0.9), 2.8),
            (codes(1024, 1024, 2), 2.1),
            (codes(1024, 1024, 4), 3.3),
        ):
            blob = packed_here(weight).operand().tensors[0]
            assert 8 * blob.numel() / 2**20 < most, weight.structure


@pytest.mark.parametrize(
    "make",
    [
        lambda linear: SparseLinear.from_dense(linear, 0.5, value_dtype=torch.bfloat16),
        lambda linear: SparseLinear.from_dense(linear, 0.9),
        lambda linear: Sparse24Linear.from_dense(linear, value_dtype=torch.int8),
        lambda linear: Sparse24CodebookLinear.from_dense(linear, 4, outlier_fraction=0.02),
    ],
)
def test_layers_move_into_the_layout_save_copy_and_cast(make):
    linear = torch.nn.Linear(70, 90)
    x = torch.randn(5, 70)
    with pyllmq.use_backend("cuda"):
        layer = make(linear)
        assert layer.operand().layout.startswith("cuda.") and set(dict(layer.named_buffers())) == {"layout"}
        y = layer(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dequantize(), linear.bias))
        state = layer.state_dict()
        assert set(state) == {"bias", *layer.structure.tensors()}
        fresh = type(layer)(layer.structure)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), y) and torch.equal(copy.deepcopy(layer)(x), y)
        assert len(layer.bfloat16().operand().tensors) == 1 and layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_layout_of_another_shape_gives_nan_and_a_damaged_one_is_refused():
    for weight in (bitmap(40, 52), sparse24(40, 52), codes(40, 52, 4), bitmap(40, 52, 0.9)):
        with pyllmq.use_backend("cuda"):
            operand = packed_here(weight).operand()
        (blob,) = operand.tensors
        layout = machine_layout(operand.layout)
        magic = blob.clone()
        magic[0] ^= 1
        for tensor, n, k in ((blob, 40, 49), (blob, 41, 52), (magic, 40, 52), (blob[:-128].clone(), 40, 52)):
            wrong = replace(operand, tensors=(tensor,), shape=(n, k))
            assert sparse.packed_linear(torch.randn(2, k), wrong, None, "").isnan().all()
            assert sparse.packed_linear_products(torch.randn(1, k), wrong, None, "").isnan().all()
            assert sparse.packed_dequantize(wrong, torch.float16).isnan().all()
        for given, shape, message in (
            (blob[:100].clone(), (40, 52), "at least"),
            (magic, (40, 52), "damaged"),
            (blob[:-128].clone(), (40, 52), "cut or padded"),
            (blob, (52, 40), r"shape \[40, 52\], but was given as \[52, 40\]"),
        ):
            with pytest.raises(ValueError, match=message):
                layout.from_blob(given, shape)
        other = "sparse24_codebook" if operand.kind == "bitmap" else "bitmap"
        if not (operand.meta[0] and other == "bitmap"):
            with pytest.raises(ValueError, match=f"is no layout 'cuda.{other}'"):
                machine_layout(f"cuda.{other}").from_blob(blob, (40, 52))
        with pytest.raises(ValueError, match="not those of the weight"):
            layout.unpack(replace(operand, shape=(40, 51)), weight.structure.tensors(), {})


def test_what_the_table_says():
    def reason(layout, tokens, columns=0, bits=0, precision="high"):
        meta = (columns, 1, bits, 0)
        problem = WeightProblem("packed_linear", "cpu", torch.bfloat16, layout, tokens, meta, precision)
        with pyllmq.use_backend("cuda"):
            return dispatch.choose(problem).name

    assert reason("cuda.bitmap", 64) == "cuda.bitmap_fused"
    assert reason("cuda.bitmap", 65) == "cuda.bitmap_matmul"
    assert reason("cuda.sparse24", 16, 1) == "cuda.sparse24_columns"
    assert reason("cuda.sparse24", 17, 1) == "cuda.sparse24_matmul"
    codes = "cuda.sparse24_codebook"
    assert reason(codes, 1, bits=2) == f"{codes}_products"
    assert reason(codes, 2, bits=2) == reason(codes, 2, bits=4) == f"{codes}_fused"
    assert reason(codes, 1, bits=4) == reason(codes, 1, bits=4, precision="exact") == f"{codes}_tables"
    assert reason(codes, 1, bits=2, precision="exact") == f"{codes}_fused"
    with pytest.raises(
        dispatch.NoKernelError, match=r"(?s)reads the layout 'cuda.bitmap'.*reads the layout 'cuda.sparse24'"
    ):
        reason("checkpoint.bitmap", 1)
