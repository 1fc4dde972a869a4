"""Entropic optimal transport: `sinkhorn` and `doubly_stochastic`, their schemas, fakes, gradients and public functions.

Formulas, numerics and measured times are in docs/kernels-sinkhorn.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .layouts import readable
from .operations import (
    DOUBLY_STOCHASTIC,
    DOUBLY_STOCHASTIC_BACKWARD,
    SINKHORN,
    SINKHORN_BACKWARD,
    Arriving,
    Normalisation,
    Transport,
)
from .ops import define, differentiable_once

COST_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRADIENTS = ("unroll", "implicit", "envelope")
OUTPUTS = ("plan", "potentials", "value")


# ---- sinkhorn -------------------------------------------------------------------------------------------------------


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: float | Tensor = 0.1,
    iterations: int = 20,
    tolerance: float | None = None,
    mask: Tensor | None = None,
    grad: str = "unroll",
    unbalanced: float | tuple[float, float] | None = None,
    output: str = "plan",
) -> Any:
    """Entropic optimal transport between marginals a and b, for a batch of cost matrices.

    The plan P minimises <P, cost> + epsilon KL(P | a b^T) subject to P 1 = a and P^T 1 = b. Iterations start from v = 0;
    each sets the rows right, then the columns. The result is that of so many iterations, converged or not.

    Args:
        cost: [..., n, m], float32, float64, bfloat16 or float16; +inf where no mass may go. The arithmetic is fp32, fp64 for fp64.
        a: [..., n], at least 0, broadcast over the batch; None: equal masses of sum 1 (over the rows that mask leaves). Rows and
            columns of mass 0 take no part. b: [..., m] likewise; both must sum alike.
        epsilon: the temperature, in units of cost; a tensor [...] gives each problem its own.
        iterations: at least 1; with a tolerance, at most so many.
        tolerance: a problem stops when its row marginals are off by at most this share of its mass (L1).
        mask: bool, broadcast to cost; False is a cost of +inf.
        grad: "unroll" is the exact gradient of the iterations that ran; "implicit" that of the converged plan, by one linear
            solve (P must be near convergence); "envelope" that of the value at fixed potentials, for output="value" only.
        unbalanced: rho, or (rho_a, rho_b): the marginals may be missed at the price rho KL(P 1 | a); math.inf keeps one exactly.
        output: "plan" [..., n, m]; "potentials" (u [..., n], v [..., m]) with P = exp((u + v - cost) / epsilon), -inf where there
            is no mass; "value" [...], the dual objective, which is the minimum above once converged.

    Returns:
        The plan in cost's dtype; potentials and value in the dtype of the arithmetic.

    Raises:
        ValueError: shapes that do not fit; on the CPU also values without a plan: NaN or -inf costs, negative marginals or
            such that do not sum alike, epsilon <= 0, a row with mass but nowhere to send it. Elsewhere looking at values would
            wait for the device: there NaN comes out as NaN throughout that problem, lines of negative mass or without a way out
            as zeros, and only a look at the marginals of the plan tells.
        TypeError: a dtype is not allowed.
    """
    _check_choices(iterations, tolerance, grad, output)
    rho_a, rho_b = _marginal_prices(unbalanced)
    _check_cost(cost)
    if _is_eager(cost):
        cost = readable(cost)
    work = torch.float64 if cost.dtype == torch.float64 else torch.float32
    if mask is not None:
        cost = _masked(cost, mask)
    n, m = cost.shape[-2:]
    if isinstance(epsilon, Tensor) and epsilon.requires_grad:
        raise ValueError("epsilon takes no gradient; pass epsilon.detach()")
    alike = a is None and b is None and mask is None and n == m
    a = _marginal("a", a, n, -1, cost, mask, work)
    b = a if alike else _marginal("b", b, m, -2, cost, mask, work)
    batch = _batch_shape(cost, a, b, epsilon)
    problems = math.prod(batch)
    flat_a = _flat(a, batch, n)
    arguments = (
        _flat(cost.to(work), batch, n, m),
        flat_a,
        flat_a if b is a else _flat(b, batch, m),
        _flat(epsilon.to(cost.device, work), batch).contiguous()
        if isinstance(epsilon, Tensor)
        else torch.full((problems,), epsilon, dtype=work, device=cost.device),
    )
    followed = tuple(tensor.detach() for tensor in arguments) if grad == "envelope" else arguments
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in followed)
    eager: Any = _sinkhorn_with_gradient if wants_grad else _sinkhorn
    operation = eager if _is_eager(followed[0]) else torch.ops.pyllmq.sinkhorn
    how = (iterations, float(tolerance or 0), rho_a, rho_b, grad if wants_grad else "none")
    plan, u, v, *_ = operation(*followed, *how)
    if output == "plan":
        return (plan if len(batch) == 1 else plan.view(*batch, n, m)).to(cost.dtype)
    if output == "potentials":
        return u.view(*batch, n), v.view(*batch, m)
    value = _dual_value(plan, u, v, followed, rho_a, rho_b)
    if grad == "envelope" and torch.is_grad_enabled():
        slope = _value_at_fixed_potentials(plan, u, v, arguments, rho_a, rho_b)
        if slope.requires_grad:  # fixed potentials have no second derivative
            slope.register_hook(lambda grad: differentiable_once("sinkhorn", lambda: (grad,), (grad, *arguments))[0])
        value = value + (slope - slope.detach())  # 0, with the gradient of the slope
    return value.view(batch)


def _check_choices(iterations: int, tolerance: float | None, grad: str, output: str) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; allowed: an integer of at least 1")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance!r}; allowed: None, or a number of at least 0")
    if grad not in GRADIENTS:
        raise ValueError(f"grad is {grad!r}; allowed: {', '.join(map(repr, GRADIENTS))}")
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}; allowed: {', '.join(map(repr, OUTPUTS))}")
    if grad == "envelope" and output != "value":
        raise ValueError(
            f"grad='envelope' holds for output='value' only: fixed potentials give a wrong gradient of the {output}; "
            "use 'unroll' or 'implicit'"
        )


def _marginal_prices(unbalanced: float | tuple[float, float] | None) -> tuple[float, float]:
    rho_a, rho_b = unbalanced if isinstance(unbalanced, tuple) else (unbalanced, unbalanced)
    prices = tuple(math.inf if rho is None else float(rho) for rho in (rho_a, rho_b))
    if not all(rho > 0 for rho in prices):
        raise ValueError(f"unbalanced is {unbalanced!r}; allowed: None, or rho > 0 (two of them for a and b)")
    return prices[0], prices[1]


def _check_cost(cost: Tensor) -> None:
    if cost.dtype not in COST_DTYPES:
        raise TypeError(f"cost is {cost.dtype}; allowed: {', '.join(map(str, COST_DTYPES))}")
    if cost.dim() < 2 or not cost.shape[-1] or not cost.shape[-2]:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; it must be [..., n, m] with n and m of at least 1")


def _masked(cost: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; it must be torch.bool, True where mass may go")
    try:
        fits = torch.broadcast_shapes(mask.shape, cost.shape)[-2:] == cost.shape[-2:]
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must broadcast to cost {tuple(cost.shape)}")
    return cost.masked_fill(~mask, torch.inf)


def _marginal(
    name: str, given: Tensor | None, size: int, over: int, cost: Tensor, mask: Tensor | None, work: torch.dtype
) -> Tensor:
    """The marginal in the dtype of the arithmetic. Without one: equal masses over the lines that the mask leaves."""
    if given is None:
        if mask is None:
            return torch.full((size,), 1 / size, dtype=work, device=cost.device)
        left = mask.expand(torch.broadcast_shapes(mask.shape, cost.shape)).any(over).to(work)
        return left / left.sum(-1, keepdim=True).clamp_min(1)
    if given.dim() < 1 or given.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; its last dimension must be {size}, as cost's")
    if not given.is_floating_point():
        raise TypeError(f"{name} is {given.dtype}; it must be floating-point")
    if given.device != cost.device:
        raise ValueError(f"{name} is on {given.device}, cost on {cost.device}; move them to one device")
    given = given.to(work)
    return readable(given) if _is_eager(given) else given


def _flat(given: Tensor, batch: tuple[int, ...], *line: int) -> Tensor:
    """[problems, *line]. No call that can be left out: of 4096 4x4 problems each costs one in a hundred of the time."""
    wanted = (*batch, *line)
    whole = given if given.shape == wanted else given.expand(wanted)
    return whole if len(batch) == 1 else whole.reshape(math.prod(batch), *line)


def _batch_shape(cost: Tensor, a: Tensor, b: Tensor, epsilon: float | Tensor) -> tuple[int, ...]:
    batch = cost.shape[:-2]
    own_epsilon = epsilon.shape if isinstance(epsilon, Tensor) else ()
    if a.dim() == 1 and b.dim() == 1 and not own_epsilon:
        return batch  # broadcast_shapes costs 20 us, a tenth of a small call
    try:
        return torch.broadcast_shapes(batch, a.shape[:-1], b.shape[:-1], own_epsilon)
    except RuntimeError:
        raise ValueError(
            f"the batch dimensions of cost {tuple(cost.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)} and epsilon "
            f"{tuple(own_epsilon)} do not broadcast"
        ) from None


def _is_eager(tensor: Tensor) -> bool:
    """Not being traced: then a call need not go through torch.library, whose autograd costs 200 us."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def _sinkhorn(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cost, a, b, epsilon, iterations, tolerance, rho_a, rho_b, grad = arguments
    tape = _tape(cost, iterations, grad)
    kernel = SINKHORN.kernel_for(cost.device, cost.dtype, *cost.shape[1:])
    plan, u, v, count = kernel(Transport(cost, a, b, epsilon, rho_a, rho_b), iterations, tolerance, tape)
    return plan, u, v, tape, count


def _tape(cost: Tensor, iterations: int, grad: str) -> Tensor:
    """Room for what the backward pass wants to know of every iteration, the scalings: T (n + m), not T n m."""
    problems, n, m = cost.shape
    row = SINKHORN.kernel_for(cost.device, cost.dtype, int(n), int(m)).tape_row(n, m) if grad == "unroll" else 0
    return cost.new_empty((problems, iterations, row) if row else (0,))


def _sinkhorn_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cost, a, b, _, iterations, *_, grad = arguments
    tape = _tape(cost, iterations, grad)
    count = cost.new_empty(cost.shape[0], dtype=torch.int32)
    return cost.new_empty(cost.shape), torch.empty_like(a), torch.empty_like(b), tape, count


def _sinkhorn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, epsilon, _, _, ctx.rho_a, ctx.rho_b, ctx.grad = inputs
    plan, u, v, tape, count = output
    ctx.mark_non_differentiable(tape, count)
    ctx.save_for_backward(cost, a, b, epsilon, tape, count, *((plan,) if ctx.grad == "implicit" else ()))


def _sinkhorn_backward_of(
    ctx: Any, grad_plan: Tensor, grad_u: Tensor, grad_v: Tensor, *_: object
) -> tuple[Tensor | None, ...]:
    cost, a, b, epsilon, tape, count, *plan = ctx.saved_tensors
    arriving = grad_plan, grad_u, grad_v

    def gradients() -> tuple[Tensor, Tensor, Tensor]:
        if ctx.grad == "implicit":
            return _implicit_gradients(plan[0], Transport(cost, a, b, epsilon, ctx.rho_a, ctx.rho_b), *arriving)
        backward = _sinkhorn_backward if _is_eager(grad_plan) else torch.ops.pyllmq.sinkhorn_backward
        return backward(cost, a, b, epsilon, tape, count, *arriving, ctx.rho_a, ctx.rho_b)

    found = differentiable_once("sinkhorn", gradients, (cost, a, b, epsilon, *arriving))
    return *found, None, None, None, None, None, None


def _sinkhorn_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    cost, a, b, epsilon, tape, count, *arriving, rho_a, rho_b = arguments
    kernel = SINKHORN_BACKWARD.kernel_for(cost.device, cost.dtype, *cost.shape[1:])
    gradients = (grad.contiguous() for grad in arriving)
    return kernel(Transport(cost, a, b, epsilon, rho_a, rho_b), Arriving(tape, count, *gradients))


def _sinkhorn_backward_fake(cost: Tensor, a: Tensor, b: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return cost.new_empty(cost.shape), torch.empty_like(a), torch.empty_like(b)


_sinkhorn_with_gradient = define(
    "sinkhorn(Tensor cost, Tensor a, Tensor b, Tensor epsilon, int iterations, float tolerance, float rho_a, float rho_b, "
    "str grad) -> (Tensor plan, Tensor u, Tensor v, Tensor tape, Tensor count)",
    _sinkhorn,
    _sinkhorn_fake,
    _sinkhorn_backward_of,
    _sinkhorn_setup,
)
define(
    "sinkhorn_backward(Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor tape, Tensor count, Tensor grad_plan, "
    "Tensor grad_u, Tensor grad_v, float rho_a, float rho_b) -> (Tensor, Tensor, Tensor)",
    _sinkhorn_backward,
    _sinkhorn_backward_fake,
)


def _implicit_gradients(
    plan: Tensor, transport: Transport, grad_plan: Tensor, grad_u: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Implicit function theorem at the plan, with the sums r, c that it has (not those it should have):

        [diag(r) / damp_a   P              ] [x]   [d alpha]
        [P^T                diag(c) / damp_b] [y] = [d beta ],   d cost = (P (x + y) - P dP) / epsilon

    in fp64 whatever the plan's dtype, x eliminated. Balanced, (1, -1) is in the null space; it changes x + y nowhere.
    """
    _, a, b, epsilon, rho_a, rho_b = transport
    work = plan.double()
    scale = epsilon.double().unsqueeze(-1)
    rows, columns = work.sum(-1), work.sum(-2)
    through_plan = work * grad_plan
    grad_alpha = through_plan.sum(-1) + torch.where(rows > 0, scale * grad_u, 0)
    grad_beta = through_plan.sum(-2) + torch.where(columns > 0, scale * grad_v, 0)
    rows_damped = no_zero(rows) * (1 if math.isinf(rho_a) else 1 + scale / rho_a)
    columns_damped = no_zero(columns) * (1 if math.isinf(rho_b) else 1 + scale / rho_b)
    schur = torch.diag_embed(columns_damped) - work.transpose(-1, -2) @ (work / rows_damped.unsqueeze(-1))
    if math.isinf(rho_a) and math.isinf(rho_b):
        schur = schur + columns.unsqueeze(-1) * (columns / no_zero(columns.sum(-1, keepdim=True))).unsqueeze(-2)
    right = grad_beta - (work.transpose(-1, -2) @ (grad_alpha / rows_damped).unsqueeze(-1)).squeeze(-1)
    y = torch.linalg.solve(schur, right.unsqueeze(-1)).squeeze(-1)
    x = (grad_alpha - (work @ y.unsqueeze(-1)).squeeze(-1)) / rows_damped
    grad_cost = (work * (x.unsqueeze(-1) + y.unsqueeze(-2)) - through_plan) / scale.unsqueeze(-1)
    grad_a = torch.where(a > 0, x * rows_damped / a, 0)
    grad_b = torch.where(b > 0, y * columns_damped / b, 0)
    return grad_cost.to(plan.dtype), grad_a.to(plan.dtype), grad_b.to(plan.dtype)


def no_zero(sums: Tensor) -> Tensor:
    return torch.where(sums > 0, sums, 1)


# ---- the value ------------------------------------------------------------------------------------------------------


def _relative(potential: Tensor, marginal: Tensor, epsilon: Tensor) -> Tensor:
    """The potential against the marginal's own measure, u - epsilon log a; 0 where there is no mass."""
    there = potential > -torch.inf
    safe = torch.where(there, marginal, 1)
    return torch.where(there, potential, 0) - epsilon.unsqueeze(-1) * safe.log()


def _marginal_term(relative: Tensor, rho: float) -> Tensor:
    return relative if math.isinf(rho) else -rho * torch.expm1(-relative / rho)


def _dual_value(
    plan: Tensor, u: Tensor, v: Tensor, arguments: tuple[Tensor, ...], rho_a: float, rho_b: float
) -> Tensor:
    _, a, b, epsilon = arguments
    rows = (a * _marginal_term(_relative(u, a, epsilon), rho_a)).sum(-1)
    columns = (b * _marginal_term(_relative(v, b, epsilon), rho_b)).sum(-1)
    return rows + columns + epsilon * (a.sum(-1) * b.sum(-1) - plan.sum((-1, -2)))


def _value_at_fixed_potentials(
    plan: Tensor, u: Tensor, v: Tensor, arguments: tuple[Tensor, ...], rho_a: float, rho_b: float
) -> Tensor:
    """A number whose gradients are those of the dual objective at fixed potentials (relative to a and b): P for the cost."""
    cost, a, b, epsilon = arguments
    slope_a, slope_b = (
        _marginal_term(_relative(potential, mass, epsilon), rho).detach()
        + epsilon.unsqueeze(-1) * (other.sum(-1, keepdim=True) - plan.sum(over) / no_zero(mass)).detach()
        for potential, mass, other, over, rho in ((u, a, b, -1, rho_a), (v, b, a, -2, rho_b))
    )
    transport = (plan * torch.where(cost < torch.inf, cost, 0)).sum((-1, -2))
    return transport + (slope_a * a).sum(-1) + (slope_b * b).sum(-1)


# ---- doubly_stochastic ----------------------------------------------------------------------------------------------


def doubly_stochastic(
    logits: Tensor,
    iterations: int = 20,
    *,
    first: str = "rows",
    start: str = "softmax",
    shift: str = "line",
    matrix_epsilon: float = 0.0,
    division_epsilon: float = 0.0,
) -> Tensor:
    """exp(logits) [..., n, m], its rows and columns normalised to sum 1 in turn; differentiable, exactly as the loop ran.

    The arguments say where the loop that this replaces puts its epsilon:

        M = softmax(logits, rows) + matrix_epsilon                         start="softmax"
        M = exp(logits - shift);  M = M / (rows(M) + division_epsilon) + matrix_epsilon        start="exp"
        M = M / (columns(M) + division_epsilon)
        (iterations - 1) times:  M = M / (rows(M) + division_epsilon);  M = M / (columns(M) + division_epsilon)

    Args:
        logits: float32, float64, bfloat16 or float16; -inf gives 0. The arithmetic is fp32, fp64 for fp64.
        iterations: of rows and columns each, at least 1.
        first: "rows" as above, or "columns" with the two exchanged.
        start: what the first normalisation is; shift: what start="exp" takes from the logits: the maximum of the "line" (each row,
            or column with first="columns"), of the "matrix", or "none".

    Raises:
        ValueError: an argument that is not known; on the CPU NaN or +inf logits, a row or column that is -inf throughout, and
            logits that overflow with shift="none". Elsewhere those come out as NaN. TypeError: a dtype that is not allowed.
    """
    _check_choices(iterations, None, "unroll", "plan")
    for name, given, allowed in (
        ("first", first, ("rows", "columns")),
        ("start", start, ("softmax", "exp")),
        ("shift", shift, ("line", "matrix", "none")),
    ):
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}; allowed: {', '.join(map(repr, allowed))}")
    for name, number in (("matrix_epsilon", matrix_epsilon), ("division_epsilon", division_epsilon)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number!r}; allowed: a number of at least 0")
    _check_cost(logits)
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    matrices = logits.to(work).reshape(-1, *logits.shape[-2:])
    if _is_eager(logits):
        matrices = readable(matrices)
    how = Normalisation(
        iterations, first == "columns", start == "softmax", shift, float(matrix_epsilon), float(division_epsilon)
    )
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    eager: Any = _doubly_stochastic_with_gradient if wants_grad else _doubly_stochastic
    operation = eager if _is_eager(logits) else torch.ops.pyllmq.doubly_stochastic
    return operation(matrices, *how).view(logits.shape).to(logits.dtype)


def _doubly_stochastic(logits: Tensor, *how: Any) -> Tensor:
    kernel = DOUBLY_STOCHASTIC.kernel_for(logits.device, logits.dtype, *logits.shape[1:])
    return kernel(logits, Normalisation(*how)).contiguous()


def _doubly_stochastic_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, *ctx.how = inputs
    ctx.save_for_backward(logits)


def _doubly_stochastic_backward_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    backward = _doubly_stochastic_backward if _is_eager(grad) else torch.ops.pyllmq.doubly_stochastic_backward
    found = differentiable_once("doubly_stochastic", lambda: (backward(logits, grad, *ctx.how),), (logits, grad))
    return *found, *[None] * len(ctx.how)


def _doubly_stochastic_backward(logits: Tensor, grad: Tensor, *how: Any) -> Tensor:
    kernel = DOUBLY_STOCHASTIC_BACKWARD.kernel_for(logits.device, logits.dtype, *logits.shape[1:])
    return kernel(logits, grad.contiguous(), Normalisation(*how)).contiguous()


_HOW = "int iterations, bool columns_first, bool softmax_start, str shift, float matrix_epsilon, float division_epsilon"
_doubly_stochastic_with_gradient = define(
    f"doubly_stochastic(Tensor logits, {_HOW}) -> Tensor",
    _doubly_stochastic,
    lambda logits, *_: logits.new_empty(logits.shape),
    _doubly_stochastic_backward_of,
    _doubly_stochastic_setup,
)
define(
    f"doubly_stochastic_backward(Tensor logits, Tensor grad, {_HOW}) -> Tensor",
    _doubly_stochastic_backward,
    lambda logits, *_: logits.new_empty(logits.shape),
)
