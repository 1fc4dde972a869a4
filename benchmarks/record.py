"""The record of a run: one row per provider and case, printed as a table and kept in a CSV."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch


@dataclass(frozen=True)
class Row:
    """What was measured, and on what. Times are of single calls; `n`, `k` = out_features, in_features; `m` = tokens."""

    ratio_to_torch_fp32: float
    """Time of torch's fp32 F.linear in the same run divided by this provider's: above 1 is faster."""
    op: str
    provider: str
    kernel: str
    shape: str
    n: int
    k: int
    m: int
    bits_per_weight: float
    """Everything stored for the weight."""
    activations: str
    precision: str
    """What our arithmetic may cost in accuracy; empty for others."""
    threads: int
    samples: int
    median_us: float
    p20_us: float
    p80_us: float
    gweights_per_s: float
    """n * k / time: weights passed in each call, which serves all m tokens."""
    gb_per_s: float
    """Bytes stored for the weight / time."""
    share_of_read_limit: float
    """Bytes stored for the weight / time / what a plain loop read in the same run; not a number where that was not measured."""
    relative_error: float
    """Against fp64, of the kernel alone: see providers.py."""
    others_cpu: float
    """Share of the machine's CPU time that other processes used meanwhile: above a few percent, measure again."""
    device: str
    isa: str
    torch: str
    pyllmq: str
    commit: str
    timestamp: str


HEADER = [field.name for field in fields(Row)]
_TYPES = {field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in fields(Row)}


# ---- where it was measured ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """Name and family/model numbers from /proc/cpuinfo, since clouds shorten the name; elsewhere what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)[ \t]*:[ \t]*(.+)$", text, re.MULTILINE))
    if "model name" not in found:
        return platform.processor() or platform.machine()
    family, model = found.get("cpu family", "?"), found.get("model", "?")
    return f"{found['model name']} (family {family} model {model}), {os.cpu_count()} CPUs"


@lru_cache(maxsize=1)
def git_commit() -> str:
    """Short commit of this source tree, "+changes" if tracked files differ from it; "unknown" without git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An environment inside somebody's repository must not report that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class OthersCpu:
    """How much of the machine other processes used since this object was made: what makes times noisy.

    `share()` is 0 (a quiet machine) to 1; not a number where there is no /proc/stat.
    """

    def __init__(self) -> None:
        self._begin = self._ticks()

    def share(self) -> float:
        now = self._ticks()
        if self._begin is None or now is None or now[0] <= self._begin[0]:
            return float("nan")
        total, busy, own = (after - before for after, before in zip(now, self._begin, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0)

    @staticmethod
    def _ticks() -> tuple[float, float, float] | None:
        """Of all CPUs together: ticks that passed, ticks that were used, ticks that this process and its children used."""
        try:
            passed = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")  # of ended children, too
            for process in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):  # it may end meanwhile
                    seen = process.read_text().rsplit(")", 1)[1].split()
                    own += sum(map(int, seen[11:13])) if int(seen[1]) == os.getpid() else 0
        except (OSError, ValueError):
            return None
        idle = passed[3] + passed[4]  # idle, and waiting for a disk
        return sum(passed), sum(passed) - idle, own


TORCH_ISA_VARIABLE = "ATEN_CPU_CAPABILITY"
"""Holds torch's own kernels; oneDNN's and MKL's have ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS."""


def held_to() -> str:
    """The instruction sets that our kernels and torch's may not go beyond, where the environment says so."""
    from pyllmq.backends.cpu.runtime import ISA_VARIABLE

    held = {"": os.environ.get(ISA_VARIABLE), "torch to ": os.environ.get(TORCH_ISA_VARIABLE)}
    named = [whose + isa for whose, isa in held.items() if isa]
    return f", held to {', '.join(named)}" if named else ""


def environment() -> dict[str, str]:
    """The fields of a row that are the same for a whole run, but for the ISA."""
    from pyllmq import __version__

    return {
        "device": cpu_model() + held_to(),
        "torch": torch.__version__,
        "pyllmq": __version__,
        "commit": git_commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# ---- the CSV --------------------------------------------------------------------------------------------------------


def check_header(path: Path, header: list[str] = HEADER) -> None:
    """Raises ValueError if `path` exists and was written with other columns: rows of two kinds in one file mislead."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if found != header:
        missing, other = [c for c in header if c not in found], [c for c in found if c not in header]
        raise ValueError(
            f"{path} has another header: columns missing: {missing or 'none'}, not known: {other or 'none'}"
            f"{'' if missing or other else ', the order differs'}. "
            "It comes from another version, or is no benchmark record; move it away or give another file"
        )


def append(path: Path, rows: Sequence[Any], header: list[str] = HEADER) -> None:
    """Add `rows` to the CSV, all or none: the new file is written beside it and takes its place. Folders are made."""
    check_header(path, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    if before and not before.endswith("\n"):
        raise ValueError(f"{path} does not end with a line end: its last row may be cut off; repair or move it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", newline="") as file:
            file.write(before)
            writer = csv.DictWriter(file, header, lineterminator="\n")
            if not before:
                writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


RowOf = TypeVar("RowOf")


def read_rows(path: Path, row_type: type[RowOf]) -> list[RowOf]:
    """The rows of a CSV of another dataclass, whose fields are str, int and float."""
    row_fields: Any = fields(row_type)  # type: ignore[arg-type]
    check_header(path, [field.name for field in row_fields])
    types = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in row_fields}
    with path.open(newline="") as file:
        return [row_type(**{n: types[n](v) for n, v in cells.items()}) for cells in csv.DictReader(file)]


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """The rows of a CSV. Raises ValueError if its header is another, or if a cell cannot be read."""
    check_header(path)
    rows = []
    with path.open(newline="") as file:
        for line, cells in enumerate(csv.DictReader(file), 2):
            try:
                rows.append(Row(**{name: _TYPES[name](cells[name]) for name in HEADER}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line} cannot be read ({error}); repair or move the file") from error
    return rows


# ---- the table ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """One line per row, a blank line between cases; the ratio to torch fp32 leads."""
    names = ["x torch fp32", "provider", "shape", "N", "K", "M", "bits", "median us", "p20", "p80", "Gw/s", "GB/s",
             "of read limit", "rel. error", "threads"]  # fmt: skip
    lines: list[list[str]] = []
    for row in rows:
        lines.append([
            f"{row.ratio_to_torch_fp32:.2f}", row.provider, row.shape, str(row.n), str(row.k), str(row.m),
            f"{row.bits_per_weight:.2f}", f"{row.median_us:.1f}", f"{row.p20_us:.1f}", f"{row.p80_us:.1f}",
            f"{row.gweights_per_s:.2f}", f"{row.gb_per_s:.1f}",
            "-" if math.isnan(row.share_of_read_limit) else f"{row.share_of_read_limit:.0%}",
            f"{row.relative_error:.1e}", str(row.threads),
        ])  # fmt: skip
    width = [max(map(len, column)) for column in zip(names, *lines, strict=True)]

    def draw(cells: Sequence[str]) -> str:
        sides = (str.ljust if name in ("provider", "shape") else str.rjust for name in names)
        return "  ".join(side(cell, w) for side, cell, w in zip(sides, cells, width, strict=True))

    text = [draw(names)]
    for i, row in enumerate(rows):
        if i == 0 or (row.n, row.k, row.m) != (rows[i - 1].n, rows[i - 1].k, rows[i - 1].m):
            text.append("")
        text.append(draw(lines[i]))
    return "\n".join(text)
