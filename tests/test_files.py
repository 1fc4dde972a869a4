"""Methods without calibration data: file by file, any number of workers, the same as in memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pyllmq
from pyllmq import CodebookLinear, KMeansConfig, SparseConfig, compress_files, loading
from pyllmq.cli import main
from pyllmq.compression.jobs import files
from pyllmq.compression.jobs.manifest import working_folder

from . import models
from .kill_and_resume import digests


def saved(model, folder: Path, shard: str = "60KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("make", "blocks"), [(models.tiny_llama, "layers"), (models.tiny_gpt2, "h"), (models.tiny_bert, "layer")]
)
def test_kmeans_is_that_of_each_layer(tmp_path, make, blocks):
    model = make()
    source, output = saved(model, tmp_path / "source"), tmp_path / "output"
    report = compress_files(source, output, KMeansConfig(3), include=[blocks], progress=False)
    packed = pyllmq.from_pretrained(output)
    assert report.layers and {row.name for row in report.layers} == {
        name for name, module in packed.named_modules() if isinstance(module, CodebookLinear)
    }
    for row in report.layers[:3]:
        dense = pyllmq.linears.as_linear(model.get_submodule(row.name))
        layer = packed.get_submodule(row.name)
        wanted = CodebookLinear.from_dense(dense, bits=3)
        assert torch.equal(layer.dequantize(), wanted.dequantize())
        assert torch.equal(layer.bias, wanted.bias) if wanted.bias is not None else layer.bias is None
        lost = (layer.dequantize() - dense.weight).double().square().sum() / dense.weight.double().square().sum()
        assert row.error == pytest.approx(float(lost), rel=1e-5) and row.nbytes == layer.nbytes
    before, after = tensors(source), tensors(output)
    copied = before.keys() & after.keys()
    assert copied and all(torch.equal(before[key], after[key]) for key in copied)
    assert {file.name for file in output.glob("*.safetensors")} == {file.name for file in source.glob("*.safetensors")}


@pytest.mark.parametrize(
    "config", [SparseConfig(pattern="2:4", method="magnitude"), SparseConfig(0.6, method="magnitude")]
)
def test_magnitude_is_that_of_the_calibrated_loop(tmp_path, config):
    source = saved(models.tiny_llama().bfloat16(), tmp_path / "source")
    compress_files(source, tmp_path / "output", config, progress=False)
    model = loading.load_model(source)
    pyllmq.compress(model, config, models.token_batches(1), progress=False)
    pyllmq.save_pretrained(model, tmp_path / "reference")
    a, b = tensors(tmp_path / "output"), tensors(tmp_path / "reference")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    described = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("output", "reference")]
    assert described[0] == described[1]


def test_workers_and_resume_give_the_same_bytes(tmp_path, monkeypatch):
    source = saved(models.tiny_llama(), tmp_path / "source")
    assert len(list(source.glob("*.safetensors"))) > 4
    compress_files(source, tmp_path / "one", KMeansConfig(2), progress=False)
    compress_files(source, tmp_path / "two", KMeansConfig(2), workers=2, progress=False)
    compress_file, calls = files.compress_file, []

    def end(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compress_file(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "compress_file", end)
        compress_files(source, tmp_path / "three", KMeansConfig(2), progress=False)
    assert not (tmp_path / "three").exists() and working_folder(tmp_path / "three").exists()
    with pytest.raises(ValueError, match="config.bits was 2, is 3"):
        compress_files(source, tmp_path / "three", KMeansConfig(3), resume=True, progress=False)
    compress_files(source, tmp_path / "three", KMeansConfig(2), resume=True, progress=False)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "three")


def test_a_single_file_needs_no_index(tmp_path):
    source = saved(models.tiny_llama(), tmp_path / "source", "1GB")
    compress_files(source, tmp_path / "output", KMeansConfig(2), progress=False)
    names = {file.name for file in (tmp_path / "output").iterdir()}
    assert "model.safetensors" in names and "model.safetensors.index.json" not in names
    pyllmq.from_pretrained(tmp_path / "output")


def test_what_does_not_go(tmp_path):
    source = saved(models.tiny_llama(), tmp_path / "source")
    for config, more, message in (
        (SparseConfig(0.5, method="wanda"), {}, "'wanda' with these settings needs calibration data"),
        (KMeansConfig(2), {"workers": 0}, "workers is 0; it must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_files(source, tmp_path / "output", config, progress=False, **more)
    with pytest.raises(ValueError, match="bits is 9; allowed"):
        KMeansConfig(9)
    bad = models.tiny_llama()
    bad.model.layers[0].mlp.up_proj.weight.data[1, 1] = torch.inf
    saved(bad, tmp_path / "bad")
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight: .*not finite"):
        compress_files(tmp_path / "bad", tmp_path / "output", KMeansConfig(2), progress=False)
    assert not (tmp_path / "output").exists()


def test_the_command(tmp_path, capsys):
    source = saved(models.tiny_llama(), tmp_path / "source")
    models.tiny_tokenizer().save_pretrained(source)
    output = tmp_path / "output"
    assert main(["compress", str(source), str(output), "--method", "kmeans", "--bits", "3", "--quiet"]) == 0
    assert "14 Linears" in capsys.readouterr().out and (output / "tokenizer.json").exists()
    for more, message in (
        (["--method", "kmeans", "--bits", "2.5"], "all columns have one width"),
        (["--workers", "2"], "choose --method kmeans or magnitude"),
    ):
        assert main(["compress", str(source), str(tmp_path / "other"), *more]) == 1
        assert message in capsys.readouterr().err
