"""Text in, calibration batches out. Batches are dicts of tensors, as a model's forward takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def builtin_paragraphs() -> list[str]:
    """English technical prose that is on every machine: the reference manual that CPython carries for its help()."""
    from pydoc_data.topics import topics

    paragraphs = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = re.sub(r"\s+", " ", block).strip()
            # Prose only: grammar rules, code and tables have few letters or open with a prompt.
            letters = sum(c.isalpha() or c == " " for c in text)
            if len(text) >= 60 and letters >= 0.85 * len(text) and not text.startswith((">>>", "...")):
                paragraphs.append(text)
    return list(dict.fromkeys(paragraphs))


def builtin_sentences() -> list[str]:
    """Sentences of `builtin_paragraphs`, 6 to 60 words each, no duplicates."""
    found = (s.strip() for p in builtin_paragraphs() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", p))
    return list(dict.fromkeys(s for s in found if 6 <= len(s.split()) <= 60))


def sentence_batches(
    tokenizer: Any, sentences: Sequence[str], batch_size: int = 16, max_length: int = 128
) -> list[Batch]:
    """Padded batches with an attention mask, for encoders."""
    return [
        dict(
            tokenizer(
                list(sentences[i : i + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
        )
        for i in range(0, len(sentences), batch_size)
    ]


def token_windows(tokenizer: Any, text: str, samples: int, seqlen: int, seed: int = 0) -> list[Batch]:
    """`samples` windows of `seqlen` tokens from one stream of text, at random places without overlap, for causal models."""
    if samples < 1 or seqlen < 1:
        raise ValueError(f"samples is {samples} and seqlen {seqlen}; both must be at least 1")
    stream = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    whole = len(stream) // seqlen
    if whole == 0:
        raise ValueError(
            f"the calibration text has {len(stream)} tokens, fewer than one window of {seqlen}; give more text or a smaller seqlen"
        )
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return [{"input_ids": stream[i * seqlen : (i + 1) * seqlen].unsqueeze(0)} for i in order.tolist()]


def as_batches(calibration: Iterable[Any]) -> list[Batch]:
    """Whatever a user may pass as calibration -> a list of keyword dicts. Labels are dropped: no loss is computed."""
    if isinstance(calibration, Tensor | str | Mapping):
        raise ValueError(
            f"calibration is a single {type(calibration).__name__}; give a list of batches: token id tensors [B, L], or dicts such "
            "as a tokenizer returns with return_tensors='pt'"
        )
    batches = []
    for i, batch in enumerate(calibration):
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping) or not batch or not all(isinstance(v, Tensor) for v in batch.values()):
            raise ValueError(
                f"calibration batch {i} is a {type(batch).__name__}; allowed: a tensor of token ids, or a dict of tensors"
            )
        batches.append({key: value for key, value in batch.items() if key != "labels"})
    if not batches or not any(v.numel() for b in batches for v in b.values()):
        raise ValueError("calibration is empty; give at least one batch, better 128 sequences of real text")
    return batches
