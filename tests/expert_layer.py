"""Random experts packed for a GPU's back end, and the same by dense weights: what kernels of `routed_experts` are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

import pyllmq
from pyllmq.functional import routed_experts
from pyllmq.operations import Gate, PackedExperts

from .oracle import random_case
from .test_routed_experts import error

ALL_WIDTHS = tuple(range(1, 9))
PLAIN = {"outliers": 0.0}
EVERYTHING = {"outliers": 0.02, "row_scale": True, "segments": 2}
SHAPES = [
    (1, 1, PLAIN),
    (33, 17, EVERYTHING),
    (530, 65, EVERYTHING),
    (130, 700, EVERYTHING),
    (2, 300, PLAIN),
    (1700, 3, PLAIN),
]
"""(hidden, units, what the weights have): rows above a block's 512, several panels of columns, too many for shared memory."""


class Layer:
    """Experts of the given widths in turn, as the back end lays codebooks out."""

    def __init__(self, widths, backend, experts=4, hidden=72, units=40, gate=None, bias=False, device="cpu", **extra):
        self.gate, self.experts, self.hidden = gate or Gate("silu"), experts, hidden
        self.backend, self.device = backend, device
        rows = 2 * units if self.gate.gated else units
        mixes = [widths[e % len(widths)] for e in range(experts)]
        if min(rows, hidden) < extra.get("segments", 1):
            extra["segments"] = 1
        cases = [[random_case(*shape, mix, **extra) for mix in mixes] for shape in ((rows, hidden), (hidden, units))]
        self.dense = [[case.dense.to(device) for case in part] for part in cases]
        self.bias = [torch.randn(experts, n, device=device) * 0.3 for n in (rows, hidden)] if bias else [None, None]
        with pyllmq.use_backend(backend):
            up, down = (tuple(case.weight.to(device).prepack() for case in part) for part in cases)
        self.packed = PackedExperts(up, down, self.gate, *self.bias)
        assert self.packed.layouts == (f"{backend}.codebook",)

    def route(self, tokens: int, choices: int, none: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """States, index, weights; with `none`, some choices name no expert."""
        index = torch.stack([torch.randperm(self.experts + none)[:choices] for _ in range(tokens)])
        given = torch.randn(tokens, self.hidden), index, torch.rand(tokens, choices)
        return tuple(each.to(self.device) for each in given)

    def run(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        with pyllmq.use_backend(self.backend):
            return routed_experts(x, index, weights, self.packed)

    def of_torch(self, x: Tensor, index: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """What torch computes in that dtype, Linear by Linear."""
        y = torch.zeros(x.shape, dtype=dtype, device=self.device)
        for e in range(self.experts):
            token, place = torch.where(index == e)
            h = x[token].to(dtype)
            for part, between in ((0, self.gate), (1, lambda h: h)):
                bias = None if self.bias[part] is None else self.bias[part][e].to(dtype)
                h = between(torch.nn.functional.linear(h, self.dense[part][e].to(dtype), bias))
            y.index_add_(0, token, weights[token, place, None].to(dtype) * h)
        return y

    def check(self, x: Tensor, index: Tensor, weights: Tensor, dtype: torch.dtype, factor: float = 2.0) -> Tensor:
        x = x.to(dtype)
        exact = self.of_torch(x, index, weights, torch.float64)
        allowed = factor * error(self.of_torch(x, index, weights, dtype), exact) + torch.finfo(dtype).eps
        actual = self.run(x, index, weights)
        assert actual.dtype == dtype and error(actual, exact) <= allowed, (error(actual, exact), allowed)
        return actual
