"""Sparse layers and their operations: the kernels that are chosen here against fp64, as modules, and through transformers."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import pyllmq
from pyllmq import (
    BitmapWeight,
    FormatError,
    Sparse24CodebookLinear,
    Sparse24Linear,
    Sparse24Weight,
    SparseLinear,
    _cpu,
    functional,
)
from pyllmq.layouts import machine_layout
from pyllmq.operations import DEFAULT_PRECISION, PRECISIONS
from pyllmq.packing import mask_24, unstructured_mask

from . import models
from .oracle import vector_isas
from .test_sparse_formats import random_codes

pytestmark = pytest.mark.kernels

VALUES = [torch.float16, torch.bfloat16, torch.float32, torch.int8]
LINEAR = {
    BitmapWeight: functional.bitmap_linear,
    Sparse24Weight: functional.sparse24_linear,
    pyllmq.Sparse24CodebookWeight: functional.sparse24_codebook_linear,
}


ISAS = vector_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def bitmap(n, k, sparsity=0.5, values=torch.bfloat16):
    weight = torch.randn(n, k)
    return BitmapWeight.pack(weight, unstructured_mask(weight, sparsity) if k > 1 else None, values)


def sparse24(n, k, values=torch.bfloat16):
    weight = torch.randn(n, k)
    return Sparse24Weight.pack(weight, mask_24(weight), values)


def dense_of(packed):
    with pyllmq.use_backend("reference"):
        return type(packed)(packed.structure, packed.tensors).dequantize().double()


def check(packed, x, bias=None, precision=DEFAULT_PRECISION):
    """At most twice the error of torch's own product in x's dtype, each against fp64, and what the precision permits."""
    dense = dense_of(packed)
    y = LINEAR[type(packed)](x, packed, bias, precision)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.out_features)
    truth = nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
    torchs = nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    allowed = {"exact": 0, "high": 2e-4, "fast": 2e-2}[precision] if "Codebook" in type(packed).__name__ else 0
    product = x.double() @ dense.T  # a bias may cancel it, and what the precision permits is of the product
    size = max(float(truth.norm()), float(product.norm())) + 1e-30
    if dense.numel() < 16:
        allowed *= 10  # it is of the largest entry that a codebook has, and a few codes may all be of small ones
    error, torchs_error = float((y.double() - truth).norm()), float((torchs.double() - truth).norm())
    # fp32: where few rows hold anything, 333 products added one after another were off by 3.6e-7, torch's by 0.7e-7
    ulp = {torch.float32: 5e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}[x.dtype]
    assert error <= 2 * torchs_error + (allowed + ulp) * size, f"{error / size:.2e}, torch {torchs_error / size:.2e}"
    return y


def make_all(n, k):
    yield from (bitmap(n, k, values=values) for values in VALUES)
    yield from (sparse24(n, k, values=values) for values in VALUES)
    yield from (random_codes(n, k, bits, outliers)[0] for bits in (2, 3, 4) for outliers in (0, 0.02))


@pytest.mark.parametrize("n,k", [(1, 1), (5, 3), (33, 70), (64, 256), (70, 515)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_fp64(n, k, dtype, isa):
    bias = torch.randn(n)
    for packed in make_all(n, k):
        for tokens in (1, 2, 5, 8, 17):
            check(packed, torch.randn(tokens, k).to(dtype), bias)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("values", VALUES)
def test_any_sparsity(sparsity, values, isa):
    packed = bitmap(70, 300, sparsity, values)
    for tokens in (1, 3, 8, 33):
        check(packed, torch.randn(tokens, 300))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_of_codes(precision, isa):
    for bits in (2, 3, 4):
        packed = random_codes(96, 520, bits, 0.01)[0]
        for tokens in (1, 5, 40):
            check(packed, torch.randn(tokens, 520), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("power", [-110, -60, 60, 110])
def test_codes_and_x_of_any_size(precision, power, isa):
    """Beyond some range a product leaves the fixed point, and one token beyond it must not cost the others anything."""
    for bits in (2, 3, 4):
        packed = random_codes(40, 300, bits, 0.01)[0]
        x = torch.randn(3, 300)
        x[1] *= 2.0**power
        truth = nn.functional.linear(x.double(), dense_of(packed))
        y = functional.sparse24_codebook_linear(x, packed, precision=precision).double()
        error = (y - truth).norm(dim=1) / truth.norm(dim=1)
        assert float(error.max()) <= {"exact": 5e-7, "high": 2e-4, "fast": 2e-3}[precision], error


def test_codes_and_zeros(isa):
    for bits in (2, 3, 4):
        packed = random_codes(40, 300, bits)[0]
        x = torch.randn(2, 300)
        x[0] = 0
        x[1, :256] = 0
        y = check(packed, x, precision="high")
        assert torch.equal(y[0], torch.zeros(40))


@pytest.mark.parametrize("packs", ISAS)
def test_a_layout_runs_on_every_instruction_set(packs, isa):
    for packed in make_all(70, 300):
        _cpu.set_isa(packs)
        operand = packed.operand()
        _cpu.set_isa(isa)
        x = torch.randn(3, 300)
        y = LINEAR[type(packed)](x, operand)
        truth = nn.functional.linear(x.double(), dense_of(packed))
        assert float((y.double() - truth).norm()) <= 2e-4 * float(truth.norm())


def test_rows_of_very_different_lengths(isa):
    weight = torch.zeros(65, 333)
    weight[3] = torch.randn(333)
    weight[40, 7] = 1.5
    weight[64, ::2] = torch.randn(167)
    for tokens in (1, 9):
        check(BitmapWeight.pack(weight), torch.randn(tokens, 333))


def test_a_machine_layout_gives_the_tensors_back():
    for n, k in [(1, 1), (33, 70), (70, 517)]:
        for packed in (*make_all(n, k), bitmap(n, k, 0.99), bitmap(n, k, 0.99, torch.int8)):
            operand = packed.operand()
            assert operand.layout == f"cpu.{packed.kind}"
            tensors = machine_layout(operand.layout).unpack(operand, packed.structure.tensors(), {})
            assert all(torch.equal(tensors[key], tensor) for key, tensor in packed.tensors.items())
            torch.testing.assert_close(packed.dequantize().double(), dense_of(packed), rtol=1e-6, atol=0)


def test_no_tokens_and_leading_dimensions():
    for packed in make_all(24, 40):
        linear = LINEAR[type(packed)]
        assert linear(torch.randn(0, 40), packed).shape == (0, 24)
        x = torch.randn(2, 3, 40)
        torch.testing.assert_close(linear(x, packed), linear(x.view(6, 40), packed).view(2, 3, 24))
        strided = torch.randn(40, 4).T
        assert torch.equal(linear(strided, packed), linear(strided.contiguous(), packed))


def test_not_a_number_stays_one(isa):
    for packed in make_all(40, 64):
        x = torch.randn(3, 64)
        x[1, 5] = float("nan")
        y = LINEAR[type(packed)](x, packed)
        reads = dense_of(packed)[:, 5] != 0
        assert bool(y[1, reads].isnan().all()) and not bool(y[[0, 2]].isnan().any())


def test_gradient_compile_and_opcheck():
    for packed in (bitmap(12, 20), sparse24(12, 20), random_codes(12, 20, 2, 0.05)[0]):
        op = LINEAR[type(packed)]
        operand = packed.operand()
        x, bias = torch.randn(3, 20, requires_grad=True), torch.randn(12, requires_grad=True)
        y = op(x, packed, bias)
        grad = torch.randn(3, 12)
        y.backward(grad)
        torch.testing.assert_close(x.grad, grad @ dense_of(packed).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias.grad, grad.sum(0))
        compiled = torch.compile(lambda x, op=op, operand=operand: op(x, operand) + 1, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x.detach()), op(x.detach(), packed) + 1)
        described = (list(operand.tensors), operand.kind, operand.layout, operand.meta, operand.shape)
        torch.library.opcheck(torch.ops.pyllmq.packed_linear.default, (x.detach(), *described, None, DEFAULT_PRECISION))
        torch.library.opcheck(torch.ops.pyllmq.packed_dequantize.default, (*described, torch.float32))


def test_wrong_arguments():
    packed = bitmap(12, 20)
    with pytest.raises(ValueError, match="last dimension must be in_features = 20"):
        functional.bitmap_linear(torch.randn(2, 21), packed)
    with pytest.raises(TypeError, match="float64"):
        functional.bitmap_linear(torch.randn(2, 20).double(), packed)
    with pytest.raises(pyllmq.NoKernelError, match="sparse24_linear"):
        functional.sparse24_linear(torch.randn(2, 20), packed)


# ---- layers -----------------------------------------------------------------------------------------------------------


def layers(linear):
    yield SparseLinear.from_dense(linear, 0.5)
    yield SparseLinear.from_dense(linear, 0.97, value_dtype=torch.int8)
    yield Sparse24Linear.from_dense(linear, value_dtype=torch.bfloat16)
    yield Sparse24CodebookLinear.from_dense(linear, bits=4, outlier_fraction=0.02)
    yield Sparse24CodebookLinear.from_dense(linear, bits=2)


def test_layers_multiply_save_copy_and_cast():
    linear = nn.Linear(52, 40)
    x = torch.randn(3, 52)
    for layer in layers(linear):
        y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.dequantize(), linear.bias), rtol=2e-3, atol=2e-3)
        state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        assert set(state) == {"bias", *layer.structure.tensors()}
        fresh = type(layer)(layer.structure)
        assert fresh.weight.device.type == "meta"
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), y) and torch.equal(copy.deepcopy(layer)(x), y)
        layer.to(torch.bfloat16)
        after = layer.state_dict()
        assert all(torch.equal(after[key], state[key]) for key in layer.structure.tensors())
        assert layer.weight.dtype == torch.bfloat16 and layer(x.bfloat16()).dtype == torch.bfloat16
        assert f"bits_per_weight={layer.bits_per_weight:.3f}" in repr(layer)
        with pytest.raises(RuntimeError, match="must be|missing|keys"):
            type(layer).from_dense(nn.Linear(52, 41)).load_state_dict(state)


def test_somebody_elses_zeros_are_kept():
    linear = nn.Linear(48, 32)
    with torch.no_grad():
        linear.weight *= torch.rand(32, 48) < 0.4
        linear.weight[0] = 0
    layer = SparseLinear.from_dense(linear)
    assert torch.equal(layer.dequantize(), linear.weight)
    assert layer.sparsity == pytest.approx(float((linear.weight == 0).double().mean()), rel=1e-12)
    with torch.no_grad():
        linear.weight *= mask_24(torch.randn(32, 48))
    assert torch.equal(Sparse24Linear.from_dense(linear).dequantize(), linear.weight)


def test_memory_is_that_of_the_format():
    for layer in layers(nn.Linear(512, 512)):
        held = sum(b.numel() * b.element_size() for b in layer.buffers())
        assert held < 1.35 * layer.nbytes, f"{held} bytes for {layer.nbytes}: {layer}"


@pytest.mark.parametrize("which", range(5))
def test_through_transformers(which, tmp_path):
    model = models.tiny_llama()
    pyllmq.swap_linear(model, lambda linear: list(layers(linear))[which])
    ids = torch.randint(0, 512, (2, 16))
    expected = model(ids).logits
    pyllmq.save_pretrained(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    kinds = {type(module) for module in loaded.modules() if isinstance(module, pyllmq.nn.PackedLinear)}
    assert len(kinds) == 1 and torch.equal(loaded(ids).logits, expected)


def test_a_checkpoint_pruned_elsewhere(tmp_path):
    """A plain folder with zeros in its weights packs, saves, loads and runs."""
    model = models.tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter *= unstructured_mask(parameter, 0.5)
    model.save_pretrained(tmp_path / "pruned")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    pyllmq.swap_linear(ours, SparseLinear.from_dense)
    pyllmq.save_pretrained(ours, tmp_path / "packed")
    again = pyllmq.from_pretrained(tmp_path / "packed")
    ids = torch.randint(0, 512, (2, 16))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert again.model.layers[0].mlp.up_proj.sparsity == pytest.approx(0.5)


def test_damage_is_refused(tmp_path):
    import json

    model = models.tiny_llama()
    pyllmq.swap_linear(model, lambda linear: Sparse24Linear.from_dense(linear))
    pyllmq.save_pretrained(model, tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    described = next(iter(config["quantization_config"]["modules"].values()))
    described["values"] = "int8"
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="config.json asks for int8|is missing"):
        pyllmq.from_pretrained(tmp_path / "packed")
