"""Models pruned elsewhere: which format each weight gets, and that nothing but the size changes."""

import pytest
import torch
from torch import nn

import pyllmq

from . import models


def prune_by_magnitude(model: nn.Module, share: float) -> None:
    for name, module in pyllmq.linears.linear_modules(model):
        if "lm_head" not in name:
            limit = module.weight.abs().float().flatten().kthvalue(int(share * module.weight.numel())).values
            module.weight.data[module.weight.abs() <= limit] = 0


@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_the_same(make, dtype) -> None:
    model = make().to(dtype)
    prune_by_magnitude(model, 0.6)
    ids = torch.randint(0, 512, (2, 11))
    before = model(ids).logits
    report = pyllmq.pack_pruned(model)
    layers = [module for module in model.modules() if isinstance(module, pyllmq.SparseLinear)]
    assert len(layers) == len(report.layers) and report.mean_error == 0.0 and report.nbytes < 0.6 * report.dense_nbytes
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(ids).logits, before, rtol=tolerance, atol=tolerance)


def test_int8_values_cost_little_and_are_reported() -> None:
    model = models.tiny_llama()
    prune_by_magnitude(model, 0.5)
    report = pyllmq.pack_pruned(model, values="int8")
    assert 0 < report.mean_error < 1e-3
    assert model.model.layers[0].mlp.up_proj.structure.values == "int8"


def test_what_would_not_shrink_stays_dense_and_is_named() -> None:
    model = models.tiny_llama(tie_word_embeddings=True)
    prune_by_magnitude(model, 0.5)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    report = pyllmq.pack_pruned(model, exclude=())
    left = {item.name: item.why for item in report.left_dense}
    assert left == {
        "lm_head": "shares its weight with model.embed_tokens",
        "model.layers.0.mlp.up_proj": "0 % zeros save nothing",
    }
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and len(report.layers) == 13


def test_two_of_four_or_any_whichever_is_smaller() -> None:
    weight = torch.randn(8, 32)
    weight[:, ::2] = 0
    sparser = weight.clone()
    sparser[:, 4:] = 0
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(32, 8))
    for module, value in zip(model, (weight, sparser, torch.zeros(8, 32)), strict=True):
        module.weight.data = value
    pyllmq.pack_pruned(model)
    assert [type(m) for m in model] == [pyllmq.Sparse24Linear, pyllmq.SparseLinear, pyllmq.SparseLinear]
    assert torch.equal(model[0].dequantize(), weight) and not model[2].dequantize().any()


def test_nothing_to_pack_and_bad_values() -> None:
    with pytest.raises(ValueError, match="none of 14 Linears has zeros"):
        pyllmq.pack_pruned(models.tiny_llama())
    with pytest.raises(ValueError, match="values is 'int4'"):
        pyllmq.pack_pruned(models.tiny_llama(), values="int4")
