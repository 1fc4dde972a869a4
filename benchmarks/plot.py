"""Plots, drawn only from the CSV: python -m pyllmq.benchmarks.plot results.csv speed.png."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

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
    """One panel for each weight [N, K] and M: speed of every provider as a multiple of torch fp32.

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
    tokens = sorted({r.m for r in rows})
    bars = max(len({r.provider for r in rows if (r.n, r.k) == weight}) for weight in weights)
    figure, panels = plt.subplots(
        len(weights), len(tokens), figsize=(4.6 * len(tokens), (0.28 * bars + 0.9) * len(weights) + 0.4), squeeze=False
    )
    for line, (n, k) in enumerate(weights):
        for column, m in enumerate(tokens):
            panel = panels[line][column]
            case = [r for r in rows if (r.n, r.k, r.m) == (n, k, m)]
            if not case:
                panel.set_axis_off()
                continue
            names, ratios = [r.provider for r in case], [r.ratio_to_torch_fp32 for r in case]
            drawn = panel.barh(names, ratios, color=[OURS if name.startswith("pyllmq") else RIVAL for name in names])
            panel.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
            panel.axvline(1, color="black", linewidth=0.8)
            panel.set_xlim(0, 1.15 * max(ratios))
            panel.invert_yaxis()
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(f"N={n}, K={k}, M={m}", fontsize=9)
            if line == len(weights) - 1:
                panel.set_xlabel(f"speed, multiple of {BASELINE}", fontsize=8)
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
