"""sinkhorn's CUDA kernels on the emulator (tests/cuda_emulator.py): what a CPU can prove of them.

The emulated device has 3 multiprocessors. Sizes lie below, at and above those of a thread's matrix (4, 8), of a warp (32) and of
the columns that lanes hold; one problem of 16384 entries and more gets a team of blocks, 12 x 4096 one that adds sums up in parts,
64 x 4096 rows that do not fit into shared memory.
"""

import itertools
import math

import pytest
import torch

import pyllmq
from pyllmq import sinkhorn

from .cuda_emulator import emulated  # noqa: F401
from .oracle import assert_as_good_as_torch
from .test_sinkhorn import exact_gradients, gradients, log_loop, loops_in_orders, marginal

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

SMALL = [(1, 1), (1, 7), (3, 2), (4, 4), (5, 8), (8, 8)]
OF_A_BLOCK = [(9, 1), (1, 33), (9, 32), (33, 17), (20, 130), (5, 300), (3, 600), (2, 2100)]
OF_A_TEAM = [(130, 128), (12, 4096)]
KEPT = (math.inf, math.inf)


@pytest.fixture(autouse=True)
def only_cuda(emulated):  # noqa: F811
    with pyllmq.use_backend("cuda"):
        yield


def check(cost, a, b, epsilon, iterations, rho=KEPT):
    plan = sinkhorn(cost, a, b, epsilon, iterations, unbalanced=rho)
    exact = log_loop(cost.double(), a.double(), b.double(), torch.as_tensor(epsilon).double(), iterations, rho)
    assert_as_good_as_torch(plan, exact, *loops_in_orders(cost, a, b, epsilon, iterations, rho))


@pytest.mark.parametrize(("n", "m"), [*SMALL, *OF_A_BLOCK])
@pytest.mark.parametrize("rho", [KEPT, (0.3, math.inf), (0.2, 0.5)], ids=str)
def test_plan(n, m, rho):
    problems = 70 if n * m <= 16 else 3  # a block of small problems has 64
    cost = torch.rand(problems, n, m)
    cost[torch.rand(problems, n, m) < 0.1] = math.inf
    cost[:, 0, :] = cost[:, :, 0] = 0.5
    a, b = marginal(problems, n, zeros=0.2), marginal(problems, m, zeros=0.2)
    check(cost, a, b, torch.rand(problems) + 0.05, 7, rho)


@pytest.mark.parametrize(("n", "m"), OF_A_TEAM)
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_plan_of_a_team(n, m, epsilon):
    check(torch.rand(1, n, m), marginal(1, n, zeros=0.1), marginal(1, m, zeros=0.1), epsilon, 5)


def test_rows_that_do_not_fit_into_shared_memory():
    check(torch.rand(1, 64, 4096), marginal(1, 64), marginal(1, 4096), 0.1, 3)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("n", "m"), [(4, 4), (7, 8), (33, 17), (40, 64)])
def test_small_epsilon(n, m, epsilon):
    check(torch.rand(3, n, m), marginal(3, n), marginal(3, m), epsilon, 30)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (6, 8), (9, 8), (33, 17), (20, 130), (130, 128)])
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
@pytest.mark.parametrize("rho", [KEPT, (0.3, math.inf), (0.2, 0.5)], ids=str)
def test_gradients(n, m, epsilon, rho):
    problems = 1 if n * m > 16384 else 3
    cost, a, b = torch.rand(problems, n, m), marginal(problems, n, zeros=0.2), marginal(problems, m, zeros=0.2)
    weight, iterations = torch.randn(problems, n, m), 3 if problems == 1 else 10
    ours = gradients(cost, a, b, weight, epsilon, iterations, unbalanced=rho)
    exact = exact_gradients(cost, a, b, weight, epsilon, iterations, unbalanced=rho)
    # what cancels in a gradient, as in tests/test_sinkhorn.py
    sizes = weight.abs() * sinkhorn(cost, a, b, epsilon, iterations, unbalanced=rho)
    rows, columns = (sizes.sum(over) / mass for over, mass in ((-1, a), (-2, b)))
    for mine, true, size in zip(ours, exact, (sizes / epsilon, rows, columns), strict=True):
        assert (mine - true).abs().max() <= 3e-5 * size.nan_to_num(posinf=0).max()


@pytest.mark.parametrize(("n", "m"), [(4, 4), (9, 8), (20, 24), (130, 128)])
@pytest.mark.parametrize("epsilon", [0.1, 2e-3])
def test_tolerance(n, m, epsilon):
    problems = 1 if n * m > 16384 else 5
    cost, a, b, weight = (
        torch.rand(problems, n, m),
        marginal(problems, n),
        marginal(problems, m),
        torch.rand(problems, n, m),
    )
    # one problem alone has to come to its end in 60 iterations
    epsilons = epsilon * torch.logspace(0, 1.5, problems) if problems > 1 else torch.tensor([max(epsilon, 0.01)])
    plan = sinkhorn(cost, a, b, epsilons, 60, 1e-2)
    missed = (plan.sum(-1) - a).abs().sum(-1)
    full = (sinkhorn(cost, a, b, epsilons, 60).sum(-1) - a).abs().sum(-1)
    assert (missed[full < 0.9e-2] <= 1.01e-2).all() and (full < 0.9e-2).any()
    assert (missed[full < 0.9e-2] > 1e-6).any(), "a problem that is done goes on"
    if epsilon == 0.1:
        ours = gradients(cost, a, b, weight, epsilons, 60, 1e-2)
        for mine, true in zip(ours, exact_gradients(cost, a, b, weight, epsilons, 60, 1e-2), strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("n", [4, 12])
def test_potentials_and_what_is_shared(n):
    cost, b = torch.rand(n, n + 1), marginal(n + 1)
    a, epsilon = marginal(5, n, zeros=0.3), torch.rand(5) + 0.1
    u, v = sinkhorn(cost, a, b, epsilon, 100, output="potentials")
    plan = sinkhorn(cost, a, b, epsilon, 100)
    torch.testing.assert_close(torch.exp((u.unsqueeze(-1) + v.unsqueeze(-2) - cost) / epsilon[:, None, None]), plan)
    assert torch.equal(u == -math.inf, a == 0)
    torch.testing.assert_close(plan[3], sinkhorn(cost, a[3], b, float(epsilon[3]), 100))


@pytest.mark.parametrize("n", [4, 12])
def test_values_without_a_plan(n):
    """Nothing is looked at on a GPU: NaN comes out as NaN, of that problem alone, a line without a way out as zeros."""
    cost, a, b = torch.rand(4, n, n), marginal(4, n), marginal(4, n)
    kept = sinkhorn(cost, a, b)
    cost[0, 1, 2], cost[1, 2, 1], cost[2, :, 3] = math.nan, -math.inf, math.inf
    plan = sinkhorn(cost, a, b)
    assert plan[:2].isnan().any(-1).any(-1).all() and plan[2].isfinite().all() and not plan[2, :, 3].any()
    torch.testing.assert_close(plan[3], kept[3])
    assert sinkhorn(torch.rand(0, n, n)).shape == (0, n, n)
    assert not sinkhorn(torch.rand(n, n), torch.zeros(n), torch.zeros(n)).any()


@pytest.mark.parametrize(("n", "m"), [(4, 4), (20, 70), (130, 128)])
def test_every_order_of_threads_and_blocks_gives_the_same_bits(emulated, n, m):  # noqa: F811
    cost, weight = torch.rand(1, n, m, requires_grad=True), torch.randn(1, n, m)
    found = []
    for last_thread_first, last_block_first in itertools.product((False, True), repeat=2):
        emulated.emulator.set_schedule(last_thread_first=last_thread_first, last_block_first=last_block_first)
        plan = sinkhorn(cost, epsilon=4e-3, iterations=4, tolerance=1e-9)
        found.append((plan, *torch.autograd.grad((plan * weight).sum(), cost)))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_too_large_matrices_say_so():
    with pytest.raises(pyllmq.NoKernelError, match="up to 65536 x 4096.*here 2 x 4097"):
        sinkhorn(torch.rand(2, 4097))
