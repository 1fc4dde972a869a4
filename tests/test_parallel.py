"""Tensor parallelism: plans of every architecture, and 2 and 4 gloo processes that together give the logits of one."""

import copy
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import CodebookLinear, Sparse24CodebookLinear, Sparse24Linear, SparseLinear, parallel
from pyllmq.experts import RoutedExperts
from pyllmq.tensor_parallel import _take_experts

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


# Every expert of every token: with a choice, rounding would choose.
FIVE = {"num_hidden_layers": 1, "num_local_experts": 5, "num_experts_per_tok": 5}


def packed_experts(include=("experts",), **changes):
    model = models.tiny_mixtral(**changes)
    pyllmq.compress(model, pyllmq.KMeansConfig(4), include=include, progress=False)
    return model


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "sliding_window": 8}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, **FIVE)).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
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
    "packed-tied": (lambda: packed_ends(llama(tie_word_embeddings=True)), mixed_widths, ("lm_head",), None),
    "packed-experts": (lambda: packed_experts(**FIVE), mixed_widths, ("lm_head",), None),
    "experts": (lambda: models.tiny_mixtral(**FIVE), mixed_widths, ("lm_head", "experts"), None),
    "some-experts-packed": (lambda: packed_experts(include=["expert_1_up", "expert_3_up", "expert_3_down"], **FIVE), mixed_widths,
                            ("lm_head", "experts"), None),
    "experts-with-biases": (lambda: gpt_oss(), mixed_widths, ("lm_head",), None),
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
    assert not found["whole"]
    held = {"model.layers.0.mlp.experts": [[5 * r // ranks, 5 * (r + 1) // ranks] for r in range(ranks)]}
    assert found["experts"] == (held if "experts" in case else {})
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


def test_experts_are_shared_out_whole():
    plan = parallel.plan(models.tiny_mixtral(num_local_experts=5), 2)
    assert {name.rpartition(".")[2] for name in plan.splits} == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    stacks = {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    assert plan.experts == dict.fromkeys(stacks, ((0, 2), (2, 5))) and not plan.whole
    assert re.search(r"layers\.1\.mlp\.experts +experts 0:2 2:5", str(plan))
    few = parallel.plan(models.tiny_mixtral(), 6)
    assert stacks <= few.whole.keys() and not few.experts and "4 experts are fewer than 6 ranks" in str(few)


def test_stacks_that_nothing_takes_apart_stay_whole_and_the_plan_says_so():
    model = llama()
    model.model.layers[0].strange = nn.Parameter(torch.zeros(4, 64, 32))
    plan = parallel.plan(model, 2)
    why = r"layers\.0\.strange +whole: .*stacked experts.* of 8,192 values, .* each of the 2 ranks holds all of it"
    assert re.search(why, str(plan))


def test_an_index_that_is_no_expert_is_refused_by_every_rank():
    stack = RoutedExperts(models.tiny_mixtral(num_local_experts=5).model.layers[0].mlp.experts)
    x, weights = torch.randn(2, 64), torch.rand(2, 1)
    whole = [stack(x, torch.full((2, 1), expert), weights) for expert in range(6)]
    for first, stop in ((0, 2), (2, 5)):
        part = copy.deepcopy(stack)
        part.keep(first, stop)
        part.register_forward_pre_hook(partial(_take_experts, 5))
        for expert in range(6):
            given = part(x, torch.full((2, 1), expert), weights)
            wanted = whole[expert] if first <= expert < stop else torch.zeros(2, 64)
            torch.testing.assert_close(given, wanted)
        for bad in (-1, 6):
            with pytest.raises(IndexError, match="sent to expert"):
                part(x, torch.full((2, 1), bad), weights)


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
