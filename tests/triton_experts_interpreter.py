"""routed_experts in Triton's interpreter, on a CPU; tests/test_triton.py runs this file. bfloat16 is left out, as elsewhere.

One token is products per thread, more are dots of up to 16 pairs of one expert.
"""

import math
from functools import partial

import pytest
import torch

import pyllmq
from pyllmq.functional import routed_experts
from pyllmq.operations import Gate, PackedExperts

from .expert_layer import ALL_WIDTHS, EVERYTHING, PLAIN
from .expert_layer import Layer as LayerOf
from .test_routed_experts import GATES
from .triton_interpreter import guarded as guarded

Layer = partial(LayerOf, backend="triton")


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_every_width(guarded, bits):
    layer = Layer([(bits,)], experts=3)
    for tokens, dtype in ((1, torch.float16), (6, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_experts_of_their_own_widths_and_pairs_a_tile(guarded, tokens, dtype):
    layer = Layer([(2,), ALL_WIDTHS, (4, 8), (3,)], **EVERYTHING)
    layer.check(*layer.route(tokens, 3, none=True), dtype)


@pytest.mark.parametrize(
    ("hidden", "units", "extra"),
    [(1, 1, PLAIN), (33, 17, EVERYTHING), (130, 70, EVERYTHING), (2, 100, PLAIN), (300, 3, PLAIN)],
)
def test_shapes(guarded, hidden, units, extra):
    layer = Layer([(1, 3, 4, 6), (2,)], experts=2, hidden=hidden, units=units, **extra)
    for tokens, dtype in ((1, torch.float16), (9, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize("gate", [*GATES, Gate("gelu_tanh"), Gate("relu", gated=False)], ids=str)
def test_gates_and_biases(guarded, gate):
    layer = Layer([(8,), (4,)], gate=gate, bias=True)
    layer.check(*layer.route(5, 2), torch.float32)


@pytest.mark.parametrize("mixes", [[(2,)], ["2:4 fp16", "4 bits"], ["bitmap int8"]], ids=str)
def test_an_expert_that_nobody_chose_and_waves(guarded, monkeypatch, mixes):
    from pyllmq.triton_kernels import routed_experts as kernels

    layer = Layer(mixes, experts=5, hidden=16, units=8)
    x, index, weights = layer.route(50, 2)
    index[index == 3] = 5
    layer.check(x, index, weights, torch.float32)
    layer.check(x, torch.full_like(index, 4), weights, torch.float32)
    assert not layer.run(x, torch.full_like(index, 5), weights).any()
    monkeypatch.setattr(kernels, "MOST_SUM_BYTES", 4 * 2 * 16 * 20)  # 20 tokens
    layer.check(x, index, weights, torch.float32)


@pytest.mark.parametrize("mixes", [[(4,)], ["2:4 int8"], ["2 bits", "bitmap fp16"]], ids=str)
def test_an_index_outside_and_weights_that_are_not_finite_give_nan_to_their_token_alone(mixes):
    layer = Layer(mixes)
    x, index, weights = layer.route(6, 2)
    expected = layer.run(x, index, weights)
    index[1, 0], index[3, 1], weights[4, 0] = -1, 6, math.nan
    y = layer.run(x, index, weights)
    assert y[[1, 3, 4]].isnan().all() and torch.equal(y[[0, 2, 5]], expected[[0, 2, 5]])
    assert layer.run(x[:0], index[:0], weights[:0]).shape == (0, 72)
    assert not layer.run(x, index[:, :0], weights[:, :0]).any()


def test_refusals():
    layer, other = Layer([(3,)]), Layer([(3,)], units=48)
    mixed = PackedExperts((*layer.packed.up[:3], other.packed.up[3]), layer.packed.down, layer.gate)
    with pyllmq.use_backend("triton"), pytest.raises(ValueError, match="have several shapes"):
        routed_experts(*layer.route(2, 1), mixed)
    mixed = PackedExperts(layer.packed.up, other.packed.down, layer.gate)
    with pyllmq.use_backend("triton"), pytest.raises(ValueError, match=r"down is \[72, 48\]; needs \[72, 40\]"):
        routed_experts(*layer.route(2, 1), mixed)
