"""`pyllmq bench --op sparse_linear`: the sparse formats beside dense torch and torch's CSR, the goals, speed against sparsity."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmq import dispatch, layouts, operations, ops
from pyllmq.formats import BitmapWeight, PackedWeight, Sparse24CodebookWeight, Sparse24Weight
from pyllmq.operations import DEFAULT_PRECISION
from pyllmq.packing import mask_24

from .providers import (
    BASELINE,
    RIVALS,
    Layer,
    Provider,
    _always,
    _pyllmq_available,
    _pyllmq_isa,
    _torch_isa,
    copy_of_layout,
)
from .record import Row, read

OP = "sparse_linear"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
CODE_BITS = (2, 3, 4)
TORCH_BF16 = "torch bf16"
QUIET_SHARE = 0.1
"""Of the CPUs, used by other processes: at 0.46 dense torch took 7 ms in place of 3, and ratios rose by a third."""
_SUFFIX = {torch.float32: "", torch.bfloat16: " bf16"}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_CODES_TOLERANCE = 2e-4
"""What the default precision permits tables of fixed point."""


def providers() -> list[Provider]:
    """torch dense, torch CSR at each sparsity, ours."""
    dense = [provider for provider in RIVALS if provider.name in (BASELINE, TORCH_BF16)]
    rows = [*dense, *(torch_csr(sparsity) for sparsity in SPARSITIES)]
    for dtype in (torch.float32, torch.bfloat16):
        rows += [_ours(f"bitmap {s:g}", partial(pruned, s, dtype), ops.bitmap_linear, dtype) for s in SPARSITIES]
        rows.append(_ours("2:4", partial(pruned_24, dtype), ops.sparse24_linear, dtype))
    for bits in CODE_BITS:
        make = partial(coded, bits)
        ours = _ours(f"2:4 {bits} bits", make, ops.sparse24_codebook_linear, torch.float32)
        rows.append(replace(ours, tolerance=_CODES_TOLERANCE, precision=DEFAULT_PRECISION))
    return rows


def _random_mask(weight: Tensor, sparsity: float) -> Tensor:
    """What is kept does not matter to a kernel, and sorting every row by magnitude takes longer than all timings."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) >= sparsity


def pruned(sparsity: float, dtype: torch.dtype, weight: Tensor) -> BitmapWeight:
    return BitmapWeight.pack(weight, _random_mask(weight, sparsity), dtype)


def pruned_24(dtype: torch.dtype, weight: Tensor) -> Sparse24Weight:
    return Sparse24Weight.pack(weight, mask_24(weight), dtype)


def coded(bits: int, weight: Tensor) -> Sparse24CodebookWeight:
    """As k-means would, but with the codebook of the first 512 rows: exact k-means of 16 million weights takes minutes."""
    n = weight.shape[0]
    few = Sparse24CodebookWeight.from_dense(weight[:512], mask_24(weight[:512]), bits).tensors["codebook"].float()
    middles = (few[:, 1:] + few[:, :-1]) / 2
    codes = torch.searchsorted(middles, weight.T.contiguous()).to(torch.uint8).T.contiguous()
    assert codes.shape[0] == n
    return Sparse24CodebookWeight.pack(codes, mask_24(weight), few)


def _ours(
    name: str, pack: Callable[[Tensor], PackedWeight], linear: Callable[..., Tensor], dtype: torch.dtype
) -> Provider:
    def make(weight: Tensor) -> Layer:
        packed = pack(weight)
        dense = getattr(ops, linear.__name__.replace("_linear", "_dequantize"))
        return _layer(packed.operand(), packed.nbytes, linear, dtype, partial(dense, packed))

    return Provider(
        f"pyllmq {name}{_SUFFIX[dtype]}", _pyllmq_available, make, _TOLERANCE[dtype], _pyllmq_isa, most_lost=1.0
    )


def _layer(
    operand: layouts.WeightOperand,
    nbytes: int,
    linear: Callable[..., Tensor],
    dtype: torch.dtype,
    dense: Callable[[], Tensor],
) -> Layer:
    def copy() -> Layer:
        return _layer(copy_of_layout(operand), nbytes, linear, dtype, dense)

    def kernel(m: int) -> str:
        return dispatch.choose(operations.WeightProblem("packed_linear", "cpu", dtype, operand.layout, m)).name

    return Layer(lambda x: linear(x, operand), dense, copy, nbytes, dtype, kernel)


def torch_csr(sparsity: float) -> Provider:
    """torch's compressed rows in fp32, 32-bit indices where torch takes them."""

    def make(weight: Tensor) -> Layer:
        return layer((weight * _random_mask(weight, sparsity)).contiguous())

    def layer(pruned: Tensor) -> Layer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "beta state"
            wide = pruned.to_sparse_csr()
            held = torch.sparse_csr_tensor(
                wide.crow_indices().int(), wide.col_indices().int(), wide.values().clone(), wide.shape
            )
        nbytes = sum(t.nbytes for t in (held.crow_indices(), held.col_indices(), held.values()))
        return Layer(
            lambda x: F.linear(x, held),
            lambda: pruned,
            lambda: layer(pruned),
            nbytes,
            torch.float32,
            lambda m: "F.linear",
        )

    return Provider(f"torch CSR {sparsity:g}", _always, make, 1e-5, _torch_isa, most_lost=1.0)


# ---- goals ----------------------------------------------------------------------------------------------------------

GOALS = (
    *((f"pyllmq bitmap {s:g}", BASELINE, 1, goal) for s, goal in zip(SPARSITIES, (2.4, 2.6, 2.8, 3.0), strict=False)),
    *((f"pyllmq bitmap {s:g} bf16", TORCH_BF16, 1, 2.2) for s in SPARSITIES[:4]),
    ("pyllmq 2:4 bf16", TORCH_BF16, 1, 2.5),
    ("pyllmq 2:4 2 bits", BASELINE, 1, 9.0),
    ("pyllmq 2:4 4 bits", BASELINE, 1, 4.0),
    *((f"pyllmq bitmap {s:g}", f"torch CSR {s:g}", 1, 1.0) for s in SPARSITIES),
    *((f"pyllmq bitmap 0.5{suffix}", rival, m, 1.0) for m in (8, 512) for suffix, rival in (("", BASELINE), (" bf16", TORCH_BF16))),
)  # fmt: skip
"""(ours, rival in the same run, M, how many times as fast)."""


def goals_table(rows: Sequence[Row]) -> str:
    """One line for each goal that the rows allow to judge: of each instruction set the last quiet run that has both rows."""
    lines = []
    for isa, shape in dict.fromkeys((run.isa, row.shape) for run in runs_quiet_last(rows) for row in run.rows):
        for ours, rival, m, goal in GOALS:
            ratio = None
            for run in runs_quiet_last(rows):
                found = {row.provider: row.median_us for row in run.rows if (row.shape, row.m) == (shape, m)}
                if run.isa == isa and ours in found and rival in found:
                    ratio = found[rival] / found[ours]
            if ratio is not None:
                lines.append(f"{isa:<7} {shape}  M={m:<4} {ours:<24} / {rival:<15} {ratio:6.2f}  goal {goal:g}"
                             f"  {'reached' if ratio >= goal else 'MISSED'}")  # fmt: skip
    return "\n".join(lines)


@dataclass(frozen=True)
class Run:
    """Rows that were timed together; `isa` is what our kernels ran on."""

    isa: str
    rows: Sequence[Row]


def runs_quiet_last(rows: Sequence[Row]) -> list[Run]:
    """Busy ones first, the busiest before the others, then quiet ones in the order of the file: the last is the one that counts."""
    by_time: dict[str, list[Row]] = {}
    for row in rows:
        by_time.setdefault(row.timestamp, []).append(row)
    quiet_last = sorted(by_time.values(), key=lambda together: -max(together[0].others_cpu, QUIET_SHARE))
    return [Run(_isa_of(together), together) for together in quiet_last]


def _isa_of(rows: Sequence[Row]) -> str:
    return next((row.isa for row in rows if row.provider.startswith("pyllmq")), rows[0].isa)


# ---- speed against sparsity -----------------------------------------------------------------------------------------

Point = tuple[float, float, float]
"""(sparsity, times as fast as dense torch in its run, times as few bits)."""


def _points(runs: Sequence[Run], shape: tuple[int, int], rival: str, named: Sequence[tuple[float, str]]) -> list[Point]:
    """Of each provider its last quiet run counts, beside the dense row of that run."""
    found: dict[str, Point] = {}
    for run in runs:
        row_of = {row.provider: row for row in run.rows if (row.n, row.k, row.m) == (*shape, 1)}
        for sparsity, name in named:
            if name in row_of and rival in row_of:
                row, dense = row_of[name], row_of[rival]
                faster, smaller = dense.median_us / row.median_us, dense.bits_per_weight / row.bits_per_weight
                found[name] = (sparsity, faster, smaller)
    return [found[name] for _, name in named if name in found]


def draw(rows: Sequence[Row], png: Path) -> None:
    """M = 1: speed against sparsity in multiples of dense torch of the same dtype, and what the bytes alone would allow.

    A row of panels for each instruction set; what no row has is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = runs_quiet_last(rows)
    by_isa = {isa: [run for run in runs if run.isa == isa] for isa in sorted({run.isa for run in runs})}

    def bitmaps(isa: str, view: tuple[tuple[int, int], str, str]) -> list[Point]:
        shape, suffix, rival = view
        return _points(by_isa[isa], shape, rival, [(s, f"pyllmq bitmap {s:g}{suffix}") for s in SPARSITIES])

    views = [
        (shape, suffix, rival)
        for shape in dict.fromkeys((row.n, row.k) for row in rows)
        for suffix, rival in (("", BASELINE), (" bf16", TORCH_BF16))
    ]
    views = [view for view in views if any(bitmaps(isa, view) for isa in by_isa)]
    size = (4.6 * len(views), 3.4 * len(by_isa))
    figure, panels = plt.subplots(len(by_isa), len(views), figsize=size, squeeze=False)
    for isa, of_isa in zip(by_isa, panels, strict=True):
        for panel, (shape, suffix, rival) in zip(of_isa, views, strict=True):
            bitmap = bitmaps(isa, (shape, suffix, rival))
            if not bitmap:
                panel.axis("off")
                continue
            panel.plot([p[0] for p in bitmap], [p[1] for p in bitmap], "o-", color="#1b6ca8", label="bitmap")
            panel.plot([p[0] for p in bitmap], [p[2] for p in bitmap], ":", color="black", label="its bytes alone")
            for label, style, color, named in (
                ("2:4", "s", "#d1495b", [(0.5, f"pyllmq 2:4{suffix}")]),
                ("2:4 of codes", "^", "#edae49", [] if suffix else [(0.5, f"pyllmq 2:4 {b} bits") for b in CODE_BITS]),
                ("torch CSR", "x-", "#b8bcc2", [] if suffix else [(s, f"torch CSR {s:g}") for s in SPARSITIES]),
            ):
                if drawn := _points(by_isa[isa], shape, rival, named):
                    panel.plot([p[0] for p in drawn], [p[1] for p in drawn], style, color=color, label=label)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_yscale("log")
            panel.set_title(f"{isa}: N={shape[0]}, K={shape[1]}, M=1, against {rival}", fontsize=9)
            panel.set_xlabel("sparsity", fontsize=8)
            panel.tick_params(labelsize=8)
            panel.legend(fontsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        of_isa[0].set_ylabel("times as fast", fontsize=8)
    last = rows[-1]
    figure.suptitle(f"{last.op}: {last.device}, {last.threads} threads, torch {last.torch}", fontsize=9)
    figure.tight_layout()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m pyllmq.benchmarks.sparse SPARSE.csv [OUT.png]   # prints the goals, draws the plot")
    measured = read(Path(sys.argv[1]))
    print(goals_table(measured))
    if len(sys.argv) == 3:
        draw(measured, Path(sys.argv[2]))
