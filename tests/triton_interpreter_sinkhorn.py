"""The Triton sinkhorn in Triton's interpreter, on a CPU. tests/test_triton_sinkhorn.py runs this file with TRITON_INTERPRET=1.

Sizes are odd, below and at powers of two, one row and one column; gradients from 65 entries on, since below a CPU keeps no tape.
"""

import math

import pytest
import torch

import pyllmq
from pyllmq import sinkhorn

from .oracle import assert_as_good_as_torch
from .test_sinkhorn import exact_gradients, gradients, log_loop, loops_in_orders, marginal

SHAPES = [(1, 1), (1, 7), (9, 1), (4, 4), (7, 9), (16, 16), (33, 17), (3, 4100), (70, 130)]
"""The last two are more than a program holds: in tiles."""


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    """Outputs come filled with NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor: empty_like(tensor).fill_(torch.nan))
    with pyllmq.use_backend("triton"):
        yield


@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("rho", [(math.inf, math.inf), (0.3, math.inf), (0.2, 0.5)])
def test_plan(n, m, rho):
    cost = torch.rand(3, n, m)
    cost[torch.rand(3, n, m) < 0.1] = math.inf
    cost[:, 0, :] = cost[:, :, 0] = 0.5
    a, b, epsilon = marginal(3, n, zeros=0.2), marginal(3, m, zeros=0.2), torch.rand(3) + 0.05
    plan = sinkhorn(cost, a, b, epsilon, 9, unbalanced=rho)
    exact = log_loop(cost.double(), a.double(), b.double(), epsilon.double(), 9, rho)
    assert_as_good_as_torch(plan, exact, *loops_in_orders(cost, a, b, epsilon, 9, rho))


@pytest.mark.parametrize(("n", "m"), [(9, 8), (33, 17), (40, 140)])
@pytest.mark.parametrize("rho", [(math.inf, math.inf), (0.2, 0.5)])
@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_gradients(n, m, rho, tolerance):
    cost, a, b, weight = torch.rand(3, n, m), marginal(3, n, zeros=0.2), marginal(3, m, zeros=0.2), torch.randn(3, n, m)
    epsilon = torch.tensor([0.1, 0.5, 5.0])
    ours = gradients(cost, a, b, weight, epsilon, 8, tolerance, unbalanced=rho)
    exact = exact_gradients(cost, a, b, weight, epsilon, 8, tolerance, unbalanced=rho)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize(("n", "m"), [(10, 12), (33, 130)])
def test_potentials_and_tolerance(n, m):
    cost, a, b = torch.rand(4, n, m), marginal(4, n, zeros=0.3), marginal(4, m)
    epsilon = torch.tensor([0.05, 0.2, 1.0, 9.0])
    u, v = sinkhorn(cost, a, b, epsilon, 300, 1e-3, output="potentials")
    plan = sinkhorn(cost, a, b, epsilon, 300, 1e-3)
    assert torch.equal(u == -math.inf, a == 0)
    torch.testing.assert_close(torch.exp((u.unsqueeze(-1) + v.unsqueeze(-2) - cost) / epsilon[:, None, None]), plan)
    missed = (plan.sum(-1) - a).abs().sum(-1)
    assert (missed <= 1.01e-3).all() and (missed > 1e-6).any()
