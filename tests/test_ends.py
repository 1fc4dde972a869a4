"""Embeddings and output heads, packed by `embeddings=` and `head=`: in memory, folder to folder, by files; tied stays tied."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import pyllmq
from pyllmq.compression.jobs.ends import find_ends
from pyllmq.layers.embedding import TiedEmbedding
from pyllmq.layers.linear import TiedLinear, packed_modules

from . import models
from .test_new_format import in_a_new_process

pytestmark = pytest.mark.transformers

BATCHES = 3


def tied_llama(**changes):
    torch.manual_seed(5)
    return models.tiny_llama(tie_word_embeddings=True, num_hidden_layers=1, **changes)


def tiny_bert_mlm():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=512, **sizes)).eval()
    nn.init.normal_(model.cls.predictions.bias)
    return model


def tiny_bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"), 64)
    return BartForConditionalGeneration(BartConfig(vocab_size=512, d_model=64, scale_embedding=True, **sizes)).eval()


def tiny_whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "max_source_positions", "max_target_positions"), 64)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=512, d_model=64, **sizes, **ids)).eval()


TIED = {
    "llama": (tied_llama, ["model.embed_tokens", "lm_head"]),
    "gemma3": (models.tiny_gemma3, ["model.embed_tokens", "lm_head"]),
    "bert": (tiny_bert_mlm, ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]),
    "t5": (models.tiny_t5, ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    "bart": (tiny_bart, ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"]),
    "whisper": (tiny_whisper, ["model.decoder.embed_tokens", "proj_out"]),
}


def logits(model):
    ids = torch.arange(3, 24).view(3, 7)
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    if model.main_input_name == "input_features":
        given = {"input_features": torch.linspace(-1, 1, 3 * 80 * 128).view(3, 80, 128), "decoder_input_ids": ids}
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("family", TIED)
def test_tied_stays_tied(family, tmp_path):
    make, names = TIED[family]
    model = make()
    dense = logits(model)
    replaced = pyllmq.swap_embedding(model, lambda embedding: pyllmq.CodebookEmbedding.from_dense(embedding, 8))
    assert replaced == names
    packed = logits(model)
    assert 0 < float((packed - dense).norm() / dense.norm()) < 0.02
    assert [name for name, _ in packed_modules(model)] == names[:1]
    pyllmq.save_pretrained(model, tmp_path / "packed")
    with safe_open(tmp_path / "packed/model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert f"{names[0]}.codes_b8" in keys and not keys & {f"{name}.weight" for name in names}
    assert not any(key.startswith(f"{name}.") and not key.endswith(".bias") for name in names[1:] for key in keys)
    again = pyllmq.from_pretrained(tmp_path / "packed", fuse=False)
    assert torch.equal(logits(again), packed)
    owner = again.get_submodule(names[0])
    for name in names[1:]:
        module = again.get_submodule(name)
        assert isinstance(module, TiedLinear | TiedEmbedding) and module.owner is owner
    assert again.get_output_embeddings() is again.get_submodule(names[-1])


def test_in_a_new_process_saved_again_and_inspected(tmp_path):
    model = tied_llama()
    pyllmq.compress(model, pyllmq.KMeansConfig(4), embeddings=5)
    pyllmq.save_pretrained(model, tmp_path / "packed")
    code = """
import sys, torch, pyllmq
model = pyllmq.from_pretrained(sys.argv[1], fuse=False)
with torch.no_grad():
    torch.save(model(torch.arange(3, 24).view(3, 7)).logits, sys.argv[2])
pyllmq.save_pretrained(model, sys.argv[3])
from pyllmq.cli import main
main(["inspect", sys.argv[1]])
"""
    said = in_a_new_process(code, tmp_path / "packed", tmp_path / "logits", tmp_path / "again")
    assert "model.embed_tokens" in said and "512x64" in said
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(model), rtol=0, atol=1e-6)
    files = [tmp_path / name / "model.safetensors" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "config", [pyllmq.KMeansConfig(4), pyllmq.ColumnCodebookConfig.preset("fast", 4.0), pyllmq.CLAQConfig(bits=4)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_in_memory_and_by_folders_alike(config, tied, tmp_path):
    torch.manual_seed(5)
    model = models.tiny_llama(tie_word_embeddings=tied, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "dense")
    wanted = {"embeddings": 6} | ({} if tied else {"head": 7})
    batches = models.token_batches(BATCHES)
    ends = ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    if isinstance(config, pyllmq.KMeansConfig):
        report = pyllmq.compress_files(tmp_path / "dense", tmp_path / "packed", config, progress=False, **wanted)
        pyllmq.compress(model, config, progress=False, **wanted)
    else:
        report = pyllmq.compress_folder(
            tmp_path / "dense", tmp_path / "packed", config, batches, progress=False, **wanted
        )
        pyllmq.compress(model, config, batches, progress=False, **wanted)
    assert [layer.name for layer in report.layers][-len(ends) :] == ends
    assert report.layers[-1].error < 2e-3
    assert not any(item.name in (*ends, "lm_head") for item in report.left_dense)
    again = pyllmq.from_pretrained(tmp_path / "packed", fuse=False)
    assert torch.equal(logits(again), logits(model))
    assert set(dict(packed_modules(again))) == {*ends, *(layer.name for layer in report.layers)}


def test_calibration_brings_heads_and_frequent_rows_closer():
    torch.manual_seed(5)
    dense = models.tiny_llama(tie_word_embeddings=False, num_hidden_layers=1)
    batches = [torch.randint(0, 40, (4, 32)) for _ in range(4)]
    errors = {}
    for way, config, text in (
        ("data", pyllmq.ColumnCodebookConfig(4.0), batches),
        ("none", pyllmq.KMeansConfig(4), None),
    ):
        torch.manual_seed(5)
        model = models.tiny_llama(tie_word_embeddings=False, num_hidden_layers=1)
        pyllmq.compress(model, config, text, embeddings=2, head=2, progress=False)
        of_rows = (model.model.embed_tokens.dequantize() - dense.model.embed_tokens.weight)[:40].detach().square().sum()
        hidden = dense.model(batches[0]).last_hidden_state.detach()
        of_head = (model.lm_head(hidden) - dense.lm_head(hidden)).detach().square().sum()
        errors[way] = float(of_rows), float(of_head)
    assert errors["data"][0] < 0.9 * errors["none"][0] and errors["data"][1] < 0.9 * errors["none"][1]


def test_a_classification_head():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=512, num_labels=5, **sizes)).eval()
    pyllmq.compress(model, pyllmq.KMeansConfig(4), head=2, progress=False)
    assert (
        isinstance(model.classifier, pyllmq.CodebookLinear)
        and type(model.bert.embeddings.word_embeddings) is nn.Embedding
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"embeddings": 9}, "embeddings is 9; allowed: an integer from 1 to 8"),
        ({"head": True}, "head is True"),
        (
            {"embeddings": 4, "head": 5},
            "embeddings is 4 and head is 5, but lm_head shares its weight with model.embed_tokens",
        ),
    ],
)
def test_what_cannot_be(wanted, message):
    model = tied_llama()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        pyllmq.compress(model, pyllmq.KMeansConfig(4), progress=False, **wanted)
    assert torch.equal(logits(model), before)


def test_an_end_that_is_not_there():
    with pytest.raises(ValueError, match="BertModel has no output head that is dense"):
        find_ends(models.tiny_bert(), None, 4)
    with pytest.raises(ValueError, match="Sequential has no embedding of token ids"):
        find_ends(nn.Sequential(nn.Linear(4, 4)), 4, None)
    model = tied_llama()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm=1.0 changes while it is used"):
        find_ends(model, 4, None)
    model = tied_llama()
    model.model.embed_tokens.sparse = True
    before = logits(model)
    with pytest.raises(
        ValueError, match="sparse gradients changes while it is used and cannot be packed; leave it dense"
    ):
        pyllmq.compress(model, pyllmq.KMeansConfig(4), embeddings=4, progress=False)
    assert torch.equal(logits(model), before) and not packed_modules(model)


def test_a_tie_that_the_config_denies(tmp_path):
    model = tied_llama()
    pyllmq.compress(model, pyllmq.KMeansConfig(4), embeddings=4, progress=False)
    pyllmq.save_pretrained(model, tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    (tmp_path / "packed/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(pyllmq.FormatError, match="has no tensors for 1 parameters .* such as lm_head.weight"):
        pyllmq.from_pretrained(tmp_path / "packed", fuse=False)


def test_a_failed_job_puts_the_dense_ends_back(monkeypatch):
    from pyllmq.compression.jobs import in_memory

    model = tied_llama()
    before, owner = logits(model), model.model.embed_tokens

    def fail(*_):
        raise RuntimeError("the end")

    monkeypatch.setattr(in_memory, "_pack_all", lambda job, pack=in_memory._pack_all: (pack(job), fail()))
    with pytest.raises(RuntimeError, match="the end"):
        pyllmq.compress(model, pyllmq.KMeansConfig(4), embeddings=4, progress=False)
    assert model.model.embed_tokens is owner and model.lm_head.weight is owner.weight
    assert torch.equal(logits(model), before)
