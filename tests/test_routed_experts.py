"""routed_experts: all experts of a layer as one call, against fp64; any formats, any routing, any number of threads."""

from __future__ import annotations

import math

import pytest
import torch

import pyllmq
from pyllmq import BitmapWeight, Sparse24CodebookWeight, _cpu
from pyllmq.experts import RoutedExperts, gate_of, take_apart
from pyllmq.functional import routed_experts
from pyllmq.layouts import CHECKPOINT
from pyllmq.operations import Gate, PackedExperts
from pyllmq.packing import mask_24, unstructured_mask

from .oracle import random_case
from .test_experts import expert_layers, logits, make

pytestmark = pytest.mark.kernels

TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of the norm: `high` errs by 2e-4 a Linear, a dtype by one rounding of x and y each."""


def bitmap(n, k):
    weight = torch.randn(n, k) * 0.1
    return BitmapWeight.pack(weight, unstructured_mask(weight, 0.5), torch.float32)


def codes24(n, k):
    weight = torch.randn(n, k) * 0.1
    return Sparse24CodebookWeight.from_dense(weight, mask_24(weight), 4, outlier_fraction=0.01)


FORMATS = {
    "codebook": lambda n, k: random_case(n, k, (4,), row_scale=True).weight,
    "mixed": lambda n, k: random_case(n, k, (1, 2, 3, 4, 6), outliers=0.01).weight,
    "2:4": codes24,
    "bitmap": bitmap,
}


class Case:
    """Experts of one format each in turn, with their dense weights and an oracle of the whole operation in fp64."""

    def __init__(self, formats, experts=5, hidden=72, units=40, gate=None, bias=False):
        self.gate, self.experts, self.hidden = gate or Gate("silu"), experts, hidden
        rows = 2 * units if self.gate.gated else units
        make = [FORMATS[formats[e % len(formats)]] for e in range(experts)]
        weights = [[make[e](rows, hidden) for e in range(experts)], [make[e](hidden, units) for e in range(experts)]]
        with pyllmq.use_backend("reference"):
            self.dense = [[pyllmq.functional.packed_dequantize(w).double() for w in part] for part in weights]
        self.bias = [torch.randn(experts, n) * 0.3 for n in (rows, hidden)] if bias else [None, None]
        self.packed = PackedExperts(*(tuple(w.prepack() for w in part) for part in weights), self.gate, *self.bias)
        with pyllmq.use_backend("reference"):
            plain = (tuple(w.prepack() for w in part) for part in weights)
            self.plain = PackedExperts(*plain, self.gate, *self.bias)

    def route(self, tokens, choices, none=False):
        index = torch.stack([torch.randperm(self.experts + none)[:choices] for _ in range(tokens)])
        return torch.randn(tokens, self.hidden), index, torch.rand(tokens, choices)

    def exact(self, x, index, weights):
        x, weights = x.double(), weights.double()
        y = torch.zeros_like(x)
        for t, places in enumerate(index.tolist()):
            for place, e in enumerate(places):
                if e < self.experts:
                    h = self.linear(0, e, x[t])
                    y[t] += weights[t, place] * self.linear(1, e, self.between(h))
        return y

    def linear(self, part, e, x):
        y = self.dense[part][e] @ x
        return y if self.bias[part] is None else y + self.bias[part][e].double()

    def between(self, h):
        gate = self.gate
        act = {"silu": lambda v: v / (1 + torch.exp(-v)), "relu_squared": lambda v: v.clamp(min=0) ** 2,
               "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2}[gate.activation]  # fmt: skip
        if not gate.gated:
            return act(h)
        units = len(h) // 2
        g, up = (h[0::2], h[1::2]) if gate.interleaved else (h[:units], h[units:])
        g, up = torch.minimum(g, torch.tensor(gate.limit)), up.clamp(-gate.limit, gate.limit)
        return act(gate.alpha * g) / gate.alpha * (up + gate.offset)


def error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.fixture(params=_cpu.supported_isas())
def isa(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.mark.parametrize("formats", [("codebook",), ("mixed",), ("2:4",), ("bitmap",), ("mixed", "2:4", "bitmap")])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_against_fp64(formats, dtype, isa):
    torch.manual_seed(len(formats))
    case = Case(formats)
    for tokens, choices in ((1, 2), (1, 5), (7, 3), (150, 2)):
        x, index, weights = case.route(tokens, choices, none=True)
        x = x.to(dtype)
        exact = case.exact(x, index, weights)
        assert error(routed_experts(x, index, weights, case.packed), exact) < TOLERANCE[dtype]
        if dtype == torch.float32:
            assert error(routed_experts(x, index.int(), weights.half(), case.plain), exact) < 1e-3


GATES = [
    Gate("gelu"),
    Gate("relu_squared", gated=False),
    Gate("silu", interleaved=True, limit=0.7, alpha=1.702, offset=1.0),
    Gate("silu", limit=0.4),
]


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates_and_biases(gate):
    torch.manual_seed(0)
    case = Case(("codebook", "bitmap"), gate=gate, bias=True)
    x, index, weights = case.route(9, 3)
    exact = case.exact(x, index, weights)
    for packed in (case.packed, case.plain):
        assert error(routed_experts(x, index, weights, packed), exact) < TOLERANCE[torch.float32]


def test_the_same_bits_for_any_number_of_threads_and_any_neighbours(monkeypatch):
    torch.manual_seed(1)
    case = Case(("mixed", "codebook", "2:4"), experts=17, hidden=160, units=96, bias=True)
    x, index, weights = case.route(130, 4)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found += [routed_experts(x, index, weights, case.packed) for _ in range(3)]
            found.append(torch.cat([routed_experts(*part, case.packed) for part in split(x, index, weights)]))
    finally:
        torch.set_num_threads(before)
    alone = found[3::4]
    assert all(torch.equal(found[0], other) for n, other in enumerate(found) if n % 4 != 3)
    assert all(torch.equal(alone[0], other) for other in alone)
    assert error(found[0], case.exact(x, index, weights)) < TOLERANCE[torch.float32]


def split(*tensors):
    return zip(*(each.split(1) for each in tensors), strict=True)


def test_an_expert_that_a_token_chooses_twice_and_weights_that_are_not_finite():
    torch.manual_seed(2)
    case = Case(("codebook",))
    x, index, weights = torch.randn(2, 72), torch.tensor([[3, 3], [0, 1]]), torch.tensor([[0.25, 0.5], [math.nan, 1.0]])
    y = routed_experts(x, index, weights, case.packed)
    assert error(y[:1], case.exact(x[:1], index[:1], weights[:1])) < TOLERANCE[torch.float32]
    assert bool(y[1].isnan().all())
    x[0, 5] = math.inf
    assert not bool(routed_experts(x, index, torch.ones(2, 2), case.packed)[0].isfinite().any())


def test_more_tokens_than_one_wave_of_memory_holds():
    torch.manual_seed(3)
    case = Case(("codebook",), experts=3, hidden=1024, units=512)
    x, index, weights = case.route(6000, 2)
    y = routed_experts(x, index, weights, case.packed)
    some = torch.randperm(6000)[:8]
    assert error(y[some], case.exact(x[some], index[some], weights[some])) < TOLERANCE[torch.float32]


def test_refusals():
    case = Case(("codebook",))
    x, index, weights = case.route(4, 2)
    assert routed_experts(x[:0], index[:0], weights[:0], case.packed).shape == (0, 72)
    assert not routed_experts(x, index[:, :0], weights[:, :0], case.packed).any()
    for packed in (case.packed, case.plain):
        for bad in (-1, 6):
            with pytest.raises(IndexError, match=f"a token was sent to expert {bad}; allowed: 0 to 4"):
                routed_experts(
                    x, index.fill_(0).index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(bad)), weights, packed
                )
    with pytest.raises(ValueError, match=r"it must be \[tokens, hidden\] = \[tokens, 72\]"):
        routed_experts(x[:, :-1], index, weights, case.packed)
    with pytest.raises(ValueError, match=r"top_k_weights has shape \(4, 1\)"):
        routed_experts(x, index, weights[:, :1], case.packed)
    with pytest.raises(TypeError, match="top_k_index is torch.float32"):
        routed_experts(x, index.float(), weights, case.packed)
    with pytest.raises(TypeError, match="hidden_states is torch.float64"):
        routed_experts(x.double(), index, weights, case.packed)
    other = Case(("codebook",), units=48)
    mixed = PackedExperts(case.packed.up, other.packed.down, Gate("silu"))
    with pytest.raises(ValueError, match="the Linears of expert 0 have the sizes 80, 72, 72, 48; needs 80, 72, 72, 40"):
        routed_experts(x, index, weights, mixed)


# ---- in models --------------------------------------------------------------------------------------------------------

FAMILY_GATES = {
    "Mixtral": Gate("silu"),
    "DeepseekV3": Gate("silu"),
    "GptOss": Gate("silu", interleaved=True, limit=7.0, alpha=1.702, offset=1.0),
}


@pytest.mark.transformers
@pytest.mark.parametrize("family", FAMILY_GATES)
def test_models_run_it(family, monkeypatch):
    model = make(family)
    pyllmq.compress(model, pyllmq.KMeansConfig(6), progress=False)
    layers = expert_layers(model)
    assert {gate_of(layer.dense) for layer in layers} == {FAMILY_GATES[family]}
    called = []
    monkeypatch.setattr(
        "pyllmq.experts.routed_experts", lambda *given: called.append(given[3]) or routed_experts(*given)
    )
    fast = logits(model)
    assert len(called) == len(layers) and all(packed.layouts == ("cpu.codebook",) for packed in called)
    assert logits(model).equal(fast) and called[: len(layers)] == called[len(layers) :]  # made once
    one_by_one(layers, monkeypatch)
    torch.testing.assert_close(logits(model), fast, rtol=2e-3, atol=2e-4)


def one_by_one(layers, monkeypatch):
    for layer in layers:
        monkeypatch.setattr(layer, "_packed", lambda *_: None)


@pytest.mark.transformers
@pytest.mark.parametrize("tokens", [1, 2])
def test_what_changes_is_seen(tokens):
    """One token asks the experts that it chose, more ask all."""
    model = make("GptOss")
    pyllmq.compress(model, pyllmq.KMeansConfig(6), progress=False)
    layer = expert_layers(model)[0]
    x, index, weights = torch.randn(tokens, 64), torch.tensor([[0, 2], [1, 2]])[-tokens:], torch.rand(tokens, 2)

    def run():
        with torch.no_grad():
            return layer(x, index, weights)

    before = run()
    with torch.no_grad():
        layer.expert_2_down.bias += 1
    changed = before + weights[:, 1:]
    torch.testing.assert_close(run(), changed, rtol=1e-5, atol=1e-5)
    ran = []
    handle = layer.expert_1_up.register_forward_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(run(), changed, rtol=1e-3, atol=1e-3)
    assert ran == [1]
    handle.remove()
    pyllmq.set_precision(model, "exact")
    run()
    assert layer._held[1].precision == "exact"
    other = make("GptOss")
    for each in (other,):
        torch.nn.init.normal_(each.model.layers[0].mlp.experts.down_proj)
    pyllmq.compress(other, pyllmq.KMeansConfig(6), progress=False)
    layer.load_state_dict(expert_layers(other)[0].state_dict())
    with torch.no_grad():
        torch.testing.assert_close(run(), expert_layers(other)[0](x, index, weights), rtol=1e-3, atol=1e-3)


@pytest.mark.transformers
def test_gradients_flow_to_the_hidden_states():
    model = make("Qwen3Moe")
    pyllmq.compress(model, pyllmq.KMeansConfig(6), progress=False)
    layer = expert_layers(model)[0]
    x, index, weights = torch.randn(2, 64, requires_grad=True), torch.tensor([[0, 2], [1, 2]]), torch.rand(2, 2)
    weights.requires_grad_()
    layer(x, index, weights).sum().backward()
    assert bool(x.grad.abs().sum() > 0) and bool(weights.grad.abs().sum() > 0)


@pytest.mark.transformers
def test_a_gate_that_nothing_known_computes_stays_with_the_module():
    model = make("Qwen3Moe")
    take_apart(model)
    layer = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    layer.dense.act_fn = torch.nn.Tanh()
    assert gate_of(layer.dense) is None
    assert Case(("codebook",)).plain.layouts == (f"{CHECKPOINT}.codebook",)
