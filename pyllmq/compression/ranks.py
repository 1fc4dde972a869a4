"""The processes of one job, started by torchrun: each has a share of the calibration data and of the work.

Everything goes over torch.distributed. With one process nothing is sent, and nothing of it need be there.
"""

from __future__ import annotations

import heapq
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

PATIENCE = timedelta(hours=24)
"""For how long a process waits for the others: the k-means of one large Linear may take an hour on one of them. A process that
died is noticed at once, by its closed connection."""


class Ranks:
    """This process among `size`. `Ranks()` is alone."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Is this the process that writes and prints?"""
        return self.rank == 0

    # ---- sharing out -----------------------------------------------------------------------------------------------

    def share(self, items: Sequence[Value]) -> list[Value]:
        """Every `size`-th item, from the `rank`-th on."""
        return list(items[self.rank :: self.size])

    def interleaved(self, shares: Sequence[Sequence[Value]]) -> list[Value]:
        """The inverse of `share`, of what all processes have."""
        total = sum(map(len, shares))
        return [shares[i % self.size][i // self.size] for i in range(total)]

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """name -> rank: falling by cost, each to the process that has the least so far; alike in all processes."""
        loads = [(0.0, rank) for rank in range(self.size)]
        found = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            load, rank = heapq.heappop(loads)
            found[name] = rank
            heapq.heappush(loads, (load + costs[name], rank))
        return found

    def mine(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the weights that this process works on."""
        owners = self.owners({name: weight.numel() for name, weight in weights.items()})
        return {name: weight for name, weight in weights.items() if owners[name] == self.rank}

    def slice_of(self, length: int) -> slice:
        """This process's part of so many things in a row."""
        return slice(length * self.rank // self.size, length * (self.rank + 1) // self.size)

    # ---- bringing together -----------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            self._run(lambda: torch.distributed.all_reduce(tensor))
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """What each process gave, in the order of their ranks; anything that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._run(lambda: torch.distributed.all_gather_object(found, value))
        return found

    def merge(self, mine: Mapping[str, Value], order: Sequence[str]) -> dict[str, Value]:
        """What all processes have, by name; each name comes from one of them."""
        merged: dict[str, Value] = {}
        for part in self.gather(dict(mine)):
            merged |= part
        return {name: merged[name] for name in order}

    def from_first(self, value: Callable[[], Value]) -> Value:
        """What `value` gives in the first process. An error there is raised in all."""
        if self.size == 1:
            return value()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = value()
            except Exception as error:
                found[1] = error
        self._run(lambda: torch.distributed.broadcast_object_list(found, src=0))
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _run(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise LostRankError(
                f"another process of this job ended, process {self.rank} of {self.size} cannot go on ({error})"
            ) from error


ALONE = Ranks()


class LostRankError(RuntimeError):
    """Another process of the job is gone."""


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, connected: gloo for what is on the CPU, NCCL for GPUs. Alone without torchrun."""
    if not started_by_torchrun():
        yield Ranks()
        return
    backend, local = "gloo", int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
