"""routed_experts in CUDA, on the emulator, against fp64: experts of their own widths, any routing.

The emulated device has 3 multiprocessors, so 6 blocks at a time. Experts get up to 4, 8 or 16 pairs a tile (half of it in fp32), by
the number of tokens; K is split where experts are few, and x staged in several parts where it has many columns.
"""

import itertools
import math

import pytest
import torch

import pyllmq
from pyllmq.backends.cuda import routed_experts as cuda
from pyllmq.dispatch import choose
from pyllmq.functional import routed_experts
from pyllmq.layouts import WeightOperand
from pyllmq.operations import ExpertsProblem, Gate, PackedExperts

from .cuda_emulator import emulated  # noqa: F401
from .oracle import random_case
from .test_routed_experts import GATES, error

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_WIDTHS = tuple(range(1, 9))
PLAIN = {"outliers": 0.0}
EVERYTHING = {"outliers": 0.02, "row_scale": True, "segments": 2}


class Layer:
    """Experts of the given widths in turn, packed for CUDA, and dense in fp64."""

    def __init__(self, widths, experts=4, hidden=72, units=40, gate=None, bias=False, **extra):
        self.gate, self.experts, self.hidden = gate or Gate("silu"), experts, hidden
        rows = 2 * units if self.gate.gated else units
        mixes = [widths[e % len(widths)] for e in range(experts)]
        cases = [[random_case(*shape, mix, **extra) for mix in mixes] for shape in ((rows, hidden), (hidden, units))]
        self.dense = [[case.dense for case in part] for part in cases]
        self.bias = [torch.randn(experts, n) * 0.3 for n in (rows, hidden)] if bias else [None, None]
        with pyllmq.use_backend("cuda"):
            self.packed = PackedExperts(
                *(tuple(c.weight.prepack() for c in part) for part in cases), self.gate, *self.bias
            )
        assert self.packed.layouts == ("cuda.codebook",)

    def route(self, tokens, choices, none=False):
        index = torch.stack([torch.randperm(self.experts + none)[:choices] for _ in range(tokens)])
        return torch.randn(tokens, self.hidden), index, torch.rand(tokens, choices)

    def run(self, x, index, weights):
        with pyllmq.use_backend("cuda"):
            return routed_experts(x, index, weights, self.packed)

    def dense_result(self, x, index, weights, dtype):
        """What torch computes in that dtype, Linear by Linear."""
        y = torch.zeros(x.shape, dtype=dtype)
        up_bias, down_bias = (bias if bias is None else bias.to(dtype) for bias in self.bias)
        for t, places in enumerate(index.tolist()):
            for place, e in enumerate(places):
                if e < self.experts:
                    h = torch.nn.functional.linear(
                        x[t].to(dtype), self.dense[0][e].to(dtype), None if up_bias is None else up_bias[e]
                    )
                    h = torch.nn.functional.linear(
                        self.gate(h), self.dense[1][e].to(dtype), None if down_bias is None else down_bias[e]
                    )
                    y[t] += weights[t, place].to(dtype) * h
        return y

    def check(self, x, index, weights, dtype):
        x = x.to(dtype)
        exact = self.dense_result(x, index, weights, torch.float64)
        of_torch = error(self.dense_result(x, index, weights, dtype), exact)
        actual = self.run(x, index, weights)
        assert actual.dtype == dtype and error(actual, exact) <= 2 * of_torch + torch.finfo(dtype).eps, (
            error(actual, exact),
            of_torch,
        )
        return actual


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


@pytest.mark.parametrize(
    ("hidden", "units", "extra"),
    [
        (1, 1, PLAIN),
        (33, 17, EVERYTHING),
        (530, 65, EVERYTHING),
        (130, 700, EVERYTHING),
        (2, 300, PLAIN),
        (1700, 3, PLAIN),
    ],
)
def test_shapes(hidden, units, extra):
    """Rows above a block's 512, columns of several panels, and more of them than x's shared memory holds."""
    layer = Layer([(1, 3, 4, 6), (2,)], experts=2, hidden=hidden, units=units, **extra)
    for tokens, dtype in ((1, torch.float16), (9, torch.float32)):
        layer.check(*layer.route(tokens, 2), dtype)


@pytest.mark.parametrize("gate", [*GATES, Gate("gelu_tanh"), Gate("relu", gated=False)], ids=str)
def test_gates_and_biases(gate):
    layer = Layer([(8,), (4,)], gate=gate, bias=True)
    layer.check(*layer.route(5, 2), torch.float32)


def test_more_pairs_than_threads_and_an_expert_that_nobody_chose():
    layer = Layer([(2,)], experts=5, hidden=16, units=8)
    x, index, weights = layer.route(150, 2)
    index[index == 3] = 5
    layer.check(x, index, weights, torch.bfloat16)
    layer.check(x, torch.full_like(index, 4), weights, torch.bfloat16)
    assert not layer.run(x, torch.full_like(index, 5), weights).any()


def test_an_index_outside_and_weights_that_are_not_finite_give_nan_to_their_token_alone():
    layer = Layer([(4,)])
    x, index, weights = layer.route(6, 2)
    expected = layer.run(x, index, weights)
    index[1, 0], index[3, 1], weights[4, 0] = -1, 6, math.nan
    y = layer.run(x, index, weights)
    assert y[[1, 3, 4]].isnan().all() and torch.equal(y[[0, 2, 5]], expected[[0, 2, 5]])
    x[0, 3] = math.inf
    assert not layer.run(x, index, weights)[0].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 12])
def test_no_order_of_threads_blocks_and_copies_changes_a_bit(emulated, tokens):  # noqa: F811
    layer = Layer([(1, 4, 6), (3,)], experts=3, hidden=300, units=300, **EVERYTHING)
    x, index, weights = layer.route(tokens, 2)
    results = []
    for last_thread_first, last_block_first, eager_copies in itertools.product((False, True), repeat=3):
        emulated.emulator.set_schedule(
            last_thread_first=last_thread_first, last_block_first=last_block_first, eager_copies=eager_copies
        )
        results.append(layer.run(x, index, weights))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_x_far_outside_of_the_range_of_fp16(magnitude):
    layer = Layer([(4,)], gate=Gate("relu", gated=False), **EVERYTHING)
    x, index, weights = layer.route(3, 2)
    layer.check(x * magnitude, index, weights, torch.bfloat16)


def test_waves_of_tokens(monkeypatch):
    monkeypatch.setattr(cuda, "MOST_SUM_BYTES", 4 * 80 * 2 * 4)  # of 80 rows and two choices: 4 tokens
    layer = Layer([(3,)])
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


def test_refusals():
    layer, other = Layer([(3,)]), Layer([(3,)], units=48)
    mixed = PackedExperts((*layer.packed.up[:3], other.packed.up[3]), layer.packed.down, layer.gate)
    with pyllmq.use_backend("cuda"), pytest.raises(ValueError, match="have several shapes"):
        routed_experts(*layer.route(2, 1), mixed)
    mixed = PackedExperts(layer.packed.up, other.packed.down, layer.gate)
    with pyllmq.use_backend("cuda"), pytest.raises(ValueError, match=r"down must be \[hidden, units\]"):
        routed_experts(*layer.route(2, 1), mixed)
    with (
        pytest.raises(pyllmq.NoKernelError, match="laid out as cuda.bitmap, cuda.codebook"),
        pyllmq.use_backend("cuda"),
    ):
        choose(ExpertsProblem("routed_experts", "cpu", torch.float16, ("cuda.bitmap", "cuda.codebook")))
