"""Every back end of kmeans_1d against the CPU's, whose optimum test_kmeans_1d.py compares with enumeration."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import pyllmq
from pyllmq.backends.reference import kmeans_1d as reference
from pyllmq.functional import kmeans_1d, kmeans_1d_errors

from .cuda_emulator import emulated  # noqa: F401

pytestmark = pytest.mark.kernels

KS = [1, 2, 5, 16]


@contextmanager
def backend(name: str, request: pytest.FixtureRequest):
    if name == "cuda":
        request.getfixturevalue("emulated")
    with pyllmq.use_backend(name):
        yield


def problems(n: int) -> Tensor:
    """Normal, heavy tails, duplicates, constant."""
    values = torch.randn(4, n)
    values[1] = torch.distributions.StudentT(3.0).sample((n,))
    values[2] = values[2].mul(2).round()
    values[3] = -1.5
    return values


@pytest.mark.parametrize("name", ["reference", "cuda"])
@pytest.mark.parametrize("weighting", ["none", "shared", "own"])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 97])
def test_equals_the_cpu(name: str, weighting: str, n: int, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(n)
    values = problems(n)
    shape = {"none": None, "shared": (n,), "own": (4, n)}[weighting]
    weights = None if shape is None else torch.rand(shape) * (torch.rand(shape) > 0.2)
    if weights is not None:
        weights[..., 0] = 1.0
    with pyllmq.use_backend("cpu"):
        expected = kmeans_1d(values, KS, weights)
        errors = kmeans_1d_errors(values, KS, weights)
    with backend(name, request):
        found = kmeans_1d(values, KS, weights)
        found_errors = kmeans_1d_errors(values, KS, weights)
        windowed = kmeans_1d(values, 5, weights, method="windowed")
        packed = kmeans_1d(values, 5, weights, packed=True)[1]
        half, _ = kmeans_1d(values, 5, weights, centroid_dtype=torch.float16)
    torch.testing.assert_close(found_errors, errors, rtol=1e-9, atol=1e-9)
    unique = [0, 1, 3]  # equal steps between duplicates allow several optima
    for (centroids, codes), (their_centroids, their_codes) in zip(found, expected, strict=True):
        torch.testing.assert_close(centroids[unique], their_centroids[unique], rtol=1e-6, atol=1e-6)
        assert torch.equal(codes[unique], their_codes[unique])
    assert torch.equal(windowed[0], found[2][0]) and torch.equal(half, found[2][0].half())
    assert torch.equal(packed, reference.pack_codes(found[2][1], 3))


def test_schedules_parts_and_an_empty_batch_change_no_bit(emulated, monkeypatch) -> None:  # noqa: F811
    torch.manual_seed(0)
    values = problems(300)
    with pyllmq.use_backend("cuda"):
        expected = kmeans_1d(values, 7)
        emulated.emulator.set_schedule(last_thread_first=True, last_block_first=True)
        assert all(map(torch.equal, kmeans_1d(values, 7), expected))
        monkeypatch.setattr(reference, "KMEANS_TABLE_BYTES", 1)
        assert all(map(torch.equal, kmeans_1d(values, 7), expected))
        centroids, codes = kmeans_1d(values[:0], 7)
    assert centroids.shape == (0, 7) and codes.shape == (0, 300)


def test_lloyd_is_refused_with_the_reason() -> None:
    with (
        pyllmq.use_backend("reference"),
        pytest.raises(pyllmq.NoKernelError, match="reference.kmeans_1d: finds the opt"),
    ):
        kmeans_1d(torch.randn(1, 9), 2, method="lloyd")
