"""Tensors as users have them: strided, expanded, at odd addresses, negated as they are read, of other dtypes, empty. Each public
function gives what it gives for a plain copy, or says what is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import functional

pytestmark = pytest.mark.kernels


def at_an_odd_address(x: torch.Tensor) -> torch.Tensor:
    values = x.contiguous().flatten().view(torch.uint8)
    memory = bytearray(1) + bytearray(values.tolist())
    return torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)


def strided(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


WAYS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": strided,
    "odd address": at_an_odd_address,
    "negated": lambda x: torch._neg_view(-x),
    "imaginary part": lambda x: torch.complex(x, -x).conj().imag if x.dtype == torch.float32 else x,
    "parameter": lambda x: nn.Parameter(x.clone()),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def functions():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layers = {
        "codebook": pyllmq.CodebookLinear.from_dense(linear, 3, outlier_fraction=0.05, row_scale=True),
        "bitmap": pyllmq.SparseLinear.from_dense(linear, 0.6),
        "sparse24": pyllmq.Sparse24Linear.from_dense(linear),
        "sparse24_codebook": pyllmq.Sparse24CodebookLinear.from_dense(linear, 3),
    }
    points, cost = torch.rand(5, 64), torch.rand(5, 64)
    mass = torch.full((64,), 1 / 64)
    operand = layers["codebook"].packed_weight().checkpoint_operand()
    found = {f"a layer, {kind}": layer for kind, layer in layers.items()}
    found |= {f"from_dense, {kind}": lambda w, layer=layer: made(type(layer), w) for kind, layer in layers.items()}
    return found | {
        "kmeans_1d": lambda x: pyllmq.kmeans_1d(x, 4),
        "kmeans_1d, weights": lambda x: pyllmq.kmeans_1d(points, 4, x.abs()),
        "kmeans_1d_errors": lambda x: functional.kmeans_1d_errors(x, [1, 4]),
        "softmax_cdist_l1": lambda x: pyllmq.softmax_cdist_l1(x, points),
        "softmax_cdist_l1, teacher": lambda x: pyllmq.softmax_cdist_l1(points, x),
        "sinkhorn": lambda x: pyllmq.sinkhorn(x),
        "sinkhorn, mass": lambda x: pyllmq.sinkhorn(cost, x[0].softmax(0)[:5] * 0 + 0.2, mass),
        "doubly_stochastic": lambda x: pyllmq.doubly_stochastic(x[:, :5]),
        "codebook_gradient": lambda x: functional.codebook_gradient(x.repeat(7, 1)[:32], operand),
    }


def made(layer, weight):
    bits = {"bits": 3} if "Codebook" in layer.__name__ else {}
    return layer.from_dense(weight, **bits).dequantize()


def tensors(found):
    return [found.detach()] if isinstance(found, torch.Tensor) else [each.detach() for each in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", functions())
def test_the_values_count_and_not_how_they_lie(name, way, dtype):
    function = functions()[name]
    torch.manual_seed(1)
    x = torch.randn(5, 64).to(dtype)
    if isinstance(function, nn.Module):
        function.to(dtype)
    elif name == "codebook_gradient" and dtype != torch.float32:
        return
    odd = WAYS[way](x)
    for no_grad in (False, True):
        with torch.set_grad_enabled(not no_grad):
            expected = tensors(function(odd.detach().clone().contiguous().resolve_neg()))
            for ours, theirs in zip(tensors(function(odd)), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_rows_by_ids_that_lie_anyhow():
    embedding = pyllmq.CodebookEmbedding.from_dense(nn.Embedding(50, 16), bits=4)
    ids = torch.randint(0, 50, (3, 6))
    for way in (strided, at_an_odd_address, lambda x: x.mT.contiguous().mT):
        assert torch.equal(embedding(way(ids)), embedding(ids))
    assert embedding(ids[:0]).shape == (0, 6, 16)
    for bad in (-1, 50, 1 << 40):
        with pytest.raises(IndexError, match=f"id {bad} at place 0; allowed: 0 to 49"):
            embedding(torch.tensor([bad]))


@pytest.mark.parametrize("kind", ["codebook", "bitmap", "sparse24", "sparse24_codebook"])
def test_weights_that_cannot_be_packed(kind):
    layer = type(functions()[f"a layer, {kind}"])
    weight = torch.randn(32, 64)
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"the weight is {dtype} on cpu; allowed: torch.float32, .*, with values"):
            made(layer, weight.to(dtype))
    with pytest.raises(ValueError, match="the weight is torch.float32 on meta"):
        made(layer, weight.to("meta"))
    for shape in ((0, 64), (32, 0), (64,), (2, 3, 4), ()):
        with pytest.raises(
            ValueError, match=r"takes an nn.Linear or a matrix \[N, K\] that is not empty, not torch.float32"
        ):
            made(layer, torch.zeros(shape))
    for bad in (float("nan"), float("inf")):
        weight[3, 5] = bad
        with pytest.raises(ValueError, match="holds 1 values that are not finite"):
            made(layer, weight)
