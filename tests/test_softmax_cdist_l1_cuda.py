"""softmax_cdist_l1's CUDA kernels on the emulator (tests/cuda_emulator.py): what a CPU can prove of them.

Rows below, at and above a group of 16 and a block of 64; columns below, at and above a tile of 32 and a block of 256.
"""

import itertools
import math

import pytest
import torch

import pyllmq
from pyllmq.functional import softmax_cdist_l1

from .cuda_emulator import emulated  # noqa: F401
from .test_softmax_cdist_l1 import check_gradient, exact_distance

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]


@pytest.fixture(autouse=True)
def only_cuda(emulated):  # noqa: F811
    with pyllmq.use_backend("cuda"):
        yield


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 31), (16, 16, 32), (65, 33, 300), (9, 66, 2100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distances_and_both_gradients(shape, dtype):
    rows, teacher_rows, columns = shape
    student = torch.randn(2, rows, columns).mul(3).to(dtype).requires_grad_()
    teacher = torch.randn(2, teacher_rows, columns).mul(3).requires_grad_()
    grad = torch.randn(2, rows, teacher_rows)
    distance = softmax_cdist_l1(student, teacher, 1.5)
    student_grad, teacher_grad = torch.autograd.grad(distance, (student, teacher), grad)
    student, teacher = student.detach(), teacher.detach()
    torch.testing.assert_close(distance.detach().double(), exact_distance(student, teacher, 1.5), rtol=0, atol=2e-6)
    check_gradient(student_grad, student, teacher, 1.5, grad)
    check_gradient(teacher_grad, teacher, student, 1.5, grad.mT)


def test_a_gradient_in_many_passes():
    """104 groups of 16 rows, even if one row is all there is, fill what is staged at once."""
    student, teacher = torch.randn(107, 1, 5000).half().requires_grad_(), torch.randn(107, 1, 5000).half()
    grad = torch.randn(107, 1, 1)
    (actual,) = torch.autograd.grad(softmax_cdist_l1(student, teacher, 2.0), student, grad)
    check_gradient(actual, student.detach(), teacher, 2.0, grad)


def test_equal_rows_and_rows_without_a_softmax():
    student = torch.randn(6, 90).mul(4)
    teacher = student.clone()
    teacher[1, 5], teacher[2] = math.nan, -math.inf
    student.requires_grad_()
    distance = softmax_cdist_l1(student, teacher, 2.0)
    kept = [0, 3, 4, 5]
    assert bool(distance[:, 1:3].isnan().all()) and bool(distance[:, kept].isfinite().all())
    assert not distance.diagonal()[kept].any()
    (grad,) = torch.autograd.grad(softmax_cdist_l1(student, student.detach(), 2.0).diagonal().sum(), student)
    assert not grad.any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_rows_on_a_side(shape):
    student = torch.randn(shape[0], 20, requires_grad=True)
    distance = softmax_cdist_l1(student, torch.randn(shape[1], 20), 1.0)
    distance.sum().backward()
    assert distance.shape == shape and not student.grad.any()


def test_every_order_of_threads_and_blocks_gives_the_same_bits(emulated):  # noqa: F811
    student, teacher = torch.randn(20, 700, requires_grad=True), torch.randn(70, 700)
    found = []
    for last_thread_first, last_block_first in itertools.product((False, True), repeat=2):
        emulated.emulator.set_schedule(last_thread_first=last_thread_first, last_block_first=last_block_first)
        distance = softmax_cdist_l1(student, teacher, 2.0)
        found.append((distance, *torch.autograd.grad(distance.square().sum(), student)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
