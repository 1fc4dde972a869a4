"""A smaller vocabulary: the same pieces and outputs for the texts it was cut for, ids mapped wherever they stand."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import pyllmq
from pyllmq import prune_vocabulary
from pyllmq.cli import main
from pyllmq.compression import calibration
from pyllmq.compression.methods import vocabulary

from . import models
from .new_process import run_python

SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
PARAGRAPHS = calibration.builtin_paragraphs()


def tokenizer_of(kind: str):
    """With 512 tokens, a template and padding switched on."""
    settings = {"vocab_size": 511, "special_tokens": list(SPECIAL.values()), "show_progress": False}
    model, trainer = {
        "BPE": lambda: (kinds.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**settings)),
        "WordPiece": lambda: (kinds.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**settings)),
        "Unigram": lambda: (kinds.Unigram(), trainers.UnigramTrainer(unk_token="[UNK]", **settings)),
        "CLIP's BPE": lambda: (
            kinds.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"),
            trainers.BpeTrainer(end_of_word_suffix="</w>", **settings),
        ),
    }[kind]()
    backend = Tokenizer(model)
    if kind == "Unigram":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "BPE":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(PARAGRAPHS[:200], trainer)
    backend.add_special_tokens(["<|late|>"])  # behind all pieces
    ids = {token: backend.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def outputs(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :200]
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return ids, model(input_ids=ids, **decoder)[0]


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("BPE", models.tiny_llama),
        ("BPE", models.tiny_gpt2),
        ("WordPiece", models.tiny_bert),
        ("Unigram", models.tiny_t5),
        ("CLIP's BPE", models.tiny_bert),
    ],
)
def test_texts_keep_their_pieces_and_outputs(kind, make, tmp_path):
    tokenizer, model = tokenizer_of(kind), make()
    texts = PARAGRAPHS[300:312]
    before = [(tokenizer.tokenize(text), *outputs(model, tokenizer, text)) for text in texts]
    small, report = prune_vocabulary(model, tokenizer, texts)
    rows = report.after
    assert report.before == 512 and 50 < rows < 500 and report.cut_tokens == 0 and len(small) == rows
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == rows
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    model.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    loaded, read = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    kept = [old for old, piece in enumerate(tokenizer.convert_ids_to_tokens(range(512))) if piece in small.get_vocab()]
    for text, (pieces, ids, wanted) in zip(texts, before, strict=True):
        for tokens, other in ((small, model), (read, loaded)):
            assert tokens.tokenize(text) == pieces and tokens.decode(tokens(text)["input_ids"]) == tokenizer.decode(
                tokenizer(text)["input_ids"]
            )
            new_ids, found = outputs(other, tokens, text)
            assert tokens.convert_ids_to_tokens(new_ids[0]) == tokenizer.convert_ids_to_tokens(ids[0])
            wanted_of_kept = wanted[..., kept] if wanted.shape[-1] == 512 else wanted
            torch.testing.assert_close(found, wanted_of_kept, rtol=0, atol=1e-6)
    for name, token in SPECIAL.items():
        assert getattr(read, name) == token and read.convert_tokens_to_ids(token) == getattr(read, f"{name}_id")
    assert read.convert_tokens_to_ids("<|late|>") == rows - 1
    # What the texts did not contain can still be written: by smaller pieces, never by none.
    other = PARAGRAPHS[400]
    assert read.unk_token not in read.tokenize(other) or tokenizer.unk_token in tokenizer.tokenize(other)


def test_every_piece_of_a_bpe_can_be_reached():
    tokenizer, model = tokenizer_of("BPE"), models.tiny_llama()
    plain = [t for t in tokenizer.get_vocab() if tokenizer.backend_tokenizer.model.tokenize(t)[0].value == t]
    small, _ = prune_vocabulary(model, tokenizer, PARAGRAPHS[300:303], keep=[max(plain, key=len)])
    kept = [t for t in plain if t in small.get_vocab()]
    assert max(plain, key=len) in kept and len(kept) > 60
    assert all([piece.value for piece in small.backend_tokenizer.model.tokenize(t)] == [t] for t in kept)


def test_a_size_keeps_the_most_frequent():
    tokenizer, model = tokenizer_of("WordPiece"), models.tiny_bert()
    text = PARAGRAPHS[300:340]
    everything = prune_vocabulary(models.tiny_bert(), tokenizer, text)[1].after
    small, report = prune_vocabulary(model, tokenizer, text, size=everything - 40)
    assert report.after == len(small) == everything - 40 and 0 < report.cut_tokens < 0.1 * report.tokens
    assert "split otherwise now" in str(report)
    with pytest.raises(ValueError, match="the size is 20, but .* tokens stay in any case"):
        prune_vocabulary(model, small, text, size=20)


def test_ids_in_settings_follow():
    tokenizer, model = tokenizer_of("BPE"), models.tiny_llama(pad_token_id=1, eos_token_id=[2, 4])
    rare = [tokenizer.convert_ids_to_tokens(i) for i in (509, 510)]
    listed = {"suppress_tokens": [3, 508], "begin_suppress_tokens": [507], "bad_words_ids": [[3], [506, 3]]}
    for name, value in (listed | {"forced_decoder_ids": [[1, 509]], "forced_bos_token_id": 510}).items():
        setattr(model.generation_config, name, value)
    small, report = prune_vocabulary(model, tokenizer, ["the text"])
    place = small.get_vocab()
    settings = model.generation_config
    assert report.after < 300 and model.config.eos_token_id == [2, 4] and model.model.embed_tokens.padding_idx == 1
    assert settings.forced_decoder_ids == [[1, place[rare[0]]]] and settings.forced_bos_token_id == place[rare[1]]
    assert (
        settings.suppress_tokens == [3] and settings.begin_suppress_tokens is None and settings.bad_words_ids == [[3]]
    )


def test_what_cannot_be_cut(monkeypatch):
    tokenizer, text = tokenizer_of("BPE"), ["some text"]

    def refused(message, model=None, **changes):
        with pytest.raises(ValueError, match=message):
            prune_vocabulary(model or models.tiny_llama(), **{"tokenizer": tokenizer, "texts": text} | changes)

    refused("texts must be strings", texts=[])
    refused("keep names 'nowhere', which is no token", keep=["nowhere"])
    refused("is no fast tokenizer", tokenizer=object())
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordLevel({"a": 0}, unk_token="a")))
    refused("the tokenizer is a WordLevel; allowed: BPE, WordPiece, Unigram", tokenizer=words)
    refused("the model 300 rows; they are not of one model", model=models.tiny_llama(vocab_size=300))
    packed = models.tiny_llama()
    pyllmq.swap_linear(packed, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4))
    refused("is packed already", model=packed)
    with pytest.raises(ValueError, match="packs nothing; take pyllmq.prune_vocabulary"):
        pyllmq.compress(models.tiny_llama(), pyllmq.VocabularyConfig(), models.token_batches(1, 8))
    # A tokenizer of which less is known than was thought: nothing is changed.
    monkeypatch.setattr(vocabulary._BPE, "needed_by", lambda self, model, pieces: lambda piece: ())
    model = models.tiny_llama()
    refused(
        "would split this text otherwise, from its token .* on: 'Licence",
        model=model,
        texts=["Licence " + PARAGRAPHS[300]],
    )
    assert model.model.embed_tokens.weight.shape[0] == model.config.vocab_size == 512


def test_the_command_writes_a_plain_folder(tmp_path, capsys):
    source, out = tmp_path / "dense", tmp_path / "small"
    models.tiny_bert().save_pretrained(source)
    tokenizer_of("WordPiece").save_pretrained(source)
    (source / "vocab.txt").write_text("stale")
    (source / "README.md").write_text("about it")
    (tmp_path / "text.txt").write_text("\n\n".join(PARAGRAPHS[300:310]), encoding="utf-8")
    command = ["compress", str(source), str(out), "--method", "vocabulary", "--calibration", str(tmp_path / "text.txt")]
    assert main([*command, "--dry-run"]) == 0 and not out.exists() and "nothing was written" in capsys.readouterr().out
    assert main(command) == 0
    assert "512 tokens -> " in capsys.readouterr().out
    assert (out / "README.md").exists() and not (out / "vocab.txt").exists()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    code = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
assert not any(name.startswith("pyllmq") for name in sys.modules)
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(**tokenizer(sys.argv[2], return_tensors="pt")).last_hidden_state, sys.argv[3])
"""
    text = PARAGRAPHS[301][:120]
    done = run_python("-c", code, out, text, tmp_path / "found", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = outputs(AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source), text)[1]
    torch.testing.assert_close(torch.load(tmp_path / "found"), wanted, rtol=0, atol=1e-6)
    for more, message in (
        (["--samples", "3"], "--samples 3 does not go with"),
        (["--resume"], "--resume True does not go"),
    ):
        assert (
            main([*command[:2], str(tmp_path / "no"), *command[3:], *more]) == 1 and message in capsys.readouterr().err
        )


def test_a_real_encoder(minilm):
    """Of 30522 tokens what 300 kB of English need; the same embeddings."""
    from pyllmq.loading import load_model, load_tokenizer

    model, tokenizer = load_model(minilm), load_tokenizer(minilm)
    text = "\n\n".join(PARAGRAPHS)[:300_000]
    sentences = [text[i : i + 200] for i in range(0, 200 * 200, 2000)]

    def embeddings(tokenizer):
        batch = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True, max_length=64)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
        return hidden.sum(1) / batch["attention_mask"].sum(1, keepdim=True)

    wanted = embeddings(tokenizer)
    small, report = prune_vocabulary(model, tokenizer, [*calibration.in_parts(text), *sentences])
    assert report.before == 30522 and report.after < 12000 and report.cut_tokens == 0
    torch.testing.assert_close(embeddings(small), wanted, rtol=0, atol=1e-6)
