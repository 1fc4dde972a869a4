"""codebook_linear and codebook_dequantize against fp64, on every back end; gradients, compile, errors.

Grid: M 1, 2 (tables), 7, 16 (tables or decoded), 65 (decoded). N and K are odd, below, at and above a tile of 32 rows
and a panel of 256 lookups.
Left out: N and K beyond 600 (interior to the same loops) and widths 5, 6, 7 apart from mixes (same path as 8).
"""

from dataclasses import replace

import pytest
import torch

import pyllmq
from pyllmq import CodebookWeight, NoKernelError
from pyllmq.functional import codebook_dequantize, codebook_linear
from pyllmq.layouts import machine_layout

from .oracle import assert_as_good_as_torch, random_case

pytestmark = pytest.mark.kernels

BACKENDS = ("cpu", "reference")
TOKENS = (1, 2, 7, 16, 65)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(case, x, bias=None, backend="cpu"):
    with pyllmq.use_backend(backend):
        weight = CodebookWeight(case.weight.structure, case.weight.tensors)  # a new one: operands are cached per weight
        assert weight.operand().layout == ("cpu.codebook" if backend == "cpu" else "checkpoint.codebook")
        actual, high, fast = (codebook_linear(x, weight, bias, precision) for precision in pyllmq.operations.PRECISIONS)
    exact = x.double() @ case.dense.T + (0 if bias is None else bias.double())
    dense = case.dense.to(x.dtype)
    orders = [torch.randperm(x.shape[1]) for _ in range(8 if exact.numel() >= 256 else 16)]
    torchs = [
        torch.nn.functional.linear(x[:, order], dense[:, order], None if bias is None else bias.to(x.dtype))
        for order in orders
    ]
    assert_as_good_as_torch(actual, exact, *torchs)
    size = float((x.double() ** 2 @ case.dense.T**2).sqrt().norm() + exact.norm())
    of_dtype = float((actual.double() - exact).norm())
    for result, permitted in ((high, 2e-4), (fast, 2e-2)):
        assert result.dtype == x.dtype
        assert (
            float((result.double() - exact).norm()) <= permitted * size + 2 * of_dtype + torch.finfo(x.dtype).eps * size
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_width(backend, bits, tokens):
    case = random_case(67, 259, (bits,))
    check(case, torch.randn(tokens, 259), torch.randn(67), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 300), (300, 1), (31, 33), (32, 256), (33, 257), (129, 600), (3, 5)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_shapes_of_a_mix_with_everything(backend, n, k, tokens):
    case = random_case(n, k, (1, 2, 3, 4, 6), segments=min(3, n), outliers=0.03, row_scale=True)
    check(case, torch.randn(tokens, k), torch.randn(n), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("extra", ["plain", "outliers", "segments", "row_scale"])
def test_activation_dtypes(dtype, tokens, extra):
    case = random_case(
        96,
        320,
        (2, 4),
        segments=3 if extra == "segments" else 1,
        outliers=0.02 * (extra == "outliers"),
        row_scale=extra == "row_scale",
    )
    check(case, torch.randn(tokens, 320).to(dtype), torch.randn(96).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_far_larger_than_the_others(dtype):
    x = torch.randn(5, 512)
    x[:, 100] *= 1000
    check(random_case(64, 512, (2, 3, 4)), x.to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_not_finite_in_means_not_finite_out(tokens):
    case = random_case(40, 64, (2, 3, 4))
    x = torch.randn(tokens, 64)
    x[0, 7] = torch.inf
    x[-1, 9] = torch.nan
    y = codebook_linear(x, case.weight)
    assert not torch.isfinite(y[0]).any() and y[-1].isnan().all()
    if tokens > 2:
        torch.testing.assert_close(y[1], x[1] @ case.dense.float().T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4), (), (1, 1, 1, 2)])
def test_leading_dimensions(shape):
    case = random_case(10, 12)
    x = torch.randn(*shape, 12)
    y = codebook_linear(x, case.weight, precision="exact")
    assert y.shape == (*shape, 10)
    torch.testing.assert_close(y, (x.double() @ case.dense.T).float())


def test_input_that_is_not_contiguous():
    case = random_case(24, 40)
    x = torch.randn(40, 6).T
    torch.testing.assert_close(
        codebook_linear(x, case.weight), codebook_linear(x.contiguous(), case.weight), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(backend, dtype):
    case = random_case(45, 130, tuple(range(1, 9)), segments=2, outliers=0.05)
    with pyllmq.use_backend(backend):
        weight = CodebookWeight(case.weight.structure, case.weight.tensors)
        assert torch.equal(codebook_dequantize(weight, dtype), case.dense.to(dtype))


def test_same_bits_for_any_number_of_threads():
    case = random_case(500, 700, (2, 3, 4, 8), outliers=0.01)
    x = torch.randn(3, 700)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(codebook_linear(x, case.weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_x_and_bias(tokens, dtype):
    case = random_case(20, 33, (2, 5), outliers=0.05)
    x = torch.randn(2, tokens, 33, dtype=dtype, requires_grad=True)
    bias = torch.randn(20, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, tokens, 20, dtype=dtype)
    codebook_linear(x, case.weight, bias).backward(grad)
    exact = grad.double() @ case.dense
    torchs = grad @ case.dense.to(dtype)
    assert_as_good_as_torch(x.grad, exact, torchs)
    assert_as_good_as_torch(bias.grad, grad.double().sum((0, 1)), grad.sum((0, 1)))


def test_gradient_by_finite_differences():
    case = random_case(6, 5, (3,))
    x = torch.randn(2, 5, requires_grad=True)
    torch.autograd.gradcheck(
        lambda v: codebook_linear(v, case.weight, precision="exact"), x, eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=0
    )


@pytest.mark.slow
@pytest.mark.skipif("PYLLMQ_SANITIZED" in __import__("os").environ, reason="inductor's compiled code is not sanitized")
@pytest.mark.parametrize("tokens", [2, 70])
def test_compile_in_one_graph(tokens):
    case = random_case(16, 24, (2, 4))
    weight = case.weight.operand()
    bias = torch.randn(16)

    def f(x):
        return torch.relu(codebook_linear(x * 2, weight, bias)) + 1

    compiled = torch.compile(f, fullgraph=True)
    x = torch.randn(tokens, 24, requires_grad=True)
    torch.testing.assert_close(compiled(x), f(x))
    compiled(x).sum().backward()
    expected = torch.autograd.grad(f(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(backend, with_bias):
    case = random_case(9, 14, (1, 3), outliers=0.1)
    with pyllmq.use_backend(backend):
        operand = CodebookWeight(case.weight.structure, case.weight.tensors).operand()
        x = torch.randn(4, 14, requires_grad=True)
        bias = torch.randn(9, requires_grad=True) if with_bias else None
        torch.library.opcheck(
            torch.ops.pyllmq.packed_linear.default,
            (
                x,
                list(operand.tensors),
                "codebook",
                operand.layout,
                (),
                (9, 14),
                bias,
                pyllmq.operations.DEFAULT_PRECISION,
            ),
        )
        torch.library.opcheck(
            torch.ops.pyllmq.packed_dequantize.default,
            (list(operand.tensors), "codebook", operand.layout, (), (9, 14), torch.float32),
        )


def test_errors_name_what_was_given_and_what_is_allowed():
    case = random_case(8, 6)
    with pytest.raises(ValueError, match=r"shape \(2, 5\).*in_features = 6"):
        codebook_linear(torch.randn(2, 5), case.weight)
    with pytest.raises(ValueError, match=r"last dimension"):
        codebook_linear(torch.tensor(1.0), case.weight)
    with pytest.raises(TypeError, match="float64; allowed: torch.float32"):
        codebook_linear(torch.randn(2, 6).double(), case.weight)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\).*\[8\]"):
        codebook_linear(torch.randn(2, 6), case.weight, torch.randn(7))
    with pytest.raises(ValueError, match="precision is 'low'; allowed: 'exact', 'high', 'fast'"):
        codebook_linear(torch.randn(2, 6), case.weight, precision="low")
    with pytest.raises(TypeError, match="int64"):
        codebook_dequantize(case.weight, torch.int64)
    with pytest.raises(ValueError, match="meta.*move them to one device"):
        codebook_linear(torch.randn(2, 6, device="meta"), case.weight)
    with pyllmq.use_backend("reference"), pytest.raises(NoKernelError) as refusal:
        codebook_linear(torch.randn(2, 6), prepacked(case))
    for row in (
        "cpu.codebook_linear: back end 'reference'",
        "reference.packed_linear: reads the layouts 'checkpoint.*'",
    ):
        assert row in str(refusal.value)
    with (
        pytest.raises(ValueError, match="'gpu' does not exist; allowed: cpu, cuda, reference"),
        pyllmq.use_backend("gpu"),
    ):
        pass


def prepacked(case):
    weight = case.weight
    return machine_layout("cpu.codebook").prepack(weight.tensors, (weight.out_features, weight.in_features))


def test_a_damaged_layout_is_refused():
    operand = prepacked(random_case(40, 50))
    x = torch.randn(1, 50)
    (blob,) = operand.tensors
    damaged = blob.clone()
    damaged[0] ^= 1
    for tensors in ((damaged,), (blob[: blob.numel() // 2].clone(),)):
        broken = replace(operand, tensors=tensors)
        with pytest.raises((ValueError, RuntimeError), match="layout"):
            codebook_linear(x, broken)
    with pytest.raises((ValueError, RuntimeError)):
        codebook_linear(torch.randn(1, 49), replace(operand, shape=(40, 49)))


def test_an_operand_object_lives_as_long_as_its_layout_and_follows_it():
    operand = prepacked(random_case(40, 50))
    x = torch.randn(3, 50)
    codebook_linear(x, operand)
    first = operand.bound
    codebook_linear(x, operand)
    assert operand.bound is first
    operand.tensors[0].copy_(
        prepacked(random_case(40, 49)).tensors[0]
    )  # the same memory, another weight of as many bytes
    assert not first.is_intact
    with pytest.raises(ValueError, match=r"shape \[40, 49\], but was given as \[40, 50\]"):
        codebook_linear(x, operand)
