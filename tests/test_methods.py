"""Methods as plug-ins: those of others in every kind of job, and no option or config that is ignored in silence."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import loading
from pyllmq.cli import main
from pyllmq.compression import calibration
from pyllmq.compression.jobs.manifest import Manifest, working_folder
from pyllmq.compression.methods import METHODS, method_of, register

from . import models
from .kill_and_resume import digests

SMALL = ["--samples", "2", "--seqlen", "16"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("methods") / "dense"
    models.tiny_llama(tie_word_embeddings=False).save_pretrained(folder, max_shard_size="60KB")
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def plugins(monkeypatch):
    """Modules of this folder can be imported by name; what they register is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)
    for module in ("plugin_method", "plugin_calibrated"):
        sys.modules.pop(module, None)


def ended_after_one(monkeypatch, arguments: list[str]) -> None:
    """Run a command that is interrupted when it has finished a unit."""
    add = Manifest.add

    def add_and_end(self, *entry) -> None:
        add(self, *entry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "add", add_and_end)
        assert main(arguments) == 130


@pytest.mark.parametrize(
    ("module", "options", "layer"),
    [
        ("plugin_method", ["--method", "grid", "--bits", "5", "--shrink", "0.9"], pyllmq.CodebookLinear),
        ("plugin_calibrated", ["--method", "loudest", "--keep", "0.25", *SMALL], pyllmq.SparseLinear),
    ],
)
def test_a_method_of_others_runs_in_every_job(source, tmp_path, capsys, monkeypatch, plugins, module, options, layer):
    assert len((Path(__file__).parent / f"{module}.py").read_text().splitlines()) <= 40
    command = ["compress", str(source), "--plugin", module, *options, "--quiet"]
    assert main([*command, str(tmp_path / "dry"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "14 Linears in 2 blocks" in printed and "Nothing was written" in printed and not list(tmp_path.iterdir())
    assert main([*command, str(tmp_path / "whole")]) == 0
    ended_after_one(monkeypatch, [*command, str(tmp_path / "ended")])
    assert not (tmp_path / "ended").exists() and working_folder(tmp_path / "ended").exists()
    assert main([*command, str(tmp_path / "ended"), "--resume"]) == 0
    assert digests(tmp_path / "whole") == digests(tmp_path / "ended")
    packed = pyllmq.from_pretrained(tmp_path / "whole")
    assert sum(isinstance(module, layer) for module in packed.modules()) == 14
    # In memory, by the library: the same weights.
    config = METHODS[options[1]].config({"bits": 5, "shrink": 0.9} if "grid" in options else {"keep": 0.25})
    model = loading.load_model(source)
    batches = None
    if "loudest" in options:
        tokenizer = loading.load_tokenizer(source)
        batches = calibration.batches_of_text(model, tokenizer, None, 2, 16)
    report = pyllmq.compress(model, config, batches, progress=False)
    assert report.method == options[1] and len(report.layers) == 14
    for name, module in packed.named_modules():
        if isinstance(module, layer):
            assert torch.equal(module.dequantize(), model.get_submodule(name).dequantize())


def test_a_method_of_others_is_listed(capsys, plugins) -> None:
    with pytest.raises(SystemExit):
        main(["compress", "--plugin", "plugin_method", "--method", "grid", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "grid: Evenly spaced values in every column." in printed and "Width of the codes; default 4" in printed
    assert "--shrink" in printed and "--preset" not in printed
    assert main(["compress", "a", "b", "--plugin", "no_such_module"]) == 1
    assert "no_such_module" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'kmeans' is KMeans; register .* by another word"):
        register("kmeans", METHODS["grid"].method)


def test_a_method_of_an_installed_package(source, tmp_path, monkeypatch, plugins, capsys) -> None:
    """The entry points of the group `pyllmq.methods`, without --plugin."""
    package = tmp_path / "grid_package-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: grid-package\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[pyllmq.methods]\ngrid = plugin_method\n")
    command = ["compress", str(source), str(tmp_path / "out"), "--method", "grid", "--quiet"]
    assert main(command) == 1 and "--method is 'grid'; allowed: column-codebook, claq" in capsys.readouterr().err
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(command) == 0
    layers = [m for m in pyllmq.from_pretrained(tmp_path / "out").modules() if isinstance(m, pyllmq.CodebookLinear)]
    assert len(layers) == 14
    # One that cannot be imported does not stop the methods of others, and is named.
    (package / "entry_points.txt").write_text("[pyllmq.methods]\nbroken = no_such_module_at_all\n")
    assert main(["compress", str(source), str(tmp_path / "more"), "--method", "kmeans", "--quiet"]) == 0
    assert "broken = no_such_module_at_all" in (said := capsys.readouterr().err) and "grid-package" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kmeans", "lloyd"], "kmeans is 'lloyd'; allowed: 'exact', 'windowed'"),
        (["--method", "claq", "--preset", "best"], "--preset best does not go with --method claq; choose --method column-c"),
        (["--method", "kmeans", "--calibration", "F"], "--calibration F does not go with --method kmeans .*weights alone"),
        (["--method", "kmeans", "--samples", "9"], "--samples 9 does not go with --method kmeans .*choose --method column-c"),
        (["--method", "magnitude", "--seqlen", "9"], "--seqlen 9 does not go with --method magnitude"),
        (["--method", "kmeans", "--no-share-bits"], "--no-share-bits does not go with .* choose --method column-codebook or claq"),
        (["--method", "pack", "--bits", "3"], "--bits 3 does not go with --method pack"),
        (["--method", "wanda", "--outliers", "0.01"], "--outliers is about codebooks .* give --bits too"),
        (["--method", "wanda", "--refine", "2"], "--refine has no effect with these settings: wanda alone"),
        (["--method", "magnitude", "--spread", "0.2"], "--spread has no effect .*pruned alike"),
        (["--preset", "fast", "--tolerance", "0.1"], "--tolerance has no effect .*cycles = 0"),
        (["--method", "columns"], "--method columns is called column-codebook now"),
        (["--method", "awq"], "--method is 'awq'; allowed: column-codebook, claq, kmeans, magnitude"),
        (["--samples", "0"], "samples is 0"),
        (["--cycles", "many"], "--cycles is 'many'; give an integer: Passes of block"),
    ],
)  # fmt: skip
def test_no_option_is_ignored(source, tmp_path, capsys, options, message) -> None:
    assert main(["compress", str(source), str(tmp_path / "out"), "--quiet", *options]) == 1
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_options_reach_the_config() -> None:
    column = METHODS["column-codebook"]
    assert column.config({"preset": "fast", "bits": 2.5, "kmeans": "exact"}) == pyllmq.ColumnCodebookConfig.preset(
        "fast", 2.5, kmeans="exact"
    )
    assert METHODS["claq"].config({}) == pyllmq.CLAQConfig(3.12, outliers=0.005)
    assert METHODS["wanda"].config({"pattern": "2:4"}) == pyllmq.SparseConfig(pattern="2:4", method="wanda")
    joint = METHODS["mixed-sparsity"].config({"bits": 3.0, "outliers": 0.01})
    assert joint == pyllmq.SparseConfig(0.5, quantize=pyllmq.CLAQConfig(3.0, outliers=0.01))


def test_every_method_has_one_name() -> None:
    """Module, config, class and word."""
    for word, registered in METHODS.items():
        method = registered.method
        module, name = method.__module__.rpartition(".")[2], method.__name__
        assert method.config_type.__name__ == f"{name}Config" and module.replace("_", "") == name.lower()
        assert registered.fixed or word == module.replace("_", "-")
        assert method_of(registered.config({})).name == (registered.fixed.get("method") or word)


@pytest.mark.parametrize("config", [None, "kmeans", {"bits": 3}, pyllmq.KMeansConfig])
def test_an_unknown_config_is_refused_at_the_door(config) -> None:
    model = models.tiny_llama()
    with pytest.raises(
        ValueError, match="no method is registered; allowed: ColumnCodebookConfig, CLAQConfig, KMeansConfig"
    ):
        pyllmq.compress(model, config, models.token_batches(1))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_weights_alone_in_memory(tmp_path) -> None:
    """k-means by `compress`, with and without text, and what each method says where the other is asked for."""
    torch.manual_seed(0)
    model, again = models.tiny_llama(), models.tiny_llama()
    again.load_state_dict(model.state_dict())
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    report = pyllmq.compress(model, pyllmq.KMeansConfig(3), progress=False)
    wanted = pyllmq.CodebookLinear.from_dense(weight, bits=3).dequantize()
    assert torch.equal(model.model.layers[1].mlp.up_proj.dequantize(), wanted) and len(report.layers) == 14
    row = next(row for row in report.layers if row.name == "model.layers.1.mlp.up_proj")
    assert row.error == pytest.approx(float((wanted - weight).double().square().sum() / weight.double().square().sum()))
    calibrated = pyllmq.compress(again, pyllmq.KMeansConfig(3), models.token_batches(2), progress=False)
    assert torch.equal(again.model.layers[1].mlp.up_proj.dequantize(), wanted)
    assert [r.error for r in calibrated.layers] != [r.error for r in report.layers]
    with pytest.raises(ValueError, match="CLAQConfig needs calibration data"):
        pyllmq.compress(models.tiny_llama(), pyllmq.CLAQConfig(3))
    with pytest.raises(ValueError, match="tuning data is given, but KMeansConfig does not tune"):
        pyllmq.compress(models.tiny_llama(), pyllmq.KMeansConfig(3), tuning=models.token_batches(1))
