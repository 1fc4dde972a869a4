"""softmax_cdist_l1 against fp64, on every back end and instruction set; gradients, threads, bad input.

Shapes: rows below, at and above a group of 4 and a block of 64; columns below, at and above a register and a tile of 512,
and enough tiles that one block is split over tasks. Left out: more than two blocks a side (the same loops).
"""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyllmq
from pyllmq.backends.cpu import runtime as cpu
from pyllmq.functional import softmax_cdist_l1

from .oracle import assert_as_good_as_torch, vector_isas

pytestmark = pytest.mark.kernels

ISAS = vector_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (1, 3, 2), (5, 2, 17), (4, 4, 512), (64, 64, 513), (65, 70, 130), (3, 129, 1100), (7, 6, 40000)]
EPSILON = torch.finfo(torch.float32).eps


@contextmanager
def running(backend):
    """`backend` is "reference" or an instruction set of the C++ kernels."""
    isa = cpu.kernels().isa()
    try:
        if backend != "reference":
            cpu.kernels().set_isa(backend)
        with pyllmq.use_backend("reference" if backend == "reference" else "cpu"):
            yield
    finally:
        cpu.kernels().set_isa(isa)


def exact_distance(student, teacher, temperature):
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (student, teacher))
    return torch.stack([(p - q[..., j : j + 1, :]).abs().sum(-1) for j in range(q.shape[-2])], -1)


def probability_error(logits, temperature):
    """Relative error of an fp32 softmax: the exponent, as large as the logits' range, is rounded three times."""
    finite = logits[logits.isfinite()].double()
    return EPSILON * (16 + 2 * float(finite.max() - finite.min()) / temperature)


def exact_gradient(student, teacher, temperature, grad):
    """(gradient in the student's logits, by how much it may be off where two probabilities are too near to be told apart)."""
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (student, teacher))
    h, unsure = torch.zeros_like(p), torch.zeros_like(p)
    near = probability_error(student, temperature) + probability_error(teacher, temperature)
    for j in range(q.shape[-2]):
        difference, weight = p - q[..., j : j + 1, :], grad.double()[..., j : j + 1]
        h += weight * difference.sign()
        close = difference.abs() <= near * torch.maximum(p, q[..., j : j + 1, :])
        unsure += 2 * weight.abs() * close
    slack = p * (unsure + (p * unsure).sum(-1, keepdim=True)) / temperature
    return p * (h - (p * h).sum(-1, keepdim=True)) / temperature, slack


def check_gradient(actual, logits, other, temperature, grad):
    exact, slack = exact_gradient(logits, other, temperature, grad)
    weight = grad.double().abs().sum(-1, keepdim=True)
    p = torch.softmax(logits.double() / temperature, -1)
    # the probability, h to a few roundings of the weights' sum, then one rounding to the logits' dtype
    relative = 2 * probability_error(logits, temperature)
    allowed = relative * weight * p / temperature + torch.finfo(actual.dtype).eps * exact.abs() + slack
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    assert actual.dtype == logits.dtype and actual.shape == logits.shape
    assert bool(((actual.double() - exact).abs() <= allowed + smallest).all())


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that a kernel fills comes filled with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: empty_like(tensor, **options).fill_(math.nan))


@pytest.mark.parametrize("backend", [*ISAS, "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_distances_and_both_gradients(backend, shape, temperature, poisoned):
    rows, teacher_rows, columns = shape
    student, teacher = (torch.randn(n, columns).mul(3).requires_grad_() for n in (rows, teacher_rows))
    grad = torch.randn(rows, teacher_rows)
    with running(backend):
        distance = softmax_cdist_l1(student, teacher, temperature)
        student_grad, teacher_grad = torch.autograd.grad(distance, (student, teacher), grad)
    student, teacher = student.detach(), teacher.detach()
    softmaxes = [torch.softmax(logits / temperature, -1) for logits in (student, teacher)]
    plain = torch.cdist(*softmaxes, p=1.0)
    turned = torch.cdist(*(p.flip(-1) for p in softmaxes), p=1.0)
    assert_as_good_as_torch(distance.detach(), exact_distance(student, teacher, temperature), plain, turned, factor=4)
    check_gradient(student_grad, student, teacher, temperature, grad)
    check_gradient(teacher_grad, teacher, student, temperature, grad.T)


@pytest.mark.parametrize("backend", [*ISAS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes_in_any_pair(backend, dtype, teacher_dtype, poisoned):
    student = torch.randn(19, 700).mul(4).to(dtype).requires_grad_()
    teacher = torch.randn(6, 700).mul(4).to(teacher_dtype)
    grad = torch.randn(19, 6)
    with running(backend):
        distance = softmax_cdist_l1(student, teacher, 1.5)
        (actual,) = torch.autograd.grad(distance, student, grad)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(
        distance.detach().double(), exact_distance(student.detach(), teacher, 1.5), rtol=0, atol=4e-6
    )
    check_gradient(actual, student.detach(), teacher, 1.5, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_in_many_passes(dtype):
    """More rows than are staged at once for 16-bit gradients, several batches, and a last block that is not whole."""
    student, teacher = torch.randn(3, 37, 30000).to(dtype).requires_grad_(), torch.randn(3, 5, 30000).to(dtype)
    grad = torch.randn(3, 37, 5)
    (actual,) = torch.autograd.grad(softmax_cdist_l1(student, teacher, 2.0), student, grad)
    check_gradient(actual, student.detach(), teacher, 2.0, grad)


@pytest.mark.parametrize("backend", [*ISAS, "reference"])
def test_equal_rows_have_distance_and_gradient_zero(backend):
    student = torch.randn(9, 3000).mul(5).requires_grad_()
    with running(backend):
        distance = softmax_cdist_l1(student, student.detach().clone(), 2.0)
        (grad,) = torch.autograd.grad(distance.diagonal().sum(), student)
    assert torch.equal(distance.diagonal(), torch.zeros(9)) and not grad.any()
    assert bool((distance.detach() + 3 * torch.eye(9) > 0.1).all())


@pytest.mark.parametrize("backend", [*ISAS, "reference"])
def test_disjoint_distributions_are_two_apart(backend):
    logits = torch.full((2, 700), -200.0)
    logits[0, :300], logits[1, 300:] = 1.0, 1.0
    with running(backend):
        distance = softmax_cdist_l1(logits[:1], logits, 1.0)
    torch.testing.assert_close(distance, torch.tensor([[0.0, 2.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [*ISAS, "reference"])
def test_a_part_of_the_vocabulary_masked_out(backend):
    student, teacher = torch.randn(6, 600), torch.randn(7, 600)
    student[:, 100:300] = teacher[:, 250:] = -math.inf
    student.requires_grad_()
    grad = torch.randn(6, 7)
    with running(backend):
        distance = softmax_cdist_l1(student, teacher, 2.0)
        (actual,) = torch.autograd.grad(distance, student, grad)
    torch.testing.assert_close(
        distance.detach().double(), exact_distance(student.detach(), teacher, 2.0), rtol=0, atol=2e-6
    )
    assert not actual[:, 100:300].any()
    check_gradient(actual, student.detach(), teacher, 2.0, grad)


@pytest.mark.parametrize("backend", [*ISAS, "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("columns", [30, 1200])
def test_a_row_without_a_softmax_is_nan_and_no_other(backend, bad, columns):
    student, teacher = torch.randn(5, columns), torch.randn(6, columns)
    expected = exact_distance(student, teacher, 1.0)
    if bad == -math.inf:
        student[2], teacher[4] = bad, bad
    else:
        student[2, columns // 2], teacher[4, -1] = bad, bad
    student.requires_grad_()
    with running(backend):
        distance = softmax_cdist_l1(student, teacher, 1.0)
        (grad,) = torch.autograd.grad(distance[:, :4].sum(), student)
    broken = torch.zeros(5, 6, dtype=torch.bool)
    broken[2], broken[:, 4] = True, True
    assert torch.equal(distance.isnan(), broken)
    torch.testing.assert_close(distance.detach()[~broken].double(), expected[~broken], rtol=0, atol=2e-6)
    assert bool(grad[2].isnan().all())


@pytest.mark.parametrize("backend", [*ISAS, "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_row(backend, bad):
    student, teacher = torch.randn(5, 90).requires_grad_(), torch.randn(3, 90)
    grad = torch.ones(5, 3)
    grad[1, 2] = bad
    with running(backend):
        (actual,) = torch.autograd.grad(softmax_cdist_l1(student, teacher, 1.0), student, grad)
    assert not bool(actual[1].isfinite().any()) and bool(actual[[0, 2, 3, 4]].isfinite().all())


def test_leading_dimensions_broadcast_and_strides_do_not_matter():
    student = torch.randn(3, 1, 50, 6).mT.requires_grad_()
    teacher = torch.randn(2, 4, 50)
    distance = softmax_cdist_l1(student, teacher, 2.0)
    assert distance.shape == (3, 2, 6, 4)
    grad = torch.randn(3, 2, 6, 4)
    (actual,) = torch.autograd.grad(distance, student, grad.mT.contiguous().mT)
    wide = student.detach().expand(3, 2, 6, 50)
    torch.testing.assert_close(
        distance.detach().double(), exact_distance(wide, teacher.expand(3, 2, 4, 50), 2.0), rtol=0, atol=1e-6
    )
    exact, slack = exact_gradient(wide, teacher.expand(3, 2, 4, 50), 2.0, grad)
    assert bool(((actual.double() - exact.sum(1, keepdim=True)).abs() <= 1e-6 + slack.sum(1, keepdim=True)).all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("leading", [(), (2,), (0,)])
def test_no_rows_on_a_side(backend, shape, leading):
    student = torch.randn(*leading, shape[0], 20, requires_grad=True)
    with pyllmq.use_backend(backend):
        distance = softmax_cdist_l1(student, torch.randn(*leading, shape[1], 20), 1.0)
        distance.sum().backward()
    assert distance.shape == (*leading, *shape)
    assert student.grad is not None and not student.grad.any()


def test_same_bits_for_any_number_of_threads():
    student, teacher = torch.randn(70, 9000, requires_grad=True), torch.randn(66, 9000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            distance = softmax_cdist_l1(student, teacher, 2.0)
            found.append((distance, *torch.autograd.grad(distance.square().sum(), student)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    size=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_properties(rows, columns, size, seed):
    torch.manual_seed(seed)
    student, teacher = torch.randn(rows, columns) * size, torch.randn(5, columns) * size
    distance = softmax_cdist_l1(student, teacher, 1.3)
    assert bool(((distance >= 0) & (distance <= 2 + 1e-6)).all())
    assert torch.equal(distance.T, softmax_cdist_l1(teacher, student, 1.3))
    order = torch.randperm(rows)
    assert torch.equal(softmax_cdist_l1(student[order], teacher, 1.3), distance[order])
    assert torch.equal(softmax_cdist_l1(torch.stack([teacher, teacher]), teacher, 1.3)[1].diagonal(), torch.zeros(5))
    shifted = softmax_cdist_l1(student + 7, teacher - 2, 1.3)
    torch.testing.assert_close(shifted, distance, rtol=0, atol=4e-5 if size == 50 else 4e-6)


def test_gradcheck_in_fp64():
    student = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: softmax_cdist_l1(s, t, 1.7), (student, teacher))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    student = torch.randn(2, 3, 20, requires_grad=True)
    teacher = torch.randn(2, 5, 20, requires_grad=True)
    with pyllmq.use_backend(backend):
        torch.library.opcheck(torch.ops.pyllmq.softmax_cdist_l1.default, (student, teacher, 2.0))
        found = torch.ops.pyllmq.softmax_cdist_l1(student.detach(), teacher.detach(), 2.0)
        arguments = (torch.randn(2, 3, 5), student.detach(), teacher.detach(), *found[1:], 2.0)
        torch.library.opcheck(torch.ops.pyllmq.softmax_cdist_l1_backward.default, arguments)


@pytest.mark.skipif("PYLLMQ_SANITIZED" in __import__("os").environ, reason="inductor's compiled code is not sanitized")
def test_compile_in_one_graph():
    def f(student, teacher):
        return softmax_cdist_l1(student * 2, teacher, 2.0).square().sum()

    student, teacher = torch.randn(6, 40, requires_grad=True), torch.randn(5, 40)
    expected = f(student, teacher)
    (expected_grad,) = torch.autograd.grad(expected, student)
    loss = torch.compile(f, fullgraph=True)(student, teacher)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_errors_name_what_was_given_and_what_is_allowed():
    student, teacher = torch.randn(3, 8), torch.randn(4, 8)
    for arguments, error, message in (
        ((student[0], teacher, 1.0), ValueError, r"student_logits has shape \(8,\).*\[..., rows, vocabulary\]"),
        ((student, teacher[:, :7], 1.0), ValueError, "vocabulary of 8, teacher_logits of 7.*cut both"),
        ((student[:, :0], teacher[:, :0], 1.0), ValueError, "not 0"),
        ((student.int(), teacher, 1.0), TypeError, "student_logits is torch.int32; allowed: torch.float32"),
        ((student.double(), teacher, 1.0), TypeError, "float64 goes with float64 alone"),
        ((student, teacher.to("meta"), 1.0), ValueError, "on meta; move them to one device"),
        ((student, teacher, 0.0), ValueError, "temperature is 0.0; it must be positive"),
        ((student, teacher, math.nan), ValueError, "temperature is nan"),
    ):
        with pytest.raises(error, match=message):
            softmax_cdist_l1(*arguments)
    with pyllmq.use_backend("cpu"), pytest.raises(pyllmq.NoKernelError, match="float16, not torch.float64"):
        softmax_cdist_l1(student.double(), teacher.double(), 1.0)
