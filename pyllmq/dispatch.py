"""Which kernel runs: rows of a table for each operation; the first that supports the problem wins, a refusal gives every reason.

This module imports nothing of pyllmq. The operations themselves, with what their kernels take, stand in operations.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch

Support = tuple[bool, str]


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to do. Operations that choose by more than this have a type of their own (operations.py)."""

    op: str
    device: str
    """With its index where it has one, "cuda:1" say: the GPUs of a machine may differ."""
    dtype: torch.dtype

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.op}({', '.join(f'{f.name}={getattr(self, f.name)}' for f in fields(self)[1:])})"


P = TypeVar("P", bound=Problem)
Run = TypeVar("Run", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel(Generic[P, Run]):
    """One row of the table. `because` is the measured reason for the row's place and limits."""

    op: str
    name: str
    order: int
    """Rows of an operation are tried by rising `order`; those of one order never support the same problem."""
    supports: Callable[[P], Support]
    run: Run
    because: str

    @property
    def backend(self) -> str:
        return self.name.split(".", 1)[0]


class NoKernelError(RuntimeError):
    """No row of the table supports the problem; the message lists each row with its reason."""


class Operation(Generic[P, Run]):
    """The rows of one operation. `Run` is the signature of its kernels, so that a type checker sees those that differ."""

    def __init__(self, name: str, problem: type[P]) -> None:
        self.name, self.problem = name, problem
        self.rows: list[Kernel[P, Run]] = []
        self.kernel_for = lru_cache(maxsize=4096)(self._kernel_for)
        """`choose` from the parts of a problem, torch.device and dtype first: making a Problem costs 1 us, this 0.2."""
        _TABLE[name] = self

    def register(self, name: str, order: int, supports: Callable[[P], Support], run: Run, because: str) -> None:
        self.rows.append(Kernel(self.name, name, order, supports, run, because))
        self.rows.sort(key=lambda row: row.order)
        clear_cache()

    def choose(self, problem: P) -> Kernel[P, Run]:
        """The first row that supports `problem`. Raises NoKernelError with every row's reason if there is none."""
        reasons = []
        forced = forced_backend()
        for row in self.rows:
            if forced and row.backend != forced:
                reasons.append(f"  {row.name}: back end {forced!r} was asked for (use_backend or PYLLMQ_BACKEND)")
                continue
            fits, why = row.supports(problem)
            if fits:
                return row
            reasons.append(f"  {row.name}: {why}")
        listed = "\n".join(reasons) or "  (no kernel is registered)"
        raise NoKernelError(
            f"no kernel fits {problem}:\n{listed}\n"
            "`pyllmq doctor` shows which back ends work here; the back end 'reference' runs on any device with checkpoint layouts."
        )

    def _kernel_for(self, device: torch.device, *parts: Hashable) -> Run:
        return self.choose(self.problem(self.name, str(device), *parts)).run  # type: ignore[arg-type]


_TABLE: dict[str, Operation[Any, Any]] = {}
changes = 0
"""How often what was chosen was forgotten: who keeps a choice compares."""
_forced_backend: str | None = None


def rows(op: str | None = None) -> list[Kernel[Any, Any]]:
    """Of one operation, or of all."""
    return [row for name, operation in _TABLE.items() for row in operation.rows if op in (None, name)]


def choose(problem: Problem) -> Kernel[Any, Any]:
    """The row that serves `problem`. Raises NoKernelError with every row's reason, and for an operation that does not exist."""
    if problem.op not in _TABLE:
        raise NoKernelError(f"there is no operation {problem.op!r}; there are: {', '.join(_TABLE)}")
    return _TABLE[problem.op].choose(problem)


def clear_cache() -> None:
    """Forget what was chosen: after a change of what back ends say of themselves."""
    global changes
    changes += 1
    for operation in _TABLE.values():
        operation.kernel_for.cache_clear()


def forced_backend() -> str | None:
    """The back end that `use_backend` or the variable PYLLMQ_BACKEND asks for, if any."""
    return _forced_backend or os.environ.get("PYLLMQ_BACKEND") or None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block only kernels of back end `name` run, and weights packed in it get that back end's layout."""
    global _forced_backend
    known = sorted({row.backend for row in rows()})
    if name not in known:
        raise ValueError(f"back end {name!r} does not exist; allowed: {', '.join(known)}")
    before, _forced_backend = _forced_backend, name
    clear_cache()
    try:
        yield
    finally:
        _forced_backend = before
        clear_cache()


@contextmanager
def plain_defaults() -> Iterator[None]:
    """torch's defaults as nobody changed them: float32, on the CPU. Loaders change both for a while."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # Where nothing changes it is left alone: it costs 1 us at every call of torch.
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
