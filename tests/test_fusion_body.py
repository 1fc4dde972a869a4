"""The model around its blocks as one native run: the same tokens and logits, and its own forward wherever a run would not do."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

import pyllmq
from pyllmq import _cpu
from pyllmq.fusion.body import FusedBody
from tests.models import tiny_llama
from tests.test_fusion import assert_close_to_oracle, generated, in_fp64, packed, padded_batch, randomized, tiny

transformers = pytest.importorskip("transformers")

WHOLE = ("llama", "qwen3", "gemma", "granite", "olmo2", "smollm3", "nemotron")
"""With rotary positions; a factor behind the embedding that is a tensor (Gemma) or a number (Granite); norms of both kinds."""


def body_of(model):
    bodies = [m.__dict__["forward"] for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedBody)]
    assert len(bodies) <= 1
    return bodies[0] if bodies else None


@contextmanager
def served():
    """Counts the calls that were one run."""
    own, counts = FusedBody.served, []

    def counting(self, **given):
        y = own(self, **given)
        counts.append(y is not None)
        return y

    FusedBody.served = counting
    try:
        yield counts
    finally:
        FusedBody.served = own


def fused_llama():
    model = packed(randomized(tiny_llama(num_hidden_layers=3, vocab_size=128)))
    pyllmq.fuse(model)
    assert body_of(model) is not None
    return model


@pytest.fixture
def llama():
    return fused_llama()


def one():
    return {"input_ids": torch.randint(3, 128, (1, 9))}


def logits_of(model, inputs, tokens=8, **options):
    return torch.stack(generated(model, inputs, tokens, **options).logits)


def assert_as_unfused(model, run, runs: int):
    """`run(model)` makes so many runs, and the numbers of the unfused model."""
    with served() as counts:
        fused = run(model)
    assert sum(counts) == runs
    pyllmq.unfuse(model)
    assert body_of(model) is None
    torch.testing.assert_close(fused, run(model), rtol=1e-4, atol=1e-4)


def forced(model, ids, past: int = 5):
    """Logits of all tokens behind the first ones, one at a time."""
    cache, found = transformers.DynamicCache(config=model.config), []
    with torch.inference_mode():
        model(input_ids=ids[:, :past], past_key_values=cache)
        for i in range(past, ids.shape[1]):
            given = {"input_ids": ids[:, i : i + 1], "position_ids": torch.tensor([[i]])}
            found.append(model(**given, past_key_values=cache).logits.double())
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", WHOLE)
def test_logits_are_the_models(family, dtype):
    model, ids = packed(tiny(family)).to(dtype), torch.randint(3, 128, (1, 14))
    before, oracle = forced(model, ids), forced(in_fp64(model), ids)
    pyllmq.fuse(model)
    with served() as counts:
        after = forced(model, ids)
    assert sum(counts) == 9
    assert_close_to_oracle(after, before, oracle)


def test_a_precision_that_is_set_to_what_it_was_costs_no_token():
    """Each block made those behind it anew: ten times the time of a token, until the end of the generation."""
    model = packed(
        randomized(tiny_llama(num_hidden_layers=3, vocab_size=128)), precision=pyllmq.operations.DEFAULT_PRECISION
    )
    for layer in model.modules():
        vars(layer).pop("precision", None)  # the class has it
    pyllmq.fuse(model)
    ids = torch.randint(3, 128, (1, 14))
    pyllmq.set_precision(model, pyllmq.operations.DEFAULT_PRECISION)
    with served() as counts:
        forced(model, ids)
    assert counts == [False] + [True] * 9  # the prompt looks at each block once


def test_tokens_are_the_models(llama):
    inputs = one()
    assert_as_unfused(llama, lambda m: logits_of(m, inputs), 7)  # but for the prompt


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "cohere2"])
def test_windows_other_positions_and_blocks_that_are_not_whole_keep_the_models_own_forward(family):
    model = packed(tiny(family))
    pyllmq.fuse(model)
    assert body_of(model) is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_longest_one(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = packed(randomized(tiny_llama(vocab_size=128, rope_parameters=rope)))
    assert set(pyllmq.fuse(model).values()) == {"fused"} and body_of(model) is None


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_rotary_positions(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model, inputs = packed(randomized(tiny_llama(vocab_size=128, rope_parameters=rope))), one()
    pyllmq.fuse(model)
    assert_as_unfused(model, lambda m: logits_of(m, inputs), 7)


def test_what_a_run_does_not_serve():
    """Padding, several sequences, several tokens, embeddings, no cache, other outputs: as unfused, by the model's forward."""
    inputs, padded = one(), padded_batch()
    ids = inputs["input_ids"]

    def behind(m, **given):
        cache = transformers.DynamicCache(config=m.config)
        with torch.no_grad():
            m(input_ids=ids, past_key_values=cache)
            return m(**{"input_ids": ids[:, :1], "position_ids": torch.tensor([[9]]), "past_key_values": cache} | given)

    hidden = torch.ones(1, 10, dtype=torch.long)
    hidden[0, 2] = 0
    cases = {
        "padding": lambda m: logits_of(m, padded),
        "a hidden token": lambda m: behind(m, attention_mask=hidden).logits,
        "a mask of four dimensions": lambda m: (
            behind(m, attention_mask=torch.ones(1, 1, 1, 10, dtype=torch.bool)).logits
        ),
        "two tokens": lambda m: behind(m, input_ids=ids[:, :2], position_ids=torch.tensor([[9, 10]])).logits,
        "embeddings": lambda m: behind(m, input_ids=None, inputs_embeds=m.get_input_embeddings()(ids[:, :1])).logits,
        "static": lambda m: logits_of(m, inputs, cache_implementation="static"),
        "hidden states": lambda m: torch.stack(behind(m, output_hidden_states=True).hidden_states),
        "attentions": lambda m: behind(m, output_attentions=True).logits,
    }
    for run in cases.values():
        assert_as_unfused(fused_llama(), run, 0)
    assert_as_unfused(
        fused_llama(), lambda m: behind(m, return_dict=False)[0], 1
    )  # the model around it makes the tuple


def test_positions_given_by_hand_and_tables_of_many(llama):
    """Also such as lie behind the table, and behind one another in any order."""
    ids = torch.randint(3, 128, (1, 12))
    positions = [9, 300, 17, 255, 256]

    def run(m):
        cache = transformers.DynamicCache(config=m.config)
        with torch.no_grad():
            m(input_ids=ids[:, :7], past_key_values=cache)
            return torch.cat([
                m(input_ids=ids[:, 7 + i : 8 + i], position_ids=torch.tensor([[p]]), past_key_values=cache).logits
                for i, p in enumerate(positions)
            ])  # fmt: skip

    assert_as_unfused(llama, run, len(positions))


def test_a_cropped_cache(llama):
    ids = torch.randint(3, 128, (1, 12))

    def run(m):
        cache = transformers.DynamicCache(config=m.config)
        found = []
        with torch.inference_mode():
            m(input_ids=ids[:, :7], past_key_values=cache)
            for i in (7, 8, 6, 7):
                cache.crop(i)
                given = {"input_ids": ids[:, i : i + 1], "position_ids": torch.tensor([[i]])}
                found.append(m(**given, past_key_values=cache).logits)
        return torch.cat(found)

    assert_as_unfused(llama, run, 4)


def test_whoever_watches_sees_every_call(llama):
    for name in ("model.norm", "model.rotary_emb", "model.layers.1", "model.layers.0.mlp.down_proj"):
        seen = []
        handle = llama.get_submodule(name).register_forward_hook(lambda *given, seen=seen: seen.append(1))
        with served() as counts:
            logits_of(llama, one())
        handle.remove()
        assert len(seen) == 8 and not any(counts), name
    with served() as counts:
        logits_of(llama, one())
    assert sum(counts) == 7
    for name in ("model", "model.embed_tokens", "lm_head"):
        seen = []
        handle = llama.get_submodule(name).register_forward_hook(lambda *given, seen=seen: seen.append(1))
        with served() as counts:
            logits_of(llama, one())
        handle.remove()
        assert len(seen) == 8 and sum(counts) == 7, name


def test_whatever_changes_counts():
    def doubled(model):
        with torch.no_grad():
            model.model.norm.weight.mul_(2)

    def another_norm(model):
        model.model.norm = type(model.model.norm)(64)

    def another_block(model):
        other = copy.deepcopy(model.model.layers[1])
        randomized(other.input_layernorm)
        model.model.layers[1] = other

    def fewer(model):
        model.config.num_hidden_layers = 2

    def slower_turns(model):
        model.model.rotary_emb.inv_freq.mul_(0.5)

    def other_embedding(model):
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.5)

    inputs = one()
    for change in (doubled, another_norm, another_block, fewer, slower_turns, other_embedding):
        model = fused_llama()
        logits_of(model, inputs)  # tables are made
        change(model)
        fused = logits_of(model, inputs)
        pyllmq.unfuse(model)
        torch.testing.assert_close(fused, logits_of(model, inputs), rtol=1e-4, atol=1e-4, msg=change.__name__)


def test_gradients_and_training_take_the_models_own_forward(llama):
    ids = torch.randint(3, 128, (1, 9))
    cache = transformers.DynamicCache(config=llama.config)
    given = {"input_ids": ids[:, :1], "position_ids": torch.tensor([[9]]), "past_key_values": cache}
    with torch.no_grad():
        llama(input_ids=ids, past_key_values=cache)
    with served() as counts:
        llama(**given)
        with torch.no_grad():
            llama.train()
            llama(**given)
    assert counts == [False, False]


def test_a_norm_of_another_size_is_refused():
    x, tokens = torch.randn(3, 37), _cpu.StepTokens(batch=1, queries=3, dtype=0)
    with pytest.raises(ValueError, match="norm has a weight of 37 elements; allowed: none or 0"):
        _cpu.BlockRun([])(x.data_ptr(), x.data_ptr(), 0, tokens, (), (), _cpu.Norm("rms", 1e-6, [1.0] * 37))
