"""Random experts packed for a GPU's back end, and the same by dense weights: what kernels of `routed_experts` are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

import pyllmq
from pyllmq.functional import routed_experts
from pyllmq.operations import Gate, PackedExperts

from .oracle import random_case
from .test_routed_experts import error
from .test_sparse_formats import random_codes
from .test_sparse_linear import bitmap, dense_of, sparse24

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


HALF, BRAIN = torch.float16, torch.bfloat16
SPARSE_KINDS = {
    "2:4 fp16": lambda n, k: sparse24(n, k, HALF),
    "2:4 bf16": lambda n, k: sparse24(n, k, BRAIN),
    "2:4 fp32": lambda n, k: sparse24(n, k, torch.float32),
    "2:4 int8": lambda n, k: sparse24(n, k, torch.int8),
    "2 bits": lambda n, k: random_codes(n, k, 2)[0],
    "3 bits": lambda n, k: random_codes(n, k, 3, 0.05)[0],
    "4 bits": lambda n, k: random_codes(n, k, 4, 0.05)[0],
    "bitmap fp16": lambda n, k: bitmap(n, k, 0.5, HALF),
    "bitmap bf16": lambda n, k: bitmap(n, k, 0.6, BRAIN),
    "bitmap fp32": lambda n, k: bitmap(n, k, 0.5, torch.float32),
    "bitmap int8": lambda n, k: bitmap(n, k, 0.3, torch.int8),
    "few fp16": lambda n, k: bitmap(n, k, 0.9, HALF),
    "few int8": lambda n, k: bitmap(n, k, 0.97, torch.int8),
}
"""By name: a random weight [n, k]."""


def drawn(mix, n, k, **extra):
    """(weight, the fp64 matrix that it stands for)."""
    if isinstance(mix, str):
        weight = SPARSE_KINDS[mix](n, k)
        return weight, dense_of(weight)
    case = random_case(n, k, mix, **extra)
    return case.weight, case.dense


class Layer:
    """Experts of the given mixes in turn, widths of a codebook or a name of SPARSE_KINDS, as the back end lays them out."""

    def __init__(self, mixes, backend, experts=4, hidden=72, units=40, gate=None, bias=False, device="cpu", **extra):
        self.gate, self.experts, self.hidden = gate or Gate("silu"), experts, hidden
        self.backend, self.device = backend, device
        rows = 2 * units if self.gate.gated else units
        mixes = [mixes[e % len(mixes)] for e in range(experts)]
        if min(rows, hidden) < extra.get("segments", 1):
            extra["segments"] = 1
        cases = [[drawn(mix, *shape, **extra) for mix in mixes] for shape in ((rows, hidden), (hidden, units))]
        self.dense = [[dense.to(device) for _, dense in part] for part in cases]
        self.bias = [torch.randn(experts, n, device=device) * 0.3 for n in (rows, hidden)] if bias else [None, None]
        with pyllmq.use_backend(backend):
            up, down = (tuple(weight.to(device).prepack() for weight, _ in part) for part in cases)
        self.packed = PackedExperts(up, down, self.gate, *self.bias)
        assert all(layout.startswith(f"{backend}.") for layout in self.packed.layouts)

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
