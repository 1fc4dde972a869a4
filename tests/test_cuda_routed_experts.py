"""routed_experts in CUDA, on the emulator, against fp64: experts of their own widths, any routing.

The emulated device has 3 multiprocessors, so 6 blocks at a time. Experts get up to 4, 8 or 16 pairs a tile (half of it in fp32), by
the number of tokens; K is split where experts are few, and x staged in several parts where it has many columns.
"""

import itertools
import math
from functools import partial

import pytest
import torch

import pyllmq
from pyllmq.backends.cuda import routed_experts as cuda
from pyllmq.dispatch import choose
from pyllmq.functional import routed_experts
from pyllmq.layouts import WeightOperand
from pyllmq.operations import ExpertsProblem, Gate, PackedExperts

from .cuda_emulator import emulated, in_every_order  # noqa: F401
from .expert_layer import ALL_WIDTHS, EVERYTHING, SHAPES, SPARSE_KINDS
from .expert_layer import Layer as LayerOf
from .oracle import random_case
from .test_experts import expert_layers, make
from .test_routed_experts import GATES

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Layer = partial(LayerOf, backend="cuda")
MIXED = ["3 bits", (2, 8), "bitmap int8", "2:4 bf16", "few fp16", "bitmap fp32", "2 bits", "2:4 fp16"]
"""Kinds that meet x in fp16, bf16 and fp32."""


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_every_width(bits):
    layer = Layer([(bits,)], experts=3)
    for tokens, dtype in ((1, torch.bfloat16), (6, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_experts_of_their_own_widths_and_pairs_a_tile(tokens, dtype):
    """33 tokens of 4 experts are up to 33 of one: several tiles."""
    layer = Layer([(2,), ALL_WIDTHS, (4, 8), (3,)], **EVERYTHING)
    layer.check(*layer.route(tokens, 3, none=True), dtype)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_every_sparse_kind(kind):
    """K of up and down odd, in several cells; rows of more than a block's 256."""
    layer = Layer([kind], experts=3, hidden=331, units=141, bias=True)
    for tokens, dtype in itertools.product((1, 4, 17), DTYPES):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("mixes", [MIXED, ["2:4 bf16", "bitmap bf16", "few int8"], ["4 bits", "3 bits"]], ids=str)
def test_experts_of_their_own_kinds(mixes, tokens, dtype):
    layer = Layer(mixes, experts=8, gate=Gate("silu", interleaved=True, limit=0.7), **EVERYTHING)
    x, index, weights = layer.route(tokens, 3, none=True)
    y = layer.check(x, index, weights, dtype)
    assert torch.equal(layer.run(x.to(dtype), index, weights), y)


@pytest.mark.parametrize(("hidden", "units"), [(1, 1), (33, 17), (530, 65), (130, 700), (2, 300), (4500, 3)])
@pytest.mark.parametrize("mixes", [["3 bits", "2 bits"], ["2:4 bf16"], ["bitmap fp16"], ["few fp16"]], ids=str)
def test_shapes_of_sparse_experts(mixes, hidden, units):
    """Rows above a block's 256, more cells than x's shared memory holds, two panels of column numbers."""
    layer = Layer(mixes, experts=2, hidden=hidden, units=units, gate=Gate("gelu", gated=False), bias=True)
    for tokens, dtype in ((1, torch.float16), (9, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize("kind", ["2:4 bf16", "3 bits", "bitmap int8"])
def test_x_of_sparse_experts_in_several_stages(kind):
    """So many tiles and rows that K is not split, and more cells than shared memory holds x of."""
    layer = Layer([kind], experts=4, hidden=1700, units=300)
    layer.check(*layer.route(20, 3), torch.float32)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates_and_biases_of_sparse_experts(gate):
    layer = Layer(["2:4 bf16", "4 bits", "bitmap int8"], gate=gate, bias=True)
    layer.check(*layer.route(5, 2), torch.float32)


@pytest.mark.parametrize(("hidden", "units", "extra"), SHAPES)
def test_shapes(hidden, units, extra):
    """Rows above a block's 512, columns of several panels, and more of them than x's shared memory holds."""
    layer = Layer([(1, 3, 4, 6), (2,)], experts=2, hidden=hidden, units=units, **extra)
    for tokens, dtype in ((1, torch.float16), (9, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize("gate", [*GATES, Gate("gelu_tanh"), Gate("relu", gated=False)], ids=str)
def test_gates_and_biases(gate):
    layer = Layer([(8,), (4,)], gate=gate, bias=True)
    layer.check(*layer.route(5, 2), torch.float32)


@pytest.mark.parametrize("mixes", [[(2,)], ["2:4 fp16", "2 bits"], ["bitmap bf16", "few fp16"]], ids=str)
def test_more_pairs_than_threads_and_an_expert_that_nobody_chose(mixes):
    layer = Layer(mixes, experts=5, hidden=16, units=8)
    x, index, weights = layer.route(150, 2)
    index[index == 3] = 5
    layer.check(x, index, weights, torch.bfloat16)
    layer.check(x, torch.full_like(index, 4), weights, torch.bfloat16)
    assert not layer.run(x, torch.full_like(index, 5), weights).any()


@pytest.mark.parametrize("mixes", [[(4,)], ["2:4 bf16"], ["3 bits", "bitmap fp16"], ["bitmap fp32"]], ids=str)
def test_an_index_outside_and_weights_that_are_not_finite_give_nan_to_their_token_alone(mixes):
    layer = Layer(mixes)
    x, index, weights = layer.route(6, 2)
    expected = layer.run(x, index, weights)
    index[1, 0], index[3, 1], weights[4, 0] = -1, 6, math.nan
    y = layer.run(x, index, weights)
    assert y[[1, 3, 4]].isnan().all() and torch.equal(y[[0, 2, 5]], expected[[0, 2, 5]])
    x[0, 3] = math.inf
    assert not layer.run(x, index, weights)[0].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize(
    "mixes", [[(1, 4, 6), (3,)], ["4 bits", "bitmap bf16", "few fp16"], ["2 bits", "2:4 int8"]], ids=str
)
def test_no_order_of_threads_blocks_and_copies_changes_a_bit(emulated, mixes, tokens):  # noqa: F811
    layer = Layer(mixes, experts=3, hidden=300, units=300, **EVERYTHING)
    x, index, weights = layer.route(tokens, 2)
    in_every_order(emulated, lambda: layer.run(x, index, weights))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
@pytest.mark.parametrize("mixes", [[(4,)], ["2:4 bf16", "3 bits"], ["bitmap int8", "few fp16"]], ids=str)
def test_x_far_outside_of_the_range_of_fp16(mixes, magnitude):
    layer = Layer(mixes, gate=Gate("relu", gated=False), **EVERYTHING)
    x, index, weights = layer.route(3, 2)
    layer.check(x * magnitude, index, weights, torch.bfloat16)


@pytest.mark.parametrize("mixes", [[(3,)], ["2:4 bf16", "2 bits"]], ids=str)
def test_waves_of_tokens(monkeypatch, mixes):
    monkeypatch.setattr(cuda, "MOST_SUM_BYTES", 4 * 80 * 2 * 4)  # of 80 rows and two choices: 4 tokens
    layer = Layer(mixes)
    x, index, weights = layer.route(11, 2)
    y = layer.check(x, index, weights, torch.bfloat16)
    alone = torch.cat([layer.run(x[i : i + 4].bfloat16(), index[i : i + 4], weights[i : i + 4]) for i in (0, 4, 8)])
    assert torch.equal(y, alone)


def test_no_tokens_and_no_choices():
    layer = Layer([(3,)])
    x, index, weights = layer.route(3, 2)
    assert layer.run(x[:0], index[:0], weights[:0]).shape == (0, 72)
    assert not layer.run(x, index[:, :0], weights[:, :0]).any()


def test_a_layout_of_another_shape_gives_nan_to_its_tokens():
    layer = Layer([(3,)])
    other = random_case(81, 72, (3,)).weight
    with pyllmq.use_backend("cuda"):
        blob = other.prepack().tensors
    up = list(layer.packed.up)
    up[2] = WeightOperand("codebook", "cuda.codebook", blob, (3,), (80, 72))
    layer.packed = PackedExperts(tuple(up), layer.packed.down, layer.gate)
    x, _, weights = layer.route(3, 2)
    y = layer.run(x, torch.tensor([[0, 1], [2, 0], [3, 1]]), weights)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["2:4 bf16", "3 bits", "bitmap fp16", "few fp16"])
def test_a_sparse_layout_of_another_shape_or_kind_gives_nan_to_its_tokens(kind):
    """As meta says it, the host cannot know."""
    layer = Layer([kind])
    other, values = SPARSE_KINDS[kind](81, 72), SPARSE_KINDS["2:4 int8" if kind == "2:4 bf16" else "2:4 bf16"](80, 72)
    up = list(layer.packed.up)
    for place, weight in ((1, other), (2, values)):
        with pyllmq.use_backend("cuda"):
            blob = weight.prepack().tensors
        up[place] = WeightOperand(up[0].kind, up[0].layout, blob, up[place].meta, (80, 72))
    layer.packed = PackedExperts(tuple(up), layer.packed.down, layer.gate)
    x, _, weights = layer.route(4, 2)
    y = layer.run(x, torch.tensor([[0, 1], [2, 0], [3, 0], [0, 3]]), weights)
    assert y[:2].isnan().all() and y[2:].isfinite().all()


def test_refusals():
    layer, other = Layer([(3,)]), Layer([(3,)], units=48)
    mixed = PackedExperts((*layer.packed.up[:3], other.packed.up[3]), layer.packed.down, layer.gate)
    with pyllmq.use_backend("cuda"), pytest.raises(ValueError, match="have several shapes"):
        routed_experts(*layer.route(2, 1), mixed)
    mixed = PackedExperts(layer.packed.up, other.packed.down, layer.gate)
    with pyllmq.use_backend("cuda"), pytest.raises(ValueError, match=r"down is \[72, 48\]; needs \[72, 40\]"):
        routed_experts(*layer.route(2, 1), mixed)
    with (
        pytest.raises(
            pyllmq.NoKernelError, match=r"reads the layouts 'cuda.\*', some experts are laid out as triton.bitmap"
        ),
        pyllmq.use_backend("cuda"),
    ):
        choose(ExpertsProblem("routed_experts", "cpu", torch.float16, ("cuda.codebook", "triton.bitmap")))


def test_stacks_of_a_model_run_it(monkeypatch):
    """Biases, gate and up interleaved, clamps."""
    model = make("GptOss")
    with pyllmq.use_backend("cuda"), torch.no_grad():
        pyllmq.compress(model, pyllmq.KMeansConfig(6), include=["*.0.mlp.experts.*"], progress=False)
        layer, called = expert_layers(model)[0], []
        monkeypatch.setattr(
            "pyllmq.experts.routed_experts", lambda *given: called.append(given[3]) or routed_experts(*given)
        )
        given = torch.randn(3, 64), torch.tensor([[0, 2], [1, 2], [3, 0]]), torch.rand(3, 2)
        together = layer(*given)
        assert [packed.layouts for packed in called] == [("cuda.codebook",)]
        monkeypatch.setattr(layer, "_packed", lambda *_: None)
        torch.testing.assert_close(together, layer(*given), rtol=2e-3, atol=2e-4)
