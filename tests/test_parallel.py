"""Tensor parallelism: plans of every architecture, and 2 and 4 gloo processes that together give the logits of one."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import CodebookLinear, Sparse24CodebookLinear, Sparse24Linear, SparseLinear, parallel

from . import models
from .new_process import run_python

ROOT = Path(__file__).parent.parent
BERT_STYLES = {
    **{f"encoder.layer.*.attention.self.{name}": "colwise" for name in ("query", "key", "value")},
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
GPT2_STYLES = {
    "transformer.h.*.attn.c_attn": "colwise_gather_output",
    "transformer.h.*.attn.c_proj": "rowwise_split_input",
    "transformer.h.*.mlp.c_fc": "colwise",
    "transformer.h.*.mlp.c_proj": "rowwise",
}


def mixed_widths(linear):
    widths = torch.randint(1, 6, (linear.in_features,))
    return CodebookLinear.from_dense(linear, column_bits=widths, outlier_fraction=0.02, row_scale=True)


def fused(linear):
    """Two segments: codebooks of their own for the upper and the lower rows."""
    half = linear.out_features // 2
    upper, lower = linear.weight.detach().split([half, linear.out_features - half])
    parts = [CodebookLinear.from_dense(part, bits=3).packed_weight() for part in (upper, lower)]
    return CodebookLinear.from_weight(pyllmq.CodebookWeight.concatenate(parts), linear.bias)


def with_biases(model):
    """Biases start as zeros: one that is added twice would not be seen."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


def llama(**changes):
    return with_biases(models.tiny_llama(attention_bias=True, mlp_bias=True, **({"num_hidden_layers": 1} | changes)))


UNEVEN = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12, "intermediate_size": 101,
          "vocab_size": 509}  # fmt: skip


def packed_ends(model):
    pyllmq.swap_embedding(model, lambda embedding: pyllmq.CodebookEmbedding.from_dense(embedding, 5))
    return model


def packed_experts(**changes):
    model = models.tiny_mixtral(**changes)
    pyllmq.compress(model, pyllmq.KMeansConfig(4), include=["experts"], progress=False)
    return model


CASES = {
    # name: (model, make_layer, exclude, styles)
    "codebook": (llama, mixed_widths, ("lm_head",), None),
    "codebook-uneven": (lambda: llama(**UNEVEN), mixed_widths, (), None),
    "segments": (llama, fused, ("lm_head",), None),
    "bitmap": (lambda: llama(**UNEVEN), lambda l: SparseLinear.from_dense(l, 0.6, value_dtype=torch.int8), (), None),
    "bitmap-columns": (llama, lambda l: SparseLinear.from_dense(l, 0.97), ("lm_head",), None),
    "sparse24": (lambda: llama(**UNEVEN), Sparse24Linear.from_dense, ("lm_head",), None),
    "sparse24-codebook": (llama, lambda l: Sparse24CodebookLinear.from_dense(l, 3, outlier_fraction=0.02), (), None),
    "dense-beside-packed": (llama, mixed_widths, ("lm_head", "down_proj", "q_proj"), None),
    "tied": (lambda: llama(tie_word_embeddings=True), mixed_widths, ("lm_head",), None),
    "bert": (lambda: with_biases(models.tiny_bert()), mixed_widths, ("pooler",), BERT_STYLES),
    "gpt2": (lambda: with_biases(models.tiny_gpt2()), mixed_widths, ("lm_head",), GPT2_STYLES),
    # Every expert of every token: with a choice, rounding would choose.
    "packed-tied": (lambda: packed_ends(llama(tie_word_embeddings=True)), mixed_widths, ("lm_head",), None),
    "packed-experts": (lambda: packed_experts(num_hidden_layers=1, num_experts_per_tok=4), mixed_widths, ("lm_head",), None),
    "experts": (lambda: models.tiny_mixtral(num_hidden_layers=1, num_experts_per_tok=4), mixed_widths,
                ("lm_head", "experts"), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def chosen(request):
    """Names of the cases that this run tests: the others would cost seconds each."""
    found = {item.callspec.params["case"] for item in request.session.items if "chosen" in item.fixturenames}
    return [name for name in CASES if name in found]


@pytest.fixture(scope="module")
def cases(tmp_path_factory, chosen):
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    for name in chosen:
        make, make_layer, exclude, styles = CASES[name]
        model = make()
        pyllmq.swap_linear(model, make_layer, exclude=exclude)
        pyllmq.set_precision(model, "exact")
        ids = torch.randint(0, model.config.vocab_size, (2, 9))
        causal = model.can_generate()
        with torch.inference_mode():
            expected = {"ids": ids, "logits": model(ids)[0], "styles": styles, "through transformers": styles is None}
            expected["generated"] = (
                model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False) if causal else None
            )
            pyllmq.save_pretrained(model, folder / name)
            expected["bfloat16"] = pyllmq.from_pretrained(folder / name, dtype=torch.bfloat16)(ids)[0]
        torch.save(expected, folder / name / "expected.pt")
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def outcome(request, cases, chosen):
    """What rank 0 of 2 or 4 processes found, by case; every rank has to end well."""
    ranks = request.param
    done = run_python("-m", "tests.parallel_ranks", ranks, cases, *chosen, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return ranks, {name: json.loads((cases / f"{name}.{ranks}.json").read_text()) for name in chosen}


LIKE_OTHERS = ("codebook", "dense-beside-packed", "tied")
"""What these cases have in them, "codebook-uneven", "experts" and "packed-tied" have too."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LIKE_OTHERS)) for case in CASES]
)
def test_processes_give_the_logits_of_one(case, outcome, cases):
    ranks, found = outcome
    found = found[case]
    assert found["cut"] and found["same parts"]
    assert found["folder"] < 1e-5 and found["memory"] < 1e-5
    expected = torch.load(cases / case / "expected.pt")
    exact = expected["logits"].double()
    assert found["bfloat16"] < 2 * float((expected["bfloat16"].double() - exact).norm() / exact.norm())
    assert found.get("generated", True) and found.get("transformers", 0) < 1e-5
    assert found["split"], "something is cut"
    assert any("stacked experts" in why for why in found["whole"].values()) == (case == "experts")
    for refusal in found["refusals"]:
        assert "rank" in refusal and "whole model" in refusal


# ---- plans, without processes ---------------------------------------------------------------------------------------


def ranges(plan, name):
    return plan.splits[name].ranges


def test_a_plan_cuts_a_block_at_the_same_places():
    plan = parallel.plan(llama(intermediate_size=101), 3)
    up, down = plan.splits["model.layers.0.mlp.up_proj"], plan.splits["model.layers.0.mlp.down_proj"]
    assert up.by == "rows" and down.by == "columns" and up.ranges == down.ranges
    assert up.ranges[0][0] == 0 and up.ranges[-1][1] == 101
    assert all(a[1] == b[0] and a[1] % 8 == 0 for a, b in zip(up.ranges, up.ranges[1:], strict=False))
    assert plan.splits["lm_head"].whole_outside and ranges(plan, "lm_head")[-1][1] == 512
    assert "model.layers.0.mlp.up_proj" in str(plan) and "0:32" in str(plan)


def test_attention_is_cut_between_heads():
    plan = parallel.plan(llama(**UNEVEN), 2)
    assert ranges(plan, "model.layers.0.self_attn.q_proj") == ((0, 24), (24, 72))
    assert ranges(plan, "model.layers.0.self_attn.k_proj") == ((0, 12), (12, 36))
    assert ranges(plan, "model.layers.0.self_attn.o_proj") == ((0, 24), (24, 72))
    assert not plan.key_value_groups


def test_ranks_share_key_value_heads():
    plan = parallel.plan(models.tiny_llama(), 4)
    assert ranges(plan, "model.layers.1.self_attn.k_proj") == ((0, 16), (0, 16), (16, 32), (16, 32))
    assert ranges(plan, "model.layers.1.self_attn.q_proj") == ((0, 16), (16, 32), (32, 48), (48, 64))
    assert plan.key_value_groups == {"model.layers.0.self_attn": 1, "model.layers.1.self_attn": 1}


def test_what_cannot_be_shared_out_stays_whole_with_the_reason():
    plan = parallel.plan(llama(**UNEVEN | {"intermediate_size": 3}), 4)
    assert "6 query and 3 key/value heads" in plan.whole["model.layers.0.self_attn.q_proj"]
    assert "3 features in units of 1 are fewer than 4 ranks" in plan.whole["model.layers.0.mlp.down_proj"]
    assert plan.splits.keys() == {"lm_head"} and "whole: " in str(plan)


def test_sparse24_is_cut_between_groups_of_four():
    model = llama(intermediate_size=14, head_dim=6, hidden_size=24)
    pyllmq.swap_linear(model, Sparse24Linear.from_dense)
    plan = parallel.plan(model, 2)
    assert ranges(plan, "model.layers.0.mlp.down_proj") == ((0, 8), (8, 14))
    assert ranges(plan, "model.layers.0.self_attn.o_proj") == ((0, 12), (12, 24))
    assert "multiples of 4" in parallel.plan(model, 4).whole["model.layers.0.self_attn.o_proj"]


EXPERTS = {"gate_up_proj": "65,536", "down_proj": "32,768"}


def test_experts_stay_whole_and_the_plan_says_so():
    plan = parallel.plan(models.tiny_mixtral(), 2)
    assert {name.rpartition(".")[2] for name in plan.splits} == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    stacked = {f"model.layers.{i}.mlp.experts.{name}": n for i in (0, 1) for name, n in EXPERTS.items()}
    assert plan.whole.keys() == stacked.keys()
    for name, count in stacked.items():
        why = (
            rf"{re.escape(name)} +whole: .*stacked experts.* of {count} values, .* each of the 2 ranks holds all of it"
        )
        assert re.search(why, str(plan))


@pytest.mark.parametrize(
    ("make", "styles", "message"),
    [
        (models.tiny_bert, None, "no tensor-parallel plan for BertModel; give styles"),
        (models.tiny_llama, {"model.layers.*.mlp.up_proj": "colwise"}, "no 'rowwise' Linear comes after"),
        (models.tiny_llama, {"model.layers.*.mlp.up_proj": "diagonal"}, "'diagonal'; allowed: 'colwise'"),
        (models.tiny_llama, {"layers.*.mlp.up_proj": "colwise"}, "fit no Linear of LlamaForCausalLM"),
    ],
)
def test_plans_that_cannot_be(make, styles, message):
    with pytest.raises(ValueError, match=message):
        parallel.plan(make(), 2, styles)
    with pytest.raises(ValueError, match="at least one process"):
        parallel.plan(models.tiny_llama(), 0)


def test_processes_are_needed():
    with pytest.raises(RuntimeError, match="torchrun"):
        parallel.parallelize(models.tiny_llama())


def test_a_folder_cannot_hold_a_part(tmp_path):
    model = llama()
    pyllmq.swap_linear(model, mixed_widths)
    pyllmq.save_pretrained(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "part_of_ranks" not in config["quantization_config"]
    config["quantization_config"]["part_of_ranks"] = 2
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(pyllmq.FormatError, match="one rank's part"):
        pyllmq.from_pretrained(tmp_path / "m")
