"""The column sweep against its definition: a slow GPTQ with explicit inverses in fp64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from pyllmq.compression.solver.hessian import (
    factor_hessian,
    invert_upper_,
    output_error,
    squared_columns,
    times_inverse,
)
from pyllmq.compression.solver.sweep import ColumnQuantizer, refine_columns, sweep_columns


class RoundToGrid(ColumnQuantizer):
    def __init__(self, step: float) -> None:
        self.step = step
        self.visited: list[tuple[int, int]] = []
        self.blocks: list[Tensor] = []

    def begin_block(self, columns: Tensor, block: Tensor, upper_diagonal: Tensor) -> None:
        assert block.shape[0] == columns.numel() == upper_diagonal.numel()
        self.blocks.append(block.clone())

    def column(self, position: int, column: int, values: Tensor) -> Tensor:
        self.visited.append((position, column))
        return (values / self.step).round() * self.step


def correlated_hessian(size: int, samples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(seed)
    mix = torch.eye(size, dtype=torch.float64) + 0.3 * torch.randn(size, size, dtype=torch.float64) / size**0.5
    inputs = torch.randn(samples, size, dtype=torch.float64) @ mix * torch.randn(size, dtype=torch.float64).exp()
    return (2 / samples * inputs.t() @ inputs).to(dtype)


def slow_gptq(weight: Tensor, hessian: Tensor, damping: float, order: Tensor, step: float) -> Tensor:
    """Algorithm 1 with the remaining inverse recomputed at every step (fp64)."""
    work = weight.double()[:, order]
    damped = hessian.double()[order][:, order]
    damped += damping * damped.diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    quantized = torch.empty_like(work)
    for j in range(len(order)):
        inverse = torch.linalg.inv(damped[j:, j:])
        quantized[:, j] = (work[:, j] / step).round() * step
        error = (work[:, j] - quantized[:, j]) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
    restored = torch.empty_like(quantized)
    restored[:, order] = quantized
    return restored


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("samples", [20, 500])
def test_factor_is_the_root_of_the_damped_inverse(samples: int, act_order: bool) -> None:
    hessian = correlated_hessian(60, samples)
    factor = factor_hessian(hessian, 0.01, act_order)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    ordered = damped[factor.order][:, factor.order]
    upper = factor.square.triu().double()
    assert factor.square.dtype == torch.float32
    torch.testing.assert_close(upper @ ordered @ upper.t(), torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-5)
    diagonal = hessian.diagonal()[factor.order]
    assert bool((diagonal.diff() <= 0).all()) == act_order
    assert sorted(factor.order.tolist()) == list(range(60)) and factor.damping == 0.01
    assert factor.added() == pytest.approx(0.01 * float(diagonal.mean()))
    for begin, end in ((0, 60), (0, 1), (17, 40), (59, 60)):
        rows = hessian[factor.order][:, factor.order][begin:end]
        torch.testing.assert_close(factor.hessian_rows(begin, end), rows.float(), rtol=1e-6, atol=0)
        assert torch.equal(factor.upper_rows(begin, end).triu().double(), upper[begin:end, begin:])
    matrix = torch.randn(60, 5, dtype=torch.float64)
    torch.testing.assert_close(
        squared_columns(matrix.float(), factor),
        (ordered @ matrix * matrix).sum(0) - 0.01 * float(diagonal.mean()) * matrix.square().sum(0),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        times_inverse(matrix.float(), factor).double(), torch.linalg.solve(ordered, matrix), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("size", [7, 515, 1100])
def test_factor_in_place_and_by_panels(size: int) -> None:
    hessian = correlated_hessian(size, 2 * size, dtype=torch.float32)
    given = hessian.clone()
    factor = factor_hessian(hessian)
    assert torch.equal(hessian, given) and factor.square.data_ptr() != hessian.data_ptr()
    same = factor_hessian(given, in_place=True)
    assert same.square.data_ptr() == given.data_ptr() and torch.equal(same.square, factor.square)
    damped = hessian.double() + factor.added() * torch.eye(size)
    upper = factor.square.triu().double()
    product = upper @ damped[factor.order][:, factor.order] @ upper.t()
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-4)
    rows = torch.cat([factor.hessian_rows(begin, min(begin + 300, size)) for begin in range(0, size, 300)])
    assert torch.equal(rows, rows.t()) and torch.equal(rows.tril(), hessian[factor.order][:, factor.order].tril())


def test_factor_survives_a_rank_deficient_hessian() -> None:
    """K = 1536 from 200 samples with four loud channels: fp32 in, U close to the fp64 result."""
    hessian = correlated_hessian(1536, 200)
    hessian[:4] *= 50
    hessian[:, :4] *= 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factor = factor_hessian(hessian.float(), 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(1536, dtype=torch.float64)
    exact = torch.linalg.cholesky(torch.linalg.inv(damped[factor.order][:, factor.order]), upper=True)
    relative = (factor.square.triu().double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(relative.max()) < 1e-4


@pytest.mark.parametrize("act_order", [False, True])
def test_sweep_equals_the_definition(act_order: bool) -> None:
    hessian = correlated_hessian(50, 200, seed=1)
    torch.manual_seed(2)
    weight = torch.randn(33, 50)
    factor = factor_hessian(hessian, 0.01, act_order)
    quantizer = RoundToGrid(0.25)
    swept = sweep_columns(weight, factor, quantizer, block_size=16)
    expected = slow_gptq(weight, hessian, 0.01, factor.order, 0.25)
    different = (swept.quantized.double() - expected).abs() > 1e-6
    # fp32 against fp64: a weight on the edge between two grid points may round the other way and move later ones
    assert float(different.float().mean()) < 0.01
    assert quantizer.visited == [(p % 16, column) for p, column in enumerate(factor.order.tolist())]
    assert [len(b) for b in quantizer.blocks] == [16, 16, 16, 2]
    torch.testing.assert_close(quantizer.blocks[0], weight.t()[factor.order[:16]], rtol=0, atol=0)


def test_loss_is_the_damped_output_error_and_beats_rounding() -> None:
    hessian = correlated_hessian(200, 300, seed=3)
    torch.manual_seed(4)
    weight = torch.randn(64, 200)
    factor = factor_hessian(hessian, 0.01)
    before = weight.clone()
    swept = sweep_columns(weight, factor, RoundToGrid(0.5))
    assert swept.weight is weight and torch.equal(weight, before)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(200, dtype=torch.float64)
    error = (swept.quantized - weight).double()
    assert swept.loss == pytest.approx(float(((error @ damped) * error).sum()), rel=1e-4)
    rounded = (weight / 0.5).round() * 0.5
    assert output_error(weight, swept.quantized, hessian) < 0.7 * output_error(weight, rounded, hessian)


def test_block_size_decides_speed_only() -> None:
    hessian = correlated_hessian(70, 300, seed=5)
    torch.manual_seed(6)
    weight = torch.randn(16, 70)
    factor = factor_hessian(hessian)
    results = [sweep_columns(weight, factor, RoundToGrid(0.5), size) for size in (1, 7, 64, 128)]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=0.02)
        assert float((result.quantized != results[0].quantized).float().mean()) < 0.02


def test_dead_columns_are_listed_and_coupled_to_nothing() -> None:
    hessian = correlated_hessian(12, 100, seed=7)
    hessian[[3, 8]] = 0
    hessian[:, [3, 8]] = 0
    factor = factor_hessian(hessian)
    assert factor.order[factor.diagonal == 0].sort().values.tolist() == [3, 8]
    place = {column: p for p, column in enumerate(factor.order.tolist())}
    for column in (3, 8):
        row = factor.square.triu()[place[column]]
        mean = hessian.diagonal()[hessian.diagonal() > 0].mean()
        assert float(row[place[column]]) == pytest.approx(float(1.01 * mean) ** -0.5, rel=1e-5)
        row[place[column]] = 0
        assert not row.any() and int(factor.square.triu()[:, place[column]].count_nonzero()) == 1
    weight = torch.randn(5, 12)
    swept = sweep_columns(weight, factor, RoundToGrid(0.5))
    assert torch.equal(swept.quantized[:, 3], (weight[:, 3] / 0.5).round() * 0.5)


def test_a_hessian_of_zeros_is_plain_rounding() -> None:
    weight = torch.randn(5, 3)
    factor = factor_hessian(torch.zeros(3, 3))
    assert factor.order[factor.diagonal == 0].sort().values.tolist() == [0, 1, 2]
    swept = sweep_columns(weight, factor, RoundToGrid(0.5))
    assert torch.equal(swept.quantized, (weight / 0.5).round() * 0.5)
    assert output_error(weight, swept.quantized, torch.zeros(3, 3)) == 0.0


def test_damping_is_raised_with_a_warning() -> None:
    hessian = correlated_hessian(40, 5)  # rank 5: not factorable undamped
    hessian[0, 1] += 1e-3 * hessian[0, 0]
    hessian[1, 0] = hessian[0, 1]
    with pytest.warns(UserWarning, match=r"hessian \[40, 40\] failed with damping 0; trying 0.0001"):
        factor = factor_hessian(hessian, 0.0)
    assert 1e-4 <= factor.damping <= 1.0
    hopeless = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="fails even with damping 1.*positive semidefinite"):
        factor_hessian(hopeless)


def test_one_by_one_and_the_scale_of_the_hessian() -> None:
    swept = sweep_columns(torch.tensor([[0.7]]), factor_hessian(torch.tensor([[2.0]])), RoundToGrid(0.5))
    assert swept.quantized.tolist() == [[0.5]] and swept.loss == pytest.approx(0.04 * 2.02, rel=1e-5)
    hessian = correlated_hessian(30, 100)
    weight = torch.randn(8, 30)
    one = sweep_columns(weight, factor_hessian(hessian), RoundToGrid(0.5))
    for scale in (2.0**-40, 2.0**40):
        other = sweep_columns(weight, factor_hessian(hessian * scale), RoundToGrid(0.5))
        assert torch.equal(other.quantized, one.quantized)


@pytest.mark.parametrize("panel", [1, 7, 64, 300, 512])
def test_triangular_inverse_by_panels(panel: int) -> None:
    torch.manual_seed(0)
    square = torch.randn(300, 300, dtype=torch.float64) / 300 + torch.eye(300, dtype=torch.float64)
    inverse = square.clone()
    invert_upper_(inverse, panel)
    torch.testing.assert_close(square.triu() @ inverse.triu(), torch.eye(300, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(inverse.tril(-1), square.tril(-1))


def test_output_error_by_hand() -> None:
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    weight, quantized = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert output_error(weight, quantized, hessian) == pytest.approx(3.0 / 2.0)
    assert output_error(torch.zeros(1, 2), quantized, hessian) == float("inf")
    with pytest.raises(ValueError, match=r"weight \(1, 2\), quantized \(2, 2\)"):
        output_error(weight, torch.zeros(2, 2), hessian)


@pytest.mark.parametrize(
    ("hessian", "damping", "message"),
    [
        (torch.zeros(2, 3), 0.01, r"shape \(2, 3\); it must be \[K, K\]"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 0.01, "1 of 4 values that are not finite.*calibration activ"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 0.01, r"hessian\[1, 1\] is -1"),
        (torch.eye(2), -0.1, "damping is -0.1; allowed: 0 to 1"),
    ],
)
def test_a_bad_hessian_says_what_to_look_at(hessian: Tensor, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factor_hessian(hessian, damping)


def test_a_bad_sweep_says_what_fits() -> None:
    factor = factor_hessian(torch.eye(3))
    with pytest.raises(ValueError, match=r"shape \(2, 4\); it must be \[N, K\], K = 3"):
        sweep_columns(torch.zeros(2, 4), factor, RoundToGrid(1))
    with pytest.raises(ValueError, match="block_size is 0"):
        sweep_columns(torch.zeros(2, 3), factor, RoundToGrid(1), block_size=0)
    with pytest.raises(NotImplementedError, match="ColumnQuantizer must define column"):
        sweep_columns(torch.zeros(2, 3), factor, ColumnQuantizer())


# ---- block coordinate descent -----------------------------------------------------------------------------------------


class NearestOfThree(ColumnQuantizer):
    """Three centroids per column, fitted exactly by trying every pair of cuts; rows weigh `weights`."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def fit(self, values: Tensor) -> Tensor:
        order = values.argsort()
        best, cost = values, float("inf")
        for a in range(1, len(values)):
            for b in range(a + 1, len(values)):
                trial = torch.empty_like(values)
                for part in (order[:a], order[a:b], order[b:]):
                    trial[part] = (values[part] * self.weights[part]).sum() / self.weights[part].sum()
                spent = float(((trial - values).double().square() * self.weights).sum())
                if spent < cost:
                    best, cost = trial, spent
        return best

    def column(self, position: int, column: int, values: Tensor) -> Tensor:
        return self.fit(values)

    def refit(self, column: int, target: Tensor, stored: Tensor) -> tuple[Tensor, float]:
        found = self.fit(target)
        before, after = (((q - target).double().square() * self.weights).sum() for q in (stored, found))
        return (found, float(before - after)) if after < before else (stored, 0.0)


def damped_objective(weight: Tensor, quantized: Tensor, hessian: Tensor, damping: float, weights: Tensor) -> float:
    diagonal = hessian.diagonal()
    damped = hessian.double() + damping * float(diagonal[diagonal > 0].mean()) * torch.eye(len(hessian))
    error = quantized.double() - weight.double()
    return float((((error @ damped) * error).sum(1) * weights).sum())


@pytest.mark.parametrize("block_size", [3, 128])
def test_descent_accounts_for_every_bit_of_the_objective(block_size: int) -> None:
    hessian = correlated_hessian(23, 60, seed=3)
    weight, weights = torch.randn(13, 23), torch.rand(13) + 0.2
    quantizer, factor = NearestOfThree(weights), factor_hessian(hessian)
    swept = sweep_columns(weight, factor, quantizer).quantized
    kept = swept.clone()
    refined = refine_columns(weight, swept, factor, quantizer, 3, 0.0, block_size)
    assert torch.equal(swept, kept)
    before, after = (damped_objective(weight, q, hessian, factor.damping, weights) for q in (swept, refined.quantized))
    assert all(decrease >= 0 for decrease in refined.decreases) and refined.decreases[0] > 0
    assert after == pytest.approx(before - sum(refined.decreases), rel=1e-4) and after < before


def test_descent_ends_where_no_column_can_do_better() -> None:
    hessian = correlated_hessian(8, 40, seed=5)
    weight, ones = torch.randn(9, 8), torch.ones(9)
    quantizer, factor = NearestOfThree(ones), factor_hessian(hessian)
    done = refine_columns(weight, weight.round(), factor, quantizer, cycles=50, tolerance=1e-12)
    assert len(done.decreases) < 50 and done.decreases[-1] <= 1e-12 * done.decreases[0]
    reached = damped_objective(weight, done.quantized, hessian, factor.damping, ones)
    damped = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(8)
    for column in range(8):
        error = done.quantized.double() - weight.double()
        target = done.quantized[:, column].double() - (error @ damped[:, column]) / damped[column, column]
        other = done.quantized.clone()
        other[:, column] = quantizer.fit(target.float())
        assert damped_objective(weight, other, hessian, factor.damping, ones) >= reached * (1 - 1e-5)


def test_descent_does_not_depend_on_blocks_and_leaves_dead_columns() -> None:
    hessian = correlated_hessian(30, 100, seed=7)
    hessian[4], hessian[:, 4] = 0, 0
    weight = torch.randn(6, 30)
    factor = factor_hessian(hessian)
    start = weight.round()
    found = [
        refine_columns(weight, start, factor, NearestOfThree(torch.ones(6)), 2, 0.0, size).quantized
        for size in (1, 7, 64)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][:, 4], start[:, 4]) and not torch.equal(found[0], start)
