"""routed_experts of sparse experts, and of several formats, in Triton's interpreter; tests/test_triton.py runs this file."""

from functools import partial

import pytest
import torch

from pyllmq.operations import Gate

from .expert_layer import EVERYTHING, SPARSE_KINDS
from .expert_layer import Layer as LayerOf
from .triton_interpreter import guarded as guarded

Layer = partial(LayerOf, backend="triton")
KINDS = [name for name in SPARSE_KINDS if "bf16" not in name]
MIXED = ["3 bits", (2, 8), "bitmap int8", "2:4 fp16", "bitmap fp32"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sparse_kind(guarded, kind):
    layer = Layer([kind], experts=3, hidden=70, units=24, bias=True)
    assert len(layer.packed.layouts) == 1
    for tokens, dtype in ((1, torch.float16), (7, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (33, torch.float16)], ids=str)
@pytest.mark.parametrize("mixes", [["2 bits", "4 bits", "3 bits"], MIXED], ids=str)
def test_experts_of_their_own_kinds(guarded, mixes, tokens, dtype):
    """33 tokens of 5 experts are up to 33 of one: several tiles."""
    layer = Layer(mixes, experts=5, gate=Gate("silu", interleaved=True, limit=0.7), **EVERYTHING)
    layer.check(*layer.route(tokens, 3, none=True), dtype)


@pytest.mark.parametrize(("hidden", "units"), [(1, 1), (2, 100), (130, 70)])
@pytest.mark.parametrize("mixes", [["3 bits", "2 bits"], ["2:4 fp16"], ["bitmap fp16"]], ids=str)
def test_shapes_of_sparse_experts(guarded, mixes, hidden, units):
    layer = Layer(mixes, experts=2, hidden=hidden, units=units, gate=Gate("gelu", gated=False), bias=True)
    for tokens, dtype in ((1, torch.float16), (9, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


def test_splits_of_sparse_experts(guarded):
    """More programs than tiles: columns are split, and some splits of a kind with fewer steps are empty."""
    layer = Layer(["4 bits", (2, 8), "bitmap int8"], experts=3, hidden=300, units=70)
    x, index, weights = layer.route(3, 1)
    y = layer.check(x, index, weights, torch.float32)
    assert torch.equal(layer.run(x, index, weights), y)
