"""Every public function gives the same bits whatever torch's default dtype and device are: loaders change both for a while."""

import contextlib

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import functional
from pyllmq.operations import Gate, PackedExperts

from .oracle import built_in_kinds, random_case

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("chosen", "reference")


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


DEFAULTS = [pytest.param(default_dtype, dtype, id=str(dtype)) for dtype in DTYPES]
DEFAULTS.append(pytest.param(default_device, "meta", id="meta"))


def tensors_of(found):
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, dict):
        return [tensor for key in sorted(found) for tensor in tensors_of(found[key])]
    if isinstance(found, (tuple, list)):
        return [tensor for each in found for tensor in tensors_of(each)]
    return [torch.tensor(found, dtype=torch.float64, device="cpu")]


def calls():
    """Name -> a call on float32 or float64 CPU tensors, drawn before any default changes."""
    case = random_case(33, 41, (1, 2, 3, 5, 8), segments=2, outliers=0.05, row_scale=True)
    dense, points, x = torch.randn(32, 64), torch.randn(5, 77), torch.randn(3, 64)
    weights, cost, small = torch.rand(5, 77), torch.rand(2, 9, 40), torch.rand(6, 4, 4)
    student, teacher, grad = torch.randn(2, 5, 301), torch.randn(2, 4, 301), torch.randn(33, 41)
    labels, mask = torch.randint(0, 301, (2, 5)), torch.rand(32, 64) < 0.5
    codes = torch.randint(0, 8, (9, 21), dtype=torch.uint8)
    case_up, case_down = random_case(20, 41, (3,)), random_case(41, 10, (4,))
    index = torch.tensor([[0, 2], [1, 3], [2, 1]], device="cpu")
    bits = torch.randint(1, 5, (64,))
    linear = nn.Linear(64, 32)

    def layer(made):
        moved = pyllmq.nn.PackedLinear.from_weight.__func__(type(made), made.packed_weight(), made.bias.detach())
        again = type(made)(made.structure)
        again.load_state_dict(made.state_dict())
        cut = made.packed_weight().cut_rows(8, 24).cut_columns(8, 64)
        return (made(x), made.dequantize(), dict(made.state_dict()), moved(x), again(x), cut.dequantize())

    def gradients(function, *inputs):
        leaves = [each.clone().requires_grad_() for each in inputs]
        y = function(*leaves)
        return y.detach(), torch.autograd.grad(y.sum() + (y * y).sum(), leaves)

    def columns(descend):
        block, kept = dense[:6, :40].contiguous(), torch.full((6,), 2, dtype=torch.int32, device="cpu")
        state = [torch.zeros(6, 40, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.uint8, torch.bool)]
        state.append(torch.zeros(6, 256, dtype=torch.float32, device="cpu"))
        ones = torch.ones(40, dtype=torch.float32, device="cpu")
        coupling = torch.full((6, 6), 0.1, dtype=torch.float32, device="cpu")
        widths = torch.tensor([1, 2, 3, 4, 2, 1], dtype=torch.uint8, device="cpu")
        moves, decrease = functional.fit_columns(
            block, coupling, ones[:6].clone(), ones, ones, widths, kept, *state, descend=descend
        )
        return block, moves, decrease, state

    def experts():
        up, down = (tuple(other.weight.operand() for _ in range(3)) for other in (case_up, case_down))
        return PackedExperts(up, down, Gate("silu"))

    loss = pyllmq.losses.SinkhornDistillationLoss(weight=1.0)
    return {
        "sinkhorn": lambda: gradients(pyllmq.sinkhorn, cost),
        "sinkhorn of small problems": lambda: gradients(pyllmq.sinkhorn, small),
        "sinkhorn, implicit": lambda: gradients(lambda c: pyllmq.sinkhorn(c, iterations=300, grad="implicit"), cost),
        "sinkhorn in float64": lambda: gradients(pyllmq.sinkhorn, cost.double()),
        "potentials": lambda: pyllmq.sinkhorn(cost, tolerance=1e-3, output="potentials", unbalanced=(1.0, 2.0)),
        "value": lambda: pyllmq.sinkhorn(cost, output="value", grad="envelope", mask=cost < 0.9),
        "doubly_stochastic": lambda: gradients(pyllmq.doubly_stochastic, small),
        "doubly_stochastic of large matrices": lambda: gradients(pyllmq.doubly_stochastic, cost),
        "kmeans_1d": lambda: pyllmq.kmeans_1d(points, [2, 16], weights),
        "kmeans_1d, packed fp16": lambda: pyllmq.kmeans_1d(points, 8, centroid_dtype=torch.float16, packed=True),
        "kmeans_1d_errors": lambda: pyllmq.kmeans_1d_errors(points, [1, 2, 3]),
        "fit_columns, sweep": lambda: columns(False),
        "fit_columns, descent": lambda: columns(True),
        "softmax_cdist_l1": lambda: gradients(pyllmq.softmax_cdist_l1, student, teacher),
        "distillation": lambda: loss(student, teacher[:, [0, 1, 2, 3, 0]], labels),
        "pack_codes": lambda: functional.unpack_codes(functional.pack_codes(codes, 3), 3, 21),
        "packed_rows": lambda: functional.packed_rows(case.weight, torch.tensor([[3, 0, 32]], device="cpu")),
        "routed_experts": lambda: functional.routed_experts(
            x[:, :41].contiguous(), index, x[:, :2].contiguous(), experts()
        ),
        "codebook_gradient": lambda: functional.codebook_gradient(grad, case.weight.checkpoint_operand()),
        "codebook": lambda: layer(pyllmq.CodebookLinear.from_dense(linear, 3, outlier_fraction=0.05, row_scale=True)),
        "codebook, column_bits": lambda: layer(pyllmq.CodebookLinear.from_dense(linear, column_bits=bits)),
        "bitmap": lambda: layer(pyllmq.SparseLinear.from_dense(linear, 0.6, value_dtype=torch.int8)),
        "bitmap of few": lambda: layer(pyllmq.SparseLinear.from_dense(linear, 0.97)),
        "bitmap of a mask": lambda: pyllmq.BitmapWeight.pack(dense, mask).dequantize(),
        "sparse24": lambda: layer(pyllmq.Sparse24Linear.from_dense(linear, value_dtype=torch.float16)),
        "sparse24_codebook": lambda: layer(pyllmq.Sparse24CodebookLinear.from_dense(linear, 3, outlier_fraction=0.05)),
        "training": lambda: trained(case),
    }


def trained(case):
    """Gradients of a checkpoint operand's tensors."""
    from dataclasses import replace

    operand = case.weight.checkpoint_operand()
    leaves = [t.float().requires_grad_() if t.is_floating_point() and t.numel() else t for t in operand.tensors]
    x = torch.linspace(-1, 1, 2 * 41, dtype=torch.float32, device="cpu").view(2, 41)
    y = functional.packed_linear(x, replace(operand, tensors=tuple(leaves)))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return y.detach(), torch.autograd.grad(y.square().sum(), wanted)


def every_name():
    torch.manual_seed(0)
    return sorted(calls())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "value"), DEFAULTS)
@pytest.mark.parametrize("name", every_name())
def test_the_same_bits_under_other_defaults(name, change, value, backend):
    torch.manual_seed(1)
    made = calls()
    with pyllmq.use_backend(backend) if backend == "reference" else contextlib.nullcontext():
        expected = tensors_of(made[name]())
        with change(value):
            found = tensors_of(made[name]())
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == theirs.device and ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_every_public_function_is_called():
    """Of pyllmq.functional; the layers of every format by the names of their formats."""
    named = {name.partition(",")[0].partition(" ")[0] for name in every_name()}
    thin = {f"{kind}_{op}" for kind in built_in_kinds() for op in ("linear", "dequantize")}
    reached = {"packed_linear", "packed_dequantize", "unpack_codes"} | thin
    assert set(functional.__all__) <= named | reached and set(built_in_kinds()) <= named
