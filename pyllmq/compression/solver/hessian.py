"""Hessians of a Linear's output error: damped, ordered, factored, and what is asked of them.

With H = X^T X over the layer's inputs and E = quantized - weight, tr(E H E^T) is the squared error of the layer's output. The sweep
works with U, H^-1 = U^T U and U upper triangular.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ...packing import count_not_finite

MAX_DAMPING = 1.0
PANEL = 512
"""Columns of a Hessian that are factored in fp64 at a time."""


@dataclass(frozen=True, eq=False)
class HessianFactor:
    """A Hessian [K, K] and what the sweep needs of it, in processing order. One serves every Linear with the same input."""

    order: Tensor
    """int64 [K]: the original index of the column that is processed p-th."""
    square: Tensor
    """float32 [K, K]: on and right of the diagonal U, (damped H)^-1 = U^T U; left of it H, undamped. A [K, K] is 0.5 GB at
    K = 11008, and of either half of one says all."""
    diagonal: Tensor
    """float32 [K]: H_jj, undamped. 0 where an input was always 0 in the calibration data: it is coupled to nothing."""
    damping: float
    """The share of mean(diag H) that was added to the diagonal; above the one asked for where that one failed."""

    def upper_rows(self, begin: int, end: int) -> Tensor:
        """float32 [end - begin, K - begin]: U[begin:end, begin:]. What is left of U's diagonal is not to be read."""
        return self.square[begin:end, begin:]

    def hessian_rows(self, begin: int, end: int) -> Tensor:
        """float32 [end - begin, K]: H[begin:end], undamped; a new tensor."""
        here = slice(begin, end)
        corner = _symmetric(self.square[here, here], self.diagonal[here])
        return torch.cat([self.square[here, :begin], corner, self.square[end:, here].t()], 1)

    def added(self) -> float:
        """What damping adds to the diagonal."""
        alive = self.diagonal[self.diagonal > 0].double()
        return self.damping * float(alive.mean()) if alive.numel() else self.damping


def _symmetric(square: Tensor, diagonal: Tensor) -> Tensor:
    """The matrix that has this diagonal and is `square` left of it."""
    lower = square.tril(-1)
    return lower + lower.t() + diagonal.diag()


def centre_(hessian: Tensor, mean: Tensor) -> None:
    """The mean of x x^T becomes the covariance, in place.

    Args:
        hessian: [K, K]. mean: [K]. Both were summed in float32, whatever they are in now.

    An input that never changes has none: what rounding leaves of it, on either side of 0, becomes 0.
    """
    hessian.addr_(mean, mean, alpha=-1)
    rounding = 2 * len(mean) ** 0.5 * torch.finfo(torch.float32).eps * mean.square()
    diagonal = hessian.diagonal()
    diagonal.masked_fill_(diagonal <= rounding, 0)


def factor_hessian(
    hessian: Tensor, damping: float = 0.01, act_order: bool = True, *, in_place: bool = False
) -> HessianFactor:
    """Damp, order and factor a Hessian.

    H = R R^T with R upper, and U = R^-1: no explicit inverse of H. Panel by panel in one float32 [K, K], the arithmetic of each
    panel in fp64. At K = 1536 from 200 samples rows of U are off by 2.5e-6 at damping 0.01, by 2.4e-4 at 1e-4, as they are
    with everything in fp64: that is the rounding of H itself. All in fp32 they are off by 8e-5 and 8e-3. K = 4096 takes
    0.66 s on two cores, all in fp64 1.2 s and four times the memory.

    Args:
        hessian: float [K, K], symmetric, sum of x x^T over the calibration tokens, on any scale.
        damping: share of the mean diagonal that is added to the diagonal, 0 to 1. If the Cholesky fails it is raised
            tenfold, up to 1, with a warning.
        act_order: process the columns by falling diagonal (ties by index) instead of left to right.
        in_place: the result takes the memory of `hessian`, if that is float32.

    Raises:
        ValueError: not square, not finite, a negative diagonal, damping out of range, or no damping helps.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.numel():
        raise ValueError(f"hessian has the shape {tuple(hessian.shape)}; it must be [K, K] with K >= 1")
    if not 0 <= damping <= MAX_DAMPING:
        raise ValueError(f"damping is {damping}; allowed: 0 to {MAX_DAMPING:g} (a share of the mean diagonal)")
    bad = count_not_finite(hessian)
    if bad:
        raise ValueError(
            f"hessian holds {bad} of {hessian.numel()} values that are not finite; look at the calibration activations "
            "of this layer: one NaN or inf there is enough (fp16 overflow, a broken weight before it, masked padding)"
        )
    diagonal = hessian.diagonal().double()
    if bool((diagonal < 0).any()):
        where = int((diagonal < 0).nonzero()[0])
        raise ValueError(f"hessian[{where}, {where}] is {float(diagonal[where]):g}; a sum of x x^T has a diagonal >= 0")

    size = hessian.shape[0]
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(size)
    order = order.to(hessian.device)
    square = hessian.to(torch.float32, copy=not in_place)
    _reorder_(square, order)
    diagonal = square.diagonal().clone()
    # Rounding may leave something beside a diagonal of 0.
    dead = diagonal == 0
    square[dead], square[:, dead] = 0, 0

    used = damping
    while True:
        factor = HessianFactor(order, square, diagonal, used)
        added = torch.full_like(diagonal, factor.added(), dtype=torch.float64)
        added[dead] += float(diagonal[~dead].double().mean()) if not bool(dead.all()) else 1.0
        if _factor_into(square, diagonal + added):
            break
        if used >= MAX_DAMPING:
            raise ValueError(
                f"the Cholesky factorisation of the hessian [{size}, {size}] fails even with damping {used:g}: it is "
                "not positive semidefinite; look at how it was accumulated (symmetric? summed in float32 or better?)"
            )
        raised = min(MAX_DAMPING, max(10 * used, 1e-4))
        warnings.warn(
            f"the Cholesky factorisation of the hessian [{size}, {size}] failed with damping {used:g}; trying "
            f"{raised:g}; more calibration tokens, or a larger damping from the start, avoid this",
            stacklevel=2,
        )
        used = raised
    invert_upper_(square)
    return factor


def _reorder_(square: Tensor, order: Tensor) -> None:
    """Rows and columns in `order`, in place."""
    for part in square.split(PANEL, dim=1):
        part.copy_(part[order])
    for part in square.split(PANEL):
        part.copy_(part[:, order])


def _factor_into(square: Tensor, diagonal: Tensor, panel: int = PANEL) -> bool:
    """Write R, upper, on and right of the diagonal, with R R^T = H; False if there is none.

    Args:
        square: float32 [K, K]; left of the diagonal H, which stays.
        diagonal: float64 [K], that of H.
    """
    size = len(square)
    for begin in reversed(range(0, size, panel)):
        end = min(begin + panel, size)
        here = slice(begin, end)
        corner = _symmetric(square[here, here].double(), diagonal[here])
        rest = torch.cat([square[here, :begin].t().double(), corner])
        for later in range(end, size, panel):
            done = square[:, later : later + panel]
            rest.addmm_(done[:end].double(), done[here].double().t(), alpha=-1)
        # Both indices reversed, a lower factor is an upper one.
        lower, failed = torch.linalg.cholesky_ex(rest[here].flip(0, 1))
        if int(failed):
            return False
        corner = lower.flip(0, 1)
        square[here, here].tril_(-1).add_(corner)
        square[:begin, here] = torch.linalg.solve_triangular(corner.t(), rest[:begin], upper=False, left=False)
    return True


def invert_upper_(square: Tensor, panel: int = PANEL) -> None:
    """Invert an upper triangular matrix [K, K] in place, the arithmetic in fp64; what is left of its diagonal stays."""
    for begin in range(0, len(square), panel):
        end = min(begin + panel, len(square))
        corner = square[begin:end, begin:end]
        identity = torch.eye(end - begin, dtype=torch.float64, device=square.device)
        inverse = torch.linalg.solve_triangular(corner.triu().double(), identity, upper=True)
        above = square[:begin, begin:end].double()
        for near in range(0, begin, panel):
            far = near + panel
            # Rows near..far of the product: what is above them is done, what is below is still needed.
            above[near:far] = square[near:far, near:begin].triu().double() @ above[near:]
        square[:begin, begin:end] = -(above @ inverse)
        corner.tril_(-1).add_(inverse)


def times_inverse(rows: Tensor, factor: HessianFactor) -> Tensor:
    """(damped H)^-1 M = U^T U M for M [K, C] in processing order; a new tensor."""
    size = len(rows)
    parts = [slice(begin, min(begin + PANEL, size)) for begin in range(0, size, PANEL)]
    halfway = torch.cat([factor.upper_rows(at.start, at.stop).triu() @ rows[at.start :] for at in parts])
    found = torch.zeros_like(halfway)
    for at in parts:
        found[at.start :] += factor.upper_rows(at.start, at.stop).triu().t() @ halfway[at]
    return found


# ---- columns as rows, in processing order: contiguous where the loops work -------------------------------------------


def as_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """float [N, K] -> a new float32 [K, N]: its columns as rows, in processing order."""
    rows = torch.empty(len(order), len(matrix), device=matrix.device)
    for part, columns in zip(rows.split(PANEL), order.split(PANEL), strict=True):
        part.copy_(matrix.detach()[:, columns].t())
    return rows


def as_matrix(rows: Tensor, order: Tensor) -> Tensor:
    """[K, N] as `as_columns` makes it -> [N, K], a view of it: the columns go to their places in the memory that they have."""
    for part in rows.split(PANEL, dim=1):
        part[order] = part.clone()
    return rows.t()


def squared_columns(rows: Tensor, factor: HessianFactor) -> Tensor:
    """m_r H m_r^T, H undamped, float64 [N]: of each row of a matrix M in the form of `as_columns` the squared output."""
    found = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for begin in range(0, len(rows), PANEL):
        part = rows[begin : begin + PANEL]
        here = slice(begin, begin + len(part))
        # What is left of the diagonal stands for what is right of it too.
        product = factor.square[here, :begin] @ rows[:begin]
        product.mul_(2).addmm_(_symmetric(factor.square[here, here], factor.diagonal[here]), part)
        found += product.mul_(part).sum(0)
    return found


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), E = quantized - weight: the squared output error relative to the squared output.

    Args:
        weight, quantized: float [N, K].
        hessian: float [K, K], undamped. The products run in its dtype, at least float32; the traces in float64.

    Returns:
        0 where both traces are 0, inf where only the output is.
    """
    if weight.shape != quantized.shape or hessian.shape != (weight.shape[-1],) * 2:
        raise ValueError(
            f"weight {tuple(weight.shape)}, quantized {tuple(quantized.shape)} and hessian {tuple(hessian.shape)} do "
            "not fit; they must be [N, K], [N, K] and [K, K]"
        )
    hessian = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
    error = output = 0.0
    for dense, stored in zip(weight.split(PANEL), quantized.split(PANEL), strict=True):
        dense = dense.to(hessian.dtype)
        lost = stored.to(hessian.dtype) - dense
        error += float(((lost @ hessian) * lost).sum(1).double().sum())
        output += float(((dense @ hessian) * dense).sum(1).double().sum())
    return relative_error(error, output)


def relative_error(error: float, output: float) -> float:
    """Of squares; 0 where both are 0, inf where only the output is."""
    if output <= 0:
        return 0.0 if error <= 0 else float("inf")
    return max(0.0, error) / output
