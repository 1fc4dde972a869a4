"""Exact 1-D k-means against enumeration, sklearn, and its own properties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyllmq import _cpu
from pyllmq.functional import kmeans_1d, kmeans_1d_errors, pack_codes

pytestmark = pytest.mark.kernels


def error_of(values: Tensor, centroids: Tensor, codes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of squared errors of each problem, fp64 [C]."""
    squares = (values.double() - centroids.double().gather(1, codes.long())).square()
    return (squares if weights is None else squares * weights.double()).sum(1)


def smallest_error(values: Tensor, k: int, weights: Tensor | None = None) -> float:
    """The optimum by trying every way to cut the sorted values into k intervals (fp64)."""
    x, order = values.double().sort()
    w = torch.ones_like(x) if weights is None else weights.double()[order]
    n = len(x)

    def interval(begin: int, end: int) -> float:
        mass = w[begin:end].sum()
        if mass == 0:
            return 0.0
        mean = (w[begin:end] * x[begin:end]).sum() / mass
        return float((w[begin:end] * (x[begin:end] - mean).square()).sum())

    table = {(a, b): interval(a, b) for a in range(n) for b in range(a + 1, n + 1)}
    cuts = itertools.combinations(range(1, n), min(k, n) - 1)
    return min(sum(table[pair] for pair in itertools.pairwise((0, *cut, n))) for cut in cuts)


def assert_nearest(values: Tensor, centroids: Tensor, codes: Tensor) -> None:
    distance = (values.double()[:, :, None] - centroids.double()[:, None, :]).abs()
    chosen = distance.gather(2, codes.long()[:, :, None])[:, :, 0]
    assert torch.equal(chosen, distance.amin(2))
    assert bool((centroids.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 5, 13])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_enumeration(n: int, k: int, weighted: bool) -> None:
    torch.manual_seed(100 * n + k)
    values = torch.randn(6, n)
    values[3:] = values[3:].mul(2).round()  # duplicates
    weights = torch.rand(6, n) * (torch.rand(6, n) > 0.2) if weighted else None
    if weights is not None:
        weights[:, 0] = 1.0
    centroids, codes = kmeans_1d(values, k, weights)
    assert centroids.dtype == torch.float32 and codes.dtype == torch.uint8
    assert_nearest(values, centroids, codes)
    best = [smallest_error(values[c], k, None if weights is None else weights[c]) for c in range(6)]
    # centroids are rounded to fp32: relative 6e-8 of a value of about 1, squared, over n points
    torch.testing.assert_close(
        error_of(values, centroids, codes, weights), torch.tensor(best, dtype=torch.float64), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("k", [4, 8, 16])
@pytest.mark.parametrize("heavy_tails", [False, True])
def test_sklearn_is_never_better(k: int, heavy_tails: bool) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(k)
    values = torch.distributions.StudentT(3.0).sample((3, 700)) if heavy_tails else torch.randn(3, 700)
    weights = torch.rand(3, 700)
    for w in (None, weights):
        ours = error_of(values, *kmeans_1d(values, k, w), w)
        for c in range(3):
            fit = cluster.KMeans(k, n_init=10, random_state=0).fit(
                values[c, :, None].double().numpy(), sample_weight=None if w is None else w[c].double().numpy()
            )
            assert ours[c] <= fit.inertia_ * (1 + 1e-6)


def test_lloyd_is_a_local_optimum_near_the_exact_one() -> None:
    torch.manual_seed(0)
    values = torch.randn(16, 2000)
    exact = error_of(values, *kmeans_1d(values, 8))
    centroids, codes = kmeans_1d(values, 8, method="lloyd")
    assert_nearest(values, centroids, codes)
    lloyd = error_of(values, centroids, codes)
    assert bool((lloyd >= exact * (1 - 1e-6)).all()) and lloyd.sum() < 1.1 * exact.sum()
    for code in range(8):  # at convergence a centroid is the mean of its own points
        member = codes == code
        mean = (values.double() * member).sum(1) / member.sum(1)
        torch.testing.assert_close(mean.float(), centroids[:, code], rtol=1e-5, atol=1e-6)
    again = kmeans_1d(values, 8, method="lloyd")
    other = kmeans_1d(values, 8, method="lloyd", seed=1)
    assert torch.equal(again[0], centroids) and not torch.equal(other[0], centroids)


def test_a_common_offset_changes_nothing() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 3000).mul(256).round().div(256)  # exact in fp32 at 1e4 too
    moved = values + 1e4
    assert torch.equal(moved - 1e4, values)
    centroids, codes = kmeans_1d(values, 16)
    moved_centroids, moved_codes = kmeans_1d(moved, 16)
    torch.testing.assert_close(moved_centroids - 1e4, centroids, rtol=0, atol=1e-3)  # one ulp at 1e4 is 1e-3
    optimum = error_of(values, centroids, codes)
    member = torch.nn.functional.one_hot(moved_codes.long(), 16).double()  # [4, 3000, 16]
    means = (values.double()[:, :, None] * member).sum(1) / member.sum(1)
    # Rounded at 1e4, two centroids part their neighbours a little to the left or right of the middle.
    torch.testing.assert_close(error_of(values, means, moved_codes), optimum, rtol=1e-5, atol=0)


def test_same_bits_from_any_number_of_threads_and_from_the_scalar_code() -> None:
    torch.manual_seed(0)
    values = torch.distributions.StudentT(3.0).sample((9, 1500))
    values[4] = values[4].mul(4).round()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kmeans_1d(values, 7))
    finally:
        torch.set_num_threads(threads)
    try:
        _cpu.set_isa("scalar")
        scalar = kmeans_1d(values, 7)
    finally:
        _cpu.set_isa(_cpu.supported_isas()[0])
    for centroids, codes in (*results[1:], scalar):
        assert torch.equal(centroids, results[0][0]) and torch.equal(codes, results[0][1])


def test_fewer_distinct_values_than_centroids() -> None:
    values = torch.tensor([[2.0, -1.0, 2.0, -0.0, 0.0]])
    centroids, codes = kmeans_1d(values, 5)
    assert centroids.tolist() == [[-1.0, 0.0, 2.0, 2.0, 2.0]]
    assert codes.tolist() == [[2, 0, 2, 1, 1]]
    assert kmeans_1d(torch.full((2, 3), 7.5), 256)[0].unique().tolist() == [7.5]
    assert kmeans_1d(torch.tensor([[3.0]]), 1)[0].tolist() == [[3.0]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["exact", "windowed"])
def test_one_run_gives_every_number_of_centroids(method: str, weighted: bool) -> None:
    torch.manual_seed(0)
    values = torch.distributions.StudentT(3.0).sample((5, 2500))
    values[3] = values[3].mul(8).round()  # fewer distinct values than the largest k
    values[4] = 2.5
    weights = torch.rand(5, 2500) if weighted else None
    ks = [7, 1, 2, 100, 16]
    together = kmeans_1d(values, ks, weights, method)
    errors = kmeans_1d_errors(values, ks, weights, method)
    assert errors.dtype == torch.float64 and errors.shape == (5, len(ks))
    for i, k in enumerate(ks):
        centroids, codes = together[i]
        assert_nearest(values, centroids, codes)
        alone = kmeans_1d(values, k, weights, method)
        if method == "exact":  # windows start from cells, whose number depends on the largest k
            assert torch.equal(centroids, alone[0]) and torch.equal(codes, alone[1])
        found = error_of(values, centroids, codes, weights)
        torch.testing.assert_close(found, errors[:, i], rtol=1e-5, atol=1e-9)  # centroids are rounded to fp32


def test_windowed_is_close_to_the_optimum_and_never_below_it() -> None:
    torch.manual_seed(0)
    gauss, tails = torch.randn(24, 4096), torch.distributions.StudentT(3.0).sample((24, 4096))
    clumps = torch.randn(8, 4096) * 0.01 + torch.randint(0, 20, (8, 4096)).square()
    far = torch.randn(4, 4096)
    far[:, 7] = 1e3
    values, weights = torch.cat([gauss, tails, clumps, far]), torch.rand(60, 4096)
    ks = [2, 4, 8, 16]
    for w in (None, weights):
        ratio = kmeans_1d_errors(values, ks, w, "windowed") / kmeans_1d_errors(values, ks, w)
        assert bool((ratio > 1 - 1e-9).all())
        assert bool((ratio.mean(0) < 1 + 1e-3).all()) and float(ratio.max()) < 1.02


def test_packed_codes() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 101)
    for k, bits in ((1, 1), (2, 1), (3, 2), (16, 4), (33, 6), (256, 8)):
        codes = kmeans_1d(values, k)[1]
        assert torch.equal(kmeans_1d(values, k, packed=True)[1], pack_codes(codes, bits))


def test_zero_weight_moves_nothing_and_is_still_coded() -> None:
    values = torch.tensor([[0.0, 1.0, 10.0, 11.0, 1000.0, -1000.0]])
    centroids, codes = kmeans_1d(values, 2, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]))
    assert centroids.tolist() == [[0.5, 10.5]] and codes.tolist() == [[0, 0, 1, 1, 1, 0]]


def test_half_centroids_are_rounded_before_codes_are_assigned() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 600) * torch.tensor([[1.0], [3e-5], [4e-8], [1.2e4]])  # normal, subnormal and large in fp16
    single = kmeans_1d(values, 8)[0]
    centroids, codes = kmeans_1d(values, 8, centroid_dtype=torch.float16)
    assert centroids.dtype == torch.float16 and torch.equal(centroids, single.half())
    assert_nearest(values, centroids, codes)
    assert len(centroids[2].unique()) < 8  # 6e-8 apart, some coincide: the first of them is used
    used = codes[2].unique().long()
    assert bool((centroids[2][used[1:]] != centroids[2][used[1:] - 1]).all())
    with pytest.raises(ValueError, match=r"centroid of values\[1\] \(up to 70000\) does not fit into fp16"):
        kmeans_1d(torch.tensor([[1.0], [70000.0]]), 1, centroid_dtype=torch.float16)


def test_weights_repeat_points() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 50)
    counts = torch.randint(0, 4, (50,))
    counts[0] = 1
    weighted = kmeans_1d(values, 6, counts.float())[0]
    repeated = kmeans_1d(values.repeat_interleave(counts, 1), 6)[0]
    torch.testing.assert_close(weighted, repeated, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kmeans_1d(values, 6, counts.expand(3, -1).float())[0], weighted, rtol=0, atol=0)


def test_weights_so_far_apart_that_one_vanishes() -> None:
    values = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    centroids, codes = kmeans_1d(values, 2, torch.tensor([1.0, 1e30, 1.0, 1e30]))
    assert bool(torch.isfinite(centroids).all()) and codes.tolist() == [[0, 0, 0, 1]]
    torch.testing.assert_close(centroids, torch.tensor([[0.0, 2.0]]), rtol=0, atol=1e-6)


def test_sizes_past_sixteen_bits_and_the_largest_k() -> None:
    torch.manual_seed(0)
    values = torch.randn(1, 70_000)
    centroids, codes = kmeans_1d(values, 4)
    best = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])  # the Lloyd-Max quantizer of a Gaussian at 2 bits
    torch.testing.assert_close(centroids[0], best, rtol=0, atol=0.08)  # 6 standard deviations
    assert_nearest(values, centroids, codes)
    centroids, codes = kmeans_1d(values[:, :3000], 256)
    assert codes.max() == 255
    assert_nearest(values[:, :3000], centroids, codes)


def test_dtypes_layouts_and_no_problem_at_all() -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 5).t()
    expected = kmeans_1d(values.contiguous(), 4)
    for given_values in (values, values.double()):
        centroids, _ = kmeans_1d(given_values, 4)
        assert centroids.dtype == given_values.dtype and torch.equal(centroids.float(), expected[0])
    half = values.bfloat16()
    assert torch.equal(kmeans_1d(half, 4)[0], kmeans_1d(half.float(), 4)[0])
    centroids, codes = kmeans_1d(torch.empty(0, 5), 4)
    assert centroids.shape == (0, 4) and codes.shape == (0, 5)


@pytest.mark.parametrize("method", ["exact", "windowed", "lloyd"])
@pytest.mark.parametrize(("offset", "unit"), [(1.7e9, 1.0), (-3e15, 1.0), (1.0, 1e-12), (0.0, 1e-60), (1e30, 1e18)])
def test_float64_values_far_from_zero_or_tiny(method: str, offset: float, unit: float) -> None:
    """Three clear groups whose distances float32 does not see, as well told apart as without offset and unit."""
    groups = torch.cat([start + torch.arange(20.0, dtype=torch.float64) for start in (0, 60, 120)])
    values = torch.stack([groups, groups.flip(0) * 2]) * unit + offset
    centroids, codes = kmeans_1d(values, 3, method=method)
    assert centroids.dtype == torch.float64
    assert all(row.bincount(minlength=3).tolist() == [20, 20, 20] for row in codes)
    best = 3 * 665.0 * unit**2 * torch.tensor([1.0, 4.0], dtype=torch.float64)  # sum (0 .. 19 - 9.5)^2 = 665
    torch.testing.assert_close(error_of(values, centroids, codes), best, rtol=1e-2, atol=0)
    if method != "lloyd":
        errors = kmeans_1d_errors(values, [1, 3], method=method)
        torch.testing.assert_close(errors[:, 1], best, rtol=1e-2, atol=0)
        alone = (values - values.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(errors[:, 0], alone, rtol=1e-2, atol=0)


def test_float64_values_with_one_far_off() -> None:
    values = 1.7e9 + torch.tensor([[0.0, 1, 60, 61, 120, 121, -1.7e9]], dtype=torch.float64)
    centroids, codes = kmeans_1d(values, 4, torch.ones(7))
    assert sorted(codes[0].bincount(minlength=4).tolist()) == [1, 2, 2, 2]
    assert torch.equal(kmeans_1d(values, 4, centroid_dtype=torch.float32)[0], kmeans_1d(values.float(), 4)[0])
    of_floats = kmeans_1d(values.float(), 4, centroid_dtype=torch.float64)[0]
    assert of_floats.dtype == torch.float64 and torch.equal(of_floats.float(), kmeans_1d(values.float(), 4)[0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60),
    st.lists(st.just(0.0) | st.floats(2**-10, 100, width=32), min_size=60, max_size=60),
)
def test_properties(values: list[float], weights: list[float]) -> None:
    x = torch.tensor([values])
    w = torch.tensor([weights[: len(values)]])
    w[0, 0] = 1.0
    scale = float((w * x.square()).sum()) + 1e-30
    for given_weights in (None, w):
        previous = float("inf")
        for k in (1, 2, 3, 4, 9, 64):
            centroids, codes = kmeans_1d(x, k, given_weights)
            assert_nearest(x, centroids, codes)
            error = float(error_of(x, centroids, codes, given_weights))
            # fp32 centroids and fp64 gains: each worth about 1e-14 of the squared values
            assert error <= previous + 1e-12 * scale
            previous = error
        assert previous == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(4), 2), ValueError, r"shape \(4,\); it must be \[C, n\].*values.unsqueeze\(0\)"),
        ((torch.randn(2, 3, 4), 2), ValueError, r"shape \(2, 3, 4\)"),
        ((torch.ones(2, 3, dtype=torch.int32), 2), TypeError, "torch.int32"),
        (([[1.0]], 2), TypeError, "list"),
        ((torch.randn(2, 0), 2), ValueError, "n = 0 values"),
        ((torch.randn(2, 3), 0), ValueError, "k is 0; allowed: an integer from 1 to 256"),
        ((torch.randn(2, 3), 257), ValueError, "k is 257"),
        ((torch.randn(2, 3), 2.0), ValueError, "k is 2.0"),
        ((torch.randn(2, 3), [2, 300]), ValueError, "k is 300; .* or a sequence of such"),
        ((torch.randn(2, 3), []), ValueError, "k is empty"),
        ((torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), 2), ValueError, r"values\[1, 1\] is nan"),
        ((torch.tensor([[1.0, 1e300]], dtype=torch.float64), 2), ValueError, r"values\[0, 1\] is inf"),
        ((torch.randn(2, 3), 2, torch.ones(2)), ValueError, r"weights has .* \(2,\); allowed: \[2, 3\] or \[3\]"),
        ((torch.randn(1, 2), 2, torch.tensor([1.0, -1.0])), ValueError, r"weights\[1\] is -1.0; allowed: .* >= 0"),
        ((torch.randn(1, 2), 2, torch.tensor([[1.0, float("inf")]])), ValueError, r"weights\[0, 1\] is inf"),
        ((torch.randn(2, 2), 2, torch.tensor([[1.0, 1], [0, 0]])), ValueError, r"weights\[1\] are all 0"),
        (
            (torch.randn(2, 2), 2, None, "kmeans++"),
            ValueError,
            "method is 'kmeans\\+\\+'; allowed: 'exact', 'windowed', 'lloyd'",
        ),
        ((torch.randn(2, 2), 2, None, "lloyd", -1), ValueError, "seed is -1"),
        ((torch.randn(2, 2), 2, None, "exact", 0, torch.bfloat16), ValueError, "centroid_dtype is torch.bfloat16"),
    ],
)
def test_bad_input_says_what_is_allowed(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kmeans_1d(*arguments)


def test_errors_say_what_is_allowed() -> None:
    with pytest.raises(TypeError, match=r"k is 4; it must be a sequence of numbers, such as range\(1, 4 \+ 1\)"):
        kmeans_1d_errors(torch.randn(2, 9), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is 'lloyd'; allowed: 'exact', 'windowed'"):
        kmeans_1d_errors(torch.randn(2, 9), [4], method="lloyd")


def test_matches_numpy_reference_dynamic_program() -> None:
    """O(k n^2) textbook dynamic program in fp64, at a size that enumeration cannot reach."""
    torch.manual_seed(3)
    values = torch.distributions.StudentT(2.0).sample((1, 200))
    x = np.sort(values[0].double().numpy())
    sums, squares = np.concatenate([[0], np.cumsum(x)]), np.concatenate([[0], np.cumsum(x * x)])
    begin, end = np.meshgrid(np.arange(201), np.arange(201), indexing="ij")
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = (squares[end] - squares[begin]) - (sums[end] - sums[begin]) ** 2 / (end - begin)
    cost[begin >= end] = np.inf
    best = cost[0].copy()
    for k in range(2, 13):
        best = (best[:, None] + cost).min(0)
        ours = float(error_of(values, *kmeans_1d(values, k))[0])
        assert ours == pytest.approx(best[200], rel=1e-6)
