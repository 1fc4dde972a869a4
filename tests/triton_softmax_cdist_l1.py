"""softmax_cdist_l1 in Triton's interpreter, on a CPU; tests/test_softmax_cdist_l1.py runs this file with TRITON_INTERPRET=1.

bfloat16 is left out: the interpreter's arithmetic of it is wrong (docs/kernels-triton.md).
"""

import math

import pytest
import torch

import pyllmq
from pyllmq.functional import softmax_cdist_l1

from .test_softmax_cdist_l1 import check_gradient, exact_distance


@pytest.fixture(autouse=True)
def only_triton():
    with pyllmq.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: empty_like(tensor, **options).fill_(math.nan))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (16, 16, 32), (17, 5, 130), (5, 5, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_distances_and_both_gradients(shape, dtype):
    rows, teacher_rows, columns = shape
    student, teacher = (torch.randn(2, n, columns).mul(3).to(dtype).requires_grad_() for n in (rows, teacher_rows))
    grad = torch.randn(2, rows, teacher_rows)
    distance = softmax_cdist_l1(student, teacher, 1.5)
    student_grad, teacher_grad = torch.autograd.grad(distance, (student, teacher), grad)
    student, teacher = student.detach(), teacher.detach()
    torch.testing.assert_close(distance.detach().double(), exact_distance(student, teacher, 1.5), rtol=0, atol=2e-6)
    check_gradient(student_grad, student, teacher, 1.5, grad)
    check_gradient(teacher_grad, teacher, student, 1.5, grad.mT)


def test_a_gradient_in_many_passes(monkeypatch):
    from pyllmq.triton_kernels import softmax_cdist_l1 as kernels

    monkeypatch.setattr(kernels, "STAGED_BYTES", 4 * kernels.SIGN_ROWS * 100 * 2)
    student, teacher = torch.randn(3, 19, 100).half().requires_grad_(), torch.randn(3, 4, 100).half()
    grad = torch.randn(3, 19, 4)
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


def test_no_rows_and_the_same_bits_every_time():
    assert softmax_cdist_l1(torch.randn(0, 5), torch.randn(3, 5), 1.0).shape == (0, 3)
    student, teacher = torch.randn(20, 300), torch.randn(20, 300)
    assert torch.equal(softmax_cdist_l1(student, teacher, 1.0), softmax_cdist_l1(student, teacher, 1.0))
