"""A format that another package adds: int8 with a scale for each row. All of it is between the two lines of this file; the rest
shows that everything that takes a format takes this one."""

# ---- the format -------------------------------------------------------------------------------------------------------

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyllmq.formats import FormatError, PackedWeight, Structure, register_format
from pyllmq.layers.linear import PackedLinear, dense_and_bias


@dataclass(frozen=True)
class Int8RowsStructure(Structure):
    kind: ClassVar[str] = "int8_rows"

    def tensors(self):
        n, k = self.out_features, self.in_features
        return {"values": ((n, k), torch.int8), "scale": ((n,), torch.float32)}


@dataclass(frozen=True, eq=False)
class Int8RowsWeight(PackedWeight):
    structure_type = Int8RowsStructure
    fields = ("values", "scale")

    @classmethod
    def pack(cls, weight: Tensor) -> Int8RowsWeight:
        scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-30)
        values = (weight.float() / scale[:, None]).round().to(torch.int8)
        return cls.from_tensors({"values": values, "scale": scale}, *weight.shape)

    @staticmethod
    def check(structure, tensors):
        if bool((tensors["values"] == -128).any()):
            raise FormatError("values holds -128; allowed: -127 to 127")

    @staticmethod
    def decode(field, shape):
        return field["values"].float() * field["scale"][:, None]

    def tensors_of_rows(self, start, stop):
        return {key: tensor[start:stop] for key, tensor in self.tensors.items()}

    def tensors_of_columns(self, start, stop):
        return self.tensors | {"values": self.tensors["values"][:, start:stop]}


class Int8RowsLinear(PackedLinear):
    weight_type = Int8RowsWeight

    @classmethod
    def from_dense(cls, linear: nn.Linear | Tensor) -> Int8RowsLinear:
        dense, bias = dense_and_bias(linear)
        return cls.from_weight(Int8RowsWeight.pack(dense), bias, dense.dtype)


register_format(Int8RowsStructure, Int8RowsLinear, Int8RowsWeight)

# ---- the tests --------------------------------------------------------------------------------------------------------

import copy  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

import pyllmq  # noqa: E402
from pyllmq import functional, parallel  # noqa: E402

from . import models  # noqa: E402
from .damage import refused_of  # noqa: E402
from .new_process import run_python  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def in_a_new_process(code: str, *arguments: object) -> str:
    """With this format registered."""
    code = f"import tests.{Path(__file__).stem}\n" + code
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = run_python("-c", code, *arguments, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_format_takes_at_most_sixty_lines():
    lines = Path(__file__).read_text().split("# ---- the ")[1].splitlines()
    assert 20 < sum(bool(line.strip()) for line in lines[1:]) <= 60


def test_a_layer():
    linear = nn.Linear(37, 21)
    layer = Int8RowsLinear.from_dense(linear)
    x = torch.randn(2, 3, 37, requires_grad=True)
    dense = layer.packed_weight().tensors["values"].double() * layer.packed_weight().tensors["scale"].double()[:, None]
    assert (
        float((dense - linear.weight.detach().double()).abs().max()) <= float(linear.weight.detach().abs().max()) / 127
    )
    exact = x.detach().double() @ dense.T + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), exact.detach(), rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), dense.sum(0).expand(2, 3, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(functional.packed_linear(x, layer.packed_weight(), layer.bias), layer(x))
    again = Int8RowsLinear(layer.structure)
    again.load_state_dict(layer.state_dict())
    for same in (again, copy.deepcopy(layer)):
        assert torch.equal(same(x), layer(x)) and "bits_per_weight=8.865" in repr(same)


def packed_model(folder):
    model = models.tiny_llama()
    pyllmq.swap_linear(model, Int8RowsLinear.from_dense)
    pyllmq.save_pretrained(model, folder)
    return model


LOAD = """
import sys, torch, pyllmq
model = pyllmq.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(9)[None]).logits, sys.argv[2])
pyllmq.save_pretrained(model, sys.argv[3])
"""


def test_saved_and_loaded_in_a_new_process(tmp_path):
    model = packed_model(tmp_path / "packed")
    described = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["modules"]
    assert described["model.layers.0.mlp.up_proj"] == {"kind": "int8_rows", "out_features": 128, "in_features": 64}
    in_a_new_process(LOAD, tmp_path / "packed", tmp_path / "logits", tmp_path / "again")
    with torch.no_grad():
        expected = model(torch.arange(9)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=0, atol=1e-6)
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()
    loaded = pyllmq.from_pretrained(tmp_path / "packed")
    assert isinstance(loaded.model.layers[1].self_attn.q_proj, Int8RowsLinear)


def test_inspect_names_it(tmp_path):
    packed_model(tmp_path / "packed")
    said = in_a_new_process(
        "import sys; from pyllmq.cli import main; main(sys.argv[1:])", "inspect", tmp_path / "packed"
    )
    assert "int8_rows" in said and "14 packed Linears" in said


def test_a_process_without_the_format_says_what_it_reads(tmp_path):
    packed_model(tmp_path / "packed")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = run_python("-m", "pyllmq", "inspect", tmp_path / "packed", cwd=ROOT, env=environment)
    assert (
        done.returncode != 0
        and "kind is 'int8_rows'; this version of pyllmq reads: 'bitmap', 'codebook'" in done.stderr
    )


@pytest.mark.parametrize(("by", "ranges"), [("rows", ((0, 7), (7, 21))), ("columns", ((0, 16), (16, 37)))])
def test_a_cut_for_tensor_parallelism(by, ranges):
    layer = Int8RowsLinear.from_dense(nn.Linear(37, 21))
    dense = layer.dequantize()
    for rank, (start, stop) in enumerate(ranges):
        part = parallel.cut(layer.packed_weight(), parallel.Split(by, ranges), rank)
        assert torch.equal(part.dequantize(), dense[start:stop] if by == "rows" else dense[:, start:stop])


def test_damaged_folders_give_an_error_or_a_model(tmp_path):
    """As tests/test_fuzz.py damages the folders of the formats of this package."""
    packed_model(tmp_path / "packed")
    refused = refused_of(tmp_path / "packed", 40, tmp_path)
    assert refused >= 10
    tensors = Int8RowsLinear.from_dense(nn.Linear(8, 4)).state_dict()
    tensors["values"][2, 3] = -128
    with pytest.raises(RuntimeError, match="values holds -128"):
        Int8RowsLinear(Int8RowsStructure(4, 8)).load_state_dict(tensors)
