"""Tensor parallelism: plans of every architecture, and 2 and 4 gloo processes that together give the logits of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import CodebookLinear, Sparse24CodebookLinear, Sparse24Linear, SparseLinear, parallel

from . import models

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
    parts = [
        CodebookLinear.from_dense(part, bits=3).packed_weight() for part in linear.weight.detach().split([half, linear.out_features - half])  # fmt: skip
    ]
    return CodebookLinear.from_weight(pyllmq.CodebookWeight.concatenate(parts), linear.bias)


def with_biases(model):
    """Biases start as zeros: one that is added twice would not be seen."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


def llama(**changes):
    return with_biases(models.tiny_llama(attention_bias=True, mlp_bias=True, **changes))


UNEVEN = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12, "intermediate_size": 101, "vocab_size": 509}  # fmt: skip

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
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    for name, (make, make_layer, exclude, styles) in CASES.items():
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


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request, cases):
    """What rank 0 of 2 or 4 processes found, by case; every rank has to end well."""
    ranks = request.param
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_ranks", str(rank), str(ranks), str(cases)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    printed = [process.communicate(timeout=560)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(text[-3000:] for text in printed)
    return ranks, {name: json.loads((cases / f"{name}.{ranks}.json").read_text()) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_logits_of_one(case, outcome, cases):
    ranks, found = outcome
    found = found[case]
    assert found["cut"] and found["same parts"]
    assert found["folder"] < 1e-5 and found["memory"] < 1e-5
    expected = torch.load(cases / case / "expected.pt")
    one_process = (expected["bfloat16"].double() - expected["logits"].double()).norm() / expected["logits"].double().norm()
    assert found["bfloat16"] < 2 * float(one_process)
    assert found.get("generated", True) and found.get("transformers", 0) < 1e-5
    assert found["split"], "something is cut"
    for refusal in found["refusals"]:
        assert "rank" in refusal and "whole model" in refusal
