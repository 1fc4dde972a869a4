"""Plots, drawn only from the CSV: python -m pyllmq.benchmarks.plot results.csv speed.png."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

from .memory import READ_LIMIT
from .providers import BASELINE
from .record import Row, read

OURS, RIVAL = "#1b6ca8", "#b8bcc2"


def require_matplotlib() -> None:
    """Raises ImportError that says how to get matplotlib."""
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib, which is not installed; pip install 'pyllmq-kernels[plot]'")


def latest(rows: list[Row]) -> list[Row]:
    """The rows of the last row's device and thread count; of each case only its last run, so that ratios compare."""
    device = (rows[-1].op, rows[-1].device, rows[-1].threads)
    rows = [r for r in rows if (r.op, r.device, r.threads) == device]
    last_run = {(r.n, r.k, r.m): r.timestamp for r in rows}
    return [r for r in rows if r.timestamp == last_run[r.n, r.k, r.m]]


def draw(csv: Path, png: Path) -> None:
    """One line for each weight [N, K]: how much of the read limit each provider uses at M = 1, where the CSV says that, then a
    panel for each M with its speed as a multiple of torch fp32.

    Raises ValueError if the CSV has no rows or is no benchmark record, ImportError without matplotlib.
    """
    require_matplotlib()
    if not csv.exists():
        raise ValueError(f"{csv} does not exist; `pyllmq bench --csv {csv}` writes it")
    rows = read(csv)
    if not rows:
        raise ValueError(f"{csv} holds no rows; `pyllmq bench --csv {csv}` adds some")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = latest(rows)
    weights = list(dict.fromkeys((r.n, r.k) for r in rows))
    shares = [r for r in rows if r.m == 1 and not math.isnan(r.share_of_read_limit)]
    rows = [r for r in rows if r.provider != READ_LIMIT]
    tokens = sorted({r.m for r in rows})
    views = [(1, "share")] * bool(shares) + [(m, "ratio") for m in tokens]
    bars = max(len({r.provider for r in rows if (r.n, r.k) == weight}) for weight in weights)
    size = (4.6 * len(views), (0.28 * bars + 0.9) * len(weights) + 0.4)
    figure, panels = plt.subplots(len(weights), len(views), figsize=size, squeeze=False)
    for line, (n, k) in enumerate(weights):
        for panel, (m, what) in zip(panels[line], views, strict=True):
            case = [r for r in (shares if what == "share" else rows) if (r.n, r.k, r.m) == (n, k, m)]
            if not case:
                panel.set_axis_off()
                continue
            names = [r.provider for r in case]
            values = [r.share_of_read_limit if what == "share" else r.ratio_to_torch_fp32 for r in case]
            drawn = panel.barh(names, values, color=[OURS if name.startswith("pyllmq") else RIVAL for name in names])
            labels = [f"{value:.0%}" if what == "share" else f"{value:.2f}" for value in values]
            panel.bar_label(drawn, labels, padding=3, fontsize=8)
            panel.axvline(1, color="black", linewidth=0.8)
            panel.set_xlim(0, 1.15 * max(1, *values))
            panel.invert_yaxis()
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(f"N={n}, K={k}, M={m}", fontsize=9)
            if line == len(weights) - 1:
                label = "share of the read limit" if what == "share" else f"speed, multiple of {BASELINE}"
                panel.set_xlabel(label, fontsize=8)
    last = rows[-1]
    figure.suptitle(f"{last.op}: {last.device}, {last.threads} threads, torch {last.torch}", fontsize=9)
    figure.tight_layout()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m pyllmq.benchmarks.plot RESULTS.csv OUT.png")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
