"""The column sweep that GPTQ and SparseGPT share: change one column, push its error onto the columns still to come.

Sources: GPTQ, Frantar et al. 2022 (arXiv 2210.17323, algorithm 1); SparseGPT, Frantar & Alistarh 2023 (2301.00774).
What happens to a column (quantize, prune, both) is the business of a `ColumnQuantizer`.

With H = X^T X over the layer's inputs and E = quantized - weight, the sweep is greedy on tr(E H E^T), the squared error
of the layer's output. With H^-1 = U^T U and U upper triangular, the error that column j adds is |w_j - q_j|^2 / U_jj^2.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..packing import count_not_finite

MAX_DAMPING = 1.0
PANEL = 512
"""Columns of a Hessian that are factored in fp64 at a time."""
LAZY_COLUMNS = 8
"""Columns whose updates inside a block are gathered. 7 x 4096 elements stay below the size from which torch starts its
threads, which costs 8 ms a call where the cores are busy; idle it is 0.5 against 1.1 s at 4096 x 4096."""


@dataclass(frozen=True, eq=False)
class HessianFactor:
    """A Hessian [K, K] and what the sweep needs of it, in processing order. One serves every Linear with the same input."""

    order: Tensor
    """int64 [K]: the original index of the column that is processed p-th."""
    square: Tensor
    """float32 [K, K]: on and right of the diagonal U, (damped H)^-1 = U^T U; left of it H, undamped. A [K, K] is 0.5 GB at
    K = 11008, and of either half of one says all."""
    diagonal: Tensor
    """float32 [K]: H_jj, undamped."""
    damping: float
    """The share of mean(diag H) that was added to the diagonal; above the one asked for where that one failed."""

    @property
    def dead_columns(self) -> Tensor:
        """int64: original indices of inputs that were always 0 in the calibration data; they are coupled to nothing."""
        return self.order[self.diagonal == 0].sort().values

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


class ColumnQuantizer:
    """What the sweep calls for every block and every column. Subclass it and define `column`."""

    def begin_block(self, columns: Tensor, block: Tensor, upper_diagonal: Tensor) -> None:
        """Called once before the columns of a block.

        Args:
            columns: int64 [B], original indices.
            block: float32 [B, N], the columns as rows, compensated for the errors of all blocks before. Read only.
            upper_diagonal: float32 [B], U_jj; a change of d in column j costs d^2 / U_jj^2.
        """

    def column(self, position: int, column: int, values: Tensor) -> Tensor:
        """What is stored in place of `values`.

        Args:
            position: index inside the block.
            column: original index.
            values: float32 [N], compensated for the errors of all columns before. Do not change it.

        Returns:
            float32 [N]: exactly the values that the stored form decodes to.
        """
        raise NotImplementedError(f"{type(self).__name__} must define column(position, column, values)")

    def refit(self, column: int, target: Tensor, stored: Tensor) -> tuple[Tensor, float]:
        """What `refine_columns` calls: a better form of a column that `column` has stored before.

        Args:
            column: original index.
            target: float32 [N], the values that would make the output error least, given all other columns.
            stored: float32 [N], what the column holds now.

        Returns:
            What it holds from now on, and by how much sum_r omega_r (stored_r - target_r)^2 fell (omega_r: the weight of
            row r in the objective, 1 unless the quantizer says otherwise). `stored` itself and 0.0 where nothing is better.
        """
        raise NotImplementedError(f"{type(self).__name__} must define refit(column, target, stored)")

    # One block at a time: what the loops call. A quantizer that knows a faster way to do all columns of a block replaces these.

    def sweep_block(
        self, columns: list[int], block: Tensor, coupling: Tensor, upper_diagonal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Quantize the columns of a block in turn, each error spread over the columns after it.

        Args:
            columns: original indices. block: float32 [B, N], changed. coupling: float32 [B, B], the block of U, of which only
            what is right of the diagonal is to be read; upper_diagonal: its diagonal.

        Returns:
            (stored, errors), float32 [B, N] each; an error is (value - stored) / U_jj.
        """
        stored, errors = torch.empty_like(block), torch.empty_like(block)
        steps = upper_diagonal.tolist()
        for near in range(0, len(columns), LAZY_COLUMNS):
            far = min(near + LAZY_COLUMNS, len(columns))
            for position in range(near, far):
                values = block[position]
                found = self.column(position, columns[position], values)
                stored[position] = found
                torch.sub(values, found, out=errors[position]).div_(steps[position])
                # addcmul, not addmm with an inner size of 1: 16 against 29 us for [64, 4096].
                later = block[position + 1 : far]
                later.addcmul_(coupling[position, position + 1 : far, None], errors[position], value=-1)
            block[far:].addmm_(coupling[near:far, far:].t(), errors[near:far], alpha=-1)
        return stored, errors

    def refine_block(
        self, columns: list[int], stored: Tensor, gradient: Tensor, coupling: Tensor, curvature: Tensor
    ) -> tuple[Tensor, float]:
        """Refit the columns of a block in turn, the gradient of those after it following each change.

        Args:
            columns: original indices. stored: float32 [B, N], changed. gradient: float32 [B, N], rows of E H, changed.
            coupling: float32 [B, B], the block of H. curvature: float32 [B], H_jj; 0: the column stays as it is.

        Returns:
            (stored before - stored after, by how much the objective fell).
        """
        moves = torch.zeros_like(stored)
        decrease = 0.0
        steps = curvature.tolist()
        for near in range(0, len(columns), LAZY_COLUMNS):
            far = min(near + LAZY_COLUMNS, len(columns))
            for position in range(near, far):
                step = steps[position]
                if step == 0:
                    continue
                target = torch.sub(stored[position], gradient[position], alpha=1.0 / step)
                found, fell = self.refit(columns[position], target, stored[position])
                if fell > 0.0:
                    decrease += step * fell
                    torch.sub(stored[position], found, out=moves[position])
                    stored[position] = found
                    later = gradient[position + 1 : far]
                    later.addcmul_(coupling[position, position + 1 : far, None], moves[position], value=-1)
            gradient[far:].addmm_(coupling[near:far, far:].t(), moves[near:far], alpha=-1)
        return moves, decrease


@dataclass(frozen=True, eq=False)
class SweepResult:
    weight: Tensor
    """The weight given, float [N, K]."""
    quantized: Tensor
    """float32 [N, K], in the original column order."""
    loss: float
    """tr(E H E^T) with the damped H: what the sweep minimised."""


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


def sweep_columns(
    weight: Tensor, factor: HessianFactor, quantizer: ColumnQuantizer, block_size: int = 128
) -> SweepResult:
    """Quantize the columns of `weight` one after the other, spreading the error of each over those still to come.

    Args:
        weight: float [N, K]; not changed.
        factor: of the Hessian of this layer's input.
        quantizer: told each block and each column, in processing order.
        block_size: columns whose updates are gathered into one matmul for all later columns. It decides speed, not the
            result, unless the quantizer looks at blocks.

    Raises:
        ValueError: shapes that do not fit, or block_size < 1.
    """
    size = factor.order.numel()
    if weight.dim() != 2 or weight.shape[1] != size or not weight.numel():
        raise ValueError(f"weight has the shape {tuple(weight.shape)}; it must be [N, K], K = {size} as in the hessian")
    rows = as_columns(weight, factor.order)
    loss = sweep_(rows, factor, quantizer, block_size)
    return SweepResult(weight, as_matrix(rows, factor.order).contiguous(), loss)


def sweep_(rows: Tensor, factor: HessianFactor, quantizer: ColumnQuantizer, block_size: int) -> float:
    """`sweep_columns` in place; gives its loss.

    Args:
        rows: float32 [K, N], as `as_columns` makes it; becomes what is stored.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    order, size = factor.order, len(rows)
    indices = order.tolist()
    loss = 0.0
    for begin in range(0, size, block_size):
        end = min(begin + block_size, size)
        upper = factor.upper_rows(begin, end)
        block, inside = rows[begin:end], upper[:, : end - begin]
        diagonal = inside.diagonal()
        quantizer.begin_block(order[begin:end], block, diagonal)
        # Columns that are done are never looked at again: what is stored takes their place.
        block[:], errors = quantizer.sweep_block(indices[begin:end], block, inside, diagonal)
        loss += float(errors.square().sum(1).double().sum())
        if end < size:
            rows[end:].addmm_(upper[:, end - begin :].t(), errors, alpha=-1)
    return loss


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


@dataclass(frozen=True, eq=False)
class RefineResult:
    quantized: Tensor
    """float32 [N, K], in the original column order."""
    decreases: list[float]
    """By how much each cycle lowered sum_r omega_r e_r H e_r^T, H damped: never negative."""


def refine_columns(
    weight: Tensor,
    quantized: Tensor,
    factor: HessianFactor,
    quantizer: ColumnQuantizer,
    cycles: int = 3,
    tolerance: float = 0.01,
    block_size: int = 128,
) -> RefineResult:
    """Block coordinate descent over columns: refit one after the other, each against all others as they are now.

    With E = quantized - weight and G = E H, the error is least where column j is t_j = q_j - G_j / H_jj, and grows from there
    by H_jj |q - t_j|^2: one column is a 1-D k-means problem of t_j, codebook and codes together, whose exact solution cannot
    raise the error. Inputs that were always 0 are coupled to nothing and keep what the sweep gave them.

    Args:
        weight: float [N, K], the dense matrix.
        quantized: float [N, K], where to start: what the quantizer has stored.
        factor: of the Hessian, which is damped as it says.
        quantizer: its `refit` is called for each column.
        cycles: most passes over all columns.
        tolerance: stop after a pass that lowers the error by less than this share of the first pass's decrease.
        block_size: columns whose influence on later blocks is gathered into one matmul.
    """
    stored = as_columns(quantized, factor.order)
    error = stored - as_columns(weight, factor.order)
    decreases = refine_(stored, error, factor, quantizer, cycles, tolerance, block_size)
    return RefineResult(as_matrix(stored, factor.order).contiguous(), decreases)


def refine_(
    stored: Tensor,
    error: Tensor,
    factor: HessianFactor,
    quantizer: ColumnQuantizer,
    cycles: int,
    tolerance: float,
    block_size: int,
) -> list[float]:
    """`refine_columns` in place; gives its decreases.

    Args:
        stored: float32 [K, N], as `as_columns` makes it of what the quantizer has stored.
        error: float32 [K, N], `stored` less the dense matrix; follows it.
    """
    added = factor.added()
    indices = factor.order.tolist()
    curvature = factor.diagonal + added
    curvature[factor.diagonal == 0] = 0
    decreases: list[float] = []
    for _ in range(cycles):
        decrease = 0.0
        for begin in range(0, len(indices), block_size):
            end = min(begin + block_size, len(indices))
            coupling = factor.hessian_rows(begin, end)
            inside = coupling[:, begin:end]
            inside.diagonal().add_(added)
            moves, fell = quantizer.refine_block(
                indices[begin:end], stored[begin:end], coupling @ error, inside, curvature[begin:end]
            )
            error[begin:end] -= moves
            decrease += fell
        decreases.append(decrease)
        if decrease <= tolerance * decreases[0]:
            break
    return decreases


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
    if output <= 0:
        return 0.0 if error <= 0 else float("inf")
    return max(0.0, error) / output
