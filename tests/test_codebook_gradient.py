"""Training a packed weight: gradients of the codebook, the row scales and the outliers against autograd in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyllmq import CodebookWeight, NoKernelError, functional, use_backend
from pyllmq.layouts import WeightOperand

pytestmark = pytest.mark.kernels
BACKENDS = ("cpu", "reference")


def packed(rows: int, size: int, segments: int = 1, outliers: float = 0.0, scaled: bool = False, seed: int = 0):
    """(weight, codes [N, K]) with random widths 1..8, fresh at every seed."""
    torch.manual_seed(seed)
    bits = torch.randint(1, 9, (size,))
    codes = (torch.rand(rows, size) * (1 << bits)).to(torch.uint8)
    codebook = torch.randn(segments, int((1 << bits).sum()))
    cuts = [rows // segments] * (segments - 1)
    weight = CodebookWeight.pack(
        codes,
        codebook,
        bits,
        segment_rows=torch.tensor([*cuts, rows - sum(cuts)]),
        outlier_mask=torch.rand(rows, size) < outliers if outliers else None,
        outlier_weight=torch.randn(rows, size) if outliers else None,
        row_scale=torch.rand(rows) + 0.5 if scaled else None,
    )
    return weight, codes


def trainable(weight: CodebookWeight) -> tuple[WeightOperand, dict[str, Tensor]]:
    """The checkpoint operand with its trained tensors as fp32 leaves."""
    operand = weight.checkpoint_operand()
    field = CodebookWeight.named(operand)
    leaves = {}
    for name in ("codebook", "row_scale", "outlier_values"):
        if field[name].numel():
            leaves[name] = field[name] = field[name].float().requires_grad_()
    tensors = tuple(field[name] for name in CodebookWeight.fields)
    return replace(operand, tensors=tensors), leaves


def dense_in_fp64(weight: CodebookWeight, codes: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The matrix by definition, element by element through autograd, and its own leaves."""
    own = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    bits = weight.column_bits.long()
    first = torch.cumsum(1 << bits, 0) - (1 << bits)
    segment = torch.repeat_interleave(weight.tensors["segment_rows"].long())
    dense = own["codebook"][segment[:, None], first + codes.long()]
    if "row_scale" in own:
        dense = dense * own["row_scale"][:, None]
    if "outlier_values" in own:
        row = torch.repeat_interleave(weight.tensors["outlier_row_offsets"].long().diff())
        column = weight.tensors["outlier_columns"].long()
        dense = dense.index_put((row, column), own["outlier_values"])
    return dense, own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "size", "segments", "outliers", "scaled"),
    [
        (1, 1, 1, 0.0, False),
        (7, 5, 2, 0.3, True),
        (33, 65, 1, 0.0, True),
        (130, 300, 3, 0.02, True),
        (64, 515, 1, 0.1, False),
    ],
)
def test_gradients_are_those_of_the_dense_matrix(
    backend: str, rows: int, size: int, segments: int, outliers: float, scaled: bool
) -> None:
    weight, codes = packed(rows, size, segments, outliers, scaled, seed=rows)
    operand, leaves = trainable(weight)
    dense, own = dense_in_fp64(weight, codes, leaves)
    x = torch.randn(2, 3, size, requires_grad=True)
    bias = torch.randn(rows, requires_grad=True)
    upstream = torch.randn(2, 3, rows)
    with use_backend(backend):
        y = functional.codebook_linear(x, operand, bias)
        y.backward(upstream)
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ dense.T + bias.detach().double()
    exact.backward(upstream.double())
    size_of = size**0.5
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * size_of)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5 * rows**0.5)
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name
        torch.testing.assert_close(leaf.grad.double(), own[name].grad, rtol=1e-5, atol=2e-5 * max(rows, size) ** 0.5)
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codebook_gradient_by_hand(backend: str) -> None:
    codes = torch.tensor([[0, 1], [1, 1], [0, 1]], dtype=torch.uint8)
    weight = CodebookWeight.pack(
        codes, torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 1]), row_scale=torch.tensor([1.0, 2, 4])
    )
    gradient = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    with use_backend(backend):
        found = functional.codebook_gradient(gradient, weight.checkpoint_operand())
    assert found.tolist() == [[1 + 4 * 3, 2 * 2, 0, 10 + 2 * 20 + 4 * 30]]


def test_threads_do_not_change_the_sums() -> None:
    weight, _ = packed(211, 333, 2, 0.01, True)
    gradient = torch.randn(211, 333)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(functional.codebook_gradient(gradient, weight.checkpoint_operand()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_only_what_is_trained_gets_a_gradient() -> None:
    weight, _ = packed(9, 12, outliers=0.2, scaled=True)
    operand, leaves = trainable(weight)
    leaves["row_scale"].requires_grad_(False)
    functional.codebook_linear(torch.randn(4, 12), operand).sum().backward()
    assert leaves["row_scale"].grad is None and leaves["codebook"].grad is not None


def test_fake_and_autograd_registration() -> None:
    weight, _ = packed(6, 10, 2, 0.2, True)
    operand, _ = trainable(weight)
    gradient = torch.randn(6, 10)
    torch.library.opcheck(
        torch.ops.pyllmq.codebook_gradient, (gradient, list(weight.checkpoint_operand().tensors), "checkpoint.codebook")
    )


def test_bad_input() -> None:
    weight, _ = packed(6, 10)
    with pytest.raises(ValueError, match=r"must be torch.float32 \(6, 10\)"):
        functional.codebook_gradient(torch.zeros(6, 9), weight.checkpoint_operand())
    with pytest.raises(NoKernelError, match="reads the layout 'checkpoint.codebook'"):
        functional.codebook_gradient(torch.zeros(6, 10), weight)
