"""What the calibration of experts is worth: `python -m pyllmq.benchmarks.experts_accuracy FOLDER`.

FOLDER is what examples/train_tiny_lm.py --experts leaves. Everything but norms and routers is packed, embedding and head at 3 bits,
and the loss of perplexity compared: data-free k-means; the prior that shrinks an expert's statistics to its layer's (0: its own
alone; none: the layer's alone); bits of experts shared out alike, or by how much is routed to them and what they put out. Few
calibration texts leave some experts with few tokens, which is where the prior matters.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import pyllmq
from pyllmq.benchmarks.accuracy import Subject, causal
from pyllmq.benchmarks.record import append, read_rows
from pyllmq.compression.calibration import Batch
from pyllmq.compression.jobs.ends import find_ends
from pyllmq.compression.methods.column_codebook import ColumnCodebook
from pyllmq.compression.statistics import inputs
from pyllmq.experts import ExpertLinear, RoutedExperts, take_apart
from pyllmq.linears import dense_weight, select_linears

BITS = 3.0
ENDS: dict[str, Any] = {"embeddings": 3, "head": 3}
TEXTS = (4, 128)
"""Windows of calibration."""
PRIORS = {"own alone": 0.0, "K / 4": 0.25, "K": 1.0, "4 K": 4.0, "layer alone": 1e9}
SHARES = ("mass", "energy", "mass x energy")
K_MEANS, PRIOR, SHARE = "k-means", "prior", "bits by"


@dataclass(frozen=True)
class Result:
    model: str
    method: str
    setting: str
    """The prior, or by what bits are shared out, or the width of k-means."""
    texts: int
    draw: int
    fewest: int
    """Tokens of the expert with the fewest in the calibration text; 0 for k-means."""
    true_bits: float
    """Of everything but norms and routers."""
    damage: float
    """Perplexity / dense perplexity - 1."""
    seconds: float


HEADER = [field.name for field in fields(Result)]


@dataclass
class Routed:
    """Of one projection of one expert, over the calibration text."""

    tokens: int = 0
    mass: float = 0.0
    """Sum of squared routing weights."""
    energy: float = 0.0
    """Sum over its tokens of the mean square of its outputs."""


def routed(dense: Any, batches: Sequence[Batch]) -> dict[str, Routed]:
    """Name -> what is routed to it in the dense model."""
    model = copy.deepcopy(dense)
    take_apart(model)
    found: dict[str, Routed] = {}

    def see(name: str, stack: Any, given: tuple[Tensor, ...]) -> None:
        _, index, weights = given
        for child, linear in stack.named_children():
            chosen = index == linear.index
            found[f"{name}.{child}"].tokens += int(chosen.sum())
            found[f"{name}.{child}"].mass += float(weights[chosen].square().sum())

    def put_out(name: str, _: Any, __: Any, y: Tensor) -> None:
        found[name].energy += float(y.square().mean(1).sum())

    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            found[name] = Routed()
            module.register_forward_hook(partial(put_out, name))
        elif isinstance(module, RoutedExperts):
            module.register_forward_pre_hook(partial(see, name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return found


def by_share(share: str, of_experts: Mapping[str, Routed]) -> Any:
    """A `make_plan` that gives the experts of a layer bits by one price: half a bit for each factor of 2 in what errors weigh."""
    plan = ColumnCodebook.make_plan

    def weigh(name: str) -> float:
        seen = of_experts[name]
        energy = seen.energy / max(1, seen.tokens)
        return (seen.mass if "mass" in share else 1.0) * (energy if "energy" in share else 1.0)

    def make_plan(self: Any, linears: Mapping[str, nn.Module], *rest: Any) -> dict[str, Any]:
        found = plan(self, linears, *rest)
        groups: dict[tuple[str, str], list[str]] = {}
        for name in of_experts:
            groups.setdefault((name.rpartition(".")[0], name.rpartition("_")[2]), []).append(name)
        for names in groups.values():
            weights = torch.tensor([weigh(name) for name in names]).clamp_min(1e-30)
            more = 0.5 * weights.log2()
            more = (more - more.mean()).clamp(-1, 1)  # 1.1 bits are the least
            sizes = torch.tensor([dense_weight(linears[name]).numel() for name in names])
            more -= (more * sizes).sum() / sizes.sum()
            for name, bits, size in zip(names, more.tolist(), sizes.tolist(), strict=True):
                found["bytes"][name] += bits * size / 8
        return found

    return patch.object(ColumnCodebook, "make_plan", make_plan)


def run(subject: Subject, method: str, setting: str, texts: int, draw: int) -> Result:
    model = copy.deepcopy(subject.dense)
    batches = windows(subject, texts, draw)
    of_experts = {} if method == K_MEANS else routed(subject.dense, batches)
    with ExitStack() as changed:
        if method == K_MEANS:
            config: Any = pyllmq.KMeansConfig(int(setting), row_scale=True)
            report = pyllmq.compress(model, config, progress=False, **ENDS)
        else:
            changed.enter_context(patch.object(inputs, "PRIOR_TOKENS", PRIORS.get(setting, PRIORS["K"])))
            if method == SHARE:
                changed.enter_context(by_share(setting, of_experts))
            config = pyllmq.ColumnCodebookConfig.preset("balanced", bits_of_linears(subject.dense))
            report = pyllmq.compress(model, config, batches, progress=False, **ENDS)
    weights = sum(layer.out_features * layer.in_features for layer in report.layers)
    bits = 8 * sum(layer.nbytes for layer in report.layers) / weights
    fewest = min((each.tokens for each in of_experts.values()), default=0)
    return Result(subject.name, method, setting, texts, draw, fewest, bits, subject.judge(model), report.seconds)


def windows(subject: Subject, texts: int, draw: int) -> list[Batch]:
    ids = torch.cat([batch["input_ids"] for batch in subject.calibration(draw)])[:texts]
    return [{"input_ids": part} for part in ids.split(8)]


def bits_of_linears(dense: Any) -> float:
    """At which all together, with the ends at their width, have BITS."""
    model = copy.deepcopy(dense)
    take_apart(model)
    ends = find_ends(model, **ENDS)
    of_ends = sum(end.weight.numel() for end in ends)
    of_linears = sum(dense_weight(module).numel() for module in select_linears(model).values())
    return (BITS * (of_ends + of_linears) - 8 * sum(end.nbytes for end in ends)) / of_linears


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument(
        "--csv", type=Path, default=Path("benchmarks/experts_accuracy.csv"), help="what it holds is not run again"
    )
    given = parser.parse_args()
    subject = causal(given.folder, given.folder.name)
    jobs = [(K_MEANS, str(width), 0, 0) for width in (2, 3, 4)]
    for draw in range(given.draws):
        for texts in TEXTS:
            jobs += [(PRIOR, name, texts, draw) for name in PRIORS]
            jobs += [(SHARE, share, texts, draw) for share in SHARES]
    done = {
        (r.model, r.method, r.setting, r.texts, r.draw)
        for r in (read_rows(given.csv, Result) if given.csv.exists() else ())
    }
    for job in jobs:
        if (subject.name, *job) in done:
            continue
        result = run(subject, *job)
        append(given.csv, [result], HEADER)
        print(result, flush=True)


if __name__ == "__main__":
    main()
