"""A module made of two packed children, which a test registers: described by nesting, saved, loaded, inspected."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import pyllmq
from pyllmq.formats import CompositeStructure, FormatError, register_format, structure_from_dict
from pyllmq.layers.linear import PackedComposite, packed_modules
from pyllmq.linears import replace_module

from . import models
from .test_new_format import in_a_new_process


@dataclass(frozen=True)
class ChainStructure(CompositeStructure):
    kind: ClassVar[str] = "test_chain"

    def __post_init__(self) -> None:
        super().__post_init__()
        down, up = self.children.get("down"), self.children.get("up")
        if down is None or up is None or len(self.children) != 2 or down.out_features != up.in_features:
            raise FormatError("a test_chain has two children, down and up, and down's outputs are up's inputs")


class ChainLinear(PackedComposite):
    """y = up(down(x)) + bias."""

    @classmethod
    def from_dense(cls, linear: nn.Linear, rank: int = 16) -> ChainLinear:
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        down = pyllmq.CodebookLinear.from_dense(v[:rank], 6)
        up = pyllmq.SparseLinear.from_dense(u[:, :rank] * s[:rank], 0.25)
        structure = ChainStructure(*linear.weight.shape, {"down": down.structure, "up": up.structure})
        layer = cls(structure, linear.bias is not None, linear.weight.dtype)
        layer.down, layer.up = down, up
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x))
        return y if self.bias is None else y + self.bias


register_format(ChainStructure, ChainLinear)


def packed_model():
    model = models.tiny_llama(attention_bias=True)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        replace_module(model, name, ChainLinear.from_dense(model.get_submodule(name)))
    replace_module(
        model,
        "model.layers.0.mlp.up_proj",
        pyllmq.CodebookLinear.from_dense(model.get_submodule("model.layers.0.mlp.up_proj"), 4),
    )
    return model


def test_only_the_outermost_module_is_packed():
    names = [name for name, _ in packed_modules(packed_model())]
    chains = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert sorted(names) == sorted([*chains, "model.layers.0.mlp.up_proj"])


def test_a_description_nests_and_comes_back():
    layer = ChainLinear.from_dense(nn.Linear(40, 30), 8)
    described = layer.structure.to_dict()
    assert described["children"]["down"]["kind"] == "codebook" and described["children"]["up"]["kind"] == "bitmap"
    again = structure_from_dict(json.loads(json.dumps(described)))
    assert again == layer.structure and again.tensors() == layer.structure.tensors()
    assert set(layer.state_dict()) == {*again.tensors(), "bias"}
    assert layer.nbytes == layer.down.nbytes + layer.up.nbytes
    assert layer.bits_per_weight == 8 * layer.nbytes / (30 * 40) and "down=codebook, up=bitmap" in repr(layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"children": []}, "must map names to descriptions"),
        ({"children": {}}, "each needs a name"),
        ({"children": {"down": {"kind": "nothing"}}}, "kind is 'nothing'"),
        ({"in_features": "40"}, "in_features is '40'"),
        ({"more": 1}, "described by the keys"),
    ],
)
def test_a_wrong_description_is_refused(change, message):
    described = ChainLinear.from_dense(nn.Linear(40, 30), 8).structure.to_dict() | change
    with pytest.raises(FormatError, match=message):
        structure_from_dict(described)


def test_state_dict_round_trip_and_precision():
    layer, other = ChainLinear.from_dense(nn.Linear(40, 30), 8), ChainLinear.from_dense(nn.Linear(40, 30), 8)
    x = torch.randn(3, 40)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    skeleton = ChainLinear(layer.structure)
    assert all(tensor.device.type == "meta" for tensor in skeleton.state_dict().values())
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    skeleton.prepare()
    assert torch.equal(skeleton(x), layer(x))
    assert pyllmq.set_precision(layer, "exact") == 2


def test_saved_loaded_in_a_new_process_and_inspected(tmp_path):
    model = packed_model()
    pyllmq.save_pretrained(model, tmp_path / "packed")
    modules = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["modules"]
    assert modules["model.layers.1.mlp.down_proj"]["children"]["up"]["kind"] == "bitmap" and len(modules) == 3
    code = """
import sys, torch, pyllmq, tests.test_composite
model = pyllmq.from_pretrained(sys.argv[1], fuse=False)
assert type(model.model.layers[0].self_attn.q_proj) is tests.test_composite.ChainLinear
with torch.no_grad():
    torch.save(model(torch.arange(9)[None]).logits, sys.argv[2])
pyllmq.save_pretrained(model, sys.argv[3])
from pyllmq.cli import main
main(["inspect", sys.argv[1]])
"""
    said = in_a_new_process(code, tmp_path / "packed", tmp_path / "logits", tmp_path / "again")
    assert "test_chain: down=codebook, up=bitmap" in said and "3 packed Linears" in said
    with torch.no_grad():
        expected = model(torch.arange(9)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=0, atol=1e-6)
    files = [tmp_path / name / "model.safetensors" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
