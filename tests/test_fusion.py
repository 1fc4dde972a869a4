"""Fused models against the same models unfused, and both against fp64: families, caches, and everything that must not be fused."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq.fusion import native, report, steps
from pyllmq.fusion.body import FusedBody
from pyllmq.fusion.cache import filled_cache, growing_layer
from pyllmq.fusion.grammar import fit
from pyllmq.fusion.modules import FusedModule
from pyllmq.fusion.record import record_model
from pyllmq.nn import PackedLinear
from tests import fusion_reference
from tests.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not hasattr(pytest.importorskip("pyllmq._cpu"), "AttentionStep"), reason="no native steps"
)

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    **{
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
    },
    **{"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "ffn_dim": 128},
    **{"ffn_hidden_size": 128},
    **{"word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}

BLOCKS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "glm", "glm4", "olmo2",
          "smollm3", "cohere", "cohere2", "starcoder2", "stablelm", "gpt_neox", "phi", "gpt2", "ernie4_5", "hunyuan_v1_dense",
          "exaone4", "nemotron", "helium", "seed_oss", "arcee", "olmo")  # fmt: skip
"""Families of which every block fits whole."""
ATTENTION = ("gpt_oss", "opt", "olmoe", "qwen3_moe", "mixtral", "minimax_m2", "apertus")
"""Of which only attention does: the MLP is experts, has an activation of its own, or is no module."""


def tiny(family: str, **changes):
    config = transformers.AutoConfig.for_model(family)
    for key, value in (SIZES | changes).items():
        if hasattr(config, key):
            with suppress(AttributeError):  # some derive head_dim
                setattr(config, key, value)
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):  # the first kind of layer and the last
        kinds = getattr(config, key, None)
        if kinds:
            setattr(config, key, [kinds[0], kinds[-1]])
    return randomized(transformers.AutoModelForCausalLM.from_config(config).eval())


def randomized(model):
    """Norm weights, biases and sinks that are not all ones or zeros, and activations that are not all tiny."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2 if parameter.dim() == 1 else 0.05)
    return model


def packed(model, bits: int = 8, precision: str = "exact"):
    pyllmq.swap_linear(model, lambda linear: pyllmq.CodebookLinear.from_dense(linear, bits=bits))
    pyllmq.set_precision(model, precision)
    return model


def in_fp64(model):
    """The same model, dense and in fp64."""
    oracle = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in oracle.named_modules() if isinstance(m, PackedLinear)]:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight.data = layer.dequantize()
        if layer.bias is not None:
            dense.bias = layer.bias
        oracle.set_submodule(name, dense)
    oracle.set_experts_implementation("eager")  # torch's grouped product knows no fp64
    return nn.Module.double(oracle)


@contextmanager
def counted():
    """How many times modules were served by native steps, attention and MLP."""
    counts = {"attention": 0, "mlp": 0}
    own, own_body = FusedModule.served, FusedBody.served

    def served(self, **given):
        y = own(self, **given)
        counts["attention"] += y is not None and self.attention is not None
        counts["mlp"] += y is not None and self.mlp is not None
        return y

    def served_body(self, **given):
        y = own_body(self, **given)
        for part in counts:
            counts[part] += len(self.blocks) if y is not None else 0
        return y

    FusedModule.served, FusedBody.served = served, served_body
    try:
        yield counts
    finally:
        FusedModule.served, FusedBody.served = own, own_body


def padded_batch(left: bool = True):
    ids = torch.randint(3, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask if left else mask.flip(1)}


def generated(model, inputs, tokens: int = 12, **options):
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | options
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


@torch.no_grad()
def step_by_step(model, inputs, continuation, chunk: int):
    """Logits of the continuation, `chunk` tokens a call, behind a padded prompt: positions given by hand."""
    mask, cache = inputs["attention_mask"], transformers.DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(**inputs, position_ids=positions, past_key_values=cache)
    logits, last = [], positions.max(1, keepdim=True).values
    for ids in continuation.split(chunk, 1):
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = last + 1 + torch.arange(ids.shape[1])
        last = positions[:, -1:]
        logits.append(model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def assert_close_to_oracle(fused, unfused, oracle):
    """Twice the error of the unfused model; what both share (norms that compute in fp32 in the oracle, too) is below 2e-6."""
    scale = oracle.norm()
    assert ((fused - oracle).norm() / scale) <= 2 * ((unfused - oracle).norm() / scale) + 2e-6


# ---- encoders -------------------------------------------------------------------------------------------------------

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")


def tiny_encoder(family):
    config = transformers.AutoConfig.for_model(family, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                               intermediate_size=96, vocab_size=128, dim=64, n_layers=2, n_heads=4,
                                               hidden_dim=96, embedding_size=64, hidden_act="gelu")  # fmt: skip
    return randomized(transformers.AutoModel.from_config(config).eval())


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_encoders(family):
    model = packed(tiny_encoder(family))
    oracle = in_fp64(model)
    inputs = (
        padded_batch(),
        padded_batch(left=False),
        {"input_ids": torch.randint(3, 128, (1, 1))},
        {"input_ids": torch.randint(3, 128, (5, 33))},
    )
    before = [model(**given)[0] for given in inputs]
    found = pyllmq.fuse(model)
    assert list(found.values()) == ["fused"] * 2 and all(name.rpartition(".")[2].isdigit() for name in found)
    with counted() as counts:
        for given, unfused in zip(inputs, before, strict=True):
            seen = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
            exact = oracle(**given)[0]
            assert_close_to_oracle(*(t[seen].double() for t in (model(**given)[0], unfused, exact)))
    assert counts == {"attention": 2 * len(inputs), "mlp": 2 * len(inputs)}


@torch.no_grad()
def test_an_encoder_takes_its_own_way_where_a_step_would_not_do():
    model = packed(tiny_encoder("bert"))
    ids = torch.randint(3, 128, (9, 60))
    before = model(ids)[0]
    pyllmq.fuse(model)
    with counted() as counts:
        assert torch.equal(model(ids)[0], before)  # 540 tokens
        model.set_attn_implementation("eager")
        assert len(model(ids[:1, :5], output_attentions=True).attentions) == 2
        model.set_attn_implementation("sdpa")
        handle = model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *_: None)
        model(ids[:1, :5])
        handle.remove()
    assert counts == {"attention": 1, "mlp": 1}  # the second layer, beside the watched one
    with counted() as counts, torch.enable_grad():
        model(ids[:1, :5])
    assert counts == {"attention": 0, "mlp": 0}
    states = model(ids[:1, :5], output_hidden_states=True).hidden_states
    assert len(states) == 3
    pyllmq.unfuse(model)
    for ours, theirs in zip(states, model(ids[:1, :5], output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_no_encoder_of_this_kind_says_why():
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 128,
    }
    albert = transformers.AlbertModel(transformers.AlbertConfig(**config, embedding_size=16)).eval()
    assert "it is called more than once for a token" in pyllmq.fuse(packed(albert)).values()


# ---- families -------------------------------------------------------------------------------------------------------


LIKE_OTHERS = ("mistral", "qwen2", "qwen3", "gemma", "granite", "glm", "olmo2", "smollm3", "cohere", "starcoder2", "phi",
               "ernie4_5", "helium", "seed_oss", "arcee", "olmo", "opt", "olmoe", "qwen3_moe", "minimax_m2")  # fmt: skip
"""Families of which each step is one of the others', too."""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f in LIKE_OTHERS)) for f in (*BLOCKS, *ATTENTION)]
)
def test_family(family):
    model = packed(tiny(family))
    inputs, continuation = padded_batch(), torch.randint(3, 128, (2, 6))
    oracle = in_fp64(model)
    runs = {
        "greedy": lambda m: generated(m, inputs),
        "beams": lambda m: generated(m, inputs, 6, num_beams=3),
        "single": lambda m: generated(m, {"input_ids": inputs["input_ids"][1:]}),
    }
    before = {name: run(model) for name, run in runs.items()}
    chunks = {c: step_by_step(model, padded_batch_of(inputs, left=False), continuation, c) for c in (1, 3)}
    whole = {name for name, why in pyllmq.fuse(model).items() if why == "fused"}
    assert len(whole) == 2, report(model)
    assert all(name.rpartition(".")[2].isdigit() for name in whole) == (family in BLOCKS), report(model)
    with counted() as counts:
        for name, run in runs.items():
            after = run(model)
            assert torch.equal(after.sequences, before[name].sequences), name
            assert_close_to_oracle(*(torch.stack(out.logits).double() for out in (after, before[name], run(oracle))))
    assert counts["attention"] == 2 * (12 + 6 + 12)
    assert counts["mlp"] == (counts["attention"] if family in BLOCKS else 0)
    for chunk, expected in chunks.items():
        right = padded_batch_of(inputs, left=False)
        exact = step_by_step(oracle, right, continuation, chunk)
        assert_close_to_oracle(step_by_step(model, right, continuation, chunk).double(), expected.double(), exact)


def padded_batch_of(inputs, left: bool):
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"] if left else inputs["attention_mask"].flip(1),
    }


@pytest.mark.parametrize(
    ("family", "module", "reason"),
    [
        ("falcon", "self_attention", "attention interface"),
        ("bloom", "self_attention", "attention interface"),
        ("bloom", "mlp", "follows its last Linear"),
        ("apertus", "mlp", "no activation that is known"),
    ],
)
def test_what_does_not_fit_says_why_and_is_as_before(family, module, reason):
    model = packed(tiny(family))
    before = generated(model, padded_batch())
    reasons = [why for name, why in pyllmq.fuse(model).items() if name.endswith(module)]
    assert len(reasons) == 2 and all(reason in why for why in reasons)
    torch.manual_seed(0)
    inputs = padded_batch()
    after = generated(model, inputs)
    pyllmq.unfuse(model)
    before = generated(model, inputs)
    assert torch.equal(after.sequences, before.sequences)


def test_what_random_values_do_not_reach_keeps_a_module_unfused():
    """A clamp far out, and a factor that is 1 at the first positions."""
    model = packed(tiny("olmo", clip_qkv=50.0))
    assert "clamp" in pyllmq.fuse(model)["model.layers.0.self_attn"]


@pytest.mark.parametrize(
    "factor", [lambda p: (p // 8192).float().log1p() + 1, lambda p: p * 1e-9 + 1], ids=["log", "linear"]
)
def test_a_factor_that_depends_on_the_position_keeps_a_module_unfused(monkeypatch, factor):
    """It is 1 at the first positions."""
    from transformers.models.llama import modeling_llama

    rotate, plain = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        scale = factor(kwargs["position_ids"])[:, None, :, None]

        def scaled(q, k, *tables):
            q, k = rotate(q, k, *tables)
            return scale * q, k

        with monkeypatch.context() as inner:
            inner.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
            return plain(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    model = packed(tiny("llama"))
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    assert "more than x" in pyllmq.fuse(model)["model.layers.0.self_attn"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss", "gpt2"])
def test_prompts(monkeypatch, family, implementation):
    """Whole and in pieces, without a mask and with one, behind other tokens, longer than a window."""
    model = packed(tiny(family, sliding_window=8))
    model.set_attn_implementation("eager" if family == "gpt_oss" else implementation)
    ids = torch.randint(3, 128, (2, 45))
    padding = torch.ones_like(ids)
    padding[0, slice(7) if implementation == "sdpa" else slice(-7, None)] = (
        0  # eager in fp64: padding in front becomes nan
    )
    calls = {
        "alone": (ids[:1], None, 45),
        "padded": (ids, padding, 45),
        "in two": (ids[:1], None, 20),
        "in two, padded": (ids, padding, 13),
    }

    def run(m, name):
        given, mask, first = calls[name]
        cache = transformers.DynamicCache(config=m.config)
        with torch.inference_mode():
            found = [
                m(part, attention_mask=None if mask is None else mask[:, :stop], past_key_values=cache).logits
                for part, stop in ((given[:, :first], first), (given[:, first:], 45))
                if part.numel()
            ]
        logits = torch.cat(found, 1)
        return logits if mask is None else logits[padding.bool()]

    before = {name: run(model, name) for name in calls}
    oracle = in_fp64(model)
    pyllmq.fuse(model)
    for piece in (512, 16):
        monkeypatch.setattr("pyllmq.fusion.modules.PIECE", piece)
        for name in calls:
            with counted() as counts:
                after = run(model, name)
            assert counts["attention"] or (piece == 16 and family != "llama") or "padded" in name, name
            assert_close_to_oracle(after.double(), before[name].double(), run(oracle, name))


def test_soft_cap_follows_the_attention_implementation():
    """transformers' sdpa leaves a soft cap out, eager does not: fused is as either."""
    model = packed(tiny("gemma2", attn_logit_softcapping=0.5))
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        pyllmq.unfuse(model)
        inputs = padded_batch()
        before = generated(model, inputs)
        assert set(pyllmq.fuse(model).values()) == {"fused"}
        with counted() as counts:
            after = generated(model, inputs)
        assert counts["attention"] == 24
        torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits), rtol=1e-4, atol=1e-4)
        model.set_attn_implementation("eager" if implementation == "sdpa" else "sdpa")
        with counted() as counts:  # another implementation than was fused
            generated(model, inputs)
        assert counts["attention"] == 0


def test_encoder_decoders_run_as_before():
    model = packed(randomized(tiny_t5()))
    inputs = {"input_ids": torch.randint(3, 128, (2, 7)), "decoder_input_ids": torch.randint(3, 128, (2, 3))}
    with torch.no_grad():
        before = model(**inputs)[0]
        pyllmq.fuse(model)
        assert report(model)
        torch.testing.assert_close(model(**inputs)[0], before, rtol=1e-4, atol=1e-4)


def test_a_model_that_takes_no_token_ids_says_so():
    config = transformers.WhisperConfig(vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
                                        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    model = packed(transformers.WhisperForConditionalGeneration(config).eval())
    assert pyllmq.fuse(model) == {"": "its input is input_features, not input_ids"}


def test_a_model_without_weights_says_so():
    with torch.device("meta"):
        model = tiny_llama()
    assert pyllmq.fuse(model) == {"": "it is on meta; steps run on the CPU"} == report(model)


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma2", "glm4", "olmo2", "gpt_neox", "gpt_oss", "hunyuan_v1_dense", "granite"]
)
@torch.no_grad()
def test_steps_are_as_their_reference(family):
    """A step of three tokens behind five, with a mask, against the form in plain torch and fp64."""
    fitting = fit(record_model(tiny(family)))[0][0]
    form = fitting.attention
    x, mask = torch.randn(2, 3, 64), torch.rand(2, 1, 3, 8).log()
    mask[1, :, :, :2] = -torch.inf
    angles = torch.rand(2, 3, form.rotary.size // 2) * 6
    cos, sin = (t.repeat_interleave(form.rotary.step, -1) for t in (angles.cos(), angles.sin()))
    past = [torch.randn(2, form.kv_heads, 5, size) for size in (form.head_size, form.value_size)]

    def in_fp64(form):
        linears = tuple(copy.deepcopy(linear).double() for linear in (*form.linears, form.output.linear))
        return replace(form, linears=linears[:-1], output=replace(form.output, linear=linears[-1]))

    wide = [t.double() for t in (x, *past, cos, sin, mask)]
    expected, keys, values = fusion_reference.attention(in_fp64(form), *wide, residual=wide[0])
    layer = growing_layer(filled_cache(0, *past), 0)
    y = torch.empty_like(x)
    native.Attention(form)(x, y, native.make_tokens(x, cos, sin, mask, form.rotary), layer, residual=True)
    for ours, exact in ((y, expected), (layer.keys, keys), (layer.values, values)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    if fitting.mlp is not None:
        expected = fusion_reference.mlp(in_fp64(fitting.mlp), wide[0], y.double())
        native.Mlp(fitting.mlp)(x, y, native.make_tokens(x, None, None, None, form.rotary), residual=True)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


# ---- formats and dtypes ---------------------------------------------------------------------------------------------

LAYERS = {
    "codebook 3 bits, outliers, row scale": lambda l: pyllmq.CodebookLinear.from_dense(
        l, bits=3, outlier_fraction=0.02, row_scale=True
    ),
    "codebook of mixed widths": lambda l: pyllmq.CodebookLinear.from_dense(
        l, column_bits=[2, 4] * (l.in_features // 2)
    ),
    "bitmap": lambda l: pyllmq.SparseLinear.from_dense(l, 0.5),
    "sparse24": lambda l: pyllmq.Sparse24Linear.from_dense(l, value_dtype=torch.int8),
    "sparse24 codebook": lambda l: pyllmq.Sparse24CodebookLinear.from_dense(l, bits=4),
    "dense": None,
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_format_and_dtype(layer, dtype):
    """Biases and dense siblings among them: k stays dense."""
    model = tiny("qwen2").to(dtype)
    if layer != "dense":
        pyllmq.swap_linear(model, LAYERS[layer], exclude=("lm_head", "k_proj"))
        pyllmq.set_precision(model, "exact")
    inputs, continuation = padded_batch(), torch.randint(3, 128, (2, 6))
    before = step_by_step(model, inputs, continuation, 1).double()
    oracle = step_by_step(in_fp64(model), inputs, continuation, 1)
    assert set(pyllmq.fuse(model).values()) == {"fused"}
    with counted() as counts:
        after = step_by_step(model, inputs, continuation, 1).double()
    assert counts == {"attention": 14, "mlp": 14}
    assert_close_to_oracle(after, before, oracle)


# ---- what is done to a fused model ----------------------------------------------------------------------------------


@pytest.fixture
def llama():
    model = packed(randomized(tiny_llama(vocab_size=128)))
    assert set(pyllmq.fuse(model).values()) == {"fused"}
    return model


def assert_as_unfused(model, steps: int | None, run=None, exact: bool = False):
    """`run(model)` fused, in which so many attention steps ran (None: any number), and unfused."""
    inputs = padded_batch()
    run = run or (lambda m: torch.stack(generated(m, inputs).logits))
    with counted() as counts:
        fused = run(model)
    assert steps is None or counts["attention"] == steps
    pyllmq.unfuse(model)
    unfused = run(model)
    torch.testing.assert_close(fused, unfused, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)


def test_unfuse_gives_the_modules_back():
    model = packed(tiny_llama())
    modules = dict(model.named_modules())
    forwards = {name: module.forward for name, module in modules.items()}
    pyllmq.fuse(model)
    assert [m for m in modules.values() if "forward" in m.__dict__] == [model.model, *model.model.layers]
    assert pyllmq.unfuse(model) == 2 and report(model) == {}
    assert pyllmq.unfuse(model) == 0
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
    assert all(after[name].forward == forwards[name] for name in modules)


def test_saving_gives_the_same_bytes(tmp_path):
    model = packed(tiny_llama())
    pyllmq.save_pretrained(model, tmp_path / "before")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pyllmq.fuse(model)
    generated(model, padded_batch(), 3)
    pyllmq.save_pretrained(model, tmp_path / "after")
    names = sorted(file.name for file in (tmp_path / "before").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_copies_and_pickles_are_whole_and_not_fused(llama, tmp_path):
    dense = randomized(tiny_llama(vocab_size=128))  # the configuration of a packed one cannot be pickled, fused or not
    pyllmq.fuse(dense)
    torch.save(dense, tmp_path / "model.pt")
    inputs = padded_batch()
    for model, other in (
        (llama, copy.deepcopy(llama)),
        (dense, torch.load(tmp_path / "model.pt", weights_only=False)),
    ):
        with counted() as counts:
            theirs = generated(other, inputs)
        assert counts["attention"] == 0
        assert torch.equal(theirs.sequences, generated(model, inputs).sequences)
        assert set(pyllmq.fuse(other).values()) == {"fused"}


def test_loading_fuses(llama, tmp_path):
    pyllmq.save_pretrained(llama, tmp_path / "llama")
    inputs = padded_batch()
    unfused = pyllmq.from_pretrained(tmp_path / "llama", fuse=False)
    assert report(unfused) == {}
    for given in ({}, {"auto_class": transformers.AutoModelForCausalLM}, {"output_loading_info": True}):
        loaded = pyllmq.from_pretrained(tmp_path / "llama", **given)
        loaded = loaded[0] if isinstance(loaded, tuple) else loaded
        assert set(report(loaded).values()) == {"fused"}
        with counted() as counts:
            assert torch.equal(generated(loaded, inputs).sequences, generated(unfused, inputs).sequences)
        assert counts["attention"] > 0
    pyllmq.save_pretrained(loaded, tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "llama" / name).read_bytes()
    encoder = packed(tiny_bert())
    pyllmq.save_pretrained(encoder, tmp_path / "bert")
    assert set(report(pyllmq.from_pretrained(tmp_path / "bert")).values()) == {"fused"}


@pytest.mark.parametrize("bits", [[2], [4], [2, 3, 4, 5]])
@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_linears_of_one_x_side_by_side_have_the_bits_of_one_after_the_other(bits, precision):
    def linear(rows, columns):
        widths = torch.tensor(bits).repeat(columns)[:columns]
        codes = (torch.rand(rows, columns) * 2**widths).to(torch.uint8)
        weight = pyllmq.CodebookWeight.pack(codes, torch.randn(int((2**widths).sum())), widths)
        layer = pyllmq.CodebookLinear.from_weight(weight, bias=torch.randn(rows))
        layer.precision = precision
        return layer

    gate, up, down = linear(600, 320), linear(600, 320), linear(40, 600)
    first_rows = (steps.Rows(0, 0, 1), steps.Rows(1, 0, 1))
    step = native.Mlp(steps.MlpForm((gate, up), 600, *first_rows, "relu", steps.Output(down)))
    for tokens in (1, 3):
        x, y = torch.randn(1, tokens, 320), torch.full((1, tokens, 40), torch.nan)
        step(x, y, native.make_tokens(x, None, None, None, steps.Rotary()), residual=False)
        with torch.no_grad():
            assert torch.equal(y, down(torch.relu(gate(x)) * up(x)))


@pytest.mark.parametrize("precision", ["high", "fast"])
def test_set_precision_after_fuse(llama, precision):
    generated(llama, padded_batch(), 3)
    pyllmq.set_precision(llama, precision)
    inputs, continuation = padded_batch(), torch.randint(3, 128, (2, 6))
    with counted() as counts:
        fused = step_by_step(llama, inputs, continuation, 1)
    assert (
        counts["attention"] == 14 - 1 + 4 + 4
    )  # at the first call fitted anew, and compared: blocks, and the model around them
    pyllmq.set_precision(llama, "exact")
    pyllmq.unfuse(llama)
    exact = step_by_step(llama, inputs, continuation, 1)
    error = (fused - exact).norm() / exact.norm()
    assert error <= {"high": 2e-3, "fast": 1e-1}[precision]


def test_weights_that_change_after_fuse(llama):
    generated(llama, padded_batch(), 3)
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight.mul_(1.5)
        llama.model.layers[0].post_attention_layernorm.weight.data = torch.rand(64)
    other = packed(randomized(tiny_llama(vocab_size=128)))
    llama.model.layers[1].mlp.up_proj.load_state_dict(other.model.layers[0].mlp.up_proj.state_dict())
    assert_as_unfused(llama, 24 - 1 + 4 + 4)  # at the first call fitted anew, and compared


def test_another_dtype_after_fuse(llama):
    nn.Module.to(llama, torch.bfloat16)
    inputs, continuation = padded_batch(), torch.randint(3, 128, (2, 6))
    with counted() as counts:
        fused = step_by_step(llama, inputs, continuation, 1).float()
    assert counts["attention"] == 14 - 1 + 4 + 4
    pyllmq.unfuse(llama)
    unfused = step_by_step(llama, inputs, continuation, 1).float()
    assert (fused - unfused).norm() <= 0.03 * unfused.norm()


def test_a_module_inside_that_is_replaced(llama):
    """As adapters do."""

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.down, self.up = layer, nn.Linear(64, 2), nn.Linear(2, layer.out_features)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    attention = llama.model.layers[0].self_attn
    q = attention.q_proj
    attention.q_proj = adapter = Adapted(q)
    inputs = padded_batch()
    with counted() as counts:
        adapted = torch.stack(generated(llama, inputs).logits)
    assert counts["attention"] == 12  # the other block
    attention.q_proj = q
    with counted() as counts:
        plain = torch.stack(generated(llama, inputs).logits)
    assert counts["attention"] == 24
    pyllmq.unfuse(llama)
    torch.testing.assert_close(plain, torch.stack(generated(llama, inputs).logits), rtol=1e-4, atol=1e-4)
    attention.q_proj = adapter
    torch.testing.assert_close(adapted, torch.stack(generated(llama, inputs).logits), rtol=1e-4, atol=1e-4)


def test_lora_beside_a_fused_model(llama):
    peft = pytest.importorskip("peft")
    from pyllmq.integrations.peft import register

    adapted = peft.get_peft_model(llama, register(peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    inputs = padded_batch()
    with counted() as counts:
        fused = torch.stack(generated(adapted, inputs).logits)
    assert counts["attention"] == 0
    pyllmq.unfuse(llama)
    assert torch.equal(fused, torch.stack(generated(adapted, inputs).logits))


def test_hooks_inside_see_every_call(llama):
    seen = []
    handle = llama.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.append(y.shape) or 2 * y)
    inputs = padded_batch()
    with counted() as counts:
        hooked = torch.stack(generated(llama, inputs).logits)
    assert counts["attention"] == 12 and len(seen) == 12  # the other block stays fused
    pyllmq.unfuse(llama)
    torch.testing.assert_close(hooked, torch.stack(generated(llama, inputs).logits), rtol=1e-4, atol=1e-4)
    handle.remove()
    pyllmq.fuse(llama)
    assert_as_unfused(llama, 24)


def test_attentions_and_hidden_states(llama):
    llama.set_attn_implementation("eager")
    pyllmq.fuse(llama)
    inputs = padded_batch()

    def run(model):
        out = generated(model, inputs, 5, output_attentions=True, output_hidden_states=True)
        last = out.attentions[-1]
        return [*last, *out.hidden_states[-1], torch.stack(out.logits)]

    with counted() as counts:
        assert all(a.shape[-1] == 13 for a in run(llama)[:2])
    assert counts["attention"] == 0
    with counted() as counts:  # transformers' hooks stay, asleep
        generated(llama, inputs)
    assert counts["attention"] == 24
    assert_as_unfused(llama, 0, run)


def test_gradients_training_and_autocast_take_the_modules_own_way(llama):
    ids = torch.randint(3, 128, (2, 4))
    with counted() as counts:
        cache = llama(input_ids=ids, use_cache=True).past_key_values
        embedded = llama.get_input_embeddings()(ids[:, :1]).detach().requires_grad_()
        llama(inputs_embeds=embedded, past_key_values=cache).logits.sum().backward()
        assert embedded.grad is not None and embedded.grad.norm() > 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            llama(input_ids=ids[:, :1], past_key_values=llama(input_ids=ids, use_cache=True).past_key_values)
        llama.train()
        with torch.no_grad():
            llama(input_ids=ids[:, :1], past_key_values=llama(input_ids=ids, use_cache=True).past_key_values)
    assert counts["attention"] == 0


def test_torch_compile(llama):
    ids = torch.randint(3, 128, (1, 5))
    compiled = torch.compile(llama, backend="eager")

    def run(model):
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            return model(input_ids=ids[:, :1], past_key_values=cache).logits

    with counted() as counts:
        ours = run(compiled)
    assert counts["attention"] == 0
    pyllmq.unfuse(llama)
    torch.testing.assert_close(ours, run(llama), rtol=1e-4, atol=1e-4)


def ahead_of(model):
    return model.model.layers[0].forward.shared.ahead


def decoded(model, tokens: int = 5, disturb=lambda model, token: None):
    """Logits of some tokens, one at a time, behind a prompt; `disturb` is called before each."""
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.arange(3, 12 + tokens)[None]
    with torch.inference_mode():
        model(input_ids=ids[:, :9], past_key_values=cache)
        found = []
        for token in range(tokens):
            disturb(model, token)
            found.append(model(input_ids=ids[:, 9 + token : 10 + token], past_key_values=cache).logits)
    return torch.cat(found)


def four_blocks():
    model = packed(randomized(tiny_llama(num_hidden_layers=4, vocab_size=128)))
    pyllmq.fuse(model)
    return model


def test_blocks_run_ahead_from_the_second_token_on():
    model = four_blocks()
    ran = []
    decoded(model, 5, lambda m, token: ran.append(0 if ahead_of(m) is None else len(ahead_of(m).blocks)))
    assert ran == [0, 4, 4, 4, 4] and ahead_of(model).at == 4  # who comes behind whom the comparison showed
    assert_as_unfused(model, None, decoded)


def test_what_ran_ahead_does_not_count_after_a_change_between_blocks():
    """In place, by a hook of a block, in inference mode, where torch counts no versions; or another tensor."""
    for change in (lambda y: y.mul_(1.5), lambda y: y * 1.5, lambda y: y.clone()):
        model = four_blocks()

        def hook(module, args, y, change=change):
            return change(y)

        def disturb(m, token, hook=hook):
            if token == 3:
                m.model.layers[1].register_forward_hook(hook)

        def run(m, disturb=disturb):
            m.model.layers[1]._forward_hooks.clear()
            return decoded(m, 6, disturb)

        assert_as_unfused(model, None, run)


def test_what_ran_ahead_does_not_count_for_blocks_that_are_left_out_or_changed():
    model = four_blocks()
    layers = model.model.layers

    def without_the_third(m, token):
        m.model.layers = nn.ModuleList([layers[i] for i in ((0, 1, 3) if token % 2 else (0, 1, 2, 3))])

    def run(m):
        try:
            return decoded(m, 1, without_the_third)
        finally:
            m.model.layers = layers

    assert_as_unfused(model, None, run)
    model = four_blocks()
    weight = model.model.layers[2].input_layernorm.weight

    def another_weight(m, token):
        weight.data = weight.data + 0.1 if token == 3 else weight.data

    before = weight.data
    fused = decoded(model, 5, another_weight)
    weight.data = before
    pyllmq.unfuse(model)
    torch.testing.assert_close(fused, decoded(model, 5, another_weight), rtol=1e-4, atol=1e-4)


def test_a_state_guard_sees_every_kind_of_change():
    from pyllmq import _cpu

    value, tensor = object(), torch.zeros(3)
    state, hooks = {"there": value}, {}

    def guard(version):
        slots = [(state, "there", value), (state, "absent", ...)]
        return _cpu.StateGuard(slots, [hooks], [(tensor, tensor.data_ptr(), version)])

    plain, counted = guard(None), guard(tensor._version)
    assert plain.holds() and counted.holds()
    for change, undo in (
        (lambda: state.update(there=object()), lambda: state.update(there=value)),
        (lambda: state.pop("there"), lambda: state.update(there=value)),
        (lambda: state.update(absent=None), lambda: state.pop("absent")),
        (lambda: hooks.update({1: None}), hooks.clear),
    ):
        change()
        assert not plain.holds() and not counted.holds()
        undo()
        assert plain.holds() and counted.holds()
    tensor.add_(1)
    assert plain.holds() and not counted.holds()
    tensor.data = torch.zeros(3)
    assert not plain.holds()


def test_blocks_that_the_model_leaves_out_run_ahead_once():
    model = four_blocks()
    layers, ran = model.model.layers, []

    def first_two(m, token):
        m.model.layers = layers[:2] if token > 2 else layers
        ran.append(ahead_of(model) and len(ahead_of(model).blocks))

    decoded(model, 7, first_two)
    assert ran == [None, 4, 4, 4, 4, 2, 2]


def test_a_generation_that_ended_leaves_no_cache_alive():
    model = four_blocks()
    cache = transformers.DynamicCache(config=model.config)
    generated(model, {"input_ids": torch.arange(3, 9)[None]}, past_key_values=cache)
    reference = weakref.ref(cache.layers[3])
    del cache
    gc.collect()
    assert reference() is None


def test_masks_that_are_not_causal(llama):
    """A 4-dimensional mask, in which tokens see what they please."""
    ids = torch.randint(3, 128, (2, 9))
    mask = torch.rand(2, 1, 3, 9) < 0.6
    mask[..., 0] = True

    def run(model):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
            return model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=cache).logits

    assert_as_unfused(llama, 4, run)


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 24),
        ({"cache_implementation": "static"}, 0),
        ({"cache_implementation": "quantized"}, 0),
        ({"use_cache": False}, 0),
        ({"prompt_lookup_num_tokens": 3}, None),
        ({"num_beams": 4}, 24),
        ({"do_sample": True, "num_return_sequences": 3}, 24),
    ],
    ids=str,
)
def test_generate_with_caches_of_every_kind(llama, options, steps):
    if options.get("cache_implementation") == "quantized" and not transformers.utils.is_optimum_quanto_available():
        pytest.skip("optimum-quanto is not installed")
    inputs = (
        padded_batch() if "prompt_lookup_num_tokens" not in options else {"input_ids": torch.arange(3, 9).repeat(1, 3)}
    )

    def run(model):
        torch.manual_seed(0)
        return torch.stack(generated(model, inputs, **options).logits)

    assert_as_unfused(llama, steps, run)


def test_assisted_generation_crops_the_cache(llama):
    assistant = packed(randomized(tiny_llama(vocab_size=128)))
    pyllmq.fuse(assistant)
    inputs = {"input_ids": torch.randint(3, 128, (1, 9))}
    with counted() as counts:
        fused = generated(llama, inputs, assistant_model=assistant).sequences
    assert counts["attention"] > 0
    assert torch.equal(fused, generated(llama, inputs).sequences)
    pyllmq.unfuse(llama)
    assert torch.equal(fused, generated(llama, inputs).sequences)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_sliding_windows(family, implementation):
    """Longer than the window, by far."""
    model = packed(tiny(family, sliding_window=8))
    pyllmq.fuse(model)
    inputs = padded_batch()
    options = {"cache_implementation": implementation} if implementation else {}
    assert_as_unfused(
        model, None if implementation else 2 * 40, lambda m: torch.stack(generated(m, inputs, 40, **options).logits)
    )


def test_a_cache_without_config_and_a_window(llama):
    model = packed(tiny("mistral", sliding_window=8))
    pyllmq.fuse(model)
    inputs = padded_batch()
    assert_as_unfused(
        model, 2 * 39, lambda m: generated(m, inputs, 40, past_key_values=transformers.DynamicCache()).logits[-1]
    )


def test_a_cache_goes_from_unfused_to_fused_and_back(llama):
    ids = torch.randint(3, 128, (1, 20))
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad():
        expected = copy.deepcopy(llama)(input_ids=ids).logits
        logits = []
        for start, fused in enumerate([False, True, True, False, True] * 4):
            if fused:
                pyllmq.fuse(llama)
            else:
                pyllmq.unfuse(llama)
            logits.append(llama(input_ids=ids[:, start : start + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 2, 7])
@pytest.mark.parametrize("record", [False, True])
def test_growing_layers_are_as_dynamic_ones(window, record):
    """Random operations: tokens, crops, batches; keys, values, sizes and what `update` returns are equal after each."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from pyllmq.fusion.cache import GrowingLayer, GrowingSlidingWindowLayer

    if window is None:
        theirs, ours = DynamicLayer(), GrowingLayer()
    else:
        theirs, ours = DynamicSlidingWindowLayer(window), GrowingSlidingWindowLayer(window)
        if record:
            theirs.activate_past_recording()
            ours.activate_past_recording()
    batch = 2

    def compare():
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)

    for step in range(120):
        kind = torch.randint(0, 10, ()).item()
        if kind < 6 or step == 0:
            k, v = (
                torch.randn(batch, 2, torch.randint(1, 30 if step % 10 == 0 else 3, ()).item(), 4) for _ in range(2)
            )
            v = torch.randn(*k.shape[:3], 6)
            for a, b in zip(ours.update(k, v), theirs.update(k, v), strict=True):
                assert torch.equal(a, b)
        elif kind == 6 and theirs.keys.shape[2] > 3 and (window is None or record or theirs.get_seq_length() < window):
            theirs.crop(-2)
            ours.crop(-2)
        elif kind == 7:
            order = torch.randint(0, batch, (batch,))
            theirs.reorder_cache(order)
            ours.reorder_cache(order)
        elif kind == 8 and batch < 4:
            theirs.batch_repeat_interleave(2)
            ours.batch_repeat_interleave(2)
            batch *= 2
        elif kind == 9 and batch > 2:
            theirs.batch_select_indices(torch.tensor([2, 0]))
            ours.batch_select_indices(torch.tensor([2, 0]))
            batch = 2
        compare()
    other = copy.deepcopy(ours)
    ours.update(torch.ones(batch, 2, 1, 4), torch.ones(batch, 2, 1, 6))
    assert torch.equal(other.keys, theirs.keys)  # a copy has memory of its own


def test_a_growing_layer_allocates_seldom():
    from pyllmq.fusion.cache import GrowingLayer, GrowingSlidingWindowLayer

    for layer, most in ((GrowingLayer(), 20), (GrowingSlidingWindowLayer(100), 16)):
        places = set()
        for _ in range(1000):
            layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
            places.add(layer.grown[0].buffer.data_ptr())
        assert len(places) <= most


def test_a_growing_layer_keeps_gradients_apart():
    from pyllmq.fusion.cache import GrowingLayer

    layer = GrowingLayer()
    k = torch.randn(1, 2, 3, 4, requires_grad=True)
    keys, _ = layer.update(k, k)
    keys, _ = layer.update(k[:, :, :1], k[:, :, :1])
    keys.sum().backward()
    assert torch.equal(k.grad[:, :, 0], torch.full((1, 2, 4), 2.0))


def test_gpt2_packed_and_conv1d():
    model = packed(randomized(tiny_gpt2()))
    assert set(pyllmq.fuse(model).values()) == {"fused"}
    assert_as_unfused(model, 24)
    dense = randomized(tiny_gpt2())
    assert all("Conv1D is dense" in why for why in pyllmq.fuse(dense).values())
