"""No operation gives a wrong second derivative: it is right, or an error that names the operation."""

from dataclasses import replace

import pytest
import torch

import pyllmq
from pyllmq.formats.codebook import codebook_gradient

REFUSED = "a second derivative of {} was asked for"


def of_sinkhorn(**options):
    return lambda cost: pyllmq.sinkhorn(cost, epsilon=0.5, **options)


OPERATIONS = {
    "sinkhorn": of_sinkhorn(),
    "sinkhorn, implicit": of_sinkhorn(grad="implicit", iterations=200),
    "sinkhorn, value": of_sinkhorn(output="value"),
    "sinkhorn, envelope": of_sinkhorn(output="value", grad="envelope"),
    "sinkhorn, potentials": lambda cost: torch.cat(pyllmq.sinkhorn(cost, epsilon=0.5, output="potentials")),
    "doubly_stochastic": pyllmq.doubly_stochastic,
    "softmax_cdist_l1": lambda logits: pyllmq.softmax_cdist_l1(logits, logits.detach().flip(0) + 1, 2.0),
    "softmax_cdist_l1, teacher": lambda logits: pyllmq.softmax_cdist_l1(logits.detach().flip(0) + 1, logits, 2.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_refused(name):
    """Also where torch, asked with allow_unused=True as its own Hessian does, would take an unvisited error for 0."""
    torch.manual_seed(0)
    operation, x = OPERATIONS[name], torch.rand(5, 5)
    refused = REFUSED.format(name.partition(",")[0])
    with pytest.raises(RuntimeError, match=refused):
        torch.autograd.functional.hessian(lambda y: operation(y).square().sum(), x)
    y = x.clone().requires_grad_()
    # The gradient of a plain sum arrives without a graph of its own, and other terms would hide what is missing.
    (once,) = torch.autograd.grad(operation(y).sum() + y.pow(3).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=refused):
        once.square().sum().backward()


@pytest.mark.parametrize("name", OPERATIONS)
def test_first_derivatives_do_not_depend_on_create_graph(name):
    torch.manual_seed(0)
    x = torch.rand(5, 5, requires_grad=True)
    plain, followed = (
        torch.autograd.grad(OPERATIONS[name](x).square().sum(), x, create_graph=create)[0] for create in (False, True)
    )
    assert torch.equal(plain, followed.detach())
    assert not plain.requires_grad


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return pyllmq.CodebookWeight.from_dense(torch.randn(6, 10), torch.tensor([2] * 10), row_scale=True)


def test_a_frozen_packed_linear_has_right_second_derivatives(weight):
    dense, x = weight.dequantize(), torch.randn(4, 10)
    ours, plain = (
        torch.autograd.functional.hessian(lambda y, f=f: f(y).tanh().sum(), x)
        for f in (lambda y: pyllmq.functional.packed_linear(y, weight), lambda y: y @ dense.T)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    assert float(plain.norm()) > 0.1


def test_a_trained_packed_linear_follows_x_and_refuses_its_own_tensors(weight):
    operand = weight.checkpoint_operand()
    place = weight.fields.index("codebook")
    tensors = list(operand.tensors)
    book = tensors[place] = tensors[place].float().requires_grad_()
    operand, x = replace(operand, tensors=tuple(tensors)), torch.randn(4, 10, requires_grad=True)
    of_x, of_book = torch.autograd.grad(
        pyllmq.functional.packed_linear(x, operand).tanh().sum(), (x, book), create_graph=True
    )
    y = x.detach().requires_grad_()
    (plain,) = torch.autograd.grad((y @ weight.dequantize().T).tanh().sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(of_x.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(plain.square().sum(), y)[0], rtol=1e-3, atol=1e-4)
    for gradient, of in ((of_x, book), (of_book, book), (of_book, x)):
        with pytest.raises(RuntimeError, match=REFUSED.format("packed_linear with a trained weight")):
            torch.autograd.grad(gradient.square().sum(), of, retain_graph=True, allow_unused=True)


def test_the_gradient_of_a_codebook_has_no_derivative(weight):
    of_weight = torch.randn(6, 10, requires_grad=True)
    found = codebook_gradient(of_weight, weight.checkpoint_operand())
    with pytest.raises(RuntimeError, match=REFUSED.format("codebook_gradient")):
        found.sum().backward()
