"""Calibration from folders of sounds and images: what is read, what is done without texts, and what is refused."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import pyllmq
from pyllmq.cli import main
from pyllmq.compression.media import batches_of_files, media_files, read_wav

from . import models

QUICK = ["--preset", "fast", "--quiet"]


def write_wav(file: Path, samples: np.ndarray, rate: int = 16000, width: int = 2, channels: int = 1) -> None:
    """`samples` within -1 to 1, channels in turn."""
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        codes = np.round(samples.astype(np.float64) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
        if width == 1:
            sound.writeframes((codes + 128).astype(np.uint8).tobytes())
        else:
            sound.writeframes(b"".join(int(code).to_bytes(width, "little", signed=True) for code in codes))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width(tmp_path, width):
    samples = np.sin(np.arange(200) / 7) * 0.9
    write_wav(tmp_path / "a.wav", samples, 8000, width)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8000 and found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=2.0 / 2 ** (8 * width - 1) + 1e-6)
    write_wav(tmp_path / "b.wav", np.stack([samples, samples / 2], 1).flatten(), 8000, width, channels=2)
    np.testing.assert_allclose(read_wav(tmp_path / "b.wav")[0], samples * 0.75, atol=2.0 / 2 ** (8 * width - 1) + 1e-6)


@pytest.fixture
def whisper(tmp_path) -> Path:
    from transformers import WhisperFeatureExtractor

    torch.manual_seed(0)
    folder = tmp_path / "whisper"
    models.tiny_whisper().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1, n_fft=400, hop_length=400).save_pretrained(folder)
    return folder


@pytest.fixture
def sounds(tmp_path) -> Path:
    folder = tmp_path / "sounds"
    folder.mkdir()
    for i in range(3):
        write_wav(folder / f"{i}.wav", np.sin(np.arange(3000 + 500 * i) / (5 + i)) * 0.5)
    return folder


def test_whisper_by_its_own_transcript(whisper, sounds, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["compress", str(whisper), str(out), "--calibration", str(sounds), "--samples", "2", *QUICK]
    assert main([*command, "--dry-run"]) == 1
    assert "no .txt beside them" in capsys.readouterr().err
    assert main(command) == 0, capsys.readouterr().err
    assert "so the whole model is loaded" in capsys.readouterr().err
    packed = pyllmq.from_pretrained(out)
    assert isinstance(packed.model.encoder.layers[0].fc1, pyllmq.CodebookLinear)
    assert (out / "preprocessor_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "job",
    [["--bits", "3"], ["--method", "structured", "--keep", "0.5", "--bits", "4"], ["--preset", "best", "--tune", "2"]],
    ids=["packed", "narrow and packed", "tuned"],
)
def test_models_in_half_precision_hear_float32(whisper, sounds, tmp_path, capsys, dtype, job):
    model = models.tiny_whisper().to(dtype)
    model.save_pretrained(whisper)
    command = ["compress", str(whisper), str(tmp_path / "out"), "--calibration", str(sounds), "--quiet", *job]
    assert main(command) == 0, capsys.readouterr().err
    packed = pyllmq.from_pretrained(tmp_path / "out")
    assert isinstance(packed.model.encoder.layers[0].fc1, pyllmq.CodebookLinear)
    assert packed.model.encoder.conv1.weight.dtype == dtype
    (batch,) = batches_of_files(packed, tmp_path / "out", media_files(packed, sounds)[:1])
    batch["input_features"] = batch["input_features"].to(dtype)
    assert packed(**batch).logits.isfinite().all()


def test_errors_of_sounds(whisper, sounds, tmp_path, capsys):
    def refused(folder: Path, *words: str) -> str:
        assert (
            main(["compress", str(whisper), str(tmp_path / "out"), "--calibration", str(folder), *QUICK, *words]) == 1
        )
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    other = tmp_path / "other"
    other.mkdir()
    assert "has no audio file for WhisperForConditionalGeneration; allowed: .wav; there is nothing" in refused(other)
    write_wav(other / "slow.wav", np.zeros(900) + 0.1, rate=8000)
    said = refused(other)
    assert (
        "8000 samples a second, and WhisperFeatureExtractor takes 16000" in said
        and "ffmpeg -i slow.wav -ar 16000" in said
    )
    (other / "slow.wav").write_bytes(b"RIFF" + struct.pack("<I", 4) + b"WAVE")
    assert "is no uncompressed WAV file" in refused(other)
    assert "--seqlen 8 is about text" in refused(sounds, "--seqlen", "8")
    (whisper / "preprocessor_config.json").unlink()
    assert "has nothing by which transformers makes inputs of audio files" in refused(sounds)


def images(folder: Path, count: int = 3) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


def test_images_block_by_block(tmp_path, capsys):
    from transformers import ViTImageProcessorPil

    pytest.importorskip("PIL")
    models.tiny_vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    pictures, out = images(tmp_path / "pictures"), tmp_path / "out"
    command = ["compress", str(tmp_path / "vit"), str(out), "--calibration", str(pictures), "--quiet"]
    assert main([*command, "--dry-run"]) == 0 and "Nothing was written" in capsys.readouterr().out
    assert main(command) == 0
    assert "weigh alike" not in capsys.readouterr().err
    assert any(isinstance(m, pyllmq.CodebookLinear) for m in pyllmq.from_pretrained(out).modules())
    (pictures / "1.png").write_text("no image")
    assert main([*command[:2], str(tmp_path / "new"), *command[3:]]) == 1
    assert "1.png is no image that can be read" in capsys.readouterr().err


def test_a_model_of_text_takes_no_folder(tmp_path, capsys):
    models.tiny_bert().save_pretrained(tmp_path / "bert")
    models.tiny_tokenizer().save_pretrained(tmp_path / "bert")
    command = [
        "compress",
        str(tmp_path / "bert"),
        str(tmp_path / "out"),
        "--calibration",
        str(images(tmp_path / "pictures")),
        *QUICK,
    ]
    assert main(command) == 1
    assert "is a folder, and BertModel is calibrated with text" in capsys.readouterr().err


def test_pairs_take_a_text_beside_the_image_or_any(tmp_path):
    from transformers import CLIPImageProcessorPil

    model, pictures, source = models.tiny_clip(), images(tmp_path / "pictures"), tmp_path / "clip"
    (pictures / "0.txt").write_text("the word", encoding="utf-8")
    tokenizer = models.tiny_tokenizer()
    tokenizer.save_pretrained(source)
    model.config.save_pretrained(source)
    crop = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(source)
    (batch,) = batches_of_files(model, source, media_files(model, pictures))
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "the word"
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and model(**batch).logits_per_image.isfinite().all()
