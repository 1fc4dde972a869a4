"""`pyllmq bench --model DIR --timeline out.png`: one token of a fused model on a time line, by timestamps in the native steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyllmq import backends

from .plot import require_matplotlib
from .record import cpu_model
from .transformers_worker import make

TOKENS = 24
LINEAR, ATTENTION, REST, PYTHON = "Linears", "attention", "rest of the steps", "Python"
COLORS = {LINEAR: "#1b6ca8", ATTENTION: "#e07b39", REST: "#7a9e4b", PYTHON: "#b8bcc2"}
_NATIVE = {"linear": LINEAR, "attention": ATTENTION, "step": REST}

Piece = tuple[str, int, int]
"""Part, begin, end: nanoseconds."""


@dataclass(frozen=True)
class TokenTime:
    """What the caller and each worker did during one token."""

    begin: int
    end: int
    caller: list[Piece]
    """From begin to end without a gap."""
    workers: dict[int, list[tuple[int, int]]]
    """When each worker had work."""

    def milliseconds(self) -> dict[str, float]:
        found = dict.fromkeys(COLORS, 0.0)
        for part, begin, end in self.caller:
            found[part] += (end - begin) / 1e6
        return found

    def idle_share(self) -> float:
        """Of the workers' time while a step or a Linear ran; 0 without workers."""
        native = sum(end - begin for part, begin, end in self.caller if part != PYTHON) * len(self.workers)
        busy = sum(end - begin for spans in self.workers.values() for begin, end in spans)
        return max(1 - busy / native, 0.0) if native else 0.0


def tokens_of(spans: Sequence[tuple[str, int, int, int]], stamps: Sequence[int]) -> list[TokenTime]:
    """Spans of `take_trace` cut at the stamps, one token between two of them. The caller is the thread that runs the steps."""
    caller = next(thread for part, thread, _, _ in spans if part in _NATIVE)
    workers = sorted({thread for part, thread, _, _ in spans if part == "work"})
    found = []
    for begin, end in zip(stamps, stamps[1:], strict=False):
        inside = [(part, b, e, thread) for part, thread, b, e in spans if begin <= b and e <= end]
        native = sorted((b, -e, _NATIVE[part]) for part, b, e, thread in inside if thread == caller and part in _NATIVE)
        found.append(
            TokenTime(
                begin,
                end,
                _without_gaps(begin, end, [(part, b, -e) for b, e, part in native]),
                {w: [(b, e) for part, b, e, thread in inside if thread == w and part == "work"] for w in workers},
            )
        )
    return found


def _without_gaps(begin: int, end: int, nested: Sequence[Piece]) -> list[Piece]:
    """Nested spans, outer ones first, as pieces side by side: each moment belongs to the innermost span, else to Python."""
    edges = sorted({begin, end, *(b for _, b, _ in nested), *(e for _, _, e in nested)})
    pieces: list[Piece] = []
    open_: list[Piece] = []
    waiting = list(nested)
    for left, right in zip(edges, edges[1:], strict=False):
        open_ = [span for span in open_ if span[2] > left]
        while waiting and waiting[0][1] <= left:
            open_.append(waiting.pop(0))
        part = open_[-1][0] if open_ else PYTHON
        if pieces and pieces[-1][0] == part and pieces[-1][2] == left:
            pieces[-1] = (part, pieces[-1][1], right)
        else:
            pieces.append((part, left, right))
    return pieces


def run_timeline(
    model: str, png: Path | str, *, bits: str = "4", precision: str = "high", context: int = 300
) -> TokenTime:
    """Trace some tokens of a fused model and draw the one of median length. Returns it; prints where its time went.

    Raises ValueError: unknown model or bits. RuntimeError: nothing of it can be fused. ImportError without matplotlib.
    """
    require_matplotlib()
    system = make(model, bits, precision, "bfloat16", "1", str(torch.get_num_threads()))
    kernels: Any = backends.cpu.runtime.kernels()
    system.decode(context, TOKENS)
    stamps: list[int] = []
    kernels.start_trace()
    try:
        system.decode(context, TOKENS, lambda: stamps.append(kernels.trace_clock()))
    finally:
        spans = kernels.take_trace()
    tokens = sorted(tokens_of(spans, stamps[2:]), key=lambda token: token.end - token.begin)
    token = tokens[len(tokens) // 2]
    whole = (token.end - token.begin) / 1e6
    what = f"{Path(model).name}, {bits} bits, {precision}, {context} tokens of context"
    print(f"{what}: {whole:.1f} ms a token (median of {len(tokens)})")
    for part, taken in token.milliseconds().items():
        print(f"  {part:18} {taken:6.2f} ms  {taken / whole:4.0%}")
    print(f"  workers were idle for {token.idle_share():.0%} of the native time")
    draw(token, Path(png), f"{Path(model).name}, {bits} bits, {precision}: {cpu_model()}")
    print(f"drawn: {png}")
    return token


def draw(token: TokenTime, png: Path, title: str) -> None:
    """A lane for the caller and one for each worker; below them the first tenth of the token, larger."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lanes = 1 + len(token.workers)
    figure, panels = plt.subplots(2, 1, figsize=(11, 2.2 + 0.7 * lanes))
    for panel, share in zip(panels, (1.0, 0.1), strict=True):
        for part, color in COLORS.items():
            pieces = [((b - token.begin) / 1e6, (e - b) / 1e6) for p, b, e in token.caller if p == part]
            label = f"{part} {token.milliseconds()[part]:.1f} ms"
            panel.broken_barh(pieces, (lanes - 1 + 0.1, 0.8), facecolors=color, label=label)
        for lane, spans in enumerate(token.workers.values()):
            pieces = [((b - token.begin) / 1e6, (e - b) / 1e6) for b, e in spans]
            panel.broken_barh(pieces, (lane + 0.1, 0.8), facecolors=COLORS[LINEAR])
        panel.set_xlim(0, share * (token.end - token.begin) / 1e6)
        panel.set_ylim(0, lanes)
        panel.set_yticks(
            [i + 0.5 for i in range(lanes)], [*(f"worker {i}" for i in range(1, lanes)), "caller"], fontsize=8
        )
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_xlabel("ms", fontsize=8)
    panels[0].legend(fontsize=7, ncols=len(COLORS), loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
    plt.close(figure)
