"""Fewer MLP channels: nothing is lost where channels are spare, and the choice is that of optimal brain surgery."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import StructuredConfig, prune_structured
from pyllmq.cli import main
from pyllmq.compression.jobs.manifest import Manifest
from pyllmq.compression.jobs.pruned_folder import prune_folder
from pyllmq.compression.methods.structured import StructuredPass, kept_channels, kept_groups
from pyllmq.compression.objective import mismatch

from . import models
from .kill_and_resume import digests, ended_after
from .new_process import run_python
from .test_methods import SMALL

MLP = {
    "tiny_llama": ("gate_proj", "up_proj", "down_proj"),
    "tiny_gemma3": ("gate_proj", "up_proj", "down_proj"),
    "tiny_bert": ("intermediate.dense", "output.dense"),
    "tiny_gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "tiny_t5": ("wi", "wo"),
    "tiny_qwen2": ("gate_proj", "up_proj", "down_proj"),
    "tiny_whisper": ("fc1", "fc2"),
}


add = Manifest.add


def add_and_end(self, *arguments):
    """In the place of `Manifest.add`: the job ends behind every finished unit."""
    add(self, *arguments)
    raise KeyboardInterrupt


def with_spare_channels(model, names):
    """A quarter of the channels of each MLP are copies of others, and a quarter is never read."""
    for name, module in model.named_modules():
        if name.endswith(names) and "attention" not in name and hasattr(module, "weight"):
            transposed = not isinstance(module, nn.Linear)
            weight = module.weight.data.t() if transposed else module.weight.data
            if name.endswith(names[-1]):
                quarter = weight.shape[1] // 4
                weight[:, -quarter:] = 0
            else:
                quarter = len(weight) // 4
                weight[quarter : 2 * quarter] = weight[:quarter]
                if module.bias is not None:
                    module.bias.data[quarter : 2 * quarter] = module.bias.data[:quarter]
    return model


def inputs_of(model):
    text = models.token_batches(6, 24)
    if model.main_input_name == "input_features":
        return [{"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids} for ids in text]
    return [
        {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}) for ids in text
    ]


@pytest.mark.parametrize("make", MLP)
def test_spare_channels_go_and_nothing_is_lost(make, tmp_path):
    torch.manual_seed(0)
    model = with_spare_channels(getattr(models, make)(), MLP[make])
    batches = inputs_of(model)
    with torch.no_grad():
        wanted = model(**batches[0])[0]
    report = prune_structured(model, StructuredConfig(0.5, multiple=16, damping=1e-7), batches)
    assert len(report.groups) == sum(
        name.endswith(MLP[make][-1]) and "attention" not in name
        for name, m in model.named_modules()
        if hasattr(m, "weight")
    )
    assert all(group.after == group.before // 2 and group.error < 1e-5 for group in report.groups)
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    model.save_pretrained(tmp_path)
    for narrow in (model, type(model).from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            torch.testing.assert_close(
                narrow(**batches[0])[0], wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max()))
            )


EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}
"""Four groups of two heads that share keys and values."""


def with_spare_heads(model, head):
    """Of each attention the second group is never read, and the fourth is a copy of the first."""
    for module in model.modules():
        if not hasattr(module, "o_proj"):
            continue
        module.o_proj.weight.data[:, 2 * head : 4 * head] = 0
        for linear, size in ((module.q_proj, 2 * head), (module.k_proj, head), (module.v_proj, head)):
            for tensor in (linear.weight, linear.bias):
                if tensor is not None:
                    tensor.data.normal_(0, 0.3)
                    tensor.data[3 * size : 4 * size] = tensor.data[:size]
    return model


@pytest.mark.parametrize("parts", [("heads",), ("mlp", "heads")])
@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_qwen2])
def test_spare_heads_go_and_nothing_is_lost(make, parts, tmp_path):
    torch.manual_seed(0)
    model = with_spare_heads(make(**EIGHT), 8)
    if "mlp" in parts:
        with_spare_channels(model, MLP["tiny_llama"])
    batches = inputs_of(model)
    with torch.no_grad():
        wanted = model(**batches[0])[0]
    report = prune_structured(model, StructuredConfig(0.5, parts=parts, multiple=16, damping=1e-7), batches)
    heads = [group for group in report.groups if group.part == "heads"]
    assert [(g.before, g.after) for g in heads] == [(8, 4), (8, 4)] and all(g.error < 1e-5 for g in report.groups)
    assert {writer.rpartition(".")[2] for writer in heads[0].writers} == {"q_proj", "k_proj", "v_proj"}
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert model.model.layers[0].self_attn.k_proj.out_features == 16 and "8 heads -> 4" in str(report)
    model.save_pretrained(tmp_path)
    for narrow in (model, type(model).from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            torch.testing.assert_close(
                narrow(**batches[0])[0], wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max()))
            )


def with_dead_layers(model, dead):
    """These layers give out what they are given: all that they would add is 0."""
    for name in dead:
        for end in model.get_submodule(name).modules():
            if type(end).__name__ in ("Linear", "Conv1D"):
                end.weight.data.zero_()
                if end.bias is not None:
                    end.bias.data.zero_()
    return model


LAYERS = {
    "tiny_llama": ("model.layers", {"num_hidden_layers": 4}),
    "tiny_qwen2": ("model.layers", {"num_hidden_layers": 4}),
    "tiny_gpt2": ("transformer.h", {"n_layer": 4}),
    "tiny_whisper": ("model.decoder.layers", {"decoder_layers": 4}),
    "tiny_t5": ("decoder.block", {"num_decoder_layers": 4}),
    "tiny_gemma3": ("model.layers", {"num_hidden_layers": 4}),
}


@pytest.mark.parametrize("make", LAYERS)
def test_dead_layers_go_and_nothing_is_lost(make, tmp_path):
    """In memory and block by block; what is left is a model that transformers loads, and that writes with a cache."""
    torch.manual_seed(0)
    layers, deep = LAYERS[make]
    config = getattr(models, make)().config
    for name, value in deep.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = (list(config.layer_types) * 4)[:4]
    model = type(getattr(models, make)())(config).eval()
    if make == "tiny_whisper":
        model.generation_config.alignment_heads = [[1, 0], [3, 1]]
        model.generation_config._from_model_config = False  # it would be made anew
    with_dead_layers(model, [f"{layers}.1", f"{layers}.2"])
    batches = inputs_of(model)
    with torch.no_grad():
        wanted = model(**batches[0])[0]
    model.save_pretrained(tmp_path / "dense")
    settings = StructuredConfig(0.5, parts=("layers",), only=(layers,))
    prune_folder(tmp_path / "dense", tmp_path / "streamed", settings, batches, progress=False)
    report = prune_structured(model, settings, batches)
    assert report.layers == {layers: [0, 3]} and f"{layers}: layers 0, 3 stay" in str(report)
    model.save_pretrained(tmp_path / "thin")
    loaded = [type(model).from_pretrained(tmp_path / name).eval() for name in ("thin", "streamed")]
    for thin in (model, *loaded):
        assert len(thin.get_submodule(layers)) == 2
        with torch.no_grad():
            torch.testing.assert_close(
                thin(**batches[0])[0], wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max()))
            )
    if make == "tiny_whisper":
        assert loaded[1].generation_config.alignment_heads == [[1, 1]]
    elif make != "tiny_t5":
        ids = batches[0]["input_ids"][:1, :4]
        written = [thin.generate(ids, max_new_tokens=4, do_sample=False).tolist() for thin in (model, *loaded)]
        assert written[0] == written[1] == written[2]


def test_layers_by_brute_force():
    """Of the shortlist the layer goes without which the output is nearest; here all layers are in it."""
    torch.manual_seed(1)
    model = models.tiny_llama(num_hidden_layers=3)
    batches = inputs_of(model)
    lost = []
    with torch.no_grad():
        wanted = [model(**batch) for batch in batches]
        for i in range(3):
            thin = copy.deepcopy(model)
            del thin.model.layers[i]
            given = [thin(**batch, use_cache=False) for batch in batches]
            lost.append(sum(float(mismatch(model, g, w, b)) for g, w, b in zip(given, wanted, batches, strict=True)))
    report = prune_structured(model, StructuredConfig(0.67, parts=("layers",)), batches)
    assert report.layers == {"model.layers": [i for i in range(3) if i != lost.index(min(lost))]}


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (
            lambda: models.tiny_llama(num_hidden_layers=4, **EIGHT),
            StructuredConfig(0.5, parts=("layers", "mlp", "heads")),
        ),
        (models.tiny_bert, StructuredConfig(0.5, multiple=16)),
        (models.tiny_whisper, StructuredConfig(0.5, multiple=16, parts=("mlp", "layers"))),
        (models.tiny_t5, StructuredConfig(0.5, multiple=16)),
    ],
)
def test_from_folder_to_folder(make, settings, tmp_path):
    """The same weights as in memory, and, ended after every block in turn and resumed, the same bytes."""
    torch.manual_seed(0)
    model = make()
    batches = inputs_of(model)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "notes.txt").write_text("kept")

    def prune(name, **more):
        return prune_folder(tmp_path / "dense", tmp_path / name, settings, batches, progress=False, **more)

    whole = prune("whole")
    report = prune_structured(model, settings, batches)
    assert (whole.layers, whole.parameters_before, whole.parameters_after) == (
        report.layers,
        report.parameters_before,
        report.parameters_after,
    )
    assert [(g.reader, g.after) for g in whole.groups] == [(g.reader, g.after) for g in report.groups]
    loaded = type(model).from_pretrained(tmp_path / "whole")
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert (tmp_path / "whole" / "notes.txt").read_text() == "kept" and not (tmp_path / "whole.partial").exists()

    left = 0
    with patch.object(Manifest, "add", add_and_end):
        while not (tmp_path / "ended").exists():
            with (
                pytest.raises(KeyboardInterrupt)
                if len(list(tmp_path.glob("ended.partial/folder/*.safetensors")))
                < len(list((tmp_path / "whole").glob("*.safetensors")))
                else contextlib.nullcontext()
            ):
                prune("ended", resume=left > 0)
            left += 1
    assert left > 2 and digests(tmp_path / "ended") == digests(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="there is nothing to resume"):
        prune("ended", resume=True)


def test_resuming_another_job_is_refused(tmp_path):
    model = models.tiny_llama()
    batches = inputs_of(model)
    model.save_pretrained(tmp_path / "dense")
    with patch.object(StructuredPass, "cut", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        prune_folder(tmp_path / "dense", tmp_path / "out", StructuredConfig(0.5), batches, progress=False)
    with pytest.raises(
        ValueError, match="cannot be resumed, because this is another job: config.keep was 0.5, is 0.75"
    ):
        prune_folder(tmp_path / "dense", tmp_path / "out", StructuredConfig(0.75), batches, resume=True, progress=False)


def test_what_follows_a_sound_counts():
    """Whisper's encoder and the decoder that reads it see silence, so channels that speak there must not go unseen."""
    generator = torch.Generator().manual_seed(0)
    frames = (torch.arange(40) < torch.tensor([[40], [16]])).long()
    batch = {
        "input_features": torch.randn(2, 16, 40, generator=generator),
        "decoder_input_ids": torch.randint(1, 60, (2, 12), generator=generator),
    }
    found = []
    for given in (batch, batch | {"attention_mask": frames}):
        torch.manual_seed(3)
        model = models.tiny_whisper()
        prune_structured(model, StructuredConfig(0.5), [given])
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(
    ("make", "parts", "why"),
    [
        (models.tiny_bert, ("heads",), "no setting of BertConfig says"),
        (models.tiny_mixtral, ("mlp",), "no MLP was found"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(make, parts, why, tmp_path):
    """Before the first block is done, and after the last."""
    model = make()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=why):
        prune_folder(
            tmp_path / "dense",
            tmp_path / "out",
            StructuredConfig(0.5, parts=parts),
            inputs_of(model),
            progress=False,
        )
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_heads_are_those_of_a_brute_force_search():
    weight = torch.randn(9, 12, dtype=torch.float64)
    x = torch.randn(80, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    covariance = x.t() @ x / 80
    groups = [torch.arange(12)[i::4] for i in range(4)]

    def loss(kept):
        at = torch.cat([groups[g] for g in kept])
        lost = weight.clone()
        lost[:, at] -= torch.linalg.solve(covariance[at][:, at], covariance[at] @ weight.t()).t()
        return float(((lost @ covariance) * lost).sum())

    kept = list(range(4))
    for count in (3, 2, 1):
        kept = min(([k for k in kept if k != j] for j in kept), key=loss)
        assert kept_groups(weight.clone(), torch.linalg.inv(covariance), groups, count) == kept


@pytest.mark.parametrize("make", [models.tiny_bert, models.tiny_gpt2, models.tiny_t5, models.tiny_whisper])
def test_heads_that_no_config_can_say(make):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="reads about 2 of its 4 groups of heads of 16 channels.*leave 'heads' out"):
        prune_structured(model, StructuredConfig(0.5, parts=("heads",)), inputs_of(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_all_channels_are_the_same_model():
    model = models.tiny_bert()
    batches = inputs_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prune_structured(model, StructuredConfig(1.0, parts=("mlp", "heads")), batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("count", [11, 6])
def test_channels_are_those_of_a_brute_force_search(count):
    """One step at a time: each removes the channel whose loss, all others solved again, is least."""
    weight = torch.randn(9, 12, dtype=torch.float64)
    x = torch.randn(80, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    covariance = x.t() @ x / 80

    def loss(kept):
        found = torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ weight.t()).t()
        lost = weight.clone()
        lost[:, kept] -= found
        return float(((lost @ covariance) * lost).sum())

    kept = list(range(12))
    while len(kept) > count:
        kept = min(([k for k in kept if k != j] for j in kept), key=loss)
    assert kept_channels(weight.clone(), torch.linalg.inv(covariance), count).tolist() == kept


def with_uneven_spare_channels(model):
    """The first block of a tiny Llama reads 32 of its 128 channels, the second one 96."""
    for layer, used in zip(model.model.layers, (32, 96), strict=True):
        layer.mlp.down_proj.weight.data[:, used:] = 0
    return model


def test_widths_at_one_price_lose_nothing(tmp_path):
    """In memory, block by block, ended and resumed; the folder needs pyllmq and says so, and can be packed later."""
    torch.manual_seed(0)
    model = with_uneven_spare_channels(models.tiny_llama())
    batches = inputs_of(model)
    with torch.no_grad():
        wanted = model(**batches[0])[0]
    model.save_pretrained(tmp_path / "dense")
    config = StructuredConfig(0.5, allocation="price", multiple=16, damping=1e-7)
    prune_folder(tmp_path / "dense", tmp_path / "streamed", config, batches, progress=False)
    alike = prune_structured(copy.deepcopy(model), StructuredConfig(0.5, multiple=16, damping=1e-7), batches)
    report = prune_structured(model, config, batches)
    assert [group.after for group in report.groups] == [32, 96] and all(g.error < 1e-5 for g in report.groups)
    assert max(g.error for g in alike.groups) > 1e-2 and report.parameters_after == alike.parameters_after
    assert (alike.loads_with, report.loads_with) == ("transformers", "pyllmq.from_pretrained")
    pyllmq.save_pretrained(model, tmp_path / "saved")
    resumed = tmp_path / "resumed"
    with patch.object(Manifest, "add", add_and_end), pytest.raises(KeyboardInterrupt):
        prune_folder(tmp_path / "dense", resumed, config, batches, progress=False)
    with patch.object(StructuredPass, "choose_widths", side_effect=AssertionError):
        prune_folder(tmp_path / "dense", resumed, config, batches, resume=True, progress=False)
    assert digests(resumed) == digests(tmp_path / "streamed")
    loaded = [pyllmq.from_pretrained(tmp_path / name) for name in ("saved", "streamed")]
    for thin in (model, *loaded):
        assert [layer.mlp.up_proj.out_features for layer in thin.model.layers] == [32, 96]
        with torch.no_grad():
            torch.testing.assert_close(
                thin(**batches[0])[0], wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max()))
            )
    pyllmq.compress(loaded[0], pyllmq.KMeansConfig(8), progress=False)
    pyllmq.save_pretrained(loaded[0], tmp_path / "packed")
    assert pyllmq.from_pretrained(tmp_path / "packed").model.layers[1].mlp.down_proj.in_features == 96
    code = """
import sys, torch
if sys.argv[2] == "ours":
    from pyllmq import from_pretrained
else:
    from transformers import LlamaForCausalLM
    from_pretrained = LlamaForCausalLM.from_pretrained
print([layer.mlp.up_proj.out_features for layer in from_pretrained(sys.argv[1]).model.layers])
"""
    ours, theirs = (run_python("-c", code, tmp_path / "saved", whose) for whose in ("ours", "theirs"))
    assert ours.returncode == 0 and "[32, 96]" in ours.stdout, ours.stderr
    assert theirs.returncode != 0  # never a model with random numbers in the place of MLPs


def test_damaged_shapes_of_what_is_packed(tmp_path):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4))
    pyllmq.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["shapes"] = {"model.layers.0.mlp.up_proj": [128, 10**30]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(pyllmq.FormatError, match="up_proj is .128, 10*., and the files hold .128, 64.; the folder is"):
        pyllmq.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model.layers.0.mlp.up_proj": [32, 63]},
            "says that model.layers.0.mlp.up_proj is .32, 63., and the files hold",
        ),
        (
            {"model.layers.0.mlp.up": [32, 64]},
            "says that model.layers.0.mlp.up is .32, 64., and the files hold no such",
        ),
        ({"model.norm": [64, 1]}, "the files hold .64."),
        ({"model.embed_tokens": [512, 64]}, "says the shape of model.embed_tokens, but LlamaForCausalLM has no Linear"),
        ({"model.layers.0.mlp.up_proj": [32]}, "is .32.; it must be .out_features, in_features."),
        ({"model.layers.0.mlp.up_proj": [32, "64"]}, "both at least 1"),
        ([], "shapes is .., it must map names|shapes is ..; it must map"),
    ],
)
def test_damaged_shapes(tmp_path, change, said):
    torch.manual_seed(0)
    model = with_uneven_spare_channels(models.tiny_llama())
    prune_structured(model, StructuredConfig(0.5, allocation="price", multiple=16), inputs_of(model)[:1])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shapes = config["quantization_config"]["shapes"]
    config["quantization_config"]["shapes"] = shapes | change if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(pyllmq.FormatError, match=said):
        pyllmq.from_pretrained(tmp_path)


def test_the_command_gives_each_mlp_its_width(tmp_path, capsys):
    source, out = tmp_path / "dense", tmp_path / "thin"
    with_uneven_spare_channels(models.tiny_llama()).save_pretrained(source)
    models.tiny_tokenizer().save_pretrained(source)
    command = ["compress", str(source), str(out), "--method", "structured", "--keep", "0.5", "--allocation", "price"]
    assert main([*command, *SMALL]) == 0
    assert "128 channels -> 32" in (said := capsys.readouterr().out) and "load it with pyllmq.from_pretrained" in said
    assert main(["inspect", str(out)]) == 0
    assert "6 dense Linears of widths of their own; nothing is packed" in capsys.readouterr().out
    assert main([*command[:2], str(tmp_path / "both"), *command[3:], *SMALL, "--bits", "4"]) == 0
    assert main(["compress", str(out), str(tmp_path / "later"), "--method", "kmeans", "--bits", "4"]) == 0
    for name in ("both", "later"):
        model = pyllmq.from_pretrained(tmp_path / name)
        down = [layer.mlp.down_proj for layer in model.model.layers]
        assert all(isinstance(m, pyllmq.CodebookLinear) for m in down) and [m.in_features for m in down] == [32, 96]
        assert model(torch.arange(5)[None]).logits.isfinite().all()
    capsys.readouterr()
    assert main([*command, *SMALL, "--parts", "layers"]) == 1
    assert (
        "--allocation has no effect with these settings: it shares out the channels of MLPs" in capsys.readouterr().err
    )


def test_what_cannot_be_pruned():
    batches = models.token_batches(2, 8)
    with pytest.raises(ValueError, match="keep is 0.05; allowed: a number, 0.1 to 1"):
        StructuredConfig(0.05)
    with pytest.raises(ValueError, match="parts is \\('norms',\\); allowed: 'mlp', 'heads', 'layers', or several"):
        StructuredConfig(parts=("norms",))
    with pytest.raises(ValueError, match="no layers were found in LlamaForCausalLM"):
        prune_structured(models.tiny_llama(num_hidden_layers=1), StructuredConfig(parts=("layers",)), batches)
    with pytest.raises(ValueError, match="no heads were found in LlamaForCausalLM"):
        one = models.tiny_llama(num_attention_heads=2, num_key_value_heads=1)
        prune_structured(one, StructuredConfig(parts=("heads",)), batches)
    packed = models.tiny_llama()
    pyllmq.swap_linear(packed, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4))
    with pytest.raises(ValueError, match="is packed already"):
        prune_structured(packed, StructuredConfig(), batches)
    with pytest.raises(ValueError, match="packs nothing; take pyllmq.prune_structured"):
        pyllmq.compress(models.tiny_llama(), StructuredConfig(), batches)
    model = models.tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.config.intermediate_size = 127  # it does not say how wide the MLPs are
    with pytest.raises(ValueError, match="no setting of LlamaConfig says that the MLPs are 64 wide"):
        prune_structured(model, StructuredConfig(0.5), batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.model.layers[0].mlp.down_proj.in_features == 128


def test_the_command_writes_a_plain_folder(tmp_path, capsys):
    source, out = tmp_path / "dense", tmp_path / "narrow"
    models.tiny_llama().save_pretrained(source)
    models.tiny_tokenizer().save_pretrained(source)
    assert main(["compress", str(source), str(out), "--method", "structured", "--keep", "0.5", *SMALL]) == 0
    assert "128 channels -> 64" in capsys.readouterr().out
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("pyllmq") for name in sys.modules) and model.config.intermediate_size == 64
print(model(torch.arange(5)[None]).logits.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0 and "[1, 5, 512]" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("packing", "layer"), [(["--bits", "4"], pyllmq.CodebookLinear), (["--pattern", "2:4"], pyllmq.Sparse24Linear)]
)
def test_pruned_and_packed_in_one_command(tmp_path, capsys, packing, layer):
    source, out = tmp_path / "dense", tmp_path / "packed"
    models.tiny_llama(**EIGHT).save_pretrained(source)
    models.tiny_tokenizer().save_pretrained(source)
    command = [
        "compress",
        str(source),
        str(out),
        "--method",
        "structured",
        "--keep",
        "0.5",
        "--parts",
        "mlp,heads",
        *packing,
        *SMALL,
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "128 channels -> 64" in said and "8 heads -> 4" in said and "load it with pyllmq.from_pretrained" in said
    model = pyllmq.from_pretrained(out)
    down = model.model.layers[1].mlp.down_proj
    assert isinstance(down, layer) and down.in_features == 64 and (out / "tokenizer.json").exists()
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]
    if layer is pyllmq.CodebookLinear:  # ended while it narrows, and while it packs
        again = [*command[:2], str(tmp_path / "again"), *command[3:], "--resume"]
        with patch.object(Manifest, "add", add_and_end):
            assert main([word for word in again if word != "--resume"]) == 130
        assert "of 14 Linears are finished" in capsys.readouterr().err
        with ended_after(1, KeyboardInterrupt):
            assert main(again) == 130
        assert main([*again[:5], "--keep", "0.75", *again[7:]]) == 1
        assert "this is another job: config.keep was 0.5, is 0.75" in capsys.readouterr().err
        assert main(again) == 0 and digests(tmp_path / "again") == digests(out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "dense", "packed"]
    assert main([*command, "--workers", "2"]) == 1
    assert "--workers 2 does not go with --method structured, which holds the whole model" in capsys.readouterr().err
