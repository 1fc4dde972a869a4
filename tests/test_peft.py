"""LoRA on packed layers: it trains, is saved and loaded; the packed weight does not move; merging is refused."""

import pytest
import torch

import pyllmq

from . import models

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'pyllmq-kernels[peft]')")

LAYERS = {
    "codebook": lambda linear: pyllmq.CodebookLinear.from_dense(linear, bits=3),
    "bitmap": lambda linear: pyllmq.SparseLinear.from_dense(linear, 0.5),
    "sparse24": pyllmq.Sparse24Linear.from_dense,
    "sparse24_codebook": lambda linear: pyllmq.Sparse24CodebookLinear.from_dense(linear, 3),
}


def packed(kind):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, LAYERS[kind])
    return model


def with_adapter(model, **changes):
    from pyllmq.integrations.peft import register

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return peft.get_peft_model(model, register(peft.LoraConfig(**settings | changes)))


@pytest.mark.parametrize("kind", LAYERS)
def test_adapter_trains_saves_and_loads(kind, tmp_path):
    from pyllmq.integrations.peft import PackedLoraLinear, load_adapter

    base = packed(kind)
    pyllmq.save_pretrained(base, tmp_path / "base")
    ids = torch.randint(0, 512, (2, 12))
    before = base(ids).logits.detach()
    model = with_adapter(base)
    assert sum(isinstance(module, PackedLoraLinear) for module in model.modules()) == 3
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)  # B starts as zeros

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    trained = model(ids).logits.detach()
    assert float((trained - before).abs().max()) > 1e-2

    model.save_pretrained(tmp_path / "adapter")
    fresh = pyllmq.from_pretrained(tmp_path / "base")
    assert torch.equal(fresh(ids).logits, before)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, trained, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, before)
    for name, tensor in pyllmq.from_pretrained(tmp_path / "base").model.layers[0].mlp.down_proj.state_dict().items():
        assert torch.equal(base.model.layers[0].mlp.down_proj.base_layer.state_dict()[name], tensor)


def test_an_adapter_on_attention_beside_packed_experts(tmp_path):
    from pyllmq.integrations.peft import load_adapter

    base = models.tiny_mixtral(num_hidden_layers=1)
    pyllmq.compress(base, pyllmq.KMeansConfig(3), progress=False)
    pyllmq.save_pretrained(base, tmp_path / "base")
    ids = torch.randint(0, 512, (2, 12))
    with torch.no_grad():
        before = base(ids).logits
    model = with_adapter(base, target_modules=["q_proj", "v_proj"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(pyllmq.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():  # the experts of a token as one call, which gradients do not take
        trained = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, trained, rtol=1e-4, atol=1e-4)
        with loaded.disable_adapter():
            torch.testing.assert_close(loaded(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert float((trained - before).abs().max()) > 1e-2


def test_a_dense_module_is_trained_and_saved_and_a_packed_one_refused(tmp_path):
    from pyllmq.integrations.peft import load_adapter

    ids = torch.randint(0, 512, (1, 6))
    with pytest.raises(ValueError, match="modules_to_save names a CodebookLinear, whose packed weight"):
        with_adapter(packed("codebook"), modules_to_save=["o_proj"])
    base = packed("codebook")
    pyllmq.save_pretrained(base, tmp_path / "base")
    model = with_adapter(base, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(pyllmq.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_gradient_of_the_adapter_is_that_beside_the_dense_matrix():
    base = packed("codebook")
    pyllmq.set_precision(base, "exact")
    model = with_adapter(base, target_modules=["o_proj"])
    layer = base.model.layers[0].self_attn.o_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    a, b = (
        w.detach().double().requires_grad_() for w in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    exact = x.detach().double().requires_grad_()
    (exact @ (layer.base_layer.weight.double() + 2 * b @ a).T).square().sum().backward()
    pairs = [
        (layer.lora_A["default"].weight.grad, a.grad),
        (layer.lora_B["default"].weight.grad, b.grad),
        (x.grad, exact.grad),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert model is not None


def test_what_cannot_be_is_refused():
    from pyllmq.integrations.peft import register

    model = with_adapter(packed("codebook"))
    with pytest.raises(ValueError, match="cannot be merged into a packed layer"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="DoRA"):
        with_adapter(packed("codebook"), use_dora=True)
    with pytest.raises(ValueError, match=r"give a peft\.LoraConfig"):
        register(peft.IA3Config())
    assert type(with_adapter(packed("codebook")).unload().model.layers[0].mlp.down_proj) is pyllmq.CodebookLinear


def logits_before_and_after(model, **changes):
    ids = torch.randint(0, 512, (2, 12))
    before = model(ids).logits.detach()
    return before, with_adapter(model, **changes).eval()(ids).logits.detach()


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
def test_a_new_adapter_changes_nothing(init, more):
    """As beside a dense layer: B A is zero at the start."""
    before, after = logits_before_and_after(packed("codebook"), init_lora_weights=init, **more)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


REFUSED = {
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_base_weight_is_refused(name):
    """Before anything is changed, for the first adapter and for a second one."""
    model = packed("codebook")
    with pytest.raises(ValueError, match=r"takes the adapter out of the base weight|DoRA"):
        with_adapter(model, **REFUSED[name])
    assert type(model.model.layers[0].mlp.down_proj) is pyllmq.CodebookLinear
    two = with_adapter(model)
    with pytest.raises(ValueError, match=r"takes the adapter out of the base weight|DoRA"):
        two.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **REFUSED[name]))


@pytest.mark.parametrize("config", ["IA3Config", "VeraConfig", "AdaLoraConfig", "OFTConfig", "LoHaConfig"])
def test_other_methods_are_refused(config):
    from pyllmq.integrations.peft import register

    more = {"total_step": 10} if config == "AdaLoraConfig" else {}
    other = getattr(peft, config)(target_modules=["q_proj"], **more)
    with pytest.raises(ValueError, match=f"{config} is not supported on packed layers"):
        register(other)
    with pytest.raises((ValueError, TypeError)):  # PEFT's own refusal, where nobody asked us
        peft.get_peft_model(packed("codebook"), other)


def test_several_adapters_in_one_batch():
    ids = torch.randint(0, 512, (3, 12))
    model = with_adapter(packed("codebook"))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(model(ids).logits.detach())
    with model.disable_adapter():
        alone.append(model(ids).logits.detach())
    mixed = model(ids, adapter_names=["default", "second", "__base__"]).logits.detach()
    for i in range(3):
        torch.testing.assert_close(mixed[i], alone[i][i], rtol=1e-4, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-2
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    assert float((model(ids).logits - alone[2]).abs().max()) > 1e-2
