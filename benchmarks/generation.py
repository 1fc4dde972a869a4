"""`pyllmq bench --model SHAPE-or-DIR --rivals llama.cpp`: prompts and tokens per second of whole models, ours beside others.

Every system is a process of its own (worker.py). All stay alive and take turns, a few tokens at a time, so that whatever else the
machine does meets all of them; the best turn counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from . import llama_cpp, record
from .plot import OURS, RIVAL, require_matplotlib
from .providers import Widths
from .transformers_worker import config_of
from .worker import Worker

PROMPT = 256
CONTEXTS = (300, 2000)
TOKENS = 16
"""Timed in one turn; those before them are not: the first ones meet cold caches and threads that other systems left spinning."""
UNTIMED = 3
ROUNDS = 5
DENSE_DTYPES = ("float32", "bfloat16")
RIVALS = ("none", *llama_cpp.PACKAGES)


@dataclass(frozen=True)
class GenerationRow:
    """One system at one context. Speeds are those of the best round; of a round the median token counts."""

    model: str
    system: str
    """pyllmq, torch, llama.cpp or ik_llama.cpp."""
    weights: str
    """Ours: bits; torch: dtype; GGUF: format."""
    mode: str
    """Ours: fused or unfused, and the precision. llama.cpp: "plain buffers" where it crashes with others."""
    weights_mb: float
    """All of them, embedding and head included: of the file for GGUF, else in memory."""
    context: int
    decode_per_s: float
    prompt_per_s: float
    """Tokens of a prompt of 256 over the time to the first token."""
    first_token_s: float
    peak_mb: float
    """Most memory of the process while it generated at the first context, files that it maps included."""
    rounds: int
    others_cpu: float
    """Share of the machine's CPU time that other programs used meanwhile; not a number without /proc."""
    threads: int
    device: str
    torch: str
    pyllmq: str
    commit: str
    timestamp: str


HEADER = [field.name for field in fields(GenerationRow)]


@dataclass(frozen=True)
class System:
    system: str
    weights: str
    mode: str
    module: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(part for part in (self.system, self.weights, self.mode) if part)


@dataclass
class Found:
    """Of one system; tokens of the context that was measured last."""

    first_token_s: list[float]
    token_s: list[float]
    peak: int = 0


def run_generation(
    model: str,
    *,
    bits: str = "4,2,2.1+0.005",
    rivals: Sequence[str] = tuple(llama_cpp.PACKAGES),
    precision: Sequence[str] = ("high",),
    contexts: Sequence[int] = CONTEXTS,
    prompt: int = PROMPT,
    rounds: int = ROUNDS,
    dense: Sequence[str] = DENSE_DTYPES,
    unfused: bool = True,
    csv: Path | str | None = None,
    plot: Path | str | None = None,
    keep: Path | str | None = None,
) -> list[GenerationRow]:
    """Measure a model in `generate` of transformers, fused and not, torch dense, and the rivals on GGUF files of its shape.

    Args:
        model: a name of `transformers_worker.SHAPES` or a folder. A packed folder is measured as it is; everything else gets
            random weights of that shape, and says so.
        bits: widths as in `run`, comma separated; not for a packed folder.
        rivals: of `llama_cpp.PACKAGES`; those that are not installed are left out with a word, "none" means none.
        dense: dtypes in which torch's dense model is measured, too.
        unfused: measure ours without fused steps, too.
        keep: folder for the GGUF files, which are made anew where they are not there; None: they are deleted.

    Raises:
        ValueError: unknown model, bits or rival, or a number below 1. RuntimeError: a system cannot be run.
    """
    config = config_of(model)
    if min(*contexts, prompt, rounds) < 1:
        raise ValueError(f"contexts are {list(contexts)}, prompt {prompt}, rounds {rounds}; each must be at least 1")
    if unknown := set(rivals) - set(RIVALS):
        raise ValueError(f"--rivals is {','.join(sorted(unknown))}; allowed: {', '.join(RIVALS)}")
    if csv is not None:
        record.check_header(Path(csv), HEADER)
    if plot is not None:
        require_matplotlib()
    threads = torch.get_num_threads()
    rows: list[GenerationRow] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if keep is None else keep)
        systems = [
            *_ours(model, bits.split(","), precision, unfused, threads),
            *_dense(model, dense, threads),
            *_rivals(Path(model).name, config, rivals, folder, threads, max(contexts)),
        ]
        others = record.OthersCpu()
        for context, found in _measure(systems, contexts, prompt, rounds):
            measured = [
                GenerationRow(
                    model=Path(model).name,
                    system=system.system,
                    weights=system.weights,
                    mode=system.mode,
                    weights_mb=nbytes / 1e6,
                    context=context,
                    decode_per_s=1 / min(taken.token_s),
                    prompt_per_s=prompt / min(taken.first_token_s),
                    first_token_s=min(taken.first_token_s),
                    peak_mb=taken.peak / 1e6,
                    rounds=rounds,
                    others_cpu=others.share(),
                    threads=threads,
                    **record.environment(),
                )
                for system, (nbytes, taken) in found.items()
            ]
            rows += measured
            print(table(rows), flush=True)
            if csv is not None:
                record.append(Path(csv), measured, HEADER)
                print(f"{len(measured)} rows appended to {csv}", flush=True)
    if plot is not None:
        draw(rows, Path(plot))
        print(f"drawn: {plot}")
    return rows


# ---- the systems ----------------------------------------------------------------------------------------------------


def _ours(model: str, bits: Sequence[str], precision: Sequence[str], unfused: bool, threads: int) -> Iterator[System]:
    module = "pyllmq.benchmarks.transformers_worker"
    for width in bits:
        Widths.parse(width)
        for fused, each in [*(("1", each) for each in precision), *([("0", precision[0])] if unfused else [])]:
            mode = f"{'fused' if fused == '1' else 'unfused'} {each}"
            yield System("pyllmq", width, mode, module, (model, width, each, "bfloat16", fused, str(threads)))


def _dense(model: str, dtypes: Sequence[str], threads: int) -> Iterator[System]:
    module = "pyllmq.benchmarks.transformers_worker"
    for dtype in dtypes:
        yield System("torch", dtype, "", module, (model, "dense", "high", dtype, "0", str(threads)))


def _rivals(
    name: str, config: Any, wanted: Sequence[str], folder: Path, threads: int, context: int
) -> Iterator[System]:
    """Makes the files that are not there."""
    there = llama_cpp.installed()
    for system in wanted:
        if system != "none" and system not in there:
            package = llama_cpp.PACKAGES[system].replace("_", "-") + "-python"
            print(f"{system} is left out: its package is not installed (pip install {package})")
    chosen = {system: there[system] for system in wanted if system in there}
    if not chosen:
        return
    maker = chosen.get("llama.cpp") or next(iter(chosen.values()))
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{name}-F16.gguf"
    for file_format in llama_cpp.FORMATS:
        target = folder / f"{name}-{file_format}.gguf"
        if not target.exists():
            if not source.exists():
                llama_cpp.write_gguf(source, config)
            llama_cpp.quantize(maker, source, target, file_format, threads)
        for system, package in chosen.items():
            buffers = llama_cpp.EXTRA
            if system == "llama.cpp":
                buffers = llama_cpp.buffers_that_run(package, target, threads)
            mode = "" if buffers == llama_cpp.EXTRA else "plain buffers"
            arguments = (package, str(target), str(threads), str(context + PROMPT), buffers)
            yield System(system, file_format, mode, llama_cpp.MODULE, arguments)
    source.unlink(missing_ok=True)


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measure(
    systems: Sequence[System], contexts: Sequence[int], prompt: int, rounds: int
) -> Iterator[tuple[int, dict[System, tuple[int, Found]]]]:
    """Each context with what was found there, as soon as it is measured."""
    prompts = max(2, rounds // 2)
    turns = 1 + prompts + len(contexts) * (1 + rounds)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(systems) * turns, unit="turn", desc="generation"))

        def each(what: str) -> Iterator[System]:
            for system in systems:
                bar.set_postfix_str(f"{system}: {what}")
                yield system
                bar.update()

        workers: dict[System, Worker] = {}
        for i, system in enumerate(each("starts")):
            for ahead in systems[i + (i > 0) : i + 2]:  # two at a time: most of it runs on one thread
                workers[ahead] = worker = Worker(ahead.module, ahead.arguments)
                stack.callback(worker.close)
            _ = workers[system].nbytes
        found = {system: Found([], []) for system in systems}
        for _ in range(prompts):
            for system in each(f"prompt of {prompt}"):
                found[system].first_token_s.append(workers[system].ask("prompt", tokens=prompt))
        for context in contexts:
            for system in each(f"reads {context} tokens"):
                found[system].token_s = []
                workers[system].ask("decode", context=context, tokens=UNTIMED)
            for _ in range(rounds):
                for system in each(f"tokens at {context}"):
                    taken = workers[system].ask("decode", context=context, tokens=UNTIMED + TOKENS)[UNTIMED:]
                    found[system].token_s.append(median(taken))
            if context == contexts[0]:
                for system, worker in workers.items():
                    found[system].peak = worker.ask("peak")
            yield context, {system: (workers[system].nbytes, found[system]) for system in systems}


# ---- what it says ---------------------------------------------------------------------------------------------------

SAME_BITS = {"4": "Q4_0", "3": "Q3_K_M", "2": "Q2_K"}
"""First digit of our bits -> the format that they are compared with."""

RATIOS = (
    ("decode", "4", 1.25, 1.7),
    ("decode", "2", 1.5, 2.1),
    ("decode", "2.1+0.005", 1.3, 1.8),
    ("decode long", "4", 1.4, 1.9),
    ("decode long", "2", 1.6, 2.4),
    ("prompt high", "4", 0.9, 1.2),
    ("prompt high", "2", 0.9, 1.2),
    ("prompt fast", "4", 1.2, 1.6),
    ("prompt fast", "2", 1.2, 1.6),
)
"""What, our bits, bar, goal: ours fused over the faster rival at the same bits."""
DENSE_BAR, DENSE_GOAL = 6.0, 9.0
LONG = 1000
"""Tokens of context from which `decode long` counts."""
PEAK_FACTOR, PEAK_MB = 1.25, 300.0
"""Memory of `generate` over that of the weights, at most, and beside it."""


def table(rows: Sequence[GenerationRow]) -> str:
    contexts = list(dict.fromkeys(row.context for row in rows))
    width = max(len(f"{row.system} {row.weights} {row.mode}") for row in rows)
    lines = [
        f"{rows[0].model}, random weights where it is no packed folder; {rows[0].device}, {rows[0].threads} threads; "
        f"other programs used {rows[0].others_cpu:.0%} of the CPUs",
        f"{'':{width}}  {'weights MB':>10}  {'prompt/s':>8}  {'first s':>7}  {'peak MB':>7}"
        + "".join(f"  {f'tokens/s at {context}':>16}" for context in contexts),
    ]
    named: dict[str, list[GenerationRow]] = {}
    for row in rows:
        named.setdefault(f"{row.system} {row.weights} {row.mode}", []).append(row)
    for name, some in named.items():
        row = some[0]
        lines.append(
            f"{name:{width}}  {row.weights_mb:10.0f}  {row.prompt_per_s:8.1f}  {row.first_token_s:7.2f}  {row.peak_mb:7.0f}"
            + "".join(f"  {each.decode_per_s:16.1f}" for each in some)
        )
    return "\n".join([*lines, "", *ratios(rows)])


@dataclass(frozen=True)
class Compared:
    """Ours over the faster rival (or torch's faster dtype) at about the same bits."""

    what: str
    bits: str
    ours: float
    rival: float
    against: str
    bar: float
    goal: float

    @property
    def ratio(self) -> float:
        return self.ours / self.rival

    def __str__(self) -> str:
        bounds, rival = f"(bar {self.bar}, goal {self.goal})", f"{self.rival:6.1f} {self.against}"
        return f"{self.what:24} {self.bits:>9} bits  {self.ratio:5.2f}  {bounds}  {self.ours:8.1f} / {rival}"


def compared(rows: Sequence[GenerationRow]) -> list[Compared]:
    """What was measured on both sides, ours fused."""
    found = []

    def add(
        what: str, row: GenerationRow, speed: str, beside: Sequence[GenerationRow], bar: float, goal: float
    ) -> None:
        if beside:
            best = max(beside, key=lambda other: float(getattr(other, speed)))
            against = f"{best.system} {best.weights}"
            found.append(Compared(what, row.weights, getattr(row, speed), getattr(best, speed), against, bar, goal))

    for row in rows:
        if row.system != "pyllmq" or not row.mode.startswith("fused"):
            continue
        beside = [other for other in rows if other.context == row.context]
        files = [r for r in beside if r.weights == SAME_BITS.get(row.weights[0]) and r.system in llama_cpp.PACKAGES]
        for what, bits, bar, goal in RATIOS:
            if bits != row.weights:
                continue
            if what == f"prompt {row.mode.removeprefix('fused ')}" and row.context == rows[0].context:
                add(f"prompt {row.mode}", row, "prompt_per_s", files, bar, goal)
            if what == ("decode long" if row.context >= LONG else "decode"):
                add(f"decode at {row.context} {row.mode}", row, "decode_per_s", files, bar, goal)
        if row.weights == "4":
            dense = [r for r in beside if r.system == "torch"]
            add(f"decode at {row.context} {row.mode}", row, "decode_per_s", dense, DENSE_BAR, DENSE_GOAL)
    return found


def ratios(rows: Sequence[GenerationRow]) -> list[str]:
    """Lines of what was compared, and of memory."""
    lines = [str(each) for each in compared(rows)]
    for row in rows:
        if row.system == "pyllmq" and row.mode.startswith("fused") and row.context == rows[0].context:
            allowed = PEAK_FACTOR * row.weights_mb + PEAK_MB
            lines.append(
                f"{f'peak memory {row.mode}':24} {row.weights:>9} bits  {row.peak_mb:5.0f} MB "
                f"(bar {allowed:.0f}: {PEAK_FACTOR} x weights + {PEAK_MB:.0f} MB)"
            )
    return lines


def read(path: Path) -> list[GenerationRow]:
    """The rows of a CSV; of each system at each context on each machine the last one."""
    rows = record.read_rows(path, GenerationRow)
    return list({(r.model, r.system, r.weights, r.mode, r.context, r.device): r for r in rows}.values())


def draw(rows: Sequence[GenerationRow], png: Path) -> None:
    """Tokens per second against the bytes of the weights, a panel for each context."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts = list(dict.fromkeys(row.context for row in rows))
    figure, panels = plt.subplots(1, len(contexts), figsize=(5.2 * len(contexts), 4.2), squeeze=False)
    markers = {"pyllmq": "o", "torch": "x", "llama.cpp": "s", "ik_llama.cpp": "^"}
    for panel, context in zip(panels[0], contexts, strict=True):
        for row in (r for r in rows if r.context == context):
            ours = row.system == "pyllmq"
            hollow = ours and row.mode.startswith("unfused")
            panel.plot(
                row.weights_mb,
                row.decode_per_s,
                markers[row.system],
                color=OURS if ours else "black" if row.system == "torch" else RIVAL,
                fillstyle="none" if hollow else "full",
            )
            if not hollow:
                label = f"{row.weights} {row.mode.removeprefix('fused ')}".strip()
                panel.annotate(
                    label, (row.weights_mb, row.decode_per_s), (4, 3), textcoords="offset points", fontsize=6
                )
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_title(f"{context} tokens of context", fontsize=9)
        panel.set_xlabel("weights, MB", fontsize=8)
        panel.set_ylabel("tokens/s", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{rows[0].model}, random weights: pyllmq (circles; hollow: unfused), llama.cpp (squares), ik_llama.cpp (triangles), "
        f"torch (crosses)\n{rows[0].device}, {rows[0].threads} threads",
        fontsize=8,
    )
    figure.tight_layout()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    plt.close(figure)
