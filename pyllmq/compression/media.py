"""A folder of sounds or images in, calibration batches out, by the processors of the model's folder."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loading import is_causal, load_extractor, load_tokenizer
from .calibration import Batch, after_start, builtin_sentences, given_to_model
from .half_products import widened_products

SUFFIXES = {"audio": (".wav",), "image": (".png", ".jpg", ".jpeg", ".bmp", ".webp")}
TAKEN = {"input_features": "audio", "input_values": "audio", "pixel_values": "image"}
"""The main input of a model -> what it is made of."""
IMAGES = 8
"""In a batch."""


def kind_of(model: Any) -> str:
    """What a model takes: "audio", "image" or "text"."""
    taken = getattr(model, "main_input_name", "input_ids")
    modalities = getattr(model, "input_modalities", ())
    both = "image" in ([modalities] if isinstance(modalities, str) else modalities)
    return TAKEN.get(taken, "image" if both and not is_causal(model) else "text")


def check_takes_text(model: Any) -> None:
    """Raises ValueError for a model of images or sound."""
    taken = getattr(model, "main_input_name", "input_ids")
    if taken != "input_ids" or kind_of(model) != "text":
        raise ValueError(
            f"{type(model).__name__} takes {taken if taken != 'input_ids' else 'images too'}, and the command calibrates with text "
            "unless --calibration names a folder of sounds (.wav) or images; give one, take a method without calibration, or give "
            "pyllmq.compress or pyllmq.compress_folder batches of your own"
        )


def media_files(model: Any, folder: str | Path) -> list[Path]:
    """Files of the folder that the model can be calibrated with, by name. Raises ValueError if there are none."""
    kind = kind_of(model)
    if kind == "text":
        raise ValueError(
            f"{folder} is a folder, and {type(model).__name__} is calibrated with text: give --calibration a UTF-8 file, or pyllmq."
            "compress batches of your own"
        )
    files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in SUFFIXES[kind])
    if not files:
        there = sorted({file.suffix or file.name for file in Path(folder).iterdir()})
        raise ValueError(
            f"{folder} has no {kind} file for {type(model).__name__}; allowed: {', '.join(SUFFIXES[kind])}; there is "
            f"{', '.join(there[:8]) or 'nothing'}"
        )
    return files


def must_transcribe(model: Any, files: Sequence[Path]) -> bool:
    """Does the model have to write texts, which takes all of it, because some of the files have none beside them?"""
    return _writes(model) and any(_text_beside(file) is None for file in files)


def batches_of_files(model: Any, source: str | Path, files: Sequence[Path]) -> list[Batch]:
    """Batches for a model of sounds or images.

    NAME.txt beside NAME.wav or NAME.png is its text: what a decoder shall write, or the other half of a pair. Without it the
    decoder's own text is taken (Whisper's transcript), and for a pair any sentence.

    Args:
        source: the model's folder, which holds what makes its inputs, and a tokenizer where there are texts.

    Raises:
        ValueError: a file that cannot be read, a sound at another rate than the model's, nothing in `source` that makes inputs.
    """
    extractor = load_extractor(source, kind_of(model))
    if kind_of(model) == "audio":
        batches = [_sound(extractor, file) for file in files]
        groups = [[file] for file in files]
    else:
        groups = [
            list(files[begin : begin + IMAGES]) for begin in range(0, len(files), 1 if _writes(model) else IMAGES)
        ]
        batches = [dict(extractor(images=[_image(file) for file in some], return_tensors="pt")) for some in groups]
        batches = [{key: value for key, value in batch.items() if isinstance(value, Tensor)} for batch in batches]
    for batch, some in zip(batches, groups, strict=True):
        if _writes(model):
            batch |= _written(model, source, batch, some[0])
        elif kind_of(model) == "image" and getattr(model, "main_input_name", "") == "input_ids":
            batch |= _captions(model, load_tokenizer(source), some)
    return batches


def _writes(model: Any) -> bool:
    """A decoder that writes text about its sound or image."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and model.can_generate()


def _text_beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else None


def _written(model: Any, source: str | Path, batch: Batch, file: Path) -> Batch:
    """Ids of a text of the file, and what the decoder is given to write them."""
    text = _text_beside(file)
    if text is None:
        device = next(model.parameters()).device
        given = {key: value.to(device) for key, value in given_to_model(batch, model).items()}
        with torch.no_grad(), widened_products(model):
            # Whisper gives out its prompt (language, task) only so.
            ids = model.generate(**given, return_dict_in_generate=True).sequences.cpu()
    else:
        ids = load_tokenizer(source)(text, return_tensors="pt")["input_ids"]
    limit = getattr(model.config, "max_target_positions", None) or ids.shape[1]
    ids = ids[:, :limit]
    given_first = after_start(ids, model.config)
    if ids.shape[1] > 1 and bool((ids[:, 0] == given_first[:, 0]).all()):  # it begins with the start token itself
        return {"decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    return {"decoder_input_ids": given_first, "labels": ids}


def _captions(model: Any, tokenizer: Any, files: Sequence[Path]) -> Batch:
    others = builtin_sentences()
    texts = [_text_beside(file) or others[i % len(others)] for i, file in enumerate(files)]
    limit = model.config.get_text_config().max_position_embeddings
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
    return {key: value for key, value in found.items() if key in ("input_ids", "attention_mask")}


def _image(file: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"{file} is read by a package that is not installed: pip install pillow") from error
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{file} is no image that can be read ({error}); take it out of the folder") from error


def _sound(extractor: Any, file: Path) -> Batch:
    samples, rate = read_wav(file)
    if rate != (wanted := extractor.sampling_rate):
        raise ValueError(
            f"{file} has {rate} samples a second, and {type(extractor).__name__} takes {wanted}; convert it, for example with "
            f"ffmpeg -i {file.name} -ar {wanted} {file.stem}-{wanted}.wav"
        )
    found = extractor(samples, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def read_wav(file: str | Path) -> tuple[np.ndarray, int]:
    """(float32 [samples] within -1 to 1, samples a second) of an uncompressed WAV file; channels are averaged.

    Raises ValueError for any other file.
    """
    try:
        with wave.open(str(file), "rb") as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            raw = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{file} is no uncompressed WAV file of integers ({error}); convert it, for example with ffmpeg -i IN -c:a pcm_s16le "
            "OUT.wav"
        ) from error
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if not raw:
        raise ValueError(f"{file} holds no sound; take it out of the folder")
    if width == 1:
        values = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    else:
        # The bytes of each sample become the upper ones of 32 bits.
        upper = np.zeros((len(raw) // width, 4), np.uint8)
        upper[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        values = upper.view("<i4")[:, 0].astype(np.float32) / 2**31
    return values.reshape(-1, channels).mean(1), rate
