"""Masks, sweeps and shares against slow independent fp64 implementations written from the papers' formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pyllmq import CLAQConfig, SparseConfig
from pyllmq.compression.methods import sparse as pruning
from pyllmq.compression.solver import sparsity as densities
from pyllmq.compression.solver.hessian import output_error
from pyllmq.packing import largest_of_groups


def problem(rows: int, size: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights, correlated inputs on uneven scales."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(size) + 0.8 * torch.randn(size, size, generator=g) / size**0.5
    x = torch.randn(4 * size, size, generator=g) @ mix * torch.exp(0.7 * torch.randn(size, generator=g))
    weight = torch.randn(rows, size, generator=g) * torch.exp(0.5 * torch.randn(rows, size, generator=g))
    return weight.to(dtype), x.T @ x


def prune(weight: Tensor, hessian: Tensor, config: SparseConfig) -> pruning.CompressedLinear:
    return pruning.prune_linears({"w": weight}, hessian, config, {"w": config.share}, weight.dtype)["w"]


def damped(hessian: Tensor, damping: float = 0.01) -> np.ndarray:
    h = hessian.double().numpy()
    return h + damping * np.diag(h).mean() * np.eye(len(h))


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 33)])
def test_least_is_exact_and_takes_the_first_of_equals(shape) -> None:
    torch.manual_seed(shape[1])
    for scores in (torch.randn(shape), torch.randint(0, 3, shape).float(), torch.zeros(shape)):
        for count in range(shape[1] + 1):
            mask = pruning.least(scores, count)
            expected = np.zeros(shape, bool)
            for row in range(shape[0]):
                expected[row, np.argsort(scores[row].numpy(), kind="stable")[:count]] = True
            assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (1, 2), (4, 8), (5, 8)])
@pytest.mark.parametrize("columns", [1, 3, 8, 13])
def test_groups_keep_their_largest(kept: int, group: int, columns: int) -> None:
    torch.manual_seed(columns)
    scores = torch.rand(5, columns)
    mask = ~largest_of_groups(scores, kept, group)
    for row in range(5):
        for begin in range(0, columns, group):
            part = scores[row, begin : begin + group]
            stays = set(part.argsort(descending=True)[:kept].tolist())
            assert {i for i in range(len(part)) if not mask[row, begin + i]} == stays


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:2"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_magnitude_and_wanda(method: str, pattern: str) -> None:
    weight, hessian = problem(9, 21, 1)
    config = SparseConfig(0.5, pattern, method)
    done = prune(weight, hessian, config).weight.dequantize()
    w = weight.numpy().astype(np.float64)
    scores = np.abs(w) * (np.sqrt(np.diag(hessian.double().numpy())) if method == "wanda" else 1)
    stays = np.zeros(w.shape, bool)
    if pattern == "unstructured":
        if method == "wanda":
            for row in range(9):
                stays[row, np.argsort(scores[row])[round(0.5 * 21) :]] = True
        else:
            stays.reshape(-1)[np.argsort(scores, axis=None)[round(0.5 * 9 * 21) :]] = True
    else:
        kept, group = map(int, pattern.split(":"))
        for row in range(9):
            for begin in range(0, 21, group):
                stays[row, begin + np.argsort(-scores[row, begin : begin + group])[:kept]] = True
    assert np.array_equal(done.numpy(), np.where(stays, weight.numpy(), 0))


# ---- the sweep ------------------------------------------------------------------------------------------------------


def slow_sweep(weight: Tensor, hessian: Tensor, config: SparseConfig) -> np.ndarray:
    """Optimal brain surgery with the inverse of the Hessian of the columns still free, taken anew for every column."""
    w, h = weight.double().numpy().copy(), damped(hessian)
    rows, size = w.shape
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(size)]
    cost = np.array([1 / inverse[0, 0] for inverse in inverses])
    if config.method == "mixed":
        cost = cost + np.diag(h)
    total = round(config.share * w.size)
    if config.published:
        step = config.block_size
        before = [round(config.share * rows * j) for j in range(size)] + [total]
    else:
        step = 4
        least = np.zeros(w.size, bool)
        least[np.argsort(w**2 * cost, axis=None, kind="stable")[:total]] = True
        before = [0, *np.cumsum(least.reshape(w.shape).sum(0))]
    if config.kept_of:
        step = config.kept_of[1]
    pruned = np.zeros(w.shape, bool)
    for j in range(size):
        if j % step == 0:
            end = min(j + step, size)
            scores = w[:, j:end] ** 2 * cost[j:end]
            if config.kept_of:
                for row in range(rows):
                    pruned[row, j + np.argsort(-scores[row])[config.kept_of[0] :]] = True
            else:
                chosen = np.zeros(scores.size, bool)
                chosen[np.argsort(scores, axis=None)[: before[end] - before[j]]] = True
                pruned[:, j:end] = chosen.reshape(scores.shape)
        stored = np.where(pruned[:, j], 0, w[:, j])
        error = (w[:, j] - stored) / inverses[j][0, 0]
        w[:, j:] -= np.outer(error, inverses[j][0])
        w[:, j] = stored
    return w


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["sparsegpt", "mixed"])
def test_sweep_against_optimal_brain_surgery(method: str, pattern: str, published: bool) -> None:
    weight, hessian = problem(12, 42, 2)
    share = 0.5 if pattern != "unstructured" else 0.6
    config = SparseConfig(share, pattern, method, published=published, block_size=16, refine=0)
    done = prune(weight, hessian, config)
    expected = slow_sweep(weight, hessian, config)
    given = done.weight.dequantize().numpy()
    assert np.array_equal(given == 0, expected == 0)
    np.testing.assert_allclose(given, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    assert (given == 0).sum() == (round(0.6 * 12 * 42) if pattern == "unstructured" else 12 * 20)
    assert done.error == pytest.approx(output_error(weight, done.weight.dequantize(), hessian))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_refining_nears_the_least_squares_solution_on_the_same_weights(pattern: str) -> None:
    weight, hessian = problem(10, 40, 3)
    swept = prune(weight, hessian, SparseConfig(0.5, pattern, "sparsegpt", refine=0))
    refined = prune(weight, hessian, SparseConfig(0.5, pattern, "sparsegpt", refine=3))
    kept = swept.weight.dequantize().numpy() != 0
    assert np.array_equal(refined.weight.dequantize().numpy() != 0, kept)
    h, w = damped(hessian), weight.double().numpy()
    best = np.zeros(w.shape)
    for row in range(10):
        place = np.nonzero(kept[row])[0]
        best[row, place] = np.linalg.solve(h[np.ix_(place, place)], h[place] @ w[row])

    def loss(q: np.ndarray) -> float:
        return float(np.einsum("nk,kj,nj->", q - w, h, q - w))

    first, after, least = loss(swept.weight.dequantize().numpy()), loss(refined.weight.dequantize().numpy()), loss(best)
    assert least < after < first
    assert after - least < 0.35 * (first - least)


def test_the_default_beats_the_published_sweep_and_that_beats_wanda() -> None:
    weight, hessian = problem(64, 96, 4)
    errors = [
        prune(weight, hessian, SparseConfig(0.5, method=method, published=published)).error
        for method, published in (("sparsegpt", False), ("sparsegpt", True), ("wanda", True), ("magnitude", True))
    ]
    assert errors == sorted(errors) and errors[0] < 0.8 * errors[1]


def test_inputs_that_never_came_lose_their_weights_first() -> None:
    weight, hessian = problem(8, 24, 5)
    hessian[[3, 20]] = 0
    hessian[:, [3, 20]] = 0
    for method in ("wanda", "sparsegpt", "mixed"):
        done = prune(weight, hessian, SparseConfig(0.5, method=method)).weight.dequantize()
        assert not done[:, [3, 20]].any()


def test_weights_that_are_zero_already_stay_zero() -> None:
    weight, hessian = problem(16, 32, 6)
    zero = torch.rand(16, 32) < 0.4
    weight[zero] = 0
    done = prune(weight, hessian, SparseConfig(0.4, method="magnitude")).weight.dequantize()
    assert int((done == 0).sum()) == max(int(zero.sum()), round(0.4 * 512))
    assert torch.equal(done[done != 0], weight[done != 0])


@pytest.mark.parametrize("values", [None, "float16", "float32", "int8"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_values_are_stored_as_asked(pattern: str, values: str | None) -> None:
    weight, hessian = problem(16, 40, 7, torch.bfloat16)
    done = prune(weight, hessian, SparseConfig(0.5, pattern, "sparsegpt", values=values))
    assert done.weight.structure.values == (values or "bfloat16")
    assert done.weight.structure.kind == ("sparse24" if pattern == "2:4" else "bitmap")
    exact = prune(weight.float(), hessian, SparseConfig(0.5, pattern, "sparsegpt")).error
    assert done.error == pytest.approx(exact, rel=0.1)


# ---- pruning and quantizing in one sweep ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "mixed"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_joint_sweep_stores_few_values_and_beats_one_after_the_other(pattern: str, method: str) -> None:
    weight, hessian = problem(96, 44, 8)
    bits = 3
    config = SparseConfig(0.5, pattern, method, quantize=CLAQConfig(bits))
    done = prune(weight, hessian, config)
    decoded = done.weight.dequantize()
    assert done.weight.structure.kind == ("sparse24_codebook" if pattern == "2:4" else "codebook")
    entries = (1 << bits) - (pattern == "unstructured")
    for column in decoded.t():
        assert len(column[column != 0].unique()) <= entries
    assert float((decoded == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    alone = prune(weight, hessian, SparseConfig(0.5, pattern, method, refine=0)).weight.dequantize()
    after = alone.clone()
    for j in range(44):
        chosen = alone[:, j] != 0
        centroids, codes = pruning_kmeans(alone[chosen, j], entries)
        after[chosen, j] = centroids[codes]
    assert done.error < 0.9 * output_error(weight, after, hessian)
    assert done.paper_bits == pytest.approx(1.5, abs=0.02)


def pruning_kmeans(values: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    from pyllmq import kmeans_1d

    centroids, codes = kmeans_1d(values[None], entries)
    return centroids[0], codes[0].long()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_joint_sweep_with_outliers_and_empty_columns(pattern: str) -> None:
    weight, hessian = problem(50, 24, 9)
    hessian[5] = hessian[:, 5] = 0
    config = SparseConfig(0.5, pattern, "sparsegpt", quantize=CLAQConfig(2.28, outliers=0.02))
    done = prune(weight, hessian, config)
    assert done.weight.structure.outliers > 0
    decoded = done.weight.dequantize()
    assert bool(torch.isfinite(decoded).all())
    if pattern == "unstructured":
        assert not decoded[:, 5].any()
    plain = prune(weight, hessian, SparseConfig(0.5, pattern, "sparsegpt", quantize=CLAQConfig(2)))
    assert done.error < plain.error


# ---- shares of sparsity ---------------------------------------------------------------------------------------------


def test_shares_by_rank() -> None:
    sizes = dict.fromkeys("abcd", 100)
    shares = densities.by_rank({"a": 5.0, "b": 0.1, "c": 7.0, "d": 0.2}, sizes, 0.5, 0.1)
    # Least sensitive first: b, d, a, c at the middles of four equal parts of [0.6, 0.4].
    assert shares == pytest.approx({"b": 0.575, "d": 0.525, "a": 0.475, "c": 0.425})
    assert list(shares) == list("abcd")
    uneven = {"a": 10, "b": 1000, "c": 37, "d": 400}
    for sparsity in (0.05, 0.5, 0.9, 0.97):
        shares = densities.by_rank({"a": 5.0, "b": 0.1, "c": 7.0, "d": 0.2}, uneven, sparsity, 0.1)
        assert sum(shares[n] * uneven[n] for n in uneven) / 1447 == pytest.approx(sparsity)
        assert all(0 <= share <= 1 for share in shares.values())


def test_shares_by_outliers_follow_the_published_formula() -> None:
    outliers = {"0": 0.01, "1": 0.05, "2": 0.02}
    shares = densities.by_outliers(outliers, dict.fromkeys(outliers, 10), 0.7, 0.08)
    ratios = np.array(list(outliers.values()))
    ratios = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 0.16
    expected = ratios - ratios.mean() + (1 - 0.7)
    np.testing.assert_allclose([1 - share for share in shares.values()], expected)
    assert densities.by_outliers(dict.fromkeys("ab", 0.1), dict.fromkeys("ab", 1), 0.5, 0.08) == {"a": 0.5, "b": 0.5}


def test_outlier_share_by_hand() -> None:
    scores = {"q": torch.tensor([[1.0, 1.0, 1.0]]), "k": torch.tensor([[1.0, 1.0, 25.0]])}
    assert densities.outlier_share(scores) == pytest.approx(0.0)  # the mean is 5
    assert densities.outlier_share(scores, threshold=4.9) == pytest.approx(1 / 6)
    weight, norms = torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 4.0])
    assert densities.wanda_scores(weight, norms).tolist() == [[3.0, 8.0]]


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sparsity is None"),
        ({"sparsity": 1.0}, "sparsity is 1.0; allowed: a number, 0 to 0.99"),
        ({"sparsity": 0.5, "pattern": "3:5"}, "pattern is '3:5'; allowed: 'unstructured', or 'N:M'"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "pattern 2:4 prunes 0.5; leave sparsity out"),
        ({"pattern": "2:4", "allocation": "owl"}, "allocation is 'owl'; allowed: None, 'uniform'"),
        ({"sparsity": 0.5, "method": "obs"}, "method is 'obs'; allowed: 'magnitude', 'wanda', 'sparsegpt', 'mixed'"),
        ({"sparsity": 0.5, "block_size": 100}, "block_size is 100; with unstructured it must be a multiple of 8"),
        ({"sparsity": 0.5, "refine": -1}, "refine is -1"),
        ({"sparsity": 0.5, "values": "float64"}, "values is 'float64'"),
        ({"sparsity": 0.5, "quantize": 3}, "quantize is 3; allowed: None or a CLAQConfig"),
        ({"sparsity": 0.5, "quantize": CLAQConfig(3), "values": "int8"}, "leave values out"),
        ({"sparsity": 0.5, "quantize": CLAQConfig(3, published=True)}, "published=True"),
        ({"pattern": "2:4", "quantize": CLAQConfig(2.5)}, "2.5 bits for the codes; with the pattern 2:4 it must be"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig(**settings)


def test_settings_survive_a_round_trip() -> None:
    config = SparseConfig(pattern="2:4", quantize=CLAQConfig(4, outliers=0.0), refine=1)
    assert config.sparsity == 0.5 and config.allocation == "uniform"
    assert SparseConfig.from_dict(config.to_dict()) == config
    assert SparseConfig(0.5).allocation == "fisher" and SparseConfig(0.5, method="wanda").allocation == "uniform"
    with pytest.raises(ValueError, match="SparseConfig does not know 'bits'"):
        SparseConfig.from_dict({"sparsity": 0.5, "bits": 2})


def test_weights_beyond_fp16_are_pruned_in_their_own_dtype() -> None:
    weight, hessian = problem(8, 16, 10, torch.bfloat16)
    large = prune(weight * 1e6, hessian, SparseConfig(0.5, method="sparsegpt"))
    assert large.pruned == 0.5 and large.error == pytest.approx(
        prune(weight, hessian, SparseConfig(0.5, method="sparsegpt")).error, rel=0.02
    )
    with pytest.raises(ValueError, match="fp16, which ends at 65504"):
        prune(weight * 1e6, hessian, SparseConfig(0.5, quantize=CLAQConfig(3)))


def test_no_weights_and_bad_weights() -> None:
    _, hessian = problem(2, 8, 0)
    with pytest.raises(ValueError, match="weights is empty"):
        pruning.prune_linears({}, hessian, SparseConfig(0.5), {})
    with pytest.raises(ValueError, match="not finite"):
        prune(torch.full((2, 8), torch.nan), hessian, SparseConfig(0.5))
