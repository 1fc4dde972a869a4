"""The number tables of README.md and docs/, written from the CSVs of this folder alone: `python -m pyllmq.benchmarks.tables`.

Each table stands between `<!-- table: NAME -->` and `<!-- end table -->`; a run rewrites what stands there. `--check` changes
nothing and names the pages that differ. Every table of times ends with the machine, the versions and the day of its rows.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean, pstdev

from . import accuracy, embeddings, experts_accuracy, generation, goals, low_rank, sparse, structured, whisper
from .memory import READ_LIMIT
from .providers import BASELINE
from .record import Row, read, read_rows

ROOT = Path(__file__).resolve().parent.parent
CSVS = ROOT / "benchmarks"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)
SHAPES = {(4096, 4096): "4096 x 4096", (14336, 4096): "14336 x 4096", (4096, 11008): "4096 x 11008"}
WIDTHS = {"4": "4 bits", "3": "3 bits", "2": "2 bits", "2.1+0.005": "2.1 bits, 0.5 % outliers"}
ISAS = {"avx2": "AVX2", "amx": "AVX-512 and AMX"}
NOTHING = "-"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """`text` with every block written anew. Raises KeyError for a name that no table has."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def machine(rows: Sequence[Row]) -> str:
    devices, versions = sorted({row.device for row in rows}), sorted({row.torch for row in rows})
    days, threads = sorted({row.timestamp[:10] for row in rows}), sorted({row.threads for row in rows})
    days = [days[0], *[days[-1]] * (len(days) > 1)]
    busy = max(row.others_cpu for row in rows)
    return (
        f"\n\nMeasured on {', '.join(devices)}; {', '.join(map(str, threads))} threads; torch {', '.join(versions)}; "
        f"{' to '.join(days)}. Other processes used at most {100 * busy:.0f} % of the CPUs."
    )


def of_device(rows: Sequence[Row], device: str, shape: str = "") -> list[Row]:
    """The rows of one machine and a shape's name; of each case [N, K, M] its last run, so that the ratios are of one run."""
    rows = [row for row in rows if row.device.startswith(device) and row.shape.startswith(shape)]
    last = {(row.n, row.k, row.m): row.timestamp for row in rows}
    return [row for row in rows if row.timestamp == last[row.n, row.k, row.m]]


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 2.95 else f"{ratio:.2f}x"


# ---- codebook_linear ------------------------------------------------------------------------------------------------


def results() -> list[Row]:
    return read(CSVS / "results.csv")


def codebook_speed(precision: str, shapes: Sequence[tuple[int, int]], with_goals: bool = True) -> str:
    rows, used, lines = of_device(results(), "Intel"), [], []
    suffix = " fast" if precision == "fast" else ""
    for shape in shapes:
        for m in (1, 8, 512):
            of_case = {row.provider: row for row in rows if (row.n, row.k, row.m) == (*shape, m)}
            cells = []
            for width, goal in zip(WIDTHS, goals.GOALS[m, precision], strict=True):
                row = of_case[f"pyllmq {width}{suffix}"]
                share = 1 if shape == (4096, 4096) else goals.OTHER_SHARE
                cells.append(times(row.ratio_to_torch_fp32) + f" ({share * goal:.3g})" * with_goals)
                used.append(row)
            lines.append([SHAPES[shape], str(m), *cells])
    if len(shapes) == 1:
        lines, head = [line[1:] for line in lines], ["tokens (M)"]
    else:
        head = ["N x K", "tokens (M)"]
    return markdown([*head, *WIDTHS.values()], lines) + machine(used)


def codebook_read_limit() -> str:
    rows, used, lines = [row for row in of_device(results(), "Intel") if row.m == 1], [], []
    for shape, name in SHAPES.items():
        of_case = {row.provider: row for row in rows if (row.n, row.k) == shape}
        limit, dense = of_case[READ_LIMIT], of_case[BASELINE]
        for label, row in ((BASELINE, dense), *((WIDTHS[w], of_case[f"pyllmq {w}"]) for w in WIDTHS)):
            ceiling = limit.gb_per_s / dense.gb_per_s * dense.bits_per_weight / row.bits_per_weight
            lines.append([
                name, label, f"{row.median_us:.0f} us", f"{row.gb_per_s:.1f}", f"{100 * row.share_of_read_limit:.0f} %",
                times(ceiling), f"{row.relative_error:.1e}",
            ])  # fmt: skip
            used.append(row)
    head = ["N x K", "weight", "time", "GB/s", "of the read limit", "ceiling of the ratio", "relative error"]
    return markdown(head, lines) + machine(used)


ONE_TOKEN_BARS = {"avx2": (0.70, 0.60, 0.65, 0.55), "amx": (0.85, 0.75, 0.80, 0.70)}
"""Of the read limit, at 4096 x 4096 and the widths of WIDTHS."""


def codebook_one_token() -> str:
    """Each share is the lowest of the runs."""
    rows, lines = read(CSVS / "one_token.csv"), []
    for isa, bars in ONE_TOKEN_BARS.items():
        for width, bar in zip(WIDTHS, bars, strict=True):
            worst = min(
                (r for r in rows if (r.isa, r.provider) == (isa, f"pyllmq {width}")),
                key=lambda r: r.share_of_read_limit,
            )
            shares = f"{100 * worst.share_of_read_limit:.0f} %", f"{100 * bar:.0f} %"
            lines.append([
                {"amx": "AVX-512"}.get(isa, "AVX2"), WIDTHS[width], f"{worst.median_us:.0f} us", f"{worst.gb_per_s:.1f}", *shares,
            ])  # fmt: skip
    head = ["kernels", "weight", "time", "GB/s", "of the read limit", "bar"]
    return markdown(head, lines) + machine(rows)


def codebook_formats() -> str:
    """The first version of the kernels (`exact`, AVX2) beside torch's other formats."""
    rows = of_device(results(), "AMD", "square")
    providers = dict.fromkeys(row.provider for row in rows)
    lines = []
    for provider in providers:
        own = {row.m: row for row in rows if row.provider == provider}
        cells = [f"{times(row.ratio_to_torch_fp32)}, {row.median_us:.0f} us" for _, row in sorted(own.items())]
        lines.append([provider, f"{own[1].bits_per_weight:.2f}", *cells, f"{own[1].relative_error:.1e}"])
    head = ["provider", "bits", *(f"M = {m}" for m in sorted({row.m for row in rows})), "relative error, M = 1"]
    return markdown(head, lines) + machine(rows)


def codebook_llama() -> str:
    rows = of_device(results(), "AMD", "llama")
    shapes = dict.fromkeys(row.shape for row in rows)
    by = {(row.provider, row.shape): row for row in rows}
    lines = []
    for provider in dict.fromkeys(row.provider for row in rows):
        found = [by[provider, shape] for shape in shapes]
        lines.append([provider, *(f"{times(r.ratio_to_torch_fp32)}, {r.median_us:.0f} us" for r in found)])
    head = [
        "provider",
        *(f"{s.removeprefix('llama-2-7b ')} ({by[BASELINE, s].n} x {by[BASELINE, s].k})" for s in shapes),
    ]
    return markdown(head, lines) + machine(rows)


# ---- sparse_linear --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def sparse_runs() -> list[sparse.Run]:
    return sparse.runs_quiet_last(read(CSVS / "sparse.csv"))


def _last_pair(isa: str, shape: tuple[int, int], m: int, ours: str, rival: str) -> tuple[Row, Row] | None:
    """Both rows of the last quiet run of the instruction set that has them."""
    found = None
    for run in sparse_runs():
        of_case = {row.provider: row for row in run.rows if (row.n, row.k, row.m) == (*shape, m)}
        if run.isa == isa and ours in of_case and rival in of_case:
            found = of_case[ours], of_case[rival]
    return found


def sparse_table(
    head: str, columns: Sequence[tuple[str, str, str]], cases: Sequence[tuple[tuple[int, int], int]]
) -> str:
    """`columns` are (label, ours, rival). A cell is time, ratio to the rival in the same run, and the goal where there is one."""
    goal_of = {(ours, rival, m): goal for ours, rival, m, goal in sparse.GOALS}
    used, lines = [], []
    for shape, m in cases:
        for isa, label in ISAS.items():
            cells = []
            for _, ours, rival in columns:
                pair = _last_pair(isa, shape, m, ours, rival)
                if pair is None:
                    cells.append(NOTHING)
                    continue
                row, dense = pair
                used.append(row)
                goal = goal_of.get((ours, rival, m))
                noisy = "\\*" * (row.others_cpu > sparse.QUIET_SHARE)
                text = f"{row.median_us:.0f} us, {times(dense.median_us / row.median_us)}"
                cells.append(text + (f" ({goal:g})" if goal else "") + noisy)
            if set(cells) != {NOTHING}:
                lines.append([f"{SHAPES[shape]}, M = {m}, {label}", *cells])
    note = f" Rows marked \\* ran while others used more than {100 * sparse.QUIET_SHARE:.0f} % of the CPUs."
    noisy_rows = any(row.others_cpu > sparse.QUIET_SHARE for row in used)
    return markdown([head, *(label for label, _, _ in columns)], lines) + machine(used) + note * noisy_rows


def sparse_bitmap(suffix: str, rival: str) -> str:
    columns = [(f"{100 * s:.0f} % pruned", f"pyllmq bitmap {s:g}{suffix}", rival) for s in sparse.SPARSITIES]
    return sparse_table("bitmap" + suffix, columns, [((4096, 4096), 1), ((14336, 4096), 1)])


def sparse_csr() -> str:
    columns = [(f"{100 * s:.0f} % pruned", f"pyllmq bitmap {s:g}", f"torch CSR {s:g}") for s in sparse.SPARSITIES]
    return sparse_table("bitmap against torch's CSR", columns, [((4096, 4096), 1), ((14336, 4096), 1)])


def sparse_24() -> str:
    columns = [
        ("2:4 fp32", "pyllmq 2:4", BASELINE),
        ("2:4 bf16", "pyllmq 2:4 bf16", sparse.TORCH_BF16),
        *((f"2:4 with {b}-bit codes", f"pyllmq 2:4 {b} bits", BASELINE) for b in sparse.CODE_BITS),
    ]
    return sparse_table("2:4", columns, [((4096, 4096), 1), ((14336, 4096), 1)])


def sparse_tokens() -> str:
    columns = [
        ("bitmap fp32, 50 %", "pyllmq bitmap 0.5", BASELINE),
        ("bitmap bf16, 50 %", "pyllmq bitmap 0.5 bf16", sparse.TORCH_BF16),
        ("2:4 bf16", "pyllmq 2:4 bf16", sparse.TORCH_BF16),
        ("2:4 with 2-bit codes", "pyllmq 2:4 2 bits", BASELINE),
    ]
    cases = [(shape, m) for shape in ((4096, 4096), (14336, 4096)) for m in (8, 512)]
    return sparse_table("more tokens", columns, cases)


# ---- accuracy, pruning, streaming -----------------------------------------------------------------------------------

METHODS = {
    "CLAQ published": "CLAQ as published",
    "RTN g128": "round to nearest, groups of 128",
    "GPTQ g128": "GPTQ, groups of 128",
    "k-means per row": "k-means per row",
    "ours": "`column-codebook`, preset `balanced`",
    "ours tuned": "the same, codebooks tuned for 200 steps",
}


def accuracy_table(
    model: str, methods: Sequence[str], widths: Sequence[float], digits: int, percent: bool = False
) -> str:
    """Of each method its error at equal true bits: mean over the calibration draws, and their spread; then ratios to CLAQ."""
    rows = [row for row in read_rows(CSVS / "accuracy.csv", accuracy.Result) if row.model == model]
    draws = sorted({row.draw for row in rows})

    def values(method: str, bits: float) -> list[float | None]:
        return [accuracy.interpolate(accuracy.curve(rows, method, draw), bits) for draw in draws]

    scale, unit = (100, " %") if percent else (1, "")
    lines = []
    for method in methods:
        cells = []
        for bits in widths:
            found = [scale * v for v in values(method, bits) if v is not None]
            spread = f" +-{pstdev(found):.{digits}f}" if len(found) > 1 else ""
            cells.append(f"{mean(found):.{digits}f}{spread}{unit}" if found else NOTHING)
        lines.append([METHODS[method], *cells])
    for method in (method for method in accuracy.OURS if method in methods):
        cells = []
        for bits in widths:
            pairs = zip(values(method, bits), values(accuracy.PUBLISHED, bits), strict=True)
            ratios = [a / b for a, b in pairs if a is not None and b is not None]
            cells.append(f"{mean(ratios):.2f}" if ratios else NOTHING)
        lines.append([f"{'tuned' if method == accuracy.TUNED else '`balanced`'} / CLAQ as published", *cells])
    return markdown(["true bits", *(f"{bits:g}" for bits in widths)], lines)


PRUNING = {
    "magnitude": "magnitude", "wanda": "wanda", "wanda + owl": "wanda, shares by OWL",
    "sparsegpt published": "sparsegpt as published", "mixed published": "mixed-sparsity as published",
    "sparsegpt": "sparsegpt", "mixed": "mixed-sparsity (shares by Fisher)",
    "mixed hutchinson": "mixed-sparsity (shares by Hutchinson)",
    "mixed + 4 bits": "mixed-sparsity with 4-bit codes", "mixed + 2 bits": "mixed-sparsity with 2-bit codes",
}  # fmt: skip


def pruning_table(model: str, digits: int) -> str:
    with (CSVS / "pruning.csv").open(newline="") as file:
        found = {(row["method"], row["pruned"]): row for row in csv.DictReader(file) if row["model"] == model}

    def cell(method: str, pruned: str) -> str:
        row = found.get((method, pruned))
        if row is None:
            return NOTHING
        bits = f" at {float(row['bits_per_weight']):.2f} bits" if " bits" in method else ""
        return f"{float(row['value']):.{digits}f}{bits}"

    any_row = next(iter(found.values()))
    dense = ["dense", *[f"{float(any_row['dense_value']):.{digits}f}"] * 3]
    lines = [[name, *(cell(method, pruned) for pruned in ("0.5", "0.6", "2:4"))] for method, name in PRUNING.items()]
    return markdown([any_row["metric"], "50 % pruned", "60 % pruned", "2:4"], [dense, *lines])


LOW_RANK = {
    "whitened": "whitened by C, the same share of each Linear (SVD-LLM)",
    "centred": "+ covariance, bias correction",
    "row weights": "+ row weights by the loss",
    "price": "+ ranks at one price",
    "price, ridge target": "+ ridge target: the default",
    "search, ridge target": 'the default with `allocation="search"`',
}


def low_rank_table() -> str:
    rows = read_rows(CSVS / "low_rank.csv", low_rank.Result)
    lines = []
    for method, label in LOW_RANK.items():
        cells = []
        for keep in low_rank.KEEPS:
            found = [row.damage for row in rows if (row.method, row.keep) == (method, keep)]
            spread = f" +-{pstdev(found):.4f}" if len(found) > 1 else ""
            cells += [f"{mean(found):.4f}{spread}" if found else NOTHING, str(len(found))]
        lines.append([label, *cells])
    return markdown(["parameters kept", *(cell for keep in low_rank.KEEPS for cell in (f"{keep:g}", "draws"))], lines)


STRUCTURED = {
    "ours": "ours (OBS and least squares)",
    "ours, widths at one price": "ours, a width for each block at one price",
    "ours, layers": "ours, whole layers: {}",
    "ours, heads": "ours, heads: {}",
}


def structured_table(model: str, cut: str, keeps: Sequence[float] = structured.KEEPS, percent: bool = False) -> str:
    """Methods without a row are left out. `cut`: what of how many layers or heads stays, for the label."""
    rows = [row for row in read_rows(CSVS / "structured.csv", structured.Result) if row.model == model]
    scale, digits, unit = (100, 1, " %") if percent else (1, 4, "")
    lines = []
    for method in (method for method in structured.METHODS if any(row.method == method for row in rows)):
        cells = []
        for keep in keeps:
            found = [scale * row.damage for row in rows if (row.method, row.keep) == (method, keep)]
            spread = f" +-{pstdev(found):.{digits}f}" if len(found) > 1 else ""
            cells += [f"{mean(found):.{digits}f}{spread}{unit}" if found else NOTHING, str(len(found))]
        lines.append([STRUCTURED.get(method, method).format(cut), *cells])
    first = "share kept" if percent else "channels kept"
    return markdown([first, *(cell for keep in keeps for cell in (f"{keep:g}", "draws"))], lines)


def whisper_table() -> str:
    lines = [
        [row.name, f"{row.linear_bits:.2f}", f"{row.embedding_bits:.2f}", f"{row.megabytes:.1f} MB", f"{row.kl:.4f}",
         f"{100 * row.agreement:.1f} %", f"{row.errors} of {row.words}" if row.words else NOTHING]
        for row in read_rows(CSVS / "whisper.csv", whisper.Result)
    ]  # fmt: skip
    names = ["", "bits of Linears", "of the embedding", "weights", "KL", "same next token", "words wrong"]
    return markdown(names, lines)


def structured_speed_table() -> str:
    rows = read_rows(CSVS / "structured_speed.csv", structured.Speed)
    lines = [
        [
            f"{row.keep:g}",
            f"{row.dense_ms:.2f} ms",
            f"{row.narrow_ms:.2f} ms",
            f"{100 * row.removed:.0f} %",
            f"{row.saved:.2f}",
        ]
        for row in rows
    ]
    first, busy = rows[0], max(row.others_cpu for row in rows)
    names = ["channels kept", "dense, a sentence", "narrow", "arithmetic removed", "of that as time"]
    return markdown(names, lines) + (
        f"\n\n{first.sentences} sentences of {first.tokens} tokens in a batch. Measured on {first.device}; {first.threads} "
        f"threads; torch {first.torch}; {first.timestamp[:10]}. Other processes used at most {100 * busy:.0f} % of the CPUs."
    )


def low_rank_speed_table() -> str:
    """Rows of a quiet machine."""
    with (CSVS / "low_rank_speed.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if float(row["others_cpu"]) < 0.1]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    lines = [
        [f"{row['n']} x {row['k']}, rank {row['rank']}", row["m"], row["device"].partition(",")[0],
         f"{float(row['dense_us']):.0f} us", f"{float(row['low_rank_us']):.0f} us", times(float(row["ratio"]))]
        for row in sorted(rows, key=lambda row: devices.index(row["device"]))
    ]  # fmt: skip
    first, days = rows[0], sorted(row["timestamp"][:10] for row in rows)
    busy = max(float(row["others_cpu"]) for row in rows)
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return markdown(["N x K", "tokens (M)", "processor", "dense", "low rank", "ratio"], lines) + (
        f"\n\nMeasured on {'; '.join(devices)}; {first['threads']} thread; torch {first['torch']}; {when}. "
        f"Other processes used at most {100 * busy:.0f} % of the CPUs."
    )


# ---- experts and embeddings -----------------------------------------------------------------------------------------


def experts_calibration(method: str) -> str:
    """Perplexity above dense by the prior, or by how bits are shared out, for each number of calibration texts."""
    rows = read_rows(CSVS / "experts_accuracy.csv", experts_accuracy.Result)
    texts = experts_accuracy.TEXTS
    settings = {
        experts_accuracy.PRIOR: list(experts_accuracy.PRIORS),
        experts_accuracy.SHARE: list(experts_accuracy.SHARES),
    }
    alike = {"alike": [row for row in rows if (row.method, row.setting) == (experts_accuracy.PRIOR, "K")]}
    found = alike if method == experts_accuracy.SHARE else {}
    found |= {name: [row for row in rows if (row.method, row.setting) == (method, name)] for name in settings[method]}
    lines = []
    common = {
        count: set.intersection(*({r.draw for r in of if r.texts == count} for of in found.values())) for count in texts
    }
    for name, of_name in found.items():
        cells = []
        for count in texts:
            values = [100 * row.damage for row in of_name if row.texts == count and row.draw in common[count]]
            cells.append(f"{mean(values):.2f} % +-{pstdev(values):.2f}")
        lines.append([name, *cells])
    fewest = [{row.fewest for row in rows if row.texts == count} - {0} for count in texts]
    head = [
        f"{count} texts (an expert has {min(few)} tokens or more), draws: {len(common[count])}"
        for count, few in zip(texts, fewest, strict=True)
    ]
    return markdown([method, *head], lines)


def experts_goal() -> str:
    """Beside data-free k-means at the same size."""
    rows = read_rows(CSVS / "experts_accuracy.csv", experts_accuracy.Result)
    points = sorted((row.true_bits, row.damage) for row in rows if row.method == experts_accuracy.K_MEANS)
    most = max(experts_accuracy.TEXTS)
    ours = [row for row in rows if (row.method, row.setting, row.texts) == (experts_accuracy.PRIOR, "K", most)]
    bits, damage = mean(row.true_bits for row in ours), mean(row.damage for row in ours)
    same = accuracy.interpolate(points, bits)
    assert same is not None
    lines = [["k-means without data", f"{at:.2f}", f"{100 * lost:.2f} %", NOTHING] for at, lost in points]
    lines.append(["the same between its points", f"{bits:.2f}", f"{100 * same:.2f} %", NOTHING])
    lines.append(
        [f"`balanced`, {most} texts, {len(ours)} draws", f"{bits:.2f}", f"{100 * damage:.2f} %", f"{damage / same:.2f}"]
    )
    return markdown(["", "true bits of all but norms and routers", "perplexity above dense", "of k-means'"], lines)


def experts_speed(tokens: int, device: str) -> str:
    rows = [row for row in read(CSVS / "experts.csv") if row.m == tokens and device in row.device]
    lines = []
    for row in rows:
        share = NOTHING if math.isnan(row.share_of_read_limit) else f"{100 * row.share_of_read_limit:.0f} %"
        name = "torch eager" if row.provider == BASELINE else row.provider
        lines.append(
            [row.shape, name, f"{row.median_us:.0f} us", f"{row.gb_per_s:.1f}", share, times(row.ratio_to_torch_fp32)]
        )
    return markdown(["layer", "", "time", "GB/s", "of the read limit", "against eager"], lines) + machine(rows)


def embeddings_accuracy() -> str:
    rows = read_rows(CSVS / "embeddings_accuracy.csv", embeddings.Result)
    lines = []
    for bits in embeddings.WIDTHS:
        own = [row for row in rows if row.embedding_bits == bits]
        grown = [row.both - row.linears_alone for row in own]
        cells = [str(len(own)), f"{mean(row.linears_alone for row in own):.4f}", f"{mean(row.both for row in own):.4f}"]
        lines.append(
            [
                str(bits),
                *cells,
                f"{round(mean(grown), 5) + 0.0:.5f} +-{pstdev(grown):.5f}",
                f"{mean(row.folder_mb for row in own):.1f}",
            ]
        )
    return markdown(["embedding, bits", "draws", "Linears alone", "both", "difference", "folder, MB"], lines)


def embeddings_speed() -> str:
    rows = read(CSVS / "embeddings.csv")
    lines = [
        [f"{row.op}, {row.shape}", row.provider, str(row.m), f"{row.median_us:.0f} us", times(row.ratio_to_torch_fp32)]
        for row in rows
        if row.provider in (BASELINE, sparse.TORCH_BF16, embeddings.TORCH) or row.provider.startswith("pyllmq")
    ]
    return markdown(["", "", "ids or tokens", "time", "against torch's fp32"], lines) + machine(rows)


def streaming_table(what: str) -> str:
    with (CSVS / "streaming.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["what"] == what]
    if what == "ranks":
        head = ["calibration", "1 process", "2 processes", "ratio"]
        pairs = zip(rows[::2], rows[1::2], strict=True)
        lines = [
            [f"{one['samples']} texts of {one['seqlen']} tokens", f"{float(one['seconds']):.0f} s",
             f"{float(two['seconds']):.0f} s", f"{float(two['speedup']):.2f}"]
            for one, two in pairs
        ]  # fmt: skip
    else:
        head = ["checkpoint", "calibration", "peak", "torch and transformers", "one block in fp32", "hidden states",
                "peak without hidden states, in blocks"]  # fmt: skip
        gb = ("peak_gb", "libraries_gb", "block_fp32_gb", "hidden_gb")
        lines = [
            [f"{r['shape']}, method {r['method']}", f"{r['samples']} texts of {r['seqlen']} tokens",
             *(f"{float(r[name]):.2f} GB" for name in gb), f"{float(r['peak_blocks']):.2f}"]
            for r in rows
        ]  # fmt: skip
    first = rows[0]
    return (
        markdown(head, lines) + f"\n\nMeasured on {first['device']}; torch {first['torch']}; {first['timestamp'][:10]}."
    )


# ---- whole models -----------------------------------------------------------------------------------------------------


ZEN3, ZEN5, AMX, AMX_AS_AVX2 = "family 25", "family 26", "family 6 model 167", "held to avx2"
ALL_AS_AVX2 = "held to avx2, torch to avx2"


def generation_rows(model: str, machine: str) -> list[generation.GenerationRow]:
    rows = generation.read(CSVS / "generation.csv")
    held = machine.startswith("held to")
    rows = [
        row
        for row in rows
        if row.model == model
        and (row.device.endswith(f", {machine}") if held else machine in row.device and ", held" not in row.device)
    ]
    return [
        row for row in rows if not (held and row.system == "llama.cpp")
    ]  # which is compiled for more than ours is held to


EXPERTS = "Qwen3-30B-A3B, 3 layers"
SHORT = ("4 fused high", "2.1+0.005 fused high", "2 fused high", "Q4_0", "Q2_K", "bfloat16")


def generation_table(model: str, machine: str = ZEN3, short: bool = False) -> str:
    rows = generation_rows(model, machine)
    rows = [row for row in rows if not short or f"{row.weights} {row.mode}".strip() in SHORT]
    of_system: dict[str, list[generation.GenerationRow]] = {}
    for row in sorted(rows, key=lambda row: row.context):
        of_system.setdefault(f"{row.system} {row.weights} {row.mode}".strip(), []).append(row)
    lines = [
        [
            name, f"{some[0].weights_mb:.0f}", f"{some[0].peak_mb:.0f}", f"{some[0].prompt_per_s:.0f}",
            *(f"{row.decode_per_s:.1f}" for row in some),
        ]
        for name, some in of_system.items()
    ]  # fmt: skip
    contexts = sorted({row.context for row in rows})
    head = ["weights", "MB", "peak, MB", "prompt of 256, tokens/s", *(f"tokens/s at {context}" for context in contexts)]
    return markdown(head, lines) + generation_machine(rows)


def generation_ratios(model: str, machine: str = ZEN3) -> str:
    lines = [
        [each.what, each.bits, f"{each.ratio:.2f}", f"{each.bar:g}", f"{each.goal:g}", each.against]
        for each in generation.compared(generation_rows(model, machine))
    ]
    return markdown(["", "bits", "ratio", "bar", "goal", "against"], lines)


def generation_machine(rows: Sequence[generation.GenerationRow]) -> str:
    row = rows[-1]
    return (
        f"\n\nRandom weights of the shape of {row.model}, batch 1, random keys and values in the cache. Measured on {row.device}; "
        f"{row.threads} threads; torch {row.torch}; {row.timestamp[:10]}. "
        f"Other processes used at most {100 * max(r.others_cpu for r in rows):.0f} % of the CPUs."
    )


def sentences_table() -> str:
    with (CSVS / "models.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["unit"] == "sentence"]
    head = ["sentences a call", "precision", "dense, sentences/s", "packed", "ratio"]
    lines = [
        [r["length"], r["precision"], f"{float(r['dense_per_s']):.0f}", f"{float(r['packed_per_s']):.0f}",
         times(float(r["ratio"]))]
        for r in rows
    ]  # fmt: skip
    first = rows[0]
    bits = float(first["bits_per_weight"])
    return markdown(head, lines) + (
        f"\n\nPacked without data, {bits:.1f} bits a weight with codebooks. Measured on {first['device']}; {first['threads']} "
        f"threads; torch {first['torch']}; {first['timestamp'][:10]}."
    )


ENCODER_BITS = (2.1, 2.25, 2.5, 3.0, 3.25, 4.0)
SQUARE = [(4096, 4096)]
TABLES: dict[str, Callable[[], str]] = {
    "readme-speed": lambda: codebook_speed("high", SQUARE, with_goals=False),
    "readme-accuracy": lambda: accuracy_table(accuracy.BUNDLED, ("CLAQ published", *accuracy.OURS), ENCODER_BITS, 4),
    "codebook-speed": lambda: codebook_speed("high", list(SHAPES)),
    "codebook-speed-fast": lambda: codebook_speed("fast", SQUARE),
    "codebook-one-token": codebook_one_token,
    "codebook-read-limit": codebook_read_limit,
    "codebook-formats": codebook_formats,
    "codebook-llama": codebook_llama,
    "sparse-bitmap-fp32": lambda: sparse_bitmap("", BASELINE),
    "sparse-bitmap-bf16": lambda: sparse_bitmap(" bf16", sparse.TORCH_BF16),
    "sparse-csr": sparse_csr,
    "sparse-24": sparse_24,
    "sparse-tokens": sparse_tokens,
    "accuracy-encoder": lambda: accuracy_table(accuracy.BUNDLED, tuple(METHODS), ENCODER_BITS, 4),
    "accuracy-causal": lambda: accuracy_table(
        "tiny_lm", tuple(m for m in METHODS if m != "RTN g128"), ENCODER_BITS, 2, percent=True
    ),
    "accuracy-experts": lambda: accuracy_table(
        "tiny_moe", ("CLAQ published", "GPTQ g128", "k-means per row", "ours"), ENCODER_BITS, 2, percent=True
    ),
    "pruning-encoder": lambda: pruning_table(accuracy.BUNDLED, 4),
    "pruning-causal": lambda: pruning_table("tiny_lm", 2),
    "low-rank": low_rank_table,
    "structured": lambda: structured_table(accuracy.BUNDLED, "5, 4, 3 of 6"),
    "structured-whisper": lambda: structured_table(whisper.BUNDLED, "{}"),
    "structured-heads": lambda: structured_table("tiny_moe", "3, 2 of 4", (0.75, 0.5), percent=True),
    "structured-speed": structured_speed_table,
    "whisper": whisper_table,
    "accuracy-whisper": lambda: accuracy_table(
        whisper.BUNDLED, [method for method in METHODS if method != accuracy.TUNED], ENCODER_BITS, 4
    ),
    "experts-prior": lambda: experts_calibration(experts_accuracy.PRIOR),
    "experts-bits": lambda: experts_calibration(experts_accuracy.SHARE),
    "experts-goal": experts_goal,
    "experts-speed-1": lambda: experts_speed(1, ZEN5),
    "experts-speed-64": lambda: experts_speed(64, ZEN5),
    "experts-speed-1-amx": lambda: experts_speed(1, "Intel"),
    "experts-speed-64-amx": lambda: experts_speed(64, "Intel"),
    "embeddings-accuracy": embeddings_accuracy,
    "embeddings-speed": embeddings_speed,
    "low-rank-speed": low_rank_speed_table,
    "streaming-ranks": lambda: streaming_table("ranks"),
    "streaming-memory": lambda: streaming_table("memory"),
    "sentences": sentences_table,
    "readme-generation": lambda: generation_table("TinyLlama-1.1B", short=True),
    "generation": lambda: generation_table("TinyLlama-1.1B"),
    "generation-ratios": lambda: generation_ratios("TinyLlama-1.1B"),
    "generation-experts": lambda: generation_table(EXPERTS, "Intel"),
    "generation-avx512": lambda: generation_table("TinyLlama-1.1B", ZEN5),
    "generation-ratios-avx512": lambda: generation_ratios("TinyLlama-1.1B", ZEN5),
    "generation-amx": lambda: generation_table("TinyLlama-1.1B", AMX),
    "generation-ratios-amx": lambda: generation_ratios("TinyLlama-1.1B", AMX),
    "generation-ratios-all-as-avx2": lambda: generation_ratios("TinyLlama-1.1B", ALL_AS_AVX2),
    "generation-ratios-amx-as-avx2": lambda: generation_ratios("TinyLlama-1.1B", AMX_AS_AVX2),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page differs")
    given = parser.parse_args(arguments)
    differ = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            differ.append(page)
            if not given.check:
                page.write_text(new, encoding="utf-8")
    for page in differ:
        print(f"{page.relative_to(ROOT)} {'differs from the CSVs' if given.check else 'written'}")
    return int(given.check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
