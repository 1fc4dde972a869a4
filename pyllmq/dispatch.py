"""Which kernel runs: a table of rows, the first that supports the problem wins, and a refusal lists every row's reason.

Words used by every back end stand here too, since this module imports nothing of pyllmq: ``WeightOperand`` (what a kernel
reads) and ``Problem`` (what it is asked).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

CHECKPOINT = "checkpoint"
"""The layout name of tensors as a checkpoint holds them; every other layout name belongs to one back end."""

CHECKPOINT_FIELDS = (
    "column_bits",
    "codebook",
    "segment_rows",
    "outlier_row_offsets",
    "outlier_columns",
    "outlier_values",
    "row_scale",
    *(f"codes_b{bits}" for bits in range(1, 9)),
)
"""Order of the tensors of a codebook operand in the checkpoint layout; a field that does not occur is an empty tensor."""

SPARSE24, BITMAP, SPARSE24_CODEBOOK = "sparse24", "bitmap", "sparse24_codebook"
"""Layout names of the sparse formats' tensors as a checkpoint holds them; their order, absent ones empty:"""

SPARSE24_FIELDS = ("values", "positions", "scale")
BITMAP_FIELDS = ("values", "row_offsets", "mask", "columns", "scale")
SPARSE24_CODEBOOK_FIELDS = (
    "codes",
    "positions",
    "codebook",
    "outlier_row_offsets",
    "outlier_columns",
    "outlier_values",
)


PRECISIONS = ("exact", "high", "fast")
"""What a caller of a linear operation permits: "exact" errs no more than torch does in the activations' dtype, "high" has a
relative error of at most 2e-4 beyond that of the dtype, "fast" of at most 2e-2. A kernel may be more exact than asked."""

DEFAULT_PRECISION = "high"


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed: {', '.join(map(repr, PRECISIONS))}")


@dataclass(frozen=True, eq=False)
class WeightOperand:
    """A packed weight as kernels read it: `tensors`, whose meaning `layout` names, of a matrix [out_features, in_features]."""

    layout: str
    tensors: tuple[Tensor, ...]
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to do: operation, layout of the weight, device type, activation dtype, number of tokens M."""

    op: str
    layout: str
    device: str
    dtype: torch.dtype
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.op}(layout={self.layout}, device={self.device}, dtype={self.dtype}, tokens={self.tokens})"


Support = tuple[bool, str]


@dataclass(frozen=True)
class Kernel:
    """One row of the table. `because` is the measured reason for the row's place and limits."""

    op: str
    name: str
    supports: Callable[[Problem], Support]
    run: Callable[..., Any]
    because: str

    @property
    def backend(self) -> str:
        return self.name.split(".", 1)[0]


def reads(
    layout: str, then: Callable[[Problem], Support], most_tokens: int | None = None
) -> Callable[[Problem], Support]:
    """A row that reads weights of one layout, for up to so many tokens, on what `then` says."""

    def supports(problem: Problem) -> Support:
        if problem.layout != layout:
            return False, f"reads the layout {layout!r}, this weight is {problem.layout!r}"
        if most_tokens is not None and problem.tokens > most_tokens:
            return False, f"serves up to {most_tokens} tokens, here {problem.tokens}"
        return then(problem)

    return supports


class NoKernelError(RuntimeError):
    """No row of the table supports the problem; the message lists each row with its reason."""


_TABLE: list[Kernel] = []
_forced_backend: str | None = None


def register(kernel: Kernel) -> None:
    """Append a row; rows of one operation are tried in the order in which they were registered."""
    _TABLE.append(kernel)
    kernel_for.cache_clear()


def rows(op: str | None = None) -> list[Kernel]:
    return [row for row in _TABLE if op is None or row.op == op]


def forced_backend() -> str | None:
    """The back end that `use_backend` or the variable PYLLMQ_BACKEND asks for, if any."""
    return _forced_backend or os.environ.get("PYLLMQ_BACKEND") or None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block only kernels of back end `name` run, and weights packed in it get that back end's layout."""
    global _forced_backend
    known = sorted({row.backend for row in _TABLE})
    if name not in known:
        raise ValueError(f"back end {name!r} does not exist; allowed: {', '.join(known)}")
    before, _forced_backend = _forced_backend, name
    kernel_for.cache_clear()
    try:
        yield
    finally:
        _forced_backend = before
        kernel_for.cache_clear()


@lru_cache(maxsize=4096)
def kernel_for(op: str, layout: str, device: str, dtype: torch.dtype, tokens: int = 0) -> Kernel:
    """`choose` from the parts of a problem: what operations call, since making a Problem costs 1 us and this 0.2."""
    return choose(Problem(op, layout, device, dtype, tokens))


def choose(problem: Problem) -> Kernel:
    """The first row that supports `problem`. Raises NoKernelError with every row's reason if there is none."""
    reasons = []
    forced = forced_backend()
    for row in rows(problem.op):
        if forced and row.backend != forced:
            reasons.append(f"  {row.name}: back end {forced!r} was asked for (use_backend or PYLLMQ_BACKEND)")
            continue
        fits, why = row.supports(problem)
        if fits:
            return row
        reasons.append(f"  {row.name}: {why}")
    listed = "\n".join(reasons) or "  (no kernel of that name is registered)"
    raise NoKernelError(
        f"no kernel fits {problem}:\n{listed}\n"
        "`pyllmq doctor` shows which back ends work here; the back end 'reference' runs on any device with the checkpoint layout."
    )
