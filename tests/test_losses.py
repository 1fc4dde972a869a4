"""SinkhornDistillationLoss against the method's published definition, in fp64, for every kind of batch."""

import copy

import pytest
import torch

import pyllmq
from pyllmq.losses import SinkhornDistillationLoss

from .sinkd_published import cross_entropy_term, kl_term, sinkhorn_term

WEIGHTS = {"weight": 0.5, "cross_entropy_weight": 0.3, "kl_weight": 0.9}


def published(student, teacher, labels, batches, loss):
    """The whole loss of rows [N, V]; `batches` lists the rows of each Sinkhorn problem."""
    total = loss.weight * sum(
        sinkhorn_term(student[rows], teacher[rows], loss.temperature, loss.epsilon, loss.iterations) for rows in batches
    )
    total = total + loss.kl_weight * kl_term(student, teacher, loss.kl_temperature)
    return total + loss.cross_entropy_weight * cross_entropy_term(student, labels)


def compare(loss, student, teacher, labels, mask, rows, batches, tolerance=2e-6):
    """Value and gradient of a call, against the rows `rows` (indices into the flattened logits) done by the definition."""
    student = student.requires_grad_()
    value = loss(student, teacher, labels, mask)
    (grad,) = torch.autograd.grad(value, student)
    exact_student = student.detach().double().requires_grad_()
    flat = exact_student.flatten(0, -2)[rows]
    exact = published(flat, teacher.double().flatten(0, -2)[rows], labels.flatten()[rows], batches, loss)
    (exact_grad,) = torch.autograd.grad(exact, exact_student)
    assert value.dtype == torch.float32 and grad.dtype == student.dtype
    assert abs(float(value.detach()) - float(exact.detach())) <= tolerance * abs(float(exact.detach()))
    error = float((grad.double() - exact_grad).norm() / exact_grad.norm())
    assert error <= max(20 * tolerance, torch.finfo(student.dtype).eps), error


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("epsilon", [0.1, 0.02])
def test_one_row_per_sample(backend, temperature, epsilon):
    student, teacher, labels = torch.randn(9, 40).mul(2), torch.randn(9, 40).mul(2), torch.randint(0, 40, (9,))
    loss = SinkhornDistillationLoss(temperature, epsilon, kl_temperature=3.0, **WEIGHTS)
    with pyllmq.use_backend("reference") if backend == "reference" else torch.enable_grad():
        compare(loss, student, teacher, labels, None, torch.arange(9), [torch.arange(9)], 1e-5)


@pytest.mark.parametrize("over", ["tokens", "sequences"])
@pytest.mark.parametrize("group", [None, 1, 3, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_sequences_groups_and_padding(over, group, padded):
    student, teacher = torch.randn(3, 7, 30).mul(2), torch.randn(3, 7, 30).mul(2)
    labels = torch.randint(0, 30, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.int64)
    if padded:
        mask[0, 4:], mask[2, :6] = 0, 0
        student[2, 0], teacher[0, 6] = torch.nan, torch.nan  # what lies under padding does not matter
        labels[0, 4:] = -100
    rows = mask.flatten().nonzero().flatten()
    counts = mask.sum(1).tolist() if over == "sequences" else [len(rows)]
    batches = [part for whole in torch.arange(len(rows)).split(counts) for part in whole.split(group or len(rows))]
    loss = SinkhornDistillationLoss(over=over, group=group, **WEIGHTS)
    compare(loss, student, teacher, labels, mask, rows, batches)


def test_rows_without_a_label_take_no_part():
    student, teacher = torch.randn(2, 6, 20), torch.randn(2, 6, 20)
    labels = torch.randint(0, 20, (2, 6))
    labels[:, :2] = -100
    rows = (labels.flatten() != -100).nonzero().flatten()
    compare(SinkhornDistillationLoss(**WEIGHTS), student, teacher, labels, None, rows, [torch.arange(8)])


def test_a_mask_with_rows_that_have_no_label():
    """Cross-entropy is averaged over the labels, the other terms over the mask."""
    student, teacher, labels = torch.randn(6, 20), torch.randn(6, 20), torch.randint(0, 20, (6,))
    labels[4] = -100
    terms = SinkhornDistillationLoss(**WEIGHTS).terms(student, teacher, labels, torch.ones(6))
    labelled = labels != -100
    for name, exact in (
        ("cross_entropy", cross_entropy_term(student[labelled], labels[labelled])),
        ("kl", kl_term(student, teacher, 2.0)),
        ("sinkhorn", sinkhorn_term(student, teacher, 2.0, 0.1, 20)),
    ):
        torch.testing.assert_close(terms[name].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits(dtype):
    student, teacher, labels = torch.randn(8, 200), torch.randn(8, 200), torch.randint(0, 200, (8,))
    compare(
        SinkhornDistillationLoss(**WEIGHTS),
        student.to(dtype),
        teacher.to(dtype),
        labels,
        None,
        torch.arange(8),
        [torch.arange(8)],
        1e-5,
    )


def test_logits_that_are_not_contiguous():
    student, teacher, labels = torch.randn(20, 8).mT, torch.randn(8, 21)[:, :20], torch.randint(0, 20, (8,))
    compare(SinkhornDistillationLoss(**WEIGHTS), student, teacher, labels, None, torch.arange(8), [torch.arange(8)])


def test_gradcheck_in_fp64():
    student = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(2, 3, 6, dtype=torch.float64), torch.randint(0, 6, (2, 3))
    loss = SinkhornDistillationLoss(group=4, **WEIGHTS)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, teacher, labels), student)


def test_published_weights_and_no_gradient_for_the_teacher():
    loss = SinkhornDistillationLoss()
    assert (loss.temperature, loss.epsilon, loss.iterations) == (2.0, 0.1, 20)
    assert (loss.weight, loss.cross_entropy_weight, loss.kl_weight) == (0.0008, 0.1, 0.9)
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    loss(student, teacher, torch.randint(0, 9, (5,))).backward()
    assert student.grad is not None and bool(student.grad.any()) and teacher.grad is None


def test_terms_of_weight_zero_are_left_out():
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    loss = SinkhornDistillationLoss(cross_entropy_weight=0.0, kl_weight=0.0)
    assert set(loss.terms(student, teacher)) == {"sinkhorn"}
    torch.testing.assert_close(loss(student, teacher).double(), 0.0008 * sinkhorn_term(student, teacher, 2.0, 0.1, 20))
    nothing = SinkhornDistillationLoss(weight=0.0, cross_entropy_weight=0.0, kl_weight=0.0)
    assert nothing.terms(student, teacher) == {} and nothing(student, teacher) == 0


def test_a_student_that_is_its_teacher_pays_less_than_any_other():
    """Distance 0 on the diagonal; at epsilon 0.02 the plan stays there."""
    teacher = torch.randn(8, 50).mul(3)
    loss = SinkhornDistillationLoss(epsilon=0.02, weight=1.0, cross_entropy_weight=0.0, kl_weight=0.0)
    own, other = (float(loss(student, teacher)) for student in (teacher.clone(), torch.randn(8, 50).mul(3)))
    assert own < 1e-3 < other


def test_training_moves_a_student_to_its_teacher():
    teacher = torch.randn(16, 30).mul(2)
    student = (teacher + torch.randn(16, 30)).requires_grad_()
    loss = SinkhornDistillationLoss(epsilon=0.02, weight=1.0, cross_entropy_weight=0.0, kl_weight=0.0)
    optimizer = torch.optim.Adam([student], lr=0.05)
    before = float(loss(student, teacher).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert float(loss(student, teacher).detach()) < 0.3 * before


def test_repr_and_copy_say_what_it_was_made_of():
    loss = copy.deepcopy(SinkhornDistillationLoss(weight=0.25, over="sequences", group=64))
    assert "weight=0.25" in repr(loss) and "over='sequences', group=64" in repr(loss)


def test_errors_name_what_was_given_and_what_is_allowed():
    for arguments, message in (
        ({"over": "batch"}, "over is 'batch'; allowed: 'tokens', 'sequences'"),
        ({"group": 0}, "group is 0; allowed: None"),
        ({"iterations": 0}, "iterations is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"kl_temperature": float("nan")}, "kl_temperature is nan"),
        ({"weight": -0.1}, "weight is -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            SinkhornDistillationLoss(**arguments)
    loss, logits, labels = SinkhornDistillationLoss(), torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    for given, message in (
        ((logits[0, 0], logits[0, 0], labels), r"\(5,\).*\[B, V\] or \[B, L, V\]"),
        ((logits, logits[..., :4], labels), r"\(2, 3, 5\), teacher_logits \(2, 3, 4\)"),
        ((logits, logits, labels[0]), r"labels is \(3,\); it must be \(2, 3\)"),
        ((logits, logits, labels, labels[:, 0]), r"mask is \(2,\); it must be \(2, 3\)"),
        ((logits, logits), "labels are needed.*cross_entropy_weight=0"),
        ((logits, logits, labels, labels), r"no row of \(2, 3\) takes part"),
        ((logits[:0], logits[:0], labels[:0]), r"no row of \(0, 3\) takes part"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*given)
