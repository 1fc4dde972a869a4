"""The column sweep that GPTQ and SparseGPT share: change one column, push its error onto the columns still to come.

Sources: GPTQ, Frantar et al. 2022 (arXiv 2210.17323, algorithm 1); SparseGPT, Frantar & Alistarh 2023 (2301.00774).
What happens to a column (quantize, prune, both) is the business of a `ColumnQuantizer`.

With H = X^T X over the layer's inputs and E = quantized - weight, the sweep is greedy on tr(E H E^T), the squared error
of the layer's output. With H^-1 = U^T U and U upper triangular, the error that column j adds is |w_j - q_j|^2 / U_jj^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import HessianFactor, as_columns, as_matrix

LAZY_COLUMNS = 8
"""Columns whose updates inside a block are gathered. 7 x 4096 elements stay below the size from which torch starts its
threads, which costs 8 ms a call where the cores are busy; idle it is 0.5 against 1.1 s at 4096 x 4096."""


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
