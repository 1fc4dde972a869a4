"""CodebookLinear as a module: made, moved, cast, saved, copied; the codes are in memory once."""

import copy
import io

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import CodebookLinear, FormatError, _cpu

from .oracle import random_case

pytestmark = pytest.mark.kernels


def make(n=48, k=64, **kwargs):
    linear = nn.Linear(k, n)
    return linear, CodebookLinear.from_dense(linear, **(kwargs if "column_bits" in kwargs else {"bits": 4} | kwargs))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_from_dense_is_the_best_for_its_bits():
    linear = nn.Linear(40, 200)
    errors = [
        float((CodebookLinear.from_dense(linear, bits=bits).dequantize() - linear.weight.detach()).square().sum())
        for bits in range(1, 9)
    ]
    assert all(more > less for more, less in zip(errors, errors[1:], strict=False))
    weight = linear.weight.detach()
    step = weight.abs().max(0).values / 7
    rounded = (weight / step).round() * step
    assert errors[3] < float((rounded - weight).square().sum())


def test_few_values_are_kept_exactly():
    weight = torch.tensor([-0.5, 0.25, 1.0])[torch.randint(3, (30, 7))]
    assert torch.equal(CodebookLinear.from_dense(weight, bits=2).dequantize(), weight)


def test_outliers_and_row_scale_help():
    weight = torch.randn(300, 20)
    weight[torch.rand(300, 20) < 0.01] *= 30
    weight *= torch.rand(300, 1) * 3 + 0.1

    def error(**kwargs):
        return float((CodebookLinear.from_dense(weight, bits=3, **kwargs).dequantize() - weight).square().sum())

    assert error(outlier_fraction=0.02) < 0.5 * error()
    assert error(outlier_fraction=0.02, row_scale=True) < error(outlier_fraction=0.02)


def test_forward_is_multiplication_with_the_decoded_weight():
    linear, layer = make(column_bits=[1, 2, 3, 8] * 16)
    layer.precision = "exact"
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), linear.bias))
    assert torch.equal(layer.weight, layer.dequantize())
    assert layer.bits_per_weight == layer.packed_weight().bits_per_weight
    assert "bits_per_weight=" in repr(layer)


def test_codes_are_in_memory_once():
    layer = CodebookLinear.from_dense(torch.randn(512, 512), bits=4)
    held = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert held < 1.35 * layer.nbytes, f"{held} bytes in buffers for {layer.nbytes} in the checkpoint"
    assert not any(name.startswith("codes_b") for name, _ in layer.named_buffers())
    assert any(key.startswith("codes_b") for key in layer.state_dict())


def test_state_dict_round_trip():
    _, layer = make(column_bits=[2, 3, 5, 4] * 16, outlier_fraction=0.05)
    other = CodebookLinear.from_dense(nn.Linear(64, 48), bits=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), other(x)) and same(layer, other) and other.structure == layer.structure

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again = CodebookLinear(layer.structure)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(x), again(x))


def test_load_state_dict_refuses_another_shape_and_keeps_the_layer():
    _, layer = make()
    _, other = make(n=40)
    x = torch.randn(2, 64)
    before = layer(x)
    with pytest.raises(RuntimeError, match="segment_rows|codes_b4"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), before)
    with pytest.raises(RuntimeError, match="column_bits"):
        layer.load_state_dict({"bias": torch.zeros(48)})


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), nn.Module.double])
def test_casts_leave_the_packed_weight_alone(cast):
    _, layer = make(outlier_fraction=0.02, row_scale=True)
    packed = {key: tensor.clone() for key, tensor in layer.state_dict().items() if key != "bias"}
    x = torch.randn(2, 64)
    expected = layer(x) - layer.bias
    cast(layer)
    assert all(torch.equal(layer.state_dict()[key], tensor) for key, tensor in packed.items())
    assert layer.bias.dtype == layer.weight.dtype != torch.float32
    if layer.bias.dtype != torch.float64:
        layer.bias.data.zero_()
        torch.testing.assert_close(layer(x), expected)


def test_copy_and_sharing():
    _, layer = make()
    x = torch.randn(2, 64)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected) and same(twin, layer)
    assert twin.layout.data_ptr() != layer.layout.data_ptr()
    layer.share_memory()
    assert torch.equal(layer(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_precision_is_checked_and_kept():
    _, layer = make(n=96, k=300)
    assert layer.precision == "high" and "precision" not in repr(layer)
    with pytest.raises(ValueError, match="'quick'; allowed: 'exact', 'high', 'fast'"):
        layer.precision = "quick"
    assert layer.precision == "high"
    keys = set(layer.state_dict())
    layer.precision = "fast"
    assert set(layer.state_dict()) == keys and "precision='fast'" in repr(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for same_layer in (
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
        layer.bfloat16(),
        layer.float().cpu(),
    ):
        assert same_layer.precision == "fast"
    other = CodebookLinear.from_dense(nn.Linear(300, 96), bits=4)
    other.load_state_dict(layer.state_dict())
    assert other.precision == "high", "a checkpoint says nothing about precision"


@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_precision_is_what_the_operation_is_asked(precision):
    _, layer = make(n=96, k=300)
    layer.precision = precision
    # One token: AVX2 has tables of its own for "fast". Many: AVX-512 and AVX-VNNI decode to bytes there. AMX has neither.
    xs = torch.randn(1, 300), torch.randn(64, 300)
    ys = [pyllmq.functional.codebook_linear(x, layer.operand(), layer.bias, precision) for x in xs]
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(layer(x), y) and torch.equal(copy.deepcopy(layer)(x), y)
    for another in {"exact", "high", "fast"} - {precision}:
        others = [pyllmq.functional.codebook_linear(x, layer.operand(), layer.bias, another) for x in xs]
        same = all(torch.equal(y, other) for y, other in zip(ys, others, strict=True))
        assert same == ("exact" not in {precision, another} and _cpu.isa() == "amx")


def test_set_precision():
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 8)), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="Sequential has no packed layer"):
        pyllmq.set_precision(model, "fast")
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=4), exclude=("2",))
    assert pyllmq.set_precision(model, "fast") == 2
    assert [model[0].precision, model[1][0].precision] == ["fast", "fast"]
    with pytest.raises(ValueError, match="allowed: 'exact'"):
        pyllmq.set_precision(model, "bf16")
    assert model[0].precision == "fast"
    assert pyllmq.set_precision(model[0], "exact") == 1 and model[1][0].precision == "fast"


def test_move_to_meta_drops_the_layout():
    _, layer = make()
    x = torch.randn(2, 64)
    layer.to("meta")
    assert all(b.device.type == "meta" for b in layer.buffers())
    with pytest.raises(RuntimeError, match="no weights yet"):
        layer(x)
    with pytest.raises(RuntimeError, match="no weights yet"):
        CodebookLinear(layer.structure)(x)


def test_on_the_reference_back_end_the_checkpoint_tensors_stay():
    with pyllmq.use_backend("reference"):
        linear, layer = make()
        x = torch.randn(3, 64)
        assert "codes_b4" in dict(layer.named_buffers())
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), linear.bias))
    _, fast = make()
    fast.load_state_dict(layer.state_dict())
    fast.precision = "exact"
    torch.testing.assert_close(fast(x), nn.functional.linear(x, fast.dequantize(), linear.bias))


def test_gradients_reach_x_and_bias():
    linear, layer = make()
    layer.precision = "exact"
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    y = nn.functional.linear(x.detach(), layer.dequantize(), linear.bias)
    torch.testing.assert_close(x.grad, 2 * y @ layer.dequantize())
    torch.testing.assert_close(layer.bias.grad, 2 * y.sum(0))


def test_no_bias():
    layer = CodebookLinear.from_dense(nn.Linear(10, 6, bias=False), bits=3)
    assert layer.bias is None and "bias" not in layer.state_dict()
    assert layer(torch.randn(10)).shape == (6,)


def test_swap_linear():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 8)), nn.Linear(8, 4))
    expected = model[0].weight.clone()
    assert pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=8), exclude=("3",)) == [
        "0",
        "2.0",
    ]
    assert isinstance(model[2][0], CodebookLinear) and type(model[3]) is nn.Linear
    torch.testing.assert_close(model[0].dequantize(), expected, rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match="'nothing' fits nothing"):
        pyllmq.swap_linear(model, lambda linear: linear, exclude=("nothing",))


def test_a_failed_swap_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 values that are not finite"):
        pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=2))
    assert all(type(m) is nn.Linear for m in model)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "either bits or column_bits"),
        ({"bits": 2, "column_bits": [2] * 5}, "either bits or column_bits"),
        ({"bits": 0}, "allowed: 1 to 8"),
        ({"bits": 9}, "allowed: 1 to 8"),
        ({"bits": 2.5}, "integers"),
        ({"column_bits": [2] * 4}, "5 integers"),
        ({"bits": 2, "outlier_fraction": 0.7}, "allowed: 0 to 0.5"),
    ],
)
def test_from_dense_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CodebookLinear.from_dense(torch.randn(6, 5), **kwargs)


def test_from_dense_refuses_weights_that_fp16_cannot_hold():
    with pytest.raises(ValueError, match="fp16"):
        CodebookLinear.from_dense(
            torch.randn(6, 5) * 1e-8, bits=2, outlier_fraction=0.2
        )  # a row scale would serve the codes
    with pytest.raises(ValueError, match="fp16"):
        CodebookLinear.from_dense(torch.randn(6, 5) * 1e6, bits=2)
    with pytest.raises(ValueError, match="matrix"):
        CodebookLinear.from_dense(torch.randn(6), bits=2)


def test_from_weight_checks_the_bias():
    case = random_case(5, 6)
    with pytest.raises(ValueError, match=r"\[5\]"):
        CodebookLinear.from_weight(case.weight, torch.zeros(6))
    assert isinstance(FormatError("x"), ValueError)


@pytest.mark.skipif("PYLLMQ_SANITIZED" in __import__("os").environ, reason="inductor's compiled code is not sanitized")
def test_compiled_module_is_one_graph():
    _, layer = make(outlier_fraction=0.02)
    block = nn.Sequential(layer, nn.GELU(), CodebookLinear.from_dense(nn.Linear(48, 64), bits=3))
    x = torch.randn(5, 64, requires_grad=True)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(block(x).sum(), x)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:1]), block(x[:1]))


def test_the_output_may_be_changed_in_place_as_that_of_a_dense_layer():
    layer = CodebookLinear.from_dense(nn.Linear(16, 8), bits=3)
    x = torch.randn(2, 3, 16, requires_grad=True)
    y = layer(x)
    y[0] += 1
    y.relu_().sum().backward()
    assert torch.equal(x.grad, ((y > 0).to(x.dtype).detach() @ layer.dequantize()))
