"""A module made of packed children: nested in config.json, empty until loading fills it, one module to whoever asks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import pyllmq
from pyllmq import CodebookLinear, FormatError, parallel
from pyllmq.folders import PackedFolder
from pyllmq.formats import CompositeStructure, register_format
from pyllmq.layers.linear import PackedComposite, packed_modules

from . import models


class SplitStructure(CompositeStructure):
    kind = "test_split"


class SplitLinear(PackedComposite):
    """The upper and the lower rows of a weight, each packed by itself."""

    def forward(self, x):
        y = torch.cat([self.upper(x), self.lower(x)], -1)
        return y if self.bias is None else y + self.bias

    @classmethod
    def from_dense(cls, linear):
        half = linear.out_features // 2
        parts = dict(
            zip(("upper", "lower"), linear.weight.detach().split([half, linear.out_features - half]), strict=True)
        )
        packed = {
            name: CodebookLinear.from_dense(part, bits=bits)
            for (name, part), bits in zip(parts.items(), (3, 4), strict=True)
        }
        structure = SplitStructure(linear.out_features, linear.in_features, {n: p.structure for n, p in packed.items()})
        layer = cls(structure, linear.bias is not None, linear.weight.dtype)
        for name, part in packed.items():
            layer.add_module(name, part)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer


register_format(SplitStructure, SplitLinear)
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def packed(tmp_path):
    model = models.tiny_llama(num_hidden_layers=1, mlp_bias=True)
    pyllmq.swap_linear(model, SplitLinear.from_dense, include=["mlp"])
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=3), include=["self_attn"])
    pyllmq.save_pretrained(model, tmp_path / "m")
    return model, tmp_path / "m"


def test_nested_and_back(packed, tmp_path):
    model, folder = packed
    described = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    assert len(described) == 7 and described[UP]["children"]["upper"]["kind"] == "codebook"
    ids = torch.randint(0, 512, (2, 9))
    for loaded in (pyllmq.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert isinstance(loaded.model.layers[0].mlp.up_proj, SplitLinear) and len(packed_modules(loaded)) == 7
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    a, b = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert PackedFolder.open(tmp_path / "again").description == PackedFolder.open(folder).description


def test_a_child_that_is_missing_or_damaged_is_named(packed):
    _, folder = packed
    file = folder / "model.safetensors"
    held = load_file(file)
    save_file({key: t for key, t in held.items() if key != f"{UP}.lower.codebook"}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"{UP}.lower.codebook is missing"):
        pyllmq.from_pretrained(folder)
    save_file(
        held | {f"{UP}.lower.codebook": held[f"{UP}.lower.codebook"] * torch.nan}, file, metadata={"format": "pt"}
    )
    with pytest.raises(FormatError, match=f"{UP}: lower: .*not finite"):
        pyllmq.from_pretrained(folder)


def test_a_plan_leaves_it_whole_with_all_of_its_block(packed):
    plan = parallel.plan(packed[0], 2)
    assert "made of several packed weights (test_split)" in plan.whole[UP]
    assert {name.rpartition(".")[2] for name in plan.whole} == {"gate_proj", "up_proj", "down_proj"}
    assert "model.layers.0.self_attn.q_proj" in plan.splits
