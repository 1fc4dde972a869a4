"""The decode steps (csrc/decode_step) against the same steps in plain torch, in fp64; what lies behind the cache's end is NaN.

Forms: one for each sentence of the grammar that attention and MLP modules of transformers obey, named after a family that
speaks it. Sizes: heads below, at and between registers; contexts below, at and beyond a block of 64 and a part of 128 keys.
Left out: heads above 256 elements, which raise.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import pytest
import torch
from torch import Tensor

from pyllmq import BitmapWeight, Sparse24Weight, _cpu
from pyllmq.backends.cpu import runtime as cpu
from pyllmq.packing import mask_24, unstructured_mask

from .oracle import assert_as_good_as_torch, random_case, vector_isas
from .test_sparse_formats import random_codes

pytestmark = pytest.mark.kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
ISAS = vector_isas()
HIDDEN = 40


@contextmanager
def running(isa: str = "", threads: int = 0):
    before, threads_before = _cpu.isa(), _cpu.num_threads()
    try:
        _cpu.set_isa(isa or before)
        _cpu.set_num_threads(threads or threads_before)
        yield
    finally:
        _cpu.set_isa(before)
        _cpu.set_num_threads(threads_before)


# --- what both steps are made of -----------------------------------------------------------------------------------------


ORDERS = range(16)  # of summation: over so few outputs the error of one is luck: four were too few


def product(x: Tensor, y: Tensor, order: int) -> Tensor:
    """x @ y.mT, summed in one of the orders."""
    places = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(order))
    return x[..., places] @ y[..., places].mT


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, order: int) -> Tensor:
    y = product(x, weight.to(x.dtype), order)
    return y if bias is None else y + bias.to(x.dtype)


@dataclass
class Norm:
    kind: str
    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5

    @staticmethod
    def random(kind: str, size: int) -> Norm | None:
        """kind: "", "rms", "layer", or "plain", which is rms without a weight."""
        if not kind:
            return None
        if kind == "plain":
            return Norm("rms", None)
        return Norm(kind, torch.rand(size) + 0.5, torch.randn(size) if kind == "layer" else None)

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last dimensions, as many as the weight fills."""
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        for value, operation in ((self.weight, torch.mul), (self.bias, torch.add)):
            if value is not None:
                y = operation(y, value.to(x.dtype).view(-1, x.shape[-1]).squeeze(0))
        return y

    def native(self) -> _cpu.Norm:
        return _cpu.Norm(
            self.kind,
            self.eps,
            [] if self.weight is None else self.weight.tolist(),
            [] if self.bias is None else self.bias.tolist(),
        )


def native(norm: Norm | None) -> _cpu.Norm | None:
    return None if norm is None else norm.native()


def dense(weight: Tensor) -> _cpu.DenseOperand:
    return _cpu.DenseOperand(weight.data_ptr(), CODES[weight.dtype], *weight.shape)


def floats(tensor: Tensor | None) -> list[float]:
    return [] if tensor is None else tensor.tolist()


# --- attention -----------------------------------------------------------------------------------------------------------


def way_out(form: Attention | Mlp, y: Tensor, residual: Tensor | None) -> Tensor:
    """From the last Linear's output to the step's."""
    norm = form.norm_after or (lambda y: y)
    y = (y if form.norm_last else norm(y)) * form.multiplier
    y = y if residual is None else y + residual
    return norm(y) if form.norm_last else y


@dataclass
class Attention:
    """One form, and random weights for it."""

    layout: str = "apart"  # q, k and v are operands of their own; "one": rows of one; "mixed": head by head in one
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    value_size: int = 0  # 0: as head_size
    norm_kind: str = "rms"
    qk_norm: str = ""  # a kind of norm of q and k; v_norm: of v
    v_norm: str = ""
    norm_weights: str = "head"  # "head": one for all heads; "heads": of each head; "span": over all heads at once
    norms_after_rotary: bool = False
    rotary: str = "halves"
    rotary_size: int = 0  # 0: as head_size
    soft_cap: float = 0.0
    window: int = 0
    causal: bool = True
    sinks: bool = False
    bias: bool = False
    output_norm: str = ""
    norm_last: bool = False  # of the sum with the residual
    multiplier: float = 1.0
    residual: bool = True
    scale: float = 0.3
    weights: list[Tensor] = field(init=False)

    def __post_init__(self):
        self.value_size = self.value_size or self.head_size
        self.rotary_size = (self.rotary_size or self.head_size) if self.rotary != "none" else 0
        d, v, h, g = self.head_size, self.value_size, self.heads, self.kv_heads
        self.weights = [torch.randn(rows, HIDDEN) / math.sqrt(HIDDEN) for rows in (h * d, g * d, g * v)]
        self.out = torch.randn(HIDDEN, h * v) / math.sqrt(h * v)
        self.biases = [torch.randn(w.shape[0]) if self.bias else None for w in self.weights]
        self.out_bias = torch.randn(HIDDEN) if self.bias else None
        self.norm = Norm.random(self.norm_kind, HIDDEN)
        self.norm_after = Norm.random(self.output_norm, HIDDEN)
        count = (lambda heads: 1) if self.norm_weights == "head" else (lambda heads: heads)
        self.head_norms = [
            Norm.random(kind, count(heads) * size)
            for kind, heads, size in ((self.qk_norm, h, d), (self.qk_norm, g, d), (self.v_norm, g, v))
        ]
        self.sink = torch.randn(h) if self.sinks else None

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, queries, heads, size], cos and sin [batch, queries, 1, pairs]."""
        turned, rest = x[..., : self.rotary_size], x[..., self.rotary_size :]
        if self.rotary == "halves":
            p, q = turned.chunk(2, -1)
            turned = torch.cat((p * cos - q * sin, q * cos + p * sin), -1)
        else:
            p, q = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack((p * cos - q * sin, q * cos + p * sin), -1).flatten(-2)
        return torch.cat((turned, rest), -1)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, order: int = 0) -> list[Tensor]:
        """q, k, v [batch, heads, queries, size]."""
        h = x if self.norm is None else self.norm(x)
        found = []
        for weight, bias, norm, heads, is_value in zip(
            self.weights,
            self.biases,
            self.head_norms,
            (self.heads, self.kv_heads, self.kv_heads),
            (0, 0, 1),
            strict=True,
        ):
            y = linear(h, weight, bias, order)
            split = (heads, y.shape[-1] // heads)

            def normed(y, norm=norm, split=split):
                if norm is None:
                    return y
                return norm(y.flatten(-2)).unflatten(-1, split) if self.norm_weights == "span" else norm(y)

            y = y.unflatten(-1, split)
            y = y if self.norms_after_rotary else normed(y)
            if self.rotary != "none" and not is_value:
                y = self.rotate(y, cos.to(y.dtype)[:, :, None], sin.to(y.dtype)[:, :, None])
            y = normed(y) if self.norms_after_rotary else y
            found.append(y.transpose(1, 2))
        return found

    def sight(self, batch: int, queries: int, length: int, starts: list[int]) -> Tensor:
        """0 where a query sees a key, else -inf; fp64 [batch, queries, length]."""
        key = torch.arange(length)
        position = torch.arange(length - queries, length)[:, None]
        seen = (key <= position) if self.causal else torch.ones(queries, length, dtype=torch.bool)
        if self.window:
            seen = seen & (key > position - self.window)
        seen = seen & (key >= torch.tensor(starts or [0] * batch)[:, None, None])
        return torch.where(seen, 0.0, -math.inf).double()

    def finish(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, residual, order=0) -> Tensor:
        """keys, values: what the cache holds; mask [batch, queries, length]."""
        group = self.heads // self.kv_heads
        keys, values = (t.to(x.dtype).repeat_interleave(group, 1) for t in (keys, values))
        scores = product(q, keys, order) * self.scale
        if self.soft_cap:
            scores = torch.tanh(scores / self.soft_cap) * self.soft_cap
        scores = scores + mask[:, None].to(x.dtype)
        if self.sink is not None:
            sink = self.sink.to(x.dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), -1)
        # rows without any key get 0
        weights = torch.softmax(scores, -1).nan_to_num(nan=0.0)[..., : keys.shape[-2]]
        context = (weights @ values).transpose(1, 2).flatten(-2)
        y = linear(context, self.out, self.out_bias, order)
        return way_out(self, y, residual)

    def native(self, **changed) -> _cpu.AttentionStep:
        d, v, h, g = self.head_size, self.value_size, self.heads, self.kv_heads
        if self.layout == "apart":
            matrices, rows = self.weights, ((0, 0, d), (1, 0, d), (2, 0, v))
            bias = self.biases
        elif self.layout == "one":
            matrices, rows = [torch.cat(self.weights)], ((0, 0, d), (0, h * d, d), (0, (h + g) * d, v))
            bias = self.biases
        else:  # for each head its q, then its k, then its v
            assert h == g
            shapes = ((h, d), (h, d), (h, v))

            def mix(parts):
                return torch.cat([p.view(*shape, -1) for p, shape in zip(parts, shapes, strict=True)], 1).flatten(0, 1)

            matrices, stride = [mix(self.weights)], 2 * d + v
            rows = ((0, 0, stride), (0, d, stride), (0, 2 * d, stride))
            bias = [mix(self.biases).flatten()] if self.bias else self.biases
        self.alive = matrices  # the operands read them in place
        given = {
            "inputs": tuple(dense(m) for m in matrices),
            "input_bias": [] if bias[0] is None else torch.cat(bias).tolist(),
            "q_rows": rows[0],
            "k_rows": rows[1],
            "v_rows": rows[2],
            "heads": h,
            "kv_heads": g,
            "head_size": d,
            "value_size": v,
            "scale": self.scale,
            "output": dense(self.out),
            "norm": native(self.norm),
            "q_norm": native(self.head_norms[0]),
            "k_norm": native(self.head_norms[1]),
            "v_norm": native(self.head_norms[2]),
            "norms_span_heads": self.norm_weights == "span",
            "norms_after_rotary": self.norms_after_rotary,
            "rotary": self.rotary,
            "rotary_size": self.rotary_size,
            "soft_cap": self.soft_cap,
            "window": self.window,
            "causal": self.causal,
            "sinks": floats(self.sink),
            "output_bias": floats(self.out_bias),
            "output_norm": native(self.norm_after),
            "multiplier": self.multiplier,
            "norm_last": self.norm_last,
            "precision": 0,
        }
        return _cpu.AttentionStep(**{**given, **changed})


@dataclass
class Cache:
    keys: Tensor  # [batch, kv_heads, capacity, size]
    values: Tensor

    @staticmethod
    def random(
        form: Attention, batch: int, past: int, capacity: int, dtype: torch.dtype, positions_first=False
    ) -> Cache:
        """NaN from `past` on. positions_first: laid out as [batch, position, head, size]."""

        def make(size):
            shape = (batch, form.kv_heads, capacity, size)
            t = torch.randn(shape).to(dtype)
            t[:, :, past:] = math.nan
            return t.transpose(1, 2).contiguous().transpose(1, 2) if positions_first else t

        return Cache(make(form.head_size), make(form.value_size))

    def native(self) -> _cpu.KeyValueCache:
        batch, kv_heads, capacity, size = self.keys.shape
        return _cpu.KeyValueCache(
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            dtype=CODES[self.keys.dtype],
            batch=batch,
            kv_heads=kv_heads,
            capacity=capacity,
            head_size=size,
            value_size=self.values.shape[-1],
            key_strides=self.keys.stride()[:3],
            value_strides=self.values.stride()[:3],
        )


@dataclass
class Call:
    """Inputs of one attention step."""

    form: Attention
    batch: int = 1
    queries: int = 1
    past: int = 5
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    starts: list[int] = field(default_factory=list)
    masked: bool = False
    positions_first: bool = False

    def __post_init__(self):
        form, tokens = self.form, (self.batch, self.queries)
        self.x = torch.randn(*tokens, HIDDEN).to(self.dtype)
        self.residual = torch.randn(*tokens, HIDDEN).to(self.dtype) if form.residual else None
        angle = torch.rand(*tokens, max(form.rotary_size // 2, 1)) * 6
        self.cos, self.sin = angle.cos(), angle.sin()
        self.cache = Cache.random(
            form, self.batch, self.past, self.past + self.queries + 3, self.cache_dtype, self.positions_first
        )
        self.length = self.past + self.queries
        # an explicit mask hides a third, of one sequence everything
        self.mask = torch.randn(*tokens, self.length).masked_fill(torch.rand(*tokens, self.length) < 0.3, -math.inf)
        self.mask[-1, -1] = -math.inf

    def tokens(self, **changed) -> _cpu.StepTokens:
        given = {
            "batch": self.batch,
            "queries": self.queries,
            "dtype": CODES[self.dtype],
            "cos": self.cos.data_ptr(),
            "sin": self.sin.data_ptr(),
            "starts": self.starts,
            "mask": self.mask.data_ptr() if self.masked else 0,
            "mask_strides": self.mask.stride()[:2],
        }
        return _cpu.StepTokens(**{**given, **changed})

    def run(self, step: _cpu.AttentionStep | None = None) -> Tensor:
        y = torch.empty_like(self.x)
        step = step or self.form.native()
        residual = 0 if self.residual is None else self.residual.data_ptr()
        step(self.x.data_ptr(), y.data_ptr(), self.tokens(), self.cache.native(), self.past, residual)
        return y

    def reference(self, dtype: torch.dtype, order: int = 0) -> Tensor:
        """With the cache as it is now, new positions included."""
        x = self.x.to(dtype)
        q, _, _ = self.form.project(x, self.cos, self.sin, order)
        keys, values = (t[:, :, : self.length] for t in (self.cache.keys, self.cache.values))
        mask = self.mask if self.masked else self.form.sight(self.batch, self.queries, self.length, self.starts)
        residual = None if self.residual is None else self.residual.to(dtype)
        return self.form.finish(x, q, keys, values, mask, residual, order)

    def check(self, y: Tensor) -> None:
        """The cache and the result."""
        _, *exact = self.form.project(self.x.double(), self.cos, self.sin)
        torchs = [self.form.project(self.x, self.cos, self.sin, order)[1:] for order in ORDERS]
        for i, cached in enumerate((self.cache.keys, self.cache.values)):
            written = cached[:, :, self.past : self.length]
            # One token is a few dozen sums: torch's orders may all be lucky.
            assert_as_good_as_torch(written, exact[i], *(f[i].to(written.dtype) for f in torchs), roundings=2)
            assert bool(cached[:, :, self.length :].isnan().all()), "the step wrote behind its positions"
        self.check_result(y)

    def check_result(self, y: Tensor) -> None:
        # A softmax makes one lucky row count: of 1200 results 4 were beyond twice torch's error, on any instruction set. So one
        # result may have three times, and test_the_usual_error_is_not_above_torchs looks at many.
        torchs = (self.reference(self.dtype, i) for i in ORDERS)
        assert_as_good_as_torch(y, self.reference(torch.float64), *torchs, factor=3)


FORMS = {
    "llama": {},
    "qwen2": {"bias": True, "layout": "one"},
    "qwen3": {"qk_norm": "rms", "layout": "one"},
    "gemma2": {"soft_cap": 2.0, "output_norm": "rms", "window": 70},
    "gemma3": {"qk_norm": "rms", "output_norm": "rms", "head_size": 24, "window": 7},
    "gemma3n": {"qk_norm": "rms", "v_norm": "plain"},
    "phi3": {"layout": "one", "head_size": 20, "window": 130},
    "granite": {"multiplier": 0.22, "scale": 0.07},
    "glm4": {"rotary": "interleaved", "rotary_size": 8, "output_norm": "rms", "bias": True},
    "olmo2": {"norm_kind": "", "qk_norm": "rms", "norm_weights": "span", "output_norm": "rms"},
    "cohere": {
        "norm_kind": "layer",
        "rotary": "interleaved",
        "qk_norm": "layer",
        "norm_weights": "heads",
        "residual": False,
    },
    "hunyuan": {"qk_norm": "rms", "norms_after_rotary": True},
    "llama4": {"qk_norm": "plain", "norms_after_rotary": True},
    "smollm3": {"rotary": "none"},
    "gpt_oss": {"sinks": True, "window": 33, "bias": True, "heads": 16},
    "gpt_neox": {"layout": "mixed", "kv_heads": 4, "rotary_size": 4, "norm_kind": "layer", "bias": True},
    "gpt2": {"layout": "one", "kv_heads": 4, "rotary": "none", "norm_kind": "layer", "bias": True},
    "bert": {
        "causal": False,
        "kv_heads": 4,
        "rotary": "none",
        "norm_kind": "",
        "output_norm": "layer",
        "bias": True,
        "norm_last": True,
    },
    "no sum": {"output_norm": "rms", "norm_last": True, "residual": False},
    "one head of keys": {"heads": 11, "kv_heads": 1, "head_size": 9, "value_size": 5, "rotary_size": 6},
    "wide heads": {"heads": 2, "kv_heads": 2, "head_size": 192, "value_size": 128, "rotary_size": 64},
    "widest heads": {"heads": 3, "kv_heads": 1, "head_size": 256},
}
SIZES = {  # batch, queries, past
    "first token": {"past": 0},
    "one token": {"past": 130},
    "beyond two parts": {"past": 300},
    "speculated": {"queries": 5, "past": 126},
    "batch": {"batch": 3, "queries": 1, "past": 64},
    "both": {"batch": 2, "queries": 8, "past": 61},
    "prompt": {"queries": 37, "past": 0},
    "more of a prompt": {"batch": 2, "queries": 75, "past": 70},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_attention_step(form, size):
    call = Call(Attention(**FORMS[form]), **SIZES[size])
    call.check(call.run())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_step_of_each_dtype(isa, dtype, cache_dtype):
    for form in ("qwen2", "gemma2", "one head of keys"):
        call = Call(Attention(**FORMS[form]), batch=2, queries=2, past=131, dtype=dtype, cache_dtype=cache_dtype)
        with running(isa):
            call.check(call.run())


@pytest.mark.parametrize("form", ["llama", "gemma3", "gpt_oss", "bert"])
def test_left_padding(form):
    call = Call(Attention(**FORMS[form]), batch=3, queries=2, past=150, starts=[0, 149, 37])
    call.check(call.run())


@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_are_padding_are_never_read(masked):
    """One query: not even as a product with 0."""
    call = Call(Attention(), batch=2, past=150, starts=[140, 3], masked=masked)
    call.mask = call.form.sight(2, 1, 151, call.starts).float()
    for sequence, start in enumerate(call.starts):
        for cached in (call.cache.keys, call.cache.values):
            cached[sequence, :, :start] = math.nan
    y = call.run()
    for cached in (call.cache.keys, call.cache.values):
        cached.masked_fill_(cached.isnan(), 0.0)
    call.check_result(y)


@pytest.mark.parametrize("form", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_alone_says_who_sees_what(form):
    call = Call(Attention(**FORMS[form]), batch=2, queries=3, past=140, starts=[7, 70], masked=True)
    call.check(call.run())


def test_a_mask_may_be_shared_by_the_batch():
    call = Call(Attention(), batch=2, queries=3, past=70, masked=True)
    call.mask = call.mask[:1].expand(2, -1, -1)
    call.check(call.run())


def test_a_query_that_sees_nothing_gets_zero():
    assert not Call(Attention(residual=False), masked=True).run().any()
    assert not Call(Attention(residual=False), past=127, starts=[128]).run().any()


def test_many_heads_and_sequences_share_longer_parts():
    call = Call(Attention(heads=16, kv_heads=16, head_size=8), batch=8, past=1100, starts=[0, 300] * 4)
    call.check(call.run())


def test_a_cache_of_other_strides():
    call = Call(Attention(**FORMS["qwen3"]), batch=2, queries=2, past=80, positions_first=True)
    call.check(call.run())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["llama", "gemma2", "gpt_neox"])
def test_the_usual_error_is_not_above_torchs(form, isa):
    ours, torchs = [], []
    with running(isa):
        for _ in range(32):
            call = Call(Attention(**FORMS[form]), past=70)
            y, exact = call.run(), call.reference(torch.float64)
            for errors, result in ((ours, y), (torchs, call.reference(torch.float32))):
                errors.append(float((result.double() - exact).norm() / exact.norm()))
    assert median(ours) <= 1.5 * median(torchs), (median(ours), median(torchs))


def test_extreme_scores():
    """Differences beyond the range of exp, and a largest score in the last part."""
    call = Call(Attention(scale=40.0), past=200)
    call.check(call.run())


def test_nan_stays_nan():
    call = Call(Attention(residual=False), past=200)
    call.cache.keys[0, 0, 7, 3] = math.nan
    assert bool(call.run().isnan().all())


@pytest.mark.parametrize("form", ["llama", "gemma2", "one head of keys"])
def test_any_number_of_threads_gives_the_same_bits(form):
    call = Call(Attention(**FORMS[form]), batch=2, queries=3, past=700)
    results = []
    for threads in (1, 2, 3):
        with running(threads=threads):
            results.append(call.run())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_y_may_be_x_and_the_residual():
    call = Call(Attention(**FORMS["gemma2"]), batch=2, queries=2)
    step, expected = call.form.native(), call.run()
    for target in (call.residual, call.x):
        x, residual = call.x.clone(), call.residual.clone()
        y = x if target is call.x else residual
        step(x.data_ptr(), y.data_ptr(), call.tokens(), call.cache.native(), call.past, residual.data_ptr())
        assert torch.equal(y, expected)


def test_token_by_token_is_as_all_at_once():
    form = Attention(**FORMS["gemma3"])
    whole = Call(form, queries=8, past=0)
    expected = whole.run()
    step, cache = form.native(), Cache.random(form, 1, 0, 11, torch.float32)
    for t in range(8):
        x, residual, cos, sin = (a[:, t].contiguous() for a in (whole.x, whole.residual, whole.cos, whole.sin))
        y = torch.empty_like(x)
        tokens = whole.tokens(queries=1, cos=cos.data_ptr(), sin=sin.data_ptr())
        step(x.data_ptr(), y.data_ptr(), tokens, cache.native(), t, residual.data_ptr())
        torch.testing.assert_close(y, expected[:, t], rtol=1e-5, atol=1e-6)


# --- MLP -----------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
}


@dataclass
class Mlp:
    """One form, and random weights for it."""

    layout: str = (
        "apart"  # gate and up are operands of their own; "stacked", "interleaved": rows of one; "plain": no up
    )
    units: int = 53
    activation: str = "silu"
    norm_kind: str = "rms"
    bias: bool = False
    output_norm: str = ""
    norm_last: bool = False  # of the sum with the residual
    multiplier: float = 1.0
    residual: bool = True

    def __post_init__(self):
        count = 1 if self.layout == "plain" else 2
        self.weights = [torch.randn(self.units, HIDDEN) / 4 for _ in range(count)]
        self.biases = [torch.randn(self.units) if self.bias else None for _ in range(count)]
        self.down = torch.randn(HIDDEN, self.units) / math.sqrt(self.units)
        self.down_bias = torch.randn(HIDDEN) if self.bias else None
        self.norm = Norm.random(self.norm_kind, HIDDEN)
        self.norm_after = Norm.random(self.output_norm, HIDDEN)

    def reference(self, x: Tensor, residual: Tensor | None, order: int = 0) -> Tensor:
        h = x if self.norm is None else self.norm(x)
        gate, *up = (linear(h, w, b, order) for w, b in zip(self.weights, self.biases, strict=True))
        a = ACTIVATIONS[self.activation](gate)
        y = linear(a * up[0] if up else a, self.down, self.down_bias, order)
        return way_out(self, y, residual)

    def native(self, **changed) -> _cpu.MlpStep:
        n = self.units
        matrices, biases = self.weights, self.biases
        rows = {
            "apart": ((0, 0, 1), (1, 0, 1)),
            "stacked": ((0, 0, 1), (0, n, 1)),
            "interleaved": ((0, 0, 2), (0, 1, 2)),
            "plain": ((0, 0, 1), None),
        }[self.layout]
        if self.layout == "stacked":
            matrices = [torch.cat(matrices)]
        elif self.layout == "interleaved":
            matrices = [torch.stack(matrices, 1).flatten(0, 1)]
            biases = [torch.stack(biases, 1).flatten()] if self.bias else biases
        self.alive = matrices
        given = {
            "inputs": tuple(dense(m) for m in matrices),
            "input_bias": torch.cat(biases).tolist() if self.bias else [],
            "units": n,
            "gate_rows": rows[0],
            "up_rows": rows[1],
            "activation": self.activation,
            "output": dense(self.down),
            "norm": native(self.norm),
            "output_bias": floats(self.down_bias),
            "output_norm": native(self.norm_after),
            "multiplier": self.multiplier,
            "norm_last": self.norm_last,
            "precision": 0,
        }
        return _cpu.MlpStep(**{**given, **changed})


def run_mlp(step: _cpu.MlpStep, x: Tensor, residual: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    tokens = _cpu.StepTokens(batch=x.shape[0], queries=x.shape[1], dtype=CODES[x.dtype])
    step(x.data_ptr(), y.data_ptr(), tokens, 0 if residual is None else residual.data_ptr())
    return y


MLP_FORMS = {
    "llama": {},
    "phi3": {"layout": "stacked"},
    "gpt_oss": {"layout": "interleaved", "bias": True},
    "gemma2": {"activation": "gelu_tanh", "output_norm": "rms"},
    "bert": {
        "layout": "plain",
        "activation": "gelu",
        "bias": True,
        "norm_kind": "",
        "output_norm": "layer",
        "norm_last": True,
    },
    "gpt2": {"layout": "plain", "activation": "gelu_tanh", "bias": True, "norm_kind": "layer"},
    "opt": {"layout": "plain", "activation": "relu", "bias": True, "norm_kind": "layer"},
    "nemotron": {"layout": "plain", "activation": "relu_squared", "norm_kind": "layer"},
    "granite": {"multiplier": 0.22, "units": 64},
    "cohere": {"norm_kind": "", "residual": False, "units": 1},
    "olmo": {"activation": "gelu", "units": 1000},
}


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (8, 8)], ids=str)
@pytest.mark.parametrize("form", MLP_FORMS)
def test_mlp_step(form, shape):
    mlp = Mlp(**MLP_FORMS[form])
    x = torch.randn(*shape, HIDDEN)
    residual = torch.randn_like(x) if mlp.residual else None
    y = run_mlp(mlp.native(), x, residual)
    exact = mlp.reference(x.double(), None if residual is None else residual.double())
    assert_as_good_as_torch(y, exact, *(mlp.reference(x, residual, i) for i in ORDERS))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp_step_of_each_dtype(isa, dtype):
    for form in ("llama", "gpt_oss", "bert"):
        mlp = Mlp(**MLP_FORMS[form])
        x, residual = (torch.randn(2, 3, HIDDEN).to(dtype) for _ in range(2))
        with running(isa):
            y = run_mlp(mlp.native(), x, residual)
        torchs = (mlp.reference(x, residual, i) for i in ORDERS)
        assert_as_good_as_torch(y, mlp.reference(x.double(), residual.double()), *torchs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_to_units_in_the_last_place(isa, activation):
    """Through weights that change nothing, over the whole range, relative to each result."""
    count = 4096
    values = torch.cat((torch.linspace(-12, 12, count - 40), torch.logspace(-20, 1.9, 20), -torch.logspace(-20, 0, 20)))
    weight, one = torch.ones(count, 1), torch.eye(count)
    step = _cpu.MlpStep(
        inputs=(dense(weight),),
        input_bias=values.tolist(),
        units=count,
        gate_rows=(0, 0, 1),
        activation=activation,
        output=dense(one),
    )
    x, y = torch.zeros(1), torch.empty(count)
    with running(isa):
        step(x.data_ptr(), y.data_ptr(), _cpu.StepTokens(batch=1, queries=1, dtype=0))
    v = values.double()
    exact = ACTIVATIONS[activation](v)
    if activation == "gelu":  # torch's own 1 + erf(x) loses all digits for negative x
        exact = v * torch.special.erfc(-v / math.sqrt(2)) / 2
    elif activation == "gelu_tanh":
        exact = v * torch.sigmoid(math.sqrt(8 / math.pi) * (v + 0.044715 * v**3))
    error = ((y.double() - exact) / exact).abs().masked_fill(exact == 0, 0.0)
    # the exponent of gelu_tanh, 1.6 x + 0.0714 x^3, is rounded three times, by half a unit each
    exponent = 1.6 * v.abs() + 0.0714 * v.abs() ** 3 if activation == "gelu_tanh" else 0 * v
    allowed = torch.finfo(torch.float32).eps * (3 + 1.5 * exponent)
    tiny = exact.abs() < 1e-36  # exp(-87), the smallest that is not 0, times x
    assert bool((error <= allowed)[~tiny].all()), float((error / allowed)[~tiny].max())
    assert bool((y.abs() < 1.1e-36)[tiny].all())


def test_mlp_bits_do_not_depend_on_threads():
    mlp = Mlp(units=3000)
    step, x = mlp.native(), torch.randn(2, 4, HIDDEN)
    results = []
    for threads in (1, 2, 3):
        with running(threads=threads):
            results.append(run_mlp(step, x, x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- weights -------------------------------------------------------------------------------------------------------------


def packed(kind: str, rows: int, columns: int) -> tuple[object, Tensor, Tensor]:
    """(operand object, the matrix that it stands for, fp32 and exact, the memory that the object reads)."""
    if kind == "codebook":
        case = random_case(rows, columns, (2, 3, 4, 8), segments=2, outliers=0.01)
        operand = case.weight.operand()
        return cpu.bound(operand), case.dense.float(), operand.tensors[0]
    weight = torch.randn(rows, columns).bfloat16()
    if kind == "bitmap":
        mask = unstructured_mask(weight, 0.5)
        weight, dense = BitmapWeight.pack(weight, mask, torch.bfloat16), weight.float() * mask
    elif kind == "sparse24":
        mask = mask_24(weight)
        weight, dense = Sparse24Weight.pack(weight, mask, torch.bfloat16), weight.float() * mask
    else:
        weight, dense = random_codes(rows, columns, 3)
    operand = weight.operand()
    return cpu.bound(operand), dense.float(), operand.tensors[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["codebook", "bitmap", "sparse24", "sparse24_codebook"])
def test_packed_weights_and_dense_siblings(kind, isa):
    """One operand packed, one dense, in both steps; precision "exact"."""
    with running(isa):
        form = Attention(bias=True, head_size=32)
        first, form.weights[0], _first = packed(kind, *form.weights[0].shape)
        out, form.out, _out = packed(kind, *form.out.shape)
        step = form.native(inputs=(first, *(dense(w) for w in form.weights[1:])), output=out)
        call = Call(form, batch=2, queries=2, past=70)
        call.check(call.run(step))

        mlp = Mlp(bias=True, units=52)
        up, mlp.weights[1], _up = packed(kind, *mlp.weights[1].shape)
        down, mlp.down, _down = packed(kind, *mlp.down.shape)
        step = mlp.native(inputs=(dense(mlp.weights[0]), up), output=down)
        x = torch.randn(2, 2, HIDDEN)
        exact = mlp.reference(x.double(), x.double())
        assert_as_good_as_torch(run_mlp(step, x, x), exact, *(mlp.reference(x, x, i) for i in ORDERS))


def test_precision_may_be_set_later():
    form = Attention(residual=False)
    operands = [packed("codebook", *w.shape) for w in form.weights]
    form.weights = [w for _, w, _ in operands]
    step = form.native(inputs=tuple(operand for operand, _, _ in operands))
    call = Call(form)
    exact, errors = call.run(step), []
    reference = call.reference(torch.float64)
    for precision in (0, 1, 2):
        step.precision = precision
        assert step.precision == precision
        errors.append(float((call.run(step).double() - reference).norm() / reference.norm()))
    step.precision = 0
    assert torch.equal(call.run(step), exact)
    assert errors[0] < 1e-6 and 10 * errors[0] < errors[1] < 3e-3 and errors[2] < 3e-2
    with pytest.raises(ValueError, match="precision 3; allowed"):
        step.precision = 3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_operand(dtype, x_dtype, isa):
    with running(isa):
        for rows, columns, tokens in ((1, 1, 1), (5, 7, 3), (67, 1030, 1), (16, 512, 8), (33, 515, 19), (4, 9, 0)):
            weight, x = torch.randn(rows, columns).to(dtype), torch.randn(tokens, columns).to(x_dtype)
            bias, y = torch.randn(rows).to(dtype), torch.empty(tokens, rows, dtype=x_dtype)
            arguments = (CODES[x_dtype], tokens, bias.data_ptr(), CODES[dtype], y.data_ptr(), 0)
            dense(weight).linear(x.data_ptr(), *arguments)
            exact = linear(x.double(), weight, bias, 0)
            assert_as_good_as_torch(y, exact, *(linear(x.float(), weight, bias, i).to(x_dtype) for i in ORDERS))


# --- threads -------------------------------------------------------------------------------------------------------------


def test_threads_stay_awake_within_a_token_and_sleep_afterwards():
    mlp, x = Mlp(units=3000), torch.randn(1, 1, HIDDEN)
    step = mlp.native()
    with running(threads=2):
        run_mlp(step, x, None)  # starts the thread
        before, _ = _cpu.worker_sleep()
        long_gaps, end = 0, time.monotonic()
        for _ in range(40):
            time.sleep(0.0004)  # beyond the 150 us after which an idle thread sleeps
            long_gaps += time.monotonic() - end > 0.002
            run_mlp(step, x, None)
            end = time.monotonic()
        wakeups, _ = _cpu.worker_sleep()
        assert wakeups - before <= long_gaps + 1
        patience = time.monotonic() + 60
        while _cpu.worker_sleep()[1] < 1:
            assert time.monotonic() < patience, "the thread spins on"
            time.sleep(0.001)


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"heads": 3}, "heads and kv_heads are 3, 2; heads must be a multiple"),
        ({"kv_heads": 0}, "heads and kv_heads are 4, 0"),
        ({"head_size": 257}, "a head has 257 elements; allowed: 1..256"),
        ({"q_rows": (3, 0, 16)}, "q_rows are of operand 3 of 3"),
        ({"k_rows": (1, 1, 16)}, "k_rows begin at 1, 2 times 16 rows that are 16 apart; the operand has 32 rows"),
        ({"v_rows": (2, 0, 15)}, "v_rows begin at 0"),
        ({"inputs": ()}, "there is no input Linear"),
        ({"input_bias": [1.0]}, "input_bias has 1 elements; the input Linears have 128 rows"),
        ({"output_bias": [1.0]}, "output_bias has 1 elements; the output Linear has 40 rows"),
        ({"sinks": [1.0]}, "sinks has 1 elements; there are 4 heads"),
        ({"norm": _cpu.Norm("rms", 1e-5, [1.0])}, "norm has a weight of 1 elements; allowed: none or 40"),
        ({"q_norm": _cpu.Norm("rms", 1e-5, [1.0] * 8)}, "q_norm has a weight of 8 elements; allowed: none or 16, 64"),
        ({"rotary": "twisted"}, "rotary 'twisted' is not known; allowed: none, halves, interleaved"),
        ({"rotary_size": 7}, "rotary_size = 7; allowed: even numbers up to the head size 16"),
        ({"rotary_size": 18}, "rotary_size = 18"),
        ({"window": -1}, "window = -1"),
        ({"window": 3, "causal": False}, "window = 3"),
        ({"soft_cap": -1.0}, "soft_cap must be > 0"),
        ({"precision": 7}, "precision 7; allowed"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Attention().native(**changed)


def test_a_run_takes_a_cache_for_each_block():
    tokens = _cpu.StepTokens(batch=1, queries=1, dtype=0)
    with pytest.raises(ValueError, match="there are 0 blocks, 0 caches and 1 pasts"):
        _cpu.BlockRun([])(0, 0, 0, tokens, (), (7,))


def test_arguments_that_are_missing_or_unknown():
    with pytest.raises(TypeError, match="unknown keyword argument 'slope'"):
        Attention().native(slope=1.0)
    with pytest.raises(TypeError, match="missing keyword argument 'inputs'"):
        _cpu.AttentionStep()
    with pytest.raises(TypeError, match="'heads' is of another type"):
        Attention().native(heads="four")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"units": 54}, "gate_rows begin at 0, 54 times 1 rows that are 1 apart; the operand has 53 rows"),
        ({"units": 0}, "units = 0; must be > 0"),
        ({"units": 52}, "the output Linear reads 53 columns, but is given 52"),
        ({"up_rows": (1, 1, 1)}, "up_rows begin at 1"),
        ({"activation": "mish"}, "activation 'mish' is not known; allowed: silu, gelu"),
    ],
)
def test_mlp_sizes_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Mlp().native(**changed)


def test_calls_that_do_not_fit_are_refused():
    call = Call(Attention(), queries=2)
    step, x = call.form.native(), call.x.data_ptr()
    cache, tokens = call.cache.native(), call.tokens()
    other = Call(Attention(head_size=8)).cache.native()
    for arguments, message in (
        ((x, x, tokens, cache, 9), "past = 9 and 2 queries; the cache has room for 10 positions"),
        ((x, x, tokens, cache, -1), "past = -1"),
        ((x, x, tokens, other, 0), "of the cache are 1, 2, 8, 8; needed: 1, 2, 16, 16"),
        ((x, x, call.tokens(batch=2), cache, 0), "needed: 2, 2, 16, 16"),
        ((x, x, call.tokens(cos=0), cache, 0), "it needs cos and sin"),
        ((x, x, call.tokens(starts=[0, 0]), cache, 0), "starts has 2 elements; the batch is 1"),
        ((x, x, call.tokens(starts=[3]), cache, 0), "a sequence starts at 3; allowed: 0..2"),
        ((0, x, tokens, cache, 0), "x and y must not be null"),
        ((x, x, call.tokens(queries=0), cache, 0), "there are 0 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            step(*arguments)
    with pytest.raises(ValueError, match="dtype code 5; allowed"):
        call.tokens(dtype=5)
    with pytest.raises(ValueError, match="norm 'batch' is not known"):
        _cpu.Norm("batch", 1e-5)
