"""The call that reads torch's tensors itself: the same bits as the general way, and none of what needs more than memory."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyllmq import BitmapWeight, CodebookLinear, _cpu, dispatch, functional
from pyllmq.packing import unstructured_mask

from .oracle import random_case

pytestmark = pytest.mark.kernels

N, K = 70, 48

needs_exchange = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10 has no such table"
)


@pytest.fixture(params=["codebook", "bitmap"])
def operand(request):
    """One that was called, so that the next call takes the short way."""
    dense = torch.randn(N, K)
    weight = (
        random_case(N, K, (2, 3, 4), outliers=0.02, row_scale=True).weight
        if request.param == "codebook"
        else BitmapWeight.pack(dense, unstructured_mask(dense, 0.5), torch.float32)
    )
    made = weight.prepack()
    functional.packed_linear(torch.randn(1, K), made)
    return made


def general(x, operand, bias=None, precision="high"):
    """As where this torch has no table."""
    assert not _cpu.use_tensors(int, int, torch.is_grad_enabled, torch.get_num_threads)
    try:
        return functional.packed_linear(x, operand, bias, precision)
    finally:
        _cpu.use_tensors(torch.Tensor, nn.Parameter, torch.is_grad_enabled, torch.get_num_threads)


@needs_exchange
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (2, 1, 3, K)])
def test_the_same_bits_as_the_general_way(operand, shape, dtype):
    x, bias = torch.randn(shape).to(dtype), torch.randn(N)
    with torch.no_grad():
        for given in (None, bias, bias.bfloat16(), nn.Parameter(bias.half())):
            for precision in ("exact", "high", "fast"):
                y = operand.bound.linear_of_tensors(x, given, precision)
                assert y.shape == (*shape[:-1], N) and y.dtype == dtype and type(y) is torch.Tensor
                assert torch.equal(y, general(x, operand, given, precision))
                assert torch.equal(y, functional.packed_linear(x, operand, given, precision))


@needs_exchange
def test_a_result_is_a_tensor_like_any_other(operand):
    x = torch.randn(3, K)
    y = functional.packed_linear(x, operand)
    kept = y.clone()
    assert y.is_contiguous() and not y.requires_grad and y.data_ptr() % 64 == 0
    others = [functional.packed_linear(torch.randn(3, K), operand) for _ in range(8)]
    assert torch.equal(y, kept) and len({each.data_ptr() for each in (y, *others)}) == 9
    y.mul_(2)
    assert torch.equal(y, 2 * kept)
    with torch.inference_mode():
        assert functional.packed_linear(x, operand).is_inference()


REFUSED = {
    "it wants a gradient": lambda: torch.randn(2, K, requires_grad=True),
    "strided": lambda: torch.randn(2, 2 * K)[:, ::2],
    "transposed": lambda: torch.randn(K, 2).T,
    "negated as it is read": lambda: torch._neg_view(torch.randn(2, K)),
    "at an odd address": lambda: torch.frombuffer(
        bytearray(1 + 8 * K), dtype=torch.float32, offset=1, count=2 * K
    ).view(2, K),
    "another dtype": lambda: torch.randn(2, K).double(),
    "integers": lambda: torch.ones(2, K, dtype=torch.int32),
    "another width": lambda: torch.randn(2, K + 1),
    "a number": lambda: torch.tensor(1.0),
    "no tokens": lambda: torch.randn(0, K),
    "on another device": lambda: torch.empty(2, K, device="meta"),
    "a subclass": lambda: torch.randn(2, K).as_subclass(Subclass),
    "many dimensions": lambda: torch.randn(*[1] * 9, K),
    "no tensor": lambda: [1.0] * K,
}


class Subclass(torch.Tensor):
    pass


@needs_exchange
@pytest.mark.parametrize("why", REFUSED)
def test_what_needs_more_than_memory_goes_the_general_way(operand, why):
    x = REFUSED[why]()
    assert operand.bound.linear_of_tensors(x, None, "high") is None
    if why in ("no tensor", "on another device"):
        return
    try:
        expected = general(x, operand)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)) as found:
            functional.packed_linear(x, operand)
        assert str(found.value) == str(error)
    else:
        assert torch.equal(functional.packed_linear(x, operand), expected)


@needs_exchange
def test_what_a_bias_may_not_be(operand):
    x = torch.randn(2, K)
    for bias in (torch.randn(N + 1), torch.randn(1, N), torch.randn(N).double(), nn.Parameter(torch.randn(N))):
        assert operand.bound.linear_of_tensors(x, bias, "high") is None
    assert operand.bound.linear_of_tensors(x, None, "highest") is None


@needs_exchange
def test_gradients_reach_x_and_the_bias():
    layer = CodebookLinear.from_dense(nn.Linear(K, N), 3)
    x = torch.randn(2, K)
    layer(x)
    asked = x.clone().requires_grad_()
    layer(asked).sum().backward()
    torch.testing.assert_close(asked.grad, layer.dequantize().sum(0).expand(2, K), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, torch.full((N,), 2.0))


def test_a_change_of_the_table_is_seen(operand):
    """A back end that is forced, or a row that is added, is asked again."""
    x = torch.randn(2, K)
    with dispatch.use_backend("reference"), pytest.raises(dispatch.NoKernelError):
        functional.packed_linear(x, operand)
    functional.packed_linear(x, operand)
    assert operand.chosen_at == dispatch.changes
    dispatch.clear_cache()
    assert operand.chosen_at != dispatch.changes


def test_a_copy_reads_its_own_memory(operand):
    x = torch.randn(2, K)
    other = replace(operand, tensors=tuple(torch.zeros_like(t).copy_(t) for t in operand.tensors), bound=None)
    assert other.chosen_at == operand.chosen_at
    expected = functional.packed_linear(x, operand)
    operand.tensors[0].zero_()
    assert torch.equal(functional.packed_linear(x, other), expected)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert copied.bound is None
        assert torch.equal(functional.packed_linear(x, copied), expected)
    with pytest.raises(ValueError):
        functional.packed_linear(x, operand)


def test_it_follows_the_number_of_threads(operand):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            functional.packed_linear(torch.randn(1, K), operand)
            assert _cpu.num_threads() == threads
    finally:
        torch.set_num_threads(before)
