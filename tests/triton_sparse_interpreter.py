"""The Triton kernels of the sparse formats in Triton's interpreter, on a CPU; tests/test_triton.py runs this file.

bfloat16 is left out as an activation: the interpreter's is wrong. Tokens 1 (products per thread), 2 and 17 (dots, one or two
blocks of tokens), 65 (spread, then torch's matmul); N and K odd, below, at and above a tile.
"""

import copy

import pytest
import torch

import pyllmq
from pyllmq import BitmapWeight, Sparse24CodebookLinear, Sparse24Linear, Sparse24Weight, SparseLinear
from pyllmq.layouts import machine_layout
from pyllmq.packing import mask_24

from .test_sparse_formats import random_codes
from .test_sparse_linear import LINEAR, bitmap, dense_of, sparse24
from .triton_interpreter import guarded as guarded

TOKENS = (1, 2, 17, 65)
VALUES = [torch.float16, torch.float32, torch.int8]


@pytest.fixture(autouse=True)
def only_triton():
    with pyllmq.use_backend("triton"):
        yield


def check(packed, x, bias=None):
    fresh = type(packed)(packed.structure, packed.tensors)
    assert fresh.operand().layout == f"triton.{packed.kind}"
    y = LINEAR[type(packed)](x, fresh, bias)
    dense = dense_of(packed)
    truth = torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
    error = float((y.double() - truth).norm() / (truth.norm() + 1e-30))
    assert y.dtype == x.dtype and error < {torch.float32: 2e-6, torch.float16: 2e-3}[x.dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("make", [bitmap, sparse24])
def test_every_value_type(guarded, make, tokens, values, dtype):
    check(make(67, 131, values=values), torch.randn(tokens, 131).to(dtype), torch.randn(67).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("outliers", [0, 0.05])
def test_codes(guarded, outliers, tokens, bits, dtype):
    packed, _ = random_codes(67, 131, bits, outliers)
    check(packed, torch.randn(tokens, 131).to(dtype), torch.randn(67).to(dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 90), (130, 1), (31, 33), (64, 64), (129, 270), (3, 5)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_shapes(guarded, tokens, n, k):
    half = torch.float16
    for packed in (bitmap(n, k, values=half), sparse24(n, k, values=half), random_codes(n, k, 3, 0.1)[0]):
        check(packed, torch.randn(tokens, k))


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.99])
def test_sparsities(guarded, sparsity):
    check(bitmap(70, 300, sparsity, torch.float32), torch.randn(3, 300))


def test_the_layout_gives_the_tensors_back():
    wide = torch.zeros(2, 70000)
    wide[0, ::3], wide[1, 69999] = 1, 2
    coded = [random_codes(33, k, bits, outliers)[0] for k in (70, 73) for bits in (2, 3, 4) for outliers in (0, 0.1)]
    for packed in (bitmap(33, 70), bitmap(33, 70, 0.99, torch.int8), sparse24(33, 70), BitmapWeight.pack(wide), *coded):
        fresh = type(packed)(packed.structure, packed.tensors)
        tensors = machine_layout(f"triton.{packed.kind}").unpack(fresh.operand(), packed.structure.tensors(), {})
        assert all(torch.equal(tensors[key], tensor) for key, tensor in packed.tensors.items())
        torch.testing.assert_close(fresh.dequantize().double(), dense_of(packed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layer_type", [SparseLinear, Sparse24Linear])
def test_layers_copy_and_save(layer_type):
    weight = torch.randn(24, 40) * mask_24(torch.randn(24, 40))
    layer = layer_type.from_dense(weight)
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and torch.equal(
        layer.to(torch.float16).dequantize(torch.float32), weight
    )
    assert set(layer.state_dict()) == set(layer.structure.tensors())


def test_a_layer_of_codes_copies_and_saves():
    packed, dense = random_codes(24, 40, 3, 0.05)
    layer = Sparse24CodebookLinear.from_weight(packed)
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x).double(), x.double() @ dense.T, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and torch.equal(layer.dequantize().double(), dense)
    saved = layer.state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in packed.tensors.items())


@pytest.mark.parametrize("make", [sparse24, lambda n, k: random_codes(n, k, 2)[0]])
def test_one_token_reads_x_only_where_a_weight_is_kept(make):
    packed = make(40, 65)
    x = torch.randn(1, 65)
    x[0, 62] = torch.nan
    y, kept = LINEAR[type(packed)](x, type(packed)(packed.structure, packed.tensors)), packed.mask()[:, 62]
    assert 0 < kept.sum() < 40 and torch.equal(y.isnan()[0], kept)


def test_a_foreign_blob_is_refused():
    operand = Sparse24Weight.pack(torch.randn(8, 12) * mask_24(torch.randn(8, 12))).operand()
    (blob, *_) = operand.tensors
    for given, shape, message in (
        (blob[:300], (8, 12), "cut off"),
        (blob, (8, 13), "was given as"),
        (blob[:9], (8, 12), "at least"),
    ):
        with pytest.raises(ValueError, match=message):
            machine_layout("triton.sparse24").from_blob(given, shape)
    with pytest.raises(ValueError, match="no layout 'triton.bitmap'"):
        machine_layout("triton.bitmap").from_blob(blob, (8, 12))
