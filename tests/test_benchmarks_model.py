"""`pyllmq bench --model`: both kinds of folder, causal models and encoders. No test asserts how fast anything is."""

from __future__ import annotations

import csv

import pytest
import torch

import pyllmq
from pyllmq.benchmarks import model as benchmark
from pyllmq.benchmarks.providers import Widths
from pyllmq.cli import main

from . import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense and packed folders of a tiny Llama and a tiny BERT."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, made in (("llama", models.tiny_llama(tie_word_embeddings=False)), ("bert", models.tiny_bert())):
        found[name] = root / name
        made.save_pretrained(found[name])
        models.tiny_tokenizer().save_pretrained(found[name])
        packed = benchmark.packed_twin(made, Widths.parse("3"))
        found[f"{name} packed"] = root / f"{name}-packed"
        pyllmq.save_pretrained(packed, found[f"{name} packed"], models.tiny_tokenizer())
    return found


@pytest.mark.parametrize("name", ["llama", "llama packed", pytest.param("bert", marks=pytest.mark.slow), "bert packed"])
def test_every_kind_of_folder(folders, name, tmp_path, capsys):
    rows = benchmark.run_model(
        folders[name], bits="3", lengths=[2, 5], precision=["exact", "fast"], csv=tmp_path / "rows.csv", rounds=1
    )
    assert [(row.precision, row.length) for row in rows] == [("exact", 2), ("exact", 5), ("fast", 2), ("fast", 5)]
    for row in rows:
        assert row.unit == ("token" if "llama" in name else "sentence") and row.model == folders[name].name
        assert row.ratio == pytest.approx(row.packed_per_s / row.dense_per_s) and row.dense_per_s > 0
        assert 0 < row.packed_layers_share < 1 and row.bits_per_weight > 3
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [int(line["length"]) for line in csv.DictReader(file)] == [2, 5, 2, 5]
    assert f"{rows[0].unit}s/s" in capsys.readouterr().out


def test_twins_compute_the_same(folders):
    packed = pyllmq.from_pretrained(folders["llama packed"])
    dense = benchmark.dense_twin(packed)
    assert not any(isinstance(module, pyllmq.CodebookLinear) for module in dense.modules())
    assert sum(isinstance(module, pyllmq.CodebookLinear) for module in packed.modules()) == 14
    pyllmq.set_precision(packed, "exact")
    ids = torch.randint(0, 512, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    again = benchmark.packed_twin(dense, Widths.parse("2.1+0.01"))
    layer = again.model.layers[0].mlp.up_proj
    assert layer.structure.columns[3] > 0 < layer.structure.outliers
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_models_take_turns():
    order = []
    speeds = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    measure = lambda model: (order.append(model), next(speeds))[1]  # noqa: E731
    assert benchmark.in_turns(measure, ["dense", "packed"], 3) == [2.0, 20.0]
    assert order == ["dense", "packed"] * 3


def test_command_line_and_errors(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--model", str(folders["llama packed"]), "--lengths", "2", "--precision", "fast"]) == 0
    assert "packed/dense" in capsys.readouterr().out and (tmp_path / "pyllmq_bench_model.csv").exists()
    for options, message in (
        (["--lengths", "0"], "at least 1"),
        (["--lengths", "x"], "--lengths is"),
        (["--precision", "low"], "allowed: 'exact'"),
        (["--bits", "9"], "allowed: 1 to 8"),
    ):
        assert main(["bench", "--model", str(folders["llama"]), "--csv", "", *options]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("a,b\n")
    assert main(["bench", "--model", str(folders["llama"]), "--csv", "other.csv"]) == 1
    assert "another header" in capsys.readouterr().err
