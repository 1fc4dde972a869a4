"""The table of a GPU run, ratio to cuBLAS first. Standard library only: run_gpu.sh draws it before it knows that torch works."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BASELINE = "torch bf16"
"""The provider that calls cuBLAS in bf16."""
COPY_OP = "copy"
"""`op` of the row that holds the bandwidth of a plain copy."""

_NAMES = (
    "x cuBLAS bf16",
    "provider",
    "kernel",
    "N",
    "K",
    "M",
    "bits",
    "median us",
    "GB/s",
    "of copy",
    "of read",
    "rel. error",
)
_LEFT = ("provider", "kernel")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as text; none if the file is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def gpu_table(rows: Sequence[Mapping[str, object]], limits: Mapping[str, Any] | None = None) -> str:
    """One line per row of one run; "-" where the baseline or the copy was not measured.

    `limits` is what gpu_rates.cu measured on the same device: its memory, and instructions per clock and multiprocessor.
    """
    copies = [float(str(row["gb_per_s"])) for row in rows if row["op"] == COPY_OP]
    copy = copies[-1] if copies else None
    rows = [row for row in rows if row["op"] != COPY_OP]
    baseline = {_case(row): float(str(row["median_us"])) for row in rows if row["provider"] == BASELINE}
    lines = [list(_NAMES)]
    for row in rows:
        median, gb_per_s = float(str(row["median_us"])), float(str(row["gb_per_s"]))
        dense = baseline.get(_case(row))
        lines.append([
            "-" if dense is None else f"{dense / median:.2f}", str(row["provider"]), str(row["kernel"]),
            str(row["n"]), str(row["k"]), str(row["m"]), f"{float(str(row['bits_per_weight'])):.2f}", f"{median:.1f}",
            f"{gb_per_s:.0f}", "-" if copy is None else f"{gb_per_s / copy:.0%}",
            "-" if limits is None else f"{gb_per_s / limits['read_gb_per_s']:.0%}", f"{float(str(row['relative_error'])):.1e}",
        ])  # fmt: skip
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for i, cells in enumerate(lines):
        if i and (i == 1 or _case(rows[i - 1]) != _case(rows[i - 2])):
            text.append("")
        text.append(
            "  ".join(
                cell.ljust(w) if name in _LEFT else cell.rjust(w)
                for name, cell, w in zip(_NAMES, cells, width, strict=True)
            ).rstrip()
        )
    if copy is not None:
        text += ["", f"a copy of 1 GiB: {copy:.0f} GB/s read and written"]
    if limits is not None:
        text.append(
            f"{limits['device']}: reads {limits['read_gb_per_s']} GB/s, copies {limits['copy_gb_per_s']} GB/s; per clock and "
            "multiprocessor " + ", ".join(f"{name} {rate:g}" for name, rate in limits["per_clock_and_sm"].items())
        )
    return "\n".join(text)


def _case(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("n", "k", "m"))
