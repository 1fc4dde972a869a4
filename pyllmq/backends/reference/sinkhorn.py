"""sinkhorn in plain torch, on any device: log domain, in fp64 for fp64 costs and in fp32 for others.

Words: L = -cost / epsilon; alpha [B, n] and beta [B, m] are the logarithms of the scalings, so that the plan is
exp(alpha + L + beta). Rows and columns without mass have -inf and take no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...operations import SINKHORN, SINKHORN_BACKWARD, Arriving, Transport, anything
from ...transport import no_zero
from .rows import ORDER

SAME_MASS = 1e-3
"""Largest relative difference between the sums of a and b: what rounding of fp16 marginals explains."""


def check_values(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, balanced: bool) -> None:
    """Raise ValueError for values that no plan exists for. Waits for the device."""
    if not bool((epsilon > 0).all() and epsilon.isfinite().all()):
        raise ValueError("epsilon must be positive and finite in every problem")
    for name, marginal in (("a", a), ("b", b)):
        if not bool((marginal >= 0).all() and marginal.isfinite().all()):
            raise ValueError(f"marginal {name} has a negative, infinite or NaN entry; allowed: finite, at least 0")
    if bool((cost.isnan() | (cost == -torch.inf)).any()):
        raise ValueError("cost has a NaN or -inf entry; allowed: finite, or +inf where no mass may go")
    if not balanced:
        return
    mass, other = a.sum(-1, dtype=torch.float64), b.sum(-1, dtype=torch.float64)
    if bool(((mass - other).abs() > SAME_MASS * torch.maximum(mass, other)).any()):
        raise ValueError(
            "the marginals a and b of a problem do not sum alike, so no plan has both; rescale one, or give unbalanced="
        )
    allowed = torch.isfinite(cost) & (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    if bool(((a > 0) & ~allowed.any(-1)).any() or ((b > 0) & ~allowed.any(-2)).any()):
        raise ValueError(
            "a row or column has mass, but its cost is +inf (or masked) wherever the other side has mass; give it mass 0"
        )


@dataclass
class _Loop:
    """What every step needs. `damp_a` = rho / (rho + epsilon), 1 where the marginal is kept exactly."""

    logits: Tensor
    rows: Tensor
    columns: Tensor
    log_a: Tensor
    log_b: Tensor
    damp_a: Tensor
    damp_b: Tensor

    @classmethod
    def of(cls, transport: Transport) -> _Loop:
        cost, a, b, epsilon, rho_a, rho_b = transport
        outside = (a == 0).unsqueeze(-1) | (b == 0).unsqueeze(-2)
        logits = (-cost / epsilon[:, None, None]).masked_fill(outside, -torch.inf)
        possible = logits > -torch.inf
        return cls(
            logits,
            (a > 0) & possible.any(-1),
            (b > 0) & possible.any(-2),
            a.log(),
            b.log(),
            _damping(epsilon, rho_a),
            _damping(epsilon, rho_b),
        )

    def row_step(self, beta: Tensor) -> Tensor:
        alpha = self.log_a - self.damp_a * torch.logsumexp(self.logits + beta.unsqueeze(-2), -1)
        return torch.where(self.rows, alpha, -torch.inf)

    def column_step(self, alpha: Tensor) -> Tensor:
        beta = self.log_b - self.damp_b * torch.logsumexp(self.logits + alpha.unsqueeze(-1), -2)
        return torch.where(self.columns, beta, -torch.inf)

    def start(self) -> Tensor:
        return torch.zeros_like(self.log_b).masked_fill(~self.columns, -torch.inf)

    def plan(self, alpha: Tensor, beta: Tensor) -> Tensor:
        return torch.exp(alpha.unsqueeze(-1) + self.logits + beta.unsqueeze(-2))


def _damping(epsilon: Tensor, rho: float) -> Tensor:
    return (torch.ones_like(epsilon) if math.isinf(rho) else rho / (rho + epsilon)).unsqueeze(-1)


def _iterate(
    loop: _Loop, a: Tensor, iterations: int, tolerance: float, keep: bool
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The (alpha, beta) of every iteration (only of the last one unless `keep`), and how many each problem took.

    A problem is done when the rows of its plan are off by at most `tolerance` of its mass: sum a |f_old / f_new - 1|, where
    f_new is what the next row step would give. From then on its potentials stay.
    """
    beta = loop.start()
    steps: list[tuple[Tensor, Tensor]] = []
    count = torch.full(a.shape[:1], iterations, dtype=torch.int32, device=a.device)
    going = torch.ones_like(count, dtype=torch.bool)
    for step in range(iterations):
        alpha = loop.row_step(beta)
        if step and tolerance > 0:
            before = steps[-1][0]
            change = torch.where(loop.rows, torch.exp(before - alpha) - 1, 0).abs()
            done = (a * change).sum(-1) <= tolerance * a.sum(-1)
            count = torch.where(going & done, step, count)
            going = going & ~done
            if going.device.type == "cpu" and not bool(going.any()):
                break
            alpha = torch.where(going.unsqueeze(-1), alpha, before)
        beta_next = loop.column_step(alpha)
        beta = torch.where(going.unsqueeze(-1), beta_next, beta)
        if not keep:
            steps.clear()
        steps.append((alpha, beta))
    return steps, count


class ReferenceSinkhorn:
    """Leaves the tape alone: the backward pass runs the loop again."""

    def tape_row(self, n: int, m: int) -> int:
        return 0

    def __call__(
        self, transport: Transport, iterations: int, tolerance: float, tape: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cost, a, b, epsilon, rho_a, rho_b = transport
        if cost.device.type == "cpu":
            check_values(cost, a, b, epsilon, balanced=math.isinf(rho_a) and math.isinf(rho_b))
        loop = _Loop.of(transport)
        steps, count = _iterate(loop, a, iterations, tolerance, keep=False)
        alpha, beta = steps[-1]
        return loop.plan(alpha, beta), epsilon.unsqueeze(-1) * alpha, epsilon.unsqueeze(-1) * beta, count


def sinkhorn_backward(transport: Transport, arriving: Arriving) -> tuple[Tensor, Tensor, Tensor]:
    """Exact gradients of the loop as it ran: (cost, a, b). Steps that a problem did not take have no gradient."""
    cost, a, b, epsilon, _, _ = transport
    _, count, grad_plan, grad_u, grad_v = arriving
    loop = _Loop.of(transport)
    count = count.abs()
    iterations = int(count.max()) if count.numel() else 0
    steps, _ = _iterate(loop, a, iterations, 0.0, keep=True)
    grad_cost, grad_a, grad_b = torch.zeros_like(cost), torch.zeros_like(a), torch.zeros_like(b)
    grad_alpha, grad_beta = torch.zeros_like(a), torch.zeros_like(b)
    for step in range(iterations - 1, -1, -1):
        alpha, beta = steps[step]
        last, runs = (count - 1 == step).unsqueeze(-1), (count > step).unsqueeze(-1)
        plan = loop.plan(alpha, beta)
        through_plan = grad_plan * plan
        scale = epsilon.unsqueeze(-1)
        grad_alpha = torch.where(last, torch.where(loop.rows, scale * grad_u, 0) + through_plan.sum(-1), 0)
        grad_beta = torch.where(last, torch.where(loop.columns, scale * grad_v, 0) + through_plan.sum(-2), grad_beta)
        grad_cost += torch.where(last.unsqueeze(-1), through_plan, 0)

        grad_b += torch.where(runs & loop.columns, grad_beta / b, 0)
        share = loop.damp_b.unsqueeze(-1) * plan / no_zero(plan.sum(-2, keepdim=True))
        passed = torch.where(runs.unsqueeze(-1), share * grad_beta.unsqueeze(-2), 0)
        grad_cost -= passed
        grad_alpha = grad_alpha - passed.sum(-1)

        grad_a += torch.where(runs & loop.rows, grad_alpha / a, 0)
        plan = loop.plan(alpha, steps[step - 1][1] if step else loop.start())
        share = loop.damp_a.unsqueeze(-1) * plan / no_zero(plan.sum(-1, keepdim=True))
        passed = torch.where(runs.unsqueeze(-1), share * grad_alpha.unsqueeze(-1), 0)
        grad_cost -= passed
        grad_beta = -passed.sum(-2)
    return -grad_cost / epsilon[:, None, None], grad_a, grad_b


because = "log domain in plain torch: runs anywhere, slowly"
SINKHORN.register("reference.sinkhorn", ORDER, anything, ReferenceSinkhorn(), because)
SINKHORN_BACKWARD.register("reference.sinkhorn_backward", ORDER, anything, sinkhorn_backward, because)
